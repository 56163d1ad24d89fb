//! The rule by which a store leaves the cluster on an operator's wish.
//!
//! A store that was emptied and stopped is *retired*: no shard mentions it, so nothing depends on
//! it, and its name is free. A store that holds anything stays: an operator can't decide that data
//! are lost here (for that there is `dkc shards promote`).
//!
//! The coordinator decides by what it has probed; the command checks the same rule by what is in
//! etcd, to refuse with the reason before it asks for anything.

use std::fmt;

use crate::ids::StoreId;
use crate::planted::Planted;
use crate::shard_record::ShardRecord;

/// The removal of one store.
#[derive(Clone, Copy, Debug)]
pub struct Removal {
    /// The store.
    pub store: StoreId,
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
}

impl Removal {
    /// Returns whether the store may be retired.
    pub fn check<'a>(
        self,
        shards: impl Iterator<Item = &'a ShardRecord>,
        planted: Option<Planted>,
    ) -> Result<(), RemovalRefusal> {
        if self.runs {
            return Err(RemovalRefusal::Runs);
        }
        match shards.filter(|record| record.mentions(self.store)).count() {
            0 => Ok(()),
            _ if Planted::RemovesWhatHolds.is_in(planted) => Ok(()),
            shards => Err(RemovalRefusal::Holds { shards }),
        }
    }
}

impl fmt::Display for RemovalRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runs => f.write_str("its process runs: stop it first"),
            Self::Holds { shards } => {
                write!(f, "{shards} shards have copies there, or are to have them: drain it first")
            }
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

    #[track_caller]
    fn check(runs: bool, shards: &[ShardRecord], want: Result<(), RemovalRefusal>) {
        let removal = Removal { store: StoreId(3), runs };
        assert_eq!(removal.check(shards.iter(), None), want);
        if cfg!(feature = "planted-bugs") && matches!(want, Err(RemovalRefusal::Holds { .. })) {
            assert_eq!(removal.check(shards.iter(), Some(Planted::RemovesWhatHolds)), Ok(()));
        }
    }

    #[test]
    fn a_store_that_holds_nothing_and_is_stopped_may_leave() {
        let others = [shard(0, &[1, 2], &[4], &[1, 2, 4])];
        check(false, &others, Ok(()));
        check(true, &others, Err(RemovalRefusal::Runs));
    }

    #[test]
    fn a_store_that_holds_anything_stays() {
        for held in [
            shard(0, &[1, 2, 3], &[], &[1, 2]),
            shard(0, &[1, 2], &[3], &[1, 2]),
            shard(0, &[1, 2], &[], &[1, 2, 3]),
        ] {
            check(false, &[held], Err(RemovalRefusal::Holds { shards: 1 }));
        }
    }
}
