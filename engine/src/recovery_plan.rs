//! The plan by which a lost etcd is rebuilt from the knowledge of the stores.
//!
//! For each shard the newest record that any store knows continues, in a new epoch above everything
//! that was promised, under no primary: the coordinator promotes one in the ordinary way. That is
//! safe if no primary has acted on a record that is newer still. It is so, because
//!
//! 1. a primary acts on a record (begins to lead, stops to wait for a member, proposes to add one)
//!    only once that record is in its own log, durably; and a store deletes its copy only after the
//!    record that no longer names it;
//! 2. every in-sync member and every learner of the newest known record R has answered;
//! 3. a store that has answered has promised the new incarnation first, and follows no other etcd.
//!
//! Suppose that a primary had acted on a record above R; take the first one. If it led in the epoch
//! of R it is the primary of R, a member. If it leads in a later epoch it was promoted as a member
//! of the in-sync set, and only a primary adds to that: since R none but the primary of R, which
//! proposes learners and tainted members of the record that it has acted on, and its proposals
//! compare with R. So it is a member or a learner of R. It has answered, by 2, and knows the
//! record, by 1: R is not the newest known one. And what it does after it answered is excluded by
//! 3.
//!
//! A store that is gone for good stops the recovery as long as a newest known record names it,
//! unless an operator gives it up: [`given_up`].

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::ids::{Boot, Epoch, ShardId, StoreBoot, StoreId, Version};
use crate::message::{CopyEnd, StoreKnowledge};
use crate::planted::Planted;
use crate::records::{LossRecord, Meta, Operator, StoreRecord, StoreStatus};
use crate::shard_record::ShardRecord;

mod cover;
pub mod given_up;

/// The unused epochs of a recovery in production: more than there can be failovers of a shard of
/// which no store that answers knows anything.
pub const UNUSED_EPOCHS: u64 = 1_000_000;

/// The terms of a recovery, besides the answers of the stores.
#[derive(Clone, Debug)]
pub struct RecoveryTerms {
    /// The incarnation of the new etcd.
    pub incarnation: u32,
    /// The stores were asked to promise it. Before that a plan only shows what is missing.
    pub promised: bool,
    /// The stores that are lost for good, as the operator knows.
    pub without: BTreeSet<StoreId>,
    /// The operator.
    pub from: Operator,
    /// The number of epochs above the highest known one that stay unused: the lost etcd may have
    /// given them to processes that ended before they or a follower had made that durable.
    pub unused_epochs: u64,
    /// A bug for the tests of the tests; `None` in production.
    pub planted: Option<Planted>,
}

/// The records of a recovered etcd.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RecoveredRecords {
    /// The settings of the cluster, with the new incarnation.
    pub meta: Meta,
    /// The stores. Each has its name.
    pub stores: Vec<(StoreId, StoreRecord)>,
    /// The records of all shards.
    pub shards: Vec<ShardRecord>,
    /// The shards that may lack what was acknowledged, because stores were given up.
    pub losses: Vec<LossRecord>,
}

/// A reason why etcd can't be recovered from these answers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RecoveryRefusal {
    /// No store that has ever run has answered.
    NoStores,
    /// Two stores belong to different clusters, or to one with different settings.
    OtherCluster {
        /// The store that differs from the first one.
        store: StoreId,
    },
    /// Two processes have answered as the same store.
    SameStore {
        /// The store.
        store: StoreId,
    },
    /// Two stores have the same name: one of them was replaced.
    SameName {
        /// The name.
        name: String,
        /// The stores.
        stores: [StoreId; 2],
    },
    /// The store may have forgotten what it knew.
    Damaged {
        /// The store.
        store: StoreId,
    },
    /// The promise of the new incarnation is not durable yet.
    NotPromised {
        /// The store.
        store: StoreId,
    },
    /// Stores know two different records of one number: they have followed two etcds.
    TwoHistories {
        /// The shard.
        shard: ShardId,
    },
    /// No store that has answered knows these shards.
    UnknownShards {
        /// The first of the shards.
        first: ShardId,
        /// The number of the shards.
        shards: usize,
    },
    /// A store that is to be given up has answered.
    NotLost {
        /// The store.
        store: StoreId,
    },
    /// No record names a store that is to be given up.
    NotNamed {
        /// The store.
        store: StoreId,
    },
    /// Without the stores that are to be given up there is no copy of these shards that may lead.
    NoCopy {
        /// The first of the shards.
        first: ShardId,
        /// The number of the shards.
        shards: usize,
    },
    /// A store that has not answered may know something newer about these shards.
    MissingStore {
        /// The store.
        store: StoreId,
        /// The first of the shards.
        first: ShardId,
        /// The number of the shards.
        shards: usize,
    },
}

