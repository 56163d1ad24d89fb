//! The rule by which a store leaves the cluster on an operator's wish.
//!
//! A store that was emptied and stopped is *retired*: no shard mentions it, so nothing depends on
//! it, and its name is free. A store that is lost is *given up* by the same rule as one whose name
//! another store has taken: every shard that counts on its copy must be led by another copy that is
//! known to be good, since such a primary holds everything that was acknowledged. So the operator
//! decides that the machine will not return, and can't decide that data are lost: for that there is
//! `dkc shards promote`.
//!
//! The coordinator decides by what it has probed; the command checks the same rule by what is in
//! etcd, to refuse with the reason before it asks for anything.

use std::fmt;

use crate::ids::{ShardId, StoreId};
use crate::node::boot;
use crate::planted::Planted;
use crate::records::StoreStatus;
use crate::shard_record::ShardRecord;

/// The removal of one store.
#[derive(Clone, Copy, Debug)]
pub struct Removal {
    /// The store.
    pub store: StoreId,
    /// The store will not return: its copies are given up.
    pub lost: bool,
    /// A process of the store runs, or may run.
    pub runs: bool,
}

/// The reason why a store has to stay.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RemovalRefusal {
    /// A process of the store runs.
    Runs,
    /// Shards have copies on the store, or want them there.
    Holds {
        /// The number of those shards.
        shards: usize,
    },
    /// A shard counts on the store's copy, and no other good copy leads it.
    Needed {
        /// The first such shard.
        shard: ShardId,
        /// The number of such shards.
        shards: usize,
    },
}

impl Removal {
    /// The status of the store after the removal. `led_by_another`: a copy of another store that is
    /// known to be good leads the shard.
    pub fn status<'a, Shards: Iterator<Item = &'a ShardRecord>>(
        self,
        status: StoreStatus,
        shards: impl Fn() -> Shards,
        led_by_another: impl Fn(&ShardRecord) -> bool,
        planted: Option<Planted>,
    ) -> Result<StoreStatus, RemovalRefusal> {
        if self.runs {
            return Err(RemovalRefusal::Runs);
        }
        let mentions = |record: &&ShardRecord| {
            [&record.isr, &record.learners, &record.target]
                .iter()
                .any(|all| all.contains(&self.store))
        };
        let held = shards().filter(mentions).count();
        if held == 0 || Planted::RemovesWhatHolds.is_in(planted) {
            return Ok(StoreStatus::Retired);
        }
        if !self.lost {
            return Err(RemovalRefusal::Holds { shards: held });
        }
        let needed = |record: &&ShardRecord| {
            boot::is_trusted_member(self.store, std::iter::once(*record), planted)
                && !led_by_another(record)
        };
        let mut needed = shards().filter(needed);
        match needed.next() {
            Some(record) => {
                let (shard, shards) = (record.shard(), 1 + needed.count());
                Err(RemovalRefusal::Needed { shard, shards })
            }
            None => Ok(status.given_up()),
        }
    }
}

impl fmt::Display for RemovalRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runs => f.write_str("its process runs: stop it first"),
            Self::Holds { shards } => write!(
                f,
                "{shards} shards have copies there, or are to have them: drain it first; if the \
                 machine will never return, --lost gives its copies up"
            ),
            Self::Needed { shard, shards } => write!(
                f,
                "{shards} shards count on its copies and have no other good one that leads, shard \
                 {shard} among them: start the node, or another one that has a copy; if all are \
                 gone for good, `dkc shards promote` accepts the loss"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Slots;

    fn shard(lo: u16, isr: &[u128], learners: &[u128], target: &[u128]) -> ShardRecord {
        let ids = |stores: &[u128]| stores.iter().copied().map(StoreId).collect::<Vec<_>>();
        ShardRecord {
            slots: Slots { lo, hi: lo },
            isr: ids(isr),
            learners: ids(learners),
            target: ids(target),
            ..ShardRecord::default()
        }
    }

    /// Removes store 3 of these shards. The shards `led` are led by another good copy.
    #[track_caller]
    fn check(
        removal: (bool, bool),
        shards: &[ShardRecord],
        led: &[u16],
        want: Result<StoreStatus, RemovalRefusal>,
    ) {
        let (lost, runs) = removal;
        let removal = Removal { store: StoreId(3), lost, runs };
        let led = |record: &ShardRecord| led.contains(&record.shard().0);
        let status = |planted| removal.status(StoreStatus::Active, || shards.iter(), led, planted);
        assert_eq!(status(None), want);
        if cfg!(feature = "planted-bugs") && matches!(want, Err(RemovalRefusal::Holds { .. })) {
            assert_ne!(status(Some(Planted::RemovesWhatHolds)), want);
        }
    }

    #[test]
    fn a_store_that_holds_nothing_and_is_stopped_may_leave() {
        let others = [shard(0, &[1, 2], &[4], &[1, 2, 4])];
        check((false, false), &others, &[], Ok(StoreStatus::Retired));
        check((true, false), &others, &[], Ok(StoreStatus::Retired));
        check((false, true), &others, &[], Err(RemovalRefusal::Runs));
        check((true, true), &others, &[], Err(RemovalRefusal::Runs));
    }

    #[test]
    fn a_store_that_holds_anything_stays() {
        for held in [
            shard(0, &[1, 2, 3], &[], &[1, 2]),
            shard(0, &[1, 2], &[3], &[1, 2]),
            shard(0, &[1, 2], &[], &[1, 2, 3]),
        ] {
            check((false, false), &[held], &[0], Err(RemovalRefusal::Holds { shards: 1 }));
        }
    }

    #[test]
    fn a_lost_store_is_given_up_where_another_good_copy_leads() {
        let shards = [shard(0, &[1, 2, 3], &[], &[1, 2, 3]), shard(1, &[1, 3], &[], &[1, 2, 3])];
        check((true, false), &shards, &[0, 1], Ok(StoreStatus::Lost));
        let needed = |shard, shards| Err(RemovalRefusal::Needed { shard: ShardId(shard), shards });
        check((true, false), &shards, &[0], needed(1, 1));
        check((true, false), &shards, &[], needed(0, 2));
        // Nothing is counted on in a copy that is filled, or is to be filled again.
        let learner = [shard(0, &[1, 2], &[3], &[1, 2, 3])];
        check((true, false), &learner, &[], Ok(StoreStatus::Lost));
        let tainted = ShardRecord { tainted: vec![StoreId(3)], ..shards[0].clone() };
        check((true, false), &[tainted], &[], Ok(StoreStatus::Lost));
    }
}
