//! The searches visit the same states every time: all of them, with nothing broken. The drop of any
//! rule from the engine is detected.
//!
//! `./test --full` searches further:
//! `cargo run --profile ci -p tests --features planted-bugs --bin search`.

use std::time::Duration;

use tests::search::frontier::{SearchLimits, search};
use tests::search::mutations::{ALONE, COLLECTIONS, REFUSED, SESSIONS, SMALL, TOKENS};
#[cfg(feature = "planted-bugs")]
use tests::search::mutations::{MUTATIONS, SESSION_MUTATIONS};
use tests::search::replication::{Replication, ReplicationBounds};
use tests::search::sessions::{SessionBounds, Sessions};

const LIMITS: SearchLimits = SearchLimits { time: Duration::from_secs(600), states: 5_000_000 };

/// One op, one failover, three stores: messages, fsyncs and reads of the record in any order. The
/// numbers change with the messages of the engine; the facts that no state is left and nothing is
/// broken do not.
#[test]
fn one_failover_is_searched_to_the_last_state() {
    let found = search(&mut Replication::new(SMALL, None), LIMITS);
    assert!(found.broken.is_none(), "{:#?}", found.broken);
    assert_eq!((found.states, found.steps, found.frontier), (405_613, 1_755_049, 0));
    for what in [
        "a deposed primary still commits",
        "a divergent tail is cut",
        "a learner is added",
        "a new primary changes the set before its barrier is committed",
        "a tail not known to be committed survives",
        "an op is acknowledged",
    ] {
        assert!(found.sometimes.contains_key(what), "never: {what}");
    }
}

/// Checks that all states are visited, by so many steps, that nothing is broken, and that each of
/// these situations has occurred.
#[track_caller]
fn check_sessions(bounds: SessionBounds, states: usize, steps: u64, happens: &[&str]) {
    let found = search(&mut Sessions::new(bounds, None), LIMITS);
    assert!(found.broken.is_none(), "{:#?}", found.broken);
    assert_eq!((found.states, found.steps, found.frontier), (states, steps, 0));
    for what in happens {
        assert!(found.sometimes.contains_key(what), "never: {what}");
    }
}

/// One gateway, one op, one failover. The key may be lost and the session collected, the connection
/// may be cut, and the deadline may pass.
#[test]
fn a_lost_session_is_searched_to_the_last_state() {
    let happens = [
        "a batch of a collected session comes",
        "a client receives unknown",
        "a deposed primary still commits",
        "a message arrives after its connection was cut",
        "a primary refuses a batch",
        "a session is given up",
        "an answer is lost",
        "an op is acknowledged",
        "an uncommitted tail is lost in a failover",
        "an uncommitted tail survives a failover",
        "sessions expire",
    ];
    check_sessions(SESSIONS, 845_983, 3_478_564, &happens);
}

/// Two gateways whose sessions are both lost and collected, by lists that arrive late and out of
/// order.
#[test]
fn two_collections_are_searched_to_the_last_state() {
    let happens = [
        "a batch of a collected session comes",
        "a collection is ordered",
        "a collection older than the newest is ordered",
        "a session is given up",
        "sessions expire",
    ];
    check_sessions(COLLECTIONS, 186_408, 714_915, &happens);
}

/// One gateway, two ops, one failover, one cut, and a disk that is full for a while: batches are
/// refused, and may then be reported as not applied.
#[test]
fn refusals_are_searched_to_the_last_state() {
    let happens = [
        "a client receives not-applied",
        "a message arrives after its connection was cut",
        "an answer is lost",
        "an uncommitted tail survives a failover",
    ];
    check_sessions(REFUSED, 84_031, 234_510, &happens);
}

/// One request and its retry under one token, through two gateways, over a failover and the expiry
/// of the token.
#[test]
fn a_retry_is_searched_to_the_last_state() {
    let happens = [
        "a client receives token-too-old",
        "a client receives the earlier result",
        "a client retries through another gateway",
        "an expiry is ordered",
        "an uncommitted tail survives a failover",
    ];
    check_sessions(TOKENS, 4_198_302, 12_956_055, &happens);
}

/// Two states with equal projections do the same for every input: each state that was reached by
/// two paths is stepped in both forms.
#[test]
fn equal_projections_act_alike() {
    let mut world =
        Replication::new(ReplicationBounds { crashes: 1, ticks: 1, reads: 1, ..ALONE }, None);
    world.machines.alike = Some(0);
    let found = search(&mut world, SearchLimits { states: 100_000, ..LIMITS });
    assert!(found.broken.is_none(), "{:#?}", found.broken);
    assert!(world.machines.alike > Some(500), "too few twins: {:?}", world.machines.alike);

    let bounds = SessionBounds { epochs: 2, cuts: 1, waits: 1, ..COLLECTIONS };
    let mut world = Sessions::new(bounds, None);
    (world.primaries.alike, world.gateways.alike) = (Some(0), Some(0));
    let found = search(&mut world, SearchLimits { states: 100_000, ..LIMITS });
    assert!(found.broken.is_none(), "{:#?}", found.broken);
    let alike = (world.primaries.alike, world.gateways.alike);
    assert!(alike.0 > Some(500) && alike.1 > Some(500), "too few twins: {alike:?}");
}

#[test]
#[cfg(feature = "planted-bugs")]
fn each_mutation_yields_its_counterexample() {
    for &(bug, bounds) in MUTATIONS {
        let found = search(&mut Replication::new(bounds, Some(bug)), LIMITS);
        assert!(found.broken.is_some(), "{bug:?} went unnoticed in {} states", found.states);
    }
    for &(bug, bounds) in SESSION_MUTATIONS {
        let found = search(&mut Sessions::new(bounds, Some(bug)), LIMITS);
        assert!(found.broken.is_some(), "{bug:?} went unnoticed in {} states", found.states);
    }
}
