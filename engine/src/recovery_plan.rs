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
//! A store that is gone for good stops the recovery as long as a newest known record names it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::batcher::shard_map::ranges;
use crate::ids::{Boot, Epoch, ShardId, Slots, StoreBoot, StoreId, Version};
use crate::message::StoreKnowledge;
use crate::planted::Planted;
use crate::records::{Meta, StoreRecord, StoreStatus};
use crate::shard_record::ShardRecord;

/// The records of a recovered etcd.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RecoveredRecords {
    /// The settings of the cluster, with the new incarnation.
    pub meta: Meta,
    /// The stores. Each has its name.
    pub stores: Vec<(StoreId, StoreRecord)>,
    /// The records of all shards.
    pub shards: Vec<ShardRecord>,
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
                "stores {one} and {other} both have the name {name:?}: one was replaced, so leave \
                 its address out"
            ),
            Self::Damaged { store } => write!(
                f,
                "store {store} has found damage on its disk, and may have forgotten what it knew"
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
                write!(f, "no store that has answered knows {shards} shards, the first is {first}")
            }
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

/// Returns the records of an etcd of this incarnation, or all reasons against it. Before the stores
/// were asked to promise it, `promised` is false: then the plan only shows what is missing.
pub fn plan(
    answers: &[StoreKnowledge],
    incarnation: u32,
    promised: bool,
    planted: Option<Planted>,
) -> Result<RecoveredRecords, Vec<RecoveryRefusal>> {
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
    let shards = recover_shards(answers, &meta, &stores, &mut refusals, planted);
    match refusals.is_empty() {
        true => Ok(RecoveredRecords { meta, stores: stores.into_iter().collect(), shards }),
        false => Err(refusals),
    }
}

/// A store that is suspect stays so. An operator who was draining it has to ask again.
fn recovered_store(record: &StoreRecord) -> StoreRecord {
    let status = match record.status {
        StoreStatus::Suspect | StoreStatus::LostSuspect => StoreStatus::Suspect,
        _ => StoreStatus::Active,
    };
    StoreRecord { status, ..record.clone() }
}

fn recover_shards(
    answers: &[StoreKnowledge],
    meta: &Meta,
    stores: &BTreeMap<StoreId, StoreRecord>,
    refusals: &mut Vec<RecoveryRefusal>,
    planted: Option<Planted>,
) -> Vec<ShardRecord> {
    let mut known: BTreeMap<ShardId, NewestKnown<'_>> = BTreeMap::new();
    for shard in answers.iter().flat_map(|answer| &answer.shards) {
        let newest = known.entry(shard.shard).or_default();
        newest.promised = newest.promised.max(shard.promised);
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
    let mut unknown = Vec::new();
    let mut missing: BTreeMap<StoreId, Vec<ShardId>> = BTreeMap::new();
    let mut recovered = Vec::new();
    let (covered, gaps) = cover(&known, meta);
    unknown.extend(gaps);
    for (record, slots) in covered {
        let promised = known.get(&record.shard()).map_or(Epoch(0), |known| known.promised);
        let record = &ShardRecord { slots, ..record.clone() };
        for &store in record.isr.iter().chain(&record.learners) {
            let needed = !Planted::RecoveredWithoutMember.is_in(planted);
            if needed && !stores.contains_key(&store) {
                missing.entry(store).or_default().push(record.shard());
            }
        }
        recovered.push(recovered_record(record, promised, planted));
    }
    if let Some(&first) = unknown.first() {
        refusals.push(RecoveryRefusal::UnknownShards { first, shards: unknown.len() });
    }
    for (store, shards) in missing {
        let (first, shards) = (shards[0], shards.len());
        refusals.push(RecoveryRefusal::MissingStore { store, first, shards });
    }
    recovered
}

/// Returns the newest known records, each with the slots that are its own, and the shards that no
/// store knows. The two records of a split are written in one transaction: so if the record of the
/// right child is known, the parent ends before it, also where only an older record of the parent
/// is known.
fn cover<'a>(
    known: &BTreeMap<ShardId, NewestKnown<'a>>,
    meta: &Meta,
) -> (Vec<(&'a ShardRecord, Slots)>, Vec<ShardId>) {
    let mut records = known.values().filter_map(|known| known.record).peekable();
    let (mut covered, mut gaps, mut next) = (Vec::new(), Vec::new(), 0u32);
    let gap = |from: u32, to: u32| {
        let inside = |shard: &ShardId| (from..to).contains(&u32::from(shard.0));
        let mut shards: Vec<_> = ranges(meta.shards).map(Slots::shard).filter(inside).collect();
        if let (true, Ok(first)) = (from < to && shards.is_empty(), u16::try_from(from)) {
            shards.push(ShardId(first));
        }
        shards
    };
    while let Some(record) = records.next() {
        let lo = record.slots.lo;
        gaps.extend(gap(next, lo.into()));
        let ends_before = records.peek().map(|child| child.slots.lo.saturating_sub(1));
        let hi = ends_before.map_or(record.slots.hi, |end| end.min(record.slots.hi));
        covered.push((record, Slots { lo, hi }));
        next = u32::from(hi) + 1;
    }
    gaps.extend(gap(next, 1 << 16));
    (covered, gaps)
}

/// The knowledge of all stores about one shard.
#[derive(Clone, Copy, Default)]
struct NewestKnown<'a> {
    promised: Epoch,
    record: Option<&'a ShardRecord>,
}

/// The record by which the shard continues. It names a boot that no process has: no process leads
/// in its epoch, and every store obeys the next one, which the coordinator begins.
fn recovered_record(
    record: &ShardRecord,
    promised: Epoch,
    planted: Option<Planted>,
) -> ShardRecord {
    let mut highest = record.epoch.max(promised);
    if Planted::PromisesNotRecovered.is_in(planted) {
        highest = record.epoch;
    }
    ShardRecord {
        epoch: Epoch(highest.0 + 1),
        version: Version(record.version.0 + 1),
        primary: StoreBoot { store: record.primary.store, boot: Boot(0) },
        ..record.clone()
    }
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
