//! The identity of a starting store, and whether it may run.
//!
//! A store is identified by its disk, never by its name. Each start takes a new boot number and a
//! new *nonce*, writes both into the log, and then *claims* the store's record in etcd with a
//! compare-and-set:
//!
//! ```text
//!   read record ──▶ next_step: Claim ──▶ log, fsync, CAS ──▶ read record ──▶ next_step: Serve
//! ```
//!
//! The log comes first, etcd second: a crash between the two leaves a nonce that only the log has,
//! and the next start is recognised by the nonce before. The other way round it would leave a nonce
//! that no disk has, and the store would be refused for ever. A copy of the folder has the same
//! nonces: the first of the two that starts changes the nonce in etcd, and the other does not have
//! the new one.
//!
//! A name belongs to one store: `name/{name}` contains its id, and a claim writes it in the same
//! transaction, so of two starts that want one name only the first gets it. A store that takes the
//! name of another, whether it starts on an empty folder or with data, gives that other store up.
//! So it needs the consent of an operator (`--replace`): otherwise the empty folder below a data
//! volume that was not mounted at one boot would replace that volume. The consent applies to the
//! store that had the name when the start began.
//!
//! A store that was given up is taken back if its disk returns and some shard has it as a trusted
//! member: then everything acknowledged there is on its disk.
//!
//! A claim whose process died *may still take effect*. So the log keeps every nonce that was
//! claimed over the present record, not only the last: the next start may read any of them there.
//! Once the record has changed, claims over its former value can't succeed any more, and are
//! dropped.

use crate::ids::{Boot, StoreId};
use crate::planted::Planted;
use crate::records::{StoreRecord, StoreStatus};
use crate::shard_record::ShardRecord;
use crate::store::log::{CLAIMS_MAX, Identity};

/// One start of one store: a state machine that decides after each read of etcd what to do next.
#[derive(Clone, Debug)]
pub struct Start {
    cluster: u128,
    store: StoreId,
    request: NameRequest,
    suspect: bool,
    /// The identity in the log, with what this boot has written.
    known: Option<Identity>,
    /// True if the last claim of `known` is of this boot.
    claimed: bool,
    /// The state at the first read of etcd; `None` before it.
    first: Option<FirstRead>,
    planted: Option<Planted>,
}

/// The state of the name at the first read of etcd.
#[derive(Clone, Copy, Debug)]
struct FirstRead {
    /// The other store that had the name.
    holder: Option<StoreId>,
    /// True if this store had the name before.
    had_it: bool,
}

/// The name that the operator gives to the store.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NameRequest {
    /// The name.
    pub name: String,
    /// True to replace the store that has the name, if it does not run.
    pub replace: bool,
}

/// The state of etcd, read after the key of the previous boot was gone.
#[derive(Clone, Copy, Debug, Default)]
pub struct EtcdState<'a> {
    /// The store's own record.
    pub record: Option<&'a StoreRecord>,
    /// The store that has the name, if it is another one.
    pub holder: Option<&'a NameHolder>,
    /// True if the store [is a trusted member](is_trusted_member), read later than the record. It
    /// matters for a store that was given up.
    pub trusted_member: bool,
}

/// Another store that has the name, as etcd shows it.
#[derive(Clone, Debug)]
pub struct NameHolder {
    /// The store.
    pub store: StoreId,
    /// The record of that store.
    pub record: StoreRecord,
    /// True if a process answers a probe as this store.
    pub answers: bool,
    /// True if the store [is a trusted member](is_trusted_member).
    pub trusted_member: bool,
}

/// The next step of a start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum StartStep {
    /// The claim of this boot is in etcd: the process may register and serve, if the records are
    /// unchanged when it registers. The copies of a suspect store must not be promoted.
    Serve {
        /// The boot number that was claimed.
        boot: Boot,
        /// The nonce that was claimed.
        nonce: u128,
        /// True if the store is suspect.
        suspect: bool,
    },
    /// If no process answers as this store, write the claim's `log` if there is one, and wait for
    /// its fsync. Then write the rest into the record that was read (or create it), and the store
    /// into the record of the name, in one transaction that fails if a process is registered as the
    /// store that loses the name. Whatever the outcome, read the records again.
    Claim(StoreClaim),
}

