//! Holds new copies back when much of the cluster vanished at once.
//!
//! A rack switch that fails takes a third of the nodes and brings them back in minutes. Copying
//! what they held would load the others just when they carry everything, and all of it in vain.
//! Therefore no *new* copies are made after at least two nodes (of at least three that hold
//! anything), and more than 30 % of them, vanished within the time to live of a lease, until so
//! many have returned that the others would be no mass failure, or the hold is over. One node alone
//! is no mass failure, though it may be a third of the cluster: when a rack is back but for one
//! machine, drains and joins go on, and that machine is replaced when its own time has come.
//! (Promotions, returning members and the replacement in a frozen set are never held back: see
//! [`super::changes`].)

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::planner::PlannerLimits;
use crate::ids::{Now, StoreId};

/// The nodes whose return new copies wait for. See the module.
#[derive(Debug, Default)]
pub struct MassFailureGuard {
    /// The time since which each store that is away has been so.
    vanished: BTreeMap<StoreId, Now>,
    /// The stores that vanished together, until all of them are back.
    fallen: BTreeSet<StoreId>,
    /// Enough of them are away to hold back new copies.
    holds: bool,
    /// The end of the hold.
    until: Now,
}

impl MassFailureGuard {
    /// Takes the set of stores that are away now, out of `expected` that hold anything.
    /// `window_ms`: how close to each other their failures must lie; `hold_ms`: how long the hold
    /// lasts at most.
    pub fn observe(
        &mut self,
        now: Now,
        away: &BTreeSet<StoreId>,
        expected: usize,
        window_ms: u64,
        hold_ms: u64,
        limits: PlannerLimits,
    ) {
        self.vanished.retain(|store, _| away.contains(store));
        for &store in away {
            self.vanished.entry(store).or_insert(now);
        }
        let recent = |since: &Now| now.ms_since(*since) <= window_ms;
        let recent: BTreeSet<StoreId> =
            self.vanished.iter().filter(|(_, at)| recent(at)).map(|(&store, _)| store).collect();
        let is_mass = |stores: &BTreeSet<StoreId>| {
            let many = stores.len() > 1 && expected >= limits.guard_nodes_min;
            many && stores.len() * 100 > expected * limits.guard_percent_max
        };
        let news = recent.iter().any(|store| !self.fallen.contains(store));
        if news && is_mass(&recent) {
            self.fallen.extend(recent);
            self.until = now.plus_ms(hold_ms);
        }
        if now >= self.until || self.fallen.is_disjoint(away) {
            self.fallen.clear();
        }
        // One that comes back for a moment only does not end the hold of the others.
        self.holds = is_mass(&self.fallen.intersection(away).copied().collect());
    }

    /// Returns whether new copies are held back.
    pub fn holds(&self) -> bool {
        self.holds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: u64 = 2_000;
    const HOLD: u64 = 600_000;

    /// Each entry is a second, and the nodes that are away then, of `expected`.
    #[track_caller]
    fn check(expected: usize, seen: &[(u64, &[u128])], want: bool) {
        let mut guard = MassFailureGuard::default();
        for &(at, away) in seen {
            let away = away.iter().copied().map(StoreId).collect();
            guard.observe(
                Now(at * 1_000_000),
                &away,
                expected,
                TTL,
                HOLD,
                PlannerLimits::default(),
            );
        }
        assert_eq!(guard.holds(), want);
    }

    #[test]
    fn many_at_once_hold() {
        check(5, &[(0, &[]), (10, &[1, 2])], true);
        check(5, &[(0, &[]), (10, &[1]), (11, &[1, 2])], true);
    }

    #[test]
    fn one_by_one_or_few_do_not() {
        check(5, &[(0, &[]), (10, &[1])], false);
        check(3, &[(0, &[]), (10, &[1])], false);
        check(5, &[(0, &[]), (10, &[1]), (20, &[1, 2])], false);
        check(2, &[(0, &[]), (10, &[1, 2])], false);
    }

    #[test]
    fn ends_with_their_return_or_by_itself() {
        check(5, &[(10, &[1, 2]), (20, &[])], false);
        // Those that are left would be no mass failure.
        check(5, &[(10, &[1, 2]), (20, &[1])], false);
        check(9, &[(10, &[1, 2, 3, 4]), (20, &[1, 2, 3])], true);
        check(9, &[(10, &[1, 2, 3, 4]), (20, &[1, 2])], false);
        check(5, &[(10, &[1, 2]), (20, &[1]), (30, &[1, 2])], true);
        check(5, &[(10, &[1, 2]), (20, &[]), (30, &[1]), (40, &[1, 2])], false);
        check(5, &[(10, &[1, 2]), (609, &[1, 2])], true);
        check(5, &[(10, &[1, 2]), (610, &[1, 2])], false);
        check(5, &[(10, &[1, 2]), (610, &[1, 2]), (700, &[1, 2])], false);
    }
}