impl fmt::Display for RecoveryRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoStores => write!(f, "no store has answered that ever was part of a cluster"),
            Self::OtherCluster { store } => {
                write!(f, "store {store} belongs to another cluster, or has other settings")
            }
            Self::SameStore { store } => write!(
                f,
                "two processes have answered as store {store}: a folder was copied, or two of the \
                 addresses lead to one process"
            ),
            Self::SameName { name, stores: [one, other] } => write!(
                f,
                "stores {one} and {other} both have the name {name:?}: one was replaced. Do not \
                 name the address of that one"
            ),
            Self::Damaged { store } => write!(
                f,
                "store {store} has found damage on its disk, and may have forgotten what it knew. \
                 To do without it, stop its process, do not name its address, and give \
                 `--without {store}`"
            ),
            Self::NotPromised { store } => {
                write!(f, "store {store} has not promised the new incarnation durably")
            }
            Self::TwoHistories { shard } => write!(
                f,
                "stores know two different records of shard {shard} with one number: a coordinator \
                 has run on an etcd that was restored. Keep all folders, and open an issue"
            ),
            Self::UnknownShards { first, shards } => {
                write!(
                    f,
                    "no store that has answered has a record of {shards} shards, the first is \
                     {first}: only stores that have led a shard, or run and follow etcd, have one. \
                     Name more nodes"
                )
            }
            Self::NotLost { store } => {
                write!(
                    f,
                    "store {store} has answered, so it is not lost: do not give it as --without, \
                     or stop its process and do not name its address"
                )
            }
            Self::NotNamed { store } => write!(
                f,
                "no shard names store {store}: check the uuid. A store without copies needs no \
                 --without"
            ),
            Self::NoCopy { first, shards } => write!(
                f,
                "no store that has answered has a good copy of {shards} shards, the first is \
                 {first}"
            ),
            Self::MissingStore { store, first, shards } => write!(
                f,
                "store {store} has not answered: it is a member or a learner of {shards} shards, \
                 the first is {first}, and may know something newer about them"
            ),
        }
    }
}

/// Returns the incarnation of the new etcd: above every one that a store has followed or promised.
pub fn next_incarnation(answers: &[StoreKnowledge]) -> u32 {
    let known = answers.iter().filter_map(|answer| answer.etcd.as_ref());
    let newest = known.map(|etcd| etcd.promised.max(etcd.meta.incarnation)).max();
    newest.unwrap_or(0).saturating_add(1)
}