/// A claim of the store's record in etcd.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoreClaim {
    /// The identity to write into the log first; `None` if it is there already.
    pub log: Option<Identity>,
    /// The boot number.
    pub boot: Boot,
    /// The nonce.
    pub nonce: u128,
    /// The status of the store.
    pub status: StoreStatus,
    /// The store that loses the name.
    pub replaces: Option<StoreId>,
}

/// The reason why this disk must not run as a store.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StartRefusal {
    /// The disk belongs to another cluster.
    OtherCluster {
        /// The cluster of the disk.
        cluster: u128,
    },
    /// Etcd had a record of this store and has none: etcd lost data.
    Forgotten,
    /// The nonce in etcd was never on this disk: the disk is older than the store, or another copy
    /// of it.
    NotOurs {
        /// The boot number in etcd.
        boot: Boot,
    },
    /// The store was given up: other stores have its copies.
    GivenUp {
        /// The status in etcd.
        status: StoreStatus,
    },
    /// Another store of this name runs.
    NameRuns {
        /// The other store.
        store: StoreId,
    },
    /// Another store of this name does not run, and the operator did not consent to its
    /// replacement.
    NameTaken {
        /// The other store.
        store: StoreId,
    },
}

/// Returns whether the store is an untainted in-sync member of one of these shards: everything
/// acknowledged there is on its disk.
pub fn is_trusted_member<'a>(
    store: StoreId,
    mut shards: impl Iterator<Item = &'a ShardRecord>,
    planted: Option<Planted>,
) -> bool {
    if Planted::NeededStoreGivenUp.is_in(planted) {
        return false;
    }
    shards.any(|record| record.isr.contains(&store) && !record.tainted.contains(&store))
}

impl Start {
    /// Creates the start of a store. `found` is the identity on the disk; a disk without one gets
    /// the id `fresh`. `suspect`: recovery found damage. Fails if the disk belongs to another
    /// cluster.
    pub fn new(
        cluster: u128,
        request: NameRequest,
        suspect: bool,
        found: Option<Identity>,
        fresh: StoreId,
    ) -> Result<Self, StartRefusal> {
        if let Some(found) = &found
            && found.cluster != cluster
        {
            return Err(StartRefusal::OtherCluster { cluster: found.cluster });
        }
        let store = found.as_ref().map_or(fresh, |found| found.store);
        Ok(Self {
            cluster,
            store,
            request,
            suspect,
            known: found,
            claimed: false,
            first: None,
            planted: None,
        })
    }

    /// Plants a bug, if the build has any.
    pub fn planted(self, planted: Option<Planted>) -> Self {
        Self { planted, ..self }
    }

    /// Returns the store that this start becomes.
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// Returns the next step after a read of etcd. `fresh` is a number that nothing else has, for
    /// the nonce if one is needed.
    pub fn next_step(
        &mut self,
        seen: EtcdState<'_>,
        fresh: u128,
    ) -> Result<StartStep, StartRefusal> {
        if let Some(record) = seen.record
            && self.holder(seen).is_none()
            && self.is_claimed(record)
        {
            let suspect = record.status == StoreStatus::Suspect;
            return Ok(StartStep::Serve { boot: record.boot, nonce: record.nonce, suspect });
        }
        self.check(seen)?;
        let replaces = self.check_name(seen)?;
        let log = self.prepare(seen.record, fresh);
        let (boot, nonce) = match &log {
            Some(identity) => (identity.boot, identity.nonce()),
            None => {
                self.known.as_ref().map(|known| (known.boot, known.nonce())).unwrap_or_default()
            }
        };
        let status = match seen.record.map(|record| record.status) {
            _ if self.suspect => StoreStatus::Suspect,
            Some(status) => status.taken_back().unwrap_or(status),
            None => StoreStatus::Active,
        };
        Ok(StartStep::Claim(StoreClaim { log, boot, nonce, status, replaces }))
    }

