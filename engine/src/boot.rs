//! Who a starting store is, and whether it may run (DESIGN §6, Identity).
//!
//! A store is told by what lies on its disk, never by its name. Each start takes a new boot number and a new *nonce*,
//! writes both into the log, and then *claims* the store's record in etcd with a compare-and-set:
//!
//! ```text
//!   record read ──▶ look ──▶ Claim: log it, fsync, CAS ──▶ record read ──▶ look ──▶ Serve
//! ```
//!
//! The log first, etcd second: a crash between the two leaves a nonce that only the log knows, and the next start finds
//! itself by the one before. The other way round it would leave a nonce that no disk knows, and the store would be
//! refused for ever. A copy of the folder has the same nonces: whoever of the two starts first moves etcd on, and the
//! other does not know the new one.
//!
//! A name is one store's: `name/{name}` says whose, and a claim writes it in the same transaction, so of two starts that
//! want one name only the first can have it. A store that takes the name of another, be it an empty folder or one with
//! data, gives that other one up: so it needs an operator's word (`--replace`), or a data volume that was not mounted at
//! one boot would be replaced by the empty folder below it. The word means the store that had the name when the start began.
//!
//! A store that was given up is taken back if its disk returns and some shard still counts on its copy: then everything
//! acknowledged there is on it.
//!
//! What a newcomer gets wrong: a claim whose process died *may still come*. So the log keeps every nonce that was
//! claimed over what etcd holds, not only the last: any of them may be what the next start reads there. Once the record
//! has moved on, claims over what it held before can't succeed any more, and are forgotten.

use crate::config::ShardConfig;
use crate::ids::{Boot, StoreId};
use crate::planted::Planted;
use crate::records::{StoreRecord, StoreStatus};
use crate::store::log::{CLAIMS_MAX, Identity};

/// One start of one store. Told what etcd says each time that was read.
#[derive(Clone, Debug)]
pub struct Start {
    cluster: u128,
    store: StoreId,
    wish: Wish,
    suspect: bool,
    /// As the log has it, what this run wrote included.
    known: Option<Identity>,
    /// The last claim of `known` is this run's.
    claimed: bool,
    /// None: there was no look yet.
    first: Option<First>,
    planted: Option<Planted>,
}

/// What the first look has shown.
#[derive(Clone, Copy, Debug)]
struct First {
    /// Another store had the name.
    holder: Option<StoreId>,
    /// The store went by it before.
    had_it: bool,
}

/// What the operator wants the store to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Wish {
    pub name: String,
    /// The store that has the name, if it does not run, is to be replaced.
    pub replace: bool,
}

/// What etcd says, read after the key of the run before this one was gone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen<'a> {
    /// The store's own record.
    pub record: Option<&'a StoreRecord>,
    /// The store that the name's record names, if it is another one.
    pub holder: Option<&'a Holder>,
    /// What [`is_counted_on`] said of it, read later than the record; of interest for a store that was given up.
    pub counted_on: bool,
}

/// Another store that has a name, as etcd knows it.
#[derive(Clone, Debug)]
pub struct Holder {
    pub store: StoreId,
    pub record: StoreRecord,
    /// A process answers as this store.
    pub answers: bool,
    /// What [`is_counted_on`] said of it.
    pub counted_on: bool,
}

/// What to do next.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Step {
    /// Etcd knows this run: it may register and serve, if the records still say so when it registers. A suspect store's copies
    /// must not be promoted.
    Serve { boot: Boot, nonce: u128, suspect: bool },
    /// If no process answers as this store, write the claim's `log` if there is one, and wait for its fsync. Then put the rest
    /// into the record that was read (or make it), and the store into the name's record, in one transaction that fails if a
    /// process is registered as the store that loses the name. Whatever comes of that, read the records again.
    Claim(Claim),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Claim {
    pub log: Option<Identity>,
    pub boot: Boot,
    pub nonce: u128,
    pub status: StoreStatus,
    /// The store that loses the name.
    pub replaces: Option<StoreId>,
}

/// Why this disk must not run as a store.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// The disk belongs to another cluster.
    OtherCluster { cluster: u128 },
    /// Etcd had a record of this store and has none: it lost something.
    Forgotten,
    /// Etcd holds a nonce that this disk never knew: the disk is older than the store, or another copy of it.
    NotOurs { boot: Boot },
    /// The store was given up: others have its places.
    GivenUp { status: StoreStatus },
    /// Another store of this name runs.
    NameRuns { store: StoreId },
    /// Another store of this name does not run, and there was no word that it is to be replaced.
    NameTaken { store: StoreId },
}

/// Some shard counts on this store's copy: everything acknowledged there is on it.
pub fn is_counted_on<'a>(
    store: StoreId,
    mut shards: impl Iterator<Item = &'a ShardConfig>,
    planted: Option<Planted>,
) -> bool {
    if Planted::NeededStoreGivenUp.is_in(planted) {
        return false;
    }
    shards.any(|config| config.isr.contains(&store) && !config.tainted.contains(&store))
}

