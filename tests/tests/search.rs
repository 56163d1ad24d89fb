//! What the searches visit is the same every time: all of it, to the last state, with nothing broken. And each rule
//! dropped from the engine is noticed.
//!
//! `./test --full` searches further: `cargo run --profile ci -p tests --features planted-bugs --bin search`.

use std::time::Duration;

use tests::search::frontier::{Limits, search};
#[cfg(feature = "planted-bugs")]
use tests::search::mutations::MUTATIONS;
use tests::search::mutations::{ALONE, SMALL};
use tests::search::replication::{Bounds, Replication};

const LIMITS: Limits = Limits { time: Duration::from_secs(600), states: 5_000_000 };

/// One op, one failover, three stores: everything that messages, fsyncs and readings of the record can do in any
/// order. The numbers move with the engine's messages; what must not move is that nothing is left and nothing broken.
#[test]
fn one_failover_is_searched_to_the_last_state() {
    let found = search(&mut Replication::new(SMALL, None), LIMITS);
    assert!(found.broken.is_none(), "{:#?}", found.broken);
    assert_eq!((found.states, found.steps, found.frontier), (202_989, 883_095, 0));
    for what in [
        "a deposed primary still commits",
        "a divergent tail is cut",
        "a learner is added",
        "a new primary changes the set before its barrier is committed",
        "a tail that nobody knew committed survives",
        "an op is acknowledged",
    ] {
        assert!(found.sometimes.contains_key(what), "never: {what}");
    }
}

/// Two states that are taken for one do the same, whatever happens to them: every state that was reached by two ways is
/// stepped in both its forms.
#[test]
fn equal_projections_act_alike() {
    let mut world = Replication::new(Bounds { crashes: 1, ticks: 1, reads: 1, ..ALONE }, None);
    world.machines.alike = Some(0);
    let found = search(&mut world, Limits { states: 100_000, ..LIMITS });
    assert!(found.broken.is_none(), "{:#?}", found.broken);
    assert!(world.machines.alike > Some(500), "too few twins: {:?}", world.machines.alike);
}

#[test]
#[cfg(feature = "planted-bugs")]
fn each_mutation_yields_its_counterexample() {
    for &(bug, bounds) in MUTATIONS {
        let found = search(&mut Replication::new(bounds, Some(bug)), LIMITS);
        assert!(found.broken.is_some(), "{bug:?} went unnoticed in {} states", found.states);
    }
}
