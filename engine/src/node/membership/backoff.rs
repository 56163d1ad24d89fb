//! The wait of a peer that was ejected, before it is added to an in-sync set again.

use std::collections::BTreeMap;

use crate::ids::{Boot, Now, StoreId};
use crate::node::settings::NodeTiming;

/// The wait of an ejected peer before it is added again: 1, 2, 4 … 60 s for the same process, reset
/// once it has stayed in sync for a minute. A new process does not wait.
#[derive(Clone, Debug, Default)]
pub(super) struct Backoff {
    ejected: BTreeMap<StoreId, Ejected>,
}

#[derive(Clone, Debug)]
struct Ejected {
    boot: Boot,
    wait_ms: u64,
    at: Now,
}

impl Backoff {
    /// Records that the process was ejected.
    pub(super) fn on_ejected(&mut self, store: StoreId, boot: Boot, now: Now, timing: &NodeTiming) {
        let before = self.ejected.get(&store);
        let wait_ms = match before {
            // Every shard ejects the peer at the same moment: that counts as one ejection.
            Some(before) if before.boot == boot && now.ms_since(before.at) < before.wait_ms => {
                before.wait_ms
            }
            Some(before)
                if before.boot == boot && now.ms_since(before.at) < 2 * timing.ejected_ms_max =>
            {
                (2 * before.wait_ms).min(timing.ejected_ms_max)
            }
            _ => timing.ejected_ms,
        };
        self.ejected.insert(store, Ejected { boot, wait_ms, at: now });
    }

    /// Returns whether the process may be added again.
    pub(super) fn may_return(&self, store: StoreId, boot: Boot, now: Now) -> bool {
        self.ejected.get(&store).is_none_or(|ejected| {
            ejected.boot != boot || now.ms_since(ejected.at) >= ejected.wait_ms
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: StoreId = StoreId(1);

    #[track_caller]
    fn check(ejected_s: &[u64], returns_s: u64) {
        let mut backoff = Backoff::default();
        let second = |s: u64| Now(s * 1_000_000);
        let timing = NodeTiming::default();
        ejected_s.iter().for_each(|&s| backoff.on_ejected(A, Boot(1), second(s), &timing));
        assert!(!backoff.may_return(A, Boot(1), Now(returns_s * 1_000_000 - 1)));
        assert!(backoff.may_return(A, Boot(1), second(returns_s)));
        assert!(backoff.may_return(A, Boot(2), second(0)));
    }

    #[test]
    fn waits_double_for_the_same_process() {
        check(&[10], 11);
        check(&[10, 12], 14);
        check(&[10, 12, 20], 24);
    }

    #[test]
    fn many_shards_ejecting_at_once_are_one_ejection() {
        check(&[10, 10, 10], 11);
    }

    #[test]
    fn the_wait_is_reset_after_a_long_time_in_sync() {
        check(&[10, 12, 500], 501);
    }
}