/// Returns the records of an etcd on these terms, or all reasons against it.
pub fn plan(
    answers: &[StoreKnowledge],
    terms: &RecoveryTerms,
) -> Result<RecoveredRecords, Vec<RecoveryRefusal>> {
    let (incarnation, promised) = (terms.incarnation, terms.promised);
    let known = answers.iter().filter_map(|answer| Some((answer, answer.etcd.as_ref()?)));
    let Some(meta) = known.clone().map(|(_, etcd)| etcd.meta.clone()).next() else {
        return Err(vec![RecoveryRefusal::NoStores]);
    };
    let meta = Meta { incarnation, ..meta };
    let mut refusals = Vec::new();
    let (mut stores, mut names) = (BTreeMap::new(), BTreeMap::new());
    for (answer, etcd) in known {
        let store = answer.from.store;
        if (Meta { incarnation, ..etcd.meta.clone() }) != meta {
            refusals.push(RecoveryRefusal::OtherCluster { store });
        }
        if answer.damaged {
            refusals.push(RecoveryRefusal::Damaged { store });
        }
        if promised && !(answer.durable && etcd.promised >= incarnation) {
            refusals.push(RecoveryRefusal::NotPromised { store });
        }
        if let Some(other) = names.insert(etcd.store.name.clone(), store)
            && other != store
        {
            let (name, stores) = (etcd.store.name.clone(), [other, store]);
            refusals.push(RecoveryRefusal::SameName { name, stores });
        }
        if stores.insert(store, recovered_store(&etcd.store)).is_some() {
            refusals.push(RecoveryRefusal::SameStore { store });
        }
    }
    for &store in terms.without.iter().filter(|store| stores.contains_key(store)) {
        refusals.push(RecoveryRefusal::NotLost { store });
    }
    let known = || answers.iter().flat_map(|answer| &answer.shards);
    let named = |store| known().filter_map(|it| it.record.as_ref()).any(|it| it.mentions(store));
    for &store in terms.without.iter().filter(|&&store| !named(store)) {
        refusals.push(RecoveryRefusal::NotNamed { store });
    }
    let shards = ShardPlanner { terms, meta: &meta, stores: &stores };
    let (shards, losses) = shards.recover(answers, &mut refusals);
    if !refusals.is_empty() {
        return Err(refusals);
    }
    stores.extend(terms.without.iter().map(|&store| (store, given_up::record_of(store))));
    Ok(RecoveredRecords { meta, stores: stores.into_iter().collect(), shards, losses })
}

/// A store that is suspect stays so. An operator who was draining it has to ask again.
fn recovered_store(record: &StoreRecord) -> StoreRecord {
    let status = match record.status {
        StoreStatus::Suspect | StoreStatus::LostSuspect => StoreStatus::Suspect,
        _ => StoreStatus::Active,
    };
    StoreRecord { status, ..record.clone() }
}

/// The shards of a recovery.
struct ShardPlanner<'a> {
    terms: &'a RecoveryTerms,
    meta: &'a Meta,
    /// The stores that have answered.
    stores: &'a BTreeMap<StoreId, StoreRecord>,
}

impl ShardPlanner<'_> {
    fn recover(
        &self,
        answers: &[StoreKnowledge],
        refusals: &mut Vec<RecoveryRefusal>,
    ) -> (Vec<ShardRecord>, Vec<LossRecord>) {
        let known = newest_known(answers, refusals);
        let (covered, unknown) = cover::cover(self, known);
        let mut without_copy = Vec::new();
        let mut missing: BTreeMap<StoreId, Vec<ShardId>> = BTreeMap::new();
        let (mut recovered, mut losses) = (Vec::new(), Vec::new());
        for (record, known) in covered {
            let shard = record.shard();
            for store in self.missing(&record) {
                missing.entry(store).or_default().push(shard);
            }
            let next = self.continued(&record, known.promised);
            match given_up::without(self, &record, next, &known) {
                Some((next, loss)) => {
                    recovered.push(next);
                    losses.extend(loss);
                }
                None => without_copy.push(shard),
            }
        }
        if let Some(&first) = unknown.first() {
            refusals.push(RecoveryRefusal::UnknownShards { first, shards: unknown.len() });
        }
        for (store, shards) in missing {
            let (first, shards) = (shards[0], shards.len());
            refusals.push(RecoveryRefusal::MissingStore { store, first, shards });
        }
        if let Some(&first) = without_copy.first() {
            refusals.push(RecoveryRefusal::NoCopy { first, shards: without_copy.len() });
        }
        (recovered, losses)
    }

    /// Returns the members and learners that have not answered and are not given up.
    fn missing(&self, record: &ShardRecord) -> Vec<StoreId> {
        let needed = !Planted::RecoveredWithoutMember.is_in(self.terms.planted);
        let named = record.isr.iter().chain(&record.learners).copied();
        let is_missing = |store: &StoreId| {
            needed && !self.stores.contains_key(store) && !self.terms.without.contains(store)
        };
        named.filter(is_missing).collect()
    }

    /// The record by which the shard continues. It names a boot that no process has: no process
    /// leads in its epoch, and every store obeys the next one, which the coordinator begins.
    ///
    /// A shard that no store has led yet stays in its first epoch: only there do its members make
    /// the empty copies that it begins with. With a store that is given up that is not known.
    fn continued(&self, record: &ShardRecord, promised: Epoch) -> ShardRecord {
        let mut highest = record.epoch.max(promised);
        if Planted::PromisesNotRecovered.is_in(self.terms.planted) {
            highest = record.epoch;
        }
        let gone = |store: &StoreId| self.terms.without.contains(store);
        let is_whole = !record.isr.iter().chain(&record.learners).any(gone);
        let is_new = record.epoch == Epoch(1) && promised == Epoch(0) && is_whole;
        ShardRecord {
            epoch: if is_new {
                record.epoch
            } else {
                Epoch(highest.0 + self.terms.unused_epochs + 1)
            },
            version: Version(record.version.0 + 1),
            primary: StoreBoot { store: record.primary.store, boot: Boot(0) },
            ..record.clone()
        }
    }
}

