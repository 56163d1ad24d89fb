//! Two of three storage nodes are dead: no increment can be acknowledged, and the service refuses
//! them at once. Increments in flight are unknown, refused ones are never counted, reads continue
//! where the survivor can prove them current, and everything works again when one node returns.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::cluster::http::{DEADLINE, HttpOutcome};
use tests::cluster::load::{Load, Probe, ProbeOp};
use tests::cluster::{Cluster, Signal, until};

use crate::SOON;

/// The time from the second kill until the shards are frozen (docs/design.md#frozen-shards).
const FROZEN_WITHIN: Duration = Duration::from_secs(2);
/// The limit of "at once" on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(500);

#[test]
fn two_of_three_nodes_are_dead() {
    let cluster = Cluster::start(&[]);
    cluster.wait_until_full(3);
    let before = cluster.shards().expect("a full cluster");
    let keys = cluster.key_per_shard("two");
    let load = Load::start(&cluster.gateways(), "two", &keys);
    load.wait_for_all(50, SOON);

    let second = cluster.signal("node-2", Signal::KILL);
    let third = cluster.signal("node-3", Signal::KILL);
    let dead = Instant::now();
    // The requests in flight reach their deadlines, and the probers send new ones.
    sleep(DEADLINE + Duration::from_secs(3));
    status_explains_frozen_shards(&cluster, before.len());
    let returns = Instant::now();

    cluster.start_again(&second);
    load.wait_for_all(50, SOON);
    let probes = load.stop();
    for (shard, probe) in before.iter().zip(&probes.all) {
        let survivor_led = shard.primary.as_deref() == Some("node-1");
        check(probe, survivor_led, dead, returns);
    }
    let refused = |(_, op): &(&Probe, &ProbeOp)| matches!(op.outcome, HttpOutcome::NotApplied(_));
    assert!(probes.ops().filter(refused).any(|(_, op)| !op.is_read), "no increment was refused");
    let unknown: u64 = probes.all.iter().map(|probe| probe.unknown).sum();
    assert!(unknown > 0, "no increment was in flight at the kill: the test shows nothing");
    probes.check(&cluster.gateway);

    cluster.start_again(&third);
    cluster.wait_until_full(3);
    cluster.wait_until_copies_agree(3);
}

#[track_caller]
fn check(probe: &Probe, survivor_led: bool, dead: Instant, returns: Instant) {
    let key = &probe.key;
    let after: Vec<&ProbeOp> = probe.ops.iter().filter(|op| op.done > dead).collect();
    let took = |op: &ProbeOp| op.done - op.sent;
    // The return may have saved a request in flight at the kill, but none may be given up early.
    for op in &after {
        if let HttpOutcome::Unknown(why) = &op.outcome {
            assert!(!op.is_read, "{key}: a read is unknown");
            assert_eq!(why, "deadline", "{key}: {op:?}");
            assert!(took(op) >= DEADLINE - AT_ONCE, "{key}: given up after {:?}", took(op));
        }
    }
    // These requests were sent when the shard was frozen, and answered before the return.
    let frozen = |op: &&&ProbeOp| op.sent > dead + FROZEN_WITHIN && op.sent + AT_ONCE < returns;
    let (reads, writes): (Vec<&ProbeOp>, Vec<&ProbeOp>) =
        after.iter().filter(frozen).partition(|op| op.is_read);
    assert!(
        reads.len() + writes.len() > 0,
        "{key}: no request while the shard was frozen: {after:?}"
    );
    for op in writes {
        assert!(matches!(op.outcome, HttpOutcome::NotApplied(_)), "{key}: {op:?}");
        assert!(took(op) < AT_ONCE, "{key}: refused only after {:?}: {op:?}", took(op));
    }
    for op in reads.into_iter().filter(|_| survivor_led) {
        assert_eq!(
            op.outcome,
            HttpOutcome::Applied,
            "{key}: the survivor is primary and can read: {op:?}"
        );
        assert!(took(op) < AT_ONCE, "{key}: read only after {:?}: {op:?}", took(op));
    }
}

#[track_caller]
fn status_explains_frozen_shards(cluster: &Cluster, shards: usize) {
    until(SOON, || {
        let output = cluster.dkc(&["status", "--json"]).output().expect("dkc runs");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let not_open = status["summary"]["not_open"].as_array().expect("a list");
        let named = |one: &&Value| {
            let why = one["why"].as_str().unwrap_or_default();
            let names = |node: &str| {
                why.contains(&format!("{node} is down"))
                    || why.contains(&format!("{node} does not answer"))
            };
            names("node-2") || names("node-3")
        };
        let explained = not_open.iter().filter(named).count();
        if (not_open.len(), explained) == (shards, shards) {
            Ok(())
        } else {
            Err(format!("{explained} of {shards} shards explained: {not_open:?}"))
        }
    });
}