impl Start {
    /// `found`: who the disk says it is. `fresh`: who it becomes if it says nothing. `suspect`: recovery found damage.
    pub fn new(
        cluster: u128,
        wish: Wish,
        suspect: bool,
        found: Option<Identity>,
        fresh: StoreId,
    ) -> Result<Self, Refusal> {
        if let Some(found) = &found
            && found.cluster != cluster
        {
            return Err(Refusal::OtherCluster { cluster: found.cluster });
        }
        let store = found.as_ref().map_or(fresh, |found| found.store);
        Ok(Self {
            cluster,
            store,
            wish,
            suspect,
            known: found,
            claimed: false,
            first: None,
            planted: None,
        })
    }

    /// With this bug, if the build has any.
    pub fn planted(self, planted: Option<Planted>) -> Self {
        Self { planted, ..self }
    }

    pub fn store(&self) -> StoreId {
        self.store
    }

    /// Etcd was read. `fresh`: a number that nothing else has, for the nonce if one is needed.
    pub fn look(&mut self, seen: Seen<'_>, fresh: u128) -> Result<Step, Refusal> {
        if let Some(record) = seen.record
            && self.holder(seen).is_none()
            && self.is_claimed(record)
        {
            let suspect = record.status == StoreStatus::Suspect;
            return Ok(Step::Serve { boot: record.boot, nonce: record.nonce, suspect });
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
        Ok(Step::Claim(Claim { log, boot, nonce, status, replaces }))
    }

    /// Etcd knows this run, and it was not given up since.
    fn is_claimed(&self, record: &StoreRecord) -> bool {
        let ours = self.known.as_ref().filter(|_| self.claimed).map(Identity::nonce);
        ours == Some(record.nonce) && !record.status.is_gone()
    }

    /// The other store that has the name, if it still goes by it.
    fn holder<'a>(&self, seen: Seen<'a>) -> Option<&'a Holder> {
        let has_it = |it: &&Holder| it.record.name == self.wish.name && !it.record.status.is_gone();
        seen.holder.filter(has_it)
    }

    /// The record is one that this disk knows.
    fn check(&self, seen: Seen<'_>) -> Result<(), Refusal> {
        let Some(record) = seen.record else {
            // First starts that ended between log and etcd left no record.
            let had_one = self.known.as_ref().is_some_and(|known| known.over.is_some());
            return if had_one { Err(Refusal::Forgotten) } else { Ok(()) };
        };
        if !self.known.as_ref().is_some_and(|known| known.knows(record.nonce)) {
            return Err(Refusal::NotOurs { boot: record.boot });
        }
        let returns = seen.counted_on && record.status.taken_back().is_some();
        match record.status {
            status if status.is_gone() && !returns => Err(Refusal::GivenUp { status }),
            _ => Ok(()),
        }
    }

    /// Whether the store may have its name. Returns the store that loses it.
    fn check_name(&mut self, seen: Seen<'_>) -> Result<Option<StoreId>, Refusal> {
        let holder = self.holder(seen);
        let had_it = seen.record.is_some_and(|record| record.name == self.wish.name);
        let first = First { holder: holder.map(|it| it.store), had_it };
        let first = *self.first.get_or_insert(first);
        let Some(&Holder { store, answers, counted_on, .. }) = holder else { return Ok(None) };
        if answers {
            return Err(Refusal::NameRuns { store });
        }
        // The word is about the store that had the name then, not about another that starts as well.
        let replace = self.wish.replace || Planted::EmptyFolderTakesName.is_in(self.planted);
        let is_meant = replace && first.holder == Some(store);
        // What had the name before takes it back, also from a claim that came late, if nothing has come of replacing it.
        match is_meant || first.had_it && !counted_on {
            true => Ok(Some(store)),
            false => Err(Refusal::NameTaken { store }),
        }
    }

    /// What must be in the log before the claim; none if it is there.
    fn prepare(&mut self, record: Option<&StoreRecord>, fresh: u128) -> Option<Identity> {
        let over = record.map(|record| record.nonce);
        let stands = self.known.as_ref().filter(|known| known.over == over);
        if self.claimed && stands.is_some() {
            return None;
        }
        let mut claims = stands.map(|known| known.claims.clone()).unwrap_or_default();
        // One run has one nonce, over whatever it claims it.
        let ours = self.known.as_ref().filter(|_| self.claimed).map(Identity::nonce);
        claims.push(ours.unwrap_or(fresh));
        // So many starts ago: what that process sent has long arrived or never will.
        claims.drain(..claims.len().saturating_sub(CLAIMS_MAX));
        let identity = Identity {
            cluster: self.cluster,
            store: self.store,
            boot: next_boot(self.known.as_ref(), record),
            over,
            claims,
        };
        self.known = Some(identity.clone());
        self.claimed = true;
        Some(identity)
    }
}

/// Above every number that etcd may have heard of. As long as etcd has no record it is 1, however often a first start
/// has ended before it came to etcd.
fn next_boot(known: Option<&Identity>, record: Option<&StoreRecord>) -> Boot {
    let local = known.map_or(Boot(0), |identity| identity.boot);
    record.map_or(Boot(1), |record| Boot(record.boot.max(local).0 + 1))
}

#[cfg(test)]
mod race;
#[cfg(test)]
mod tests;