/// The knowledge of all stores about one shard.
#[derive(Clone, Default)]
struct NewestKnown<'a> {
    promised: Epoch,
    record: Option<&'a ShardRecord>,
    copies: Vec<(StoreId, CopyEnd)>,
}

fn newest_known<'a>(
    answers: &'a [StoreKnowledge],
    refusals: &mut Vec<RecoveryRefusal>,
) -> BTreeMap<ShardId, NewestKnown<'a>> {
    let mut known: BTreeMap<ShardId, NewestKnown<'_>> = BTreeMap::new();
    let shards = answers
        .iter()
        .flat_map(|answer| answer.shards.iter().map(|shard| (answer.from.store, shard)));
    for (store, shard) in shards {
        let newest = known.entry(shard.shard).or_default();
        newest.promised = newest.promised.max(shard.promised);
        newest.copies.extend(shard.copy.map(|copy| (store, copy)));
        let Some(record) = &shard.record else { continue };
        match newest.record.map(|known| (known, known.order().cmp(&record.order()))) {
            Some((_, Ordering::Greater)) => {}
            Some((known, Ordering::Equal)) => {
                if known != record {
                    refusals.push(RecoveryRefusal::TwoHistories { shard: shard.shard });
                }
            }
            Some((_, Ordering::Less)) | None => newest.record = Some(record),
        }
    }
    known
}

/// Returns the shards of which a store knows a newer record than etcd has, or has promised a higher
/// epoch: etcd was restored from a backup, or is another one. A store that finds any must not
/// follow it.
pub fn newer_than_etcd<'a>(
    own: impl Iterator<Item = (ShardId, Epoch, Option<&'a ShardRecord>)>,
    etcd: &BTreeMap<ShardId, ShardRecord>,
) -> BTreeSet<ShardId> {
    let is_inside = |shard: ShardId| {
        let parent = etcd.range(..shard).next_back();
        parent.is_some_and(|(_, parent)| shard.0 <= parent.slots.hi)
    };
    let is_newer = |(shard, promised, record): (ShardId, Epoch, Option<&ShardRecord>)| {
        let listed = etcd.get(&shard);
        let newer = match listed {
            Some(listed) => {
                promised > listed.epoch || record.is_some_and(|own| own.order() > listed.order())
            }
            // A store promises for the right child of a split before etcd has a record of it.
            None => record.is_some() || promised > Epoch(0) && !is_inside(shard),
        };
        newer.then_some(shard)
    };
    own.filter_map(is_newer).collect()
}

#[cfg(test)]
mod tests;