    /// Returns whether the record contains the claim of this boot, and the store was not given up
    /// since.
    fn is_claimed(&self, record: &StoreRecord) -> bool {
        let ours = self.known.as_ref().filter(|_| self.claimed).map(Identity::nonce);
        ours == Some(record.nonce) && !record.status.is_gone()
    }

    /// Returns the other store that has the name, if it is still its name.
    fn holder<'a>(&self, seen: EtcdState<'a>) -> Option<&'a NameHolder> {
        let has_it =
            |it: &&NameHolder| it.record.name == self.request.name && !it.record.status.is_gone();
        seen.holder.filter(has_it)
    }

    /// Checks that the record belongs to this disk.
    fn check(&self, seen: EtcdState<'_>) -> Result<(), StartRefusal> {
        let Some(record) = seen.record else {
            // First starts that ended between log and etcd left no record.
            let had_one = self.known.as_ref().is_some_and(|known| known.read_nonce.is_some());
            return if had_one { Err(StartRefusal::Forgotten) } else { Ok(()) };
        };
        let returns = seen.trusted_member && record.status.taken_back().is_some();
        match record.status {
            // A store that a recovery of etcd has given up has no nonce in etcd.
            status if status.is_gone() && !returns => Err(StartRefusal::GivenUp { status }),
            _ if self.known.as_ref().is_some_and(|known| known.knows(record.nonce)) => Ok(()),
            _ => Err(StartRefusal::NotOurs { boot: record.boot }),
        }
    }

    /// Checks that the store may have its name. Returns the store that loses it.
    fn check_name(&mut self, seen: EtcdState<'_>) -> Result<Option<StoreId>, StartRefusal> {
        let holder = self.holder(seen);
        let had_it = seen.record.is_some_and(|record| record.name == self.request.name);
        let first = FirstRead { holder: holder.map(|it| it.store), had_it };
        let first = *self.first.get_or_insert(first);
        let Some(&NameHolder { store, answers, trusted_member, .. }) = holder else {
            return Ok(None);
        };
        if answers {
            return Err(StartRefusal::NameRuns { store });
        }
        // The consent applies to the store that had the name then, not to another one that starts
        // as well.
        let replace = self.request.replace || Planted::EmptyFolderTakesName.is_in(self.planted);
        let is_meant = replace && first.holder == Some(store);
        // The store that had the name before takes it back, also from a claim that took effect
        // late, if the replacement has no data.
        match is_meant || first.had_it && !trusted_member {
            true => Ok(Some(store)),
            false => Err(StartRefusal::NameTaken { store }),
        }
    }

    /// Returns what must be in the log before the claim; `None` if it is there.
    fn prepare(&mut self, record: Option<&StoreRecord>, fresh: u128) -> Option<Identity> {
        let read_nonce = record.map(|record| record.nonce);
        let stands = self.known.as_ref().filter(|known| known.read_nonce == read_nonce);
        if self.claimed && stands.is_some() {
            return None;
        }
        let mut claims = stands.map(|known| known.claims.clone()).unwrap_or_default();
        // One boot has one nonce for all its claims.
        let ours = self.known.as_ref().filter(|_| self.claimed).map(Identity::nonce);
        claims.push(ours.unwrap_or(fresh));
        // The requests of a process that started so many starts ago have arrived or never will.
        claims.drain(..claims.len().saturating_sub(CLAIMS_MAX));
        let identity = Identity {
            cluster: self.cluster,
            store: self.store,
            boot: next_boot(self.known.as_ref(), record),
            read_nonce,
            claims,
        };
        self.known = Some(identity.clone());
        self.claimed = true;
        Some(identity)
    }
}

/// Returns a boot number above every number that etcd may have received. As long as etcd has no
/// record it is 1, however often a first start has ended before it came to etcd.
fn next_boot(known: Option<&Identity>, record: Option<&StoreRecord>) -> Boot {
    let local = known.map_or(Boot(0), |identity| identity.boot);
    record.map_or(Boot(1), |record| Boot(record.boot.max(local).0 + 1))
}

#[cfg(test)]
mod race;
#[cfg(test)]
mod tests;
