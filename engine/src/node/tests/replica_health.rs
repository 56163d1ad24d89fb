//! The health of the in-sync set: which members can acknowledge, what a primary does about it, and
//! what it reports.

use super::*;
use crate::message::{ReplicaHealth, ShardAvailability};

const C: StoreBoot = StoreBoot { store: StoreId(3), boot: Boot(1) };
const TO_C: Conn = Conn(4);

/// A with connections to B and C, all three registered, with this `min_in_sync`.
fn three(min_in_sync: usize) -> Bench {
    let mut bench = Bench::new(A);
    bench.node.shared.settings.min_in_sync = min_in_sync;
    for (conn, peer) in [(TO_B, B), (TO_C, C)] {
        bench.on(Event::Dialled { conn, peer });
        let copies = vec![(SHARD, CopyNo(1))];
        let message = FromFollower::Welcome { from: peer, copies };
        bench.on(Event::FromFollower { conn, message });
    }
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    bench.on(Event::PeersRegistered(vec![(A, 1), (B, 2), (C, 3)]));
    bench
}

/// One round asks the members of all shards. C, which is silent, is a member of one of them.
#[test]
fn reads_of_a_shard_do_not_wait_for_the_members_of_another_one() {
    let mut bench = three(2);
    let halves = [(Slots { lo: 0, hi: 32_767 }, B), (Slots { lo: 32_768, hi: 65_535 }, C)];
    let message = FromFollower::Copy { shard: halves[1].0.shard(), copy: CopyNo(1) };
    bench.on(Event::FromFollower { conn: TO_C, message });
    for (group, (slots, member)) in (1..).zip(halves) {
        bench.deliver(ShardRecord { slots, ..of(&record(1, 1, A), &[A, member]) });
        bench.on(Event::Durable { group });
    }
    bench.on(ack(TO_B, 1));
    bench.on(ack(TO_C, 1));
    let key_in = |slots: Slots| {
        let keys = (0u32..).map(|number| number.to_string());
        let mut counters = keys.filter_map(|key| CounterKey::new(b"ns", key.as_bytes()).ok());
        counters.find(|counter| slots.contains(counter.slot())).expect("there is no end of keys")
    };
    let mut effects = Vec::new();
    for (slots, _) in halves {
        let keys = vec![key_in(slots)];
        let message = GatewayMessage::Read { id: 9, slots, keys, max_staleness_ms: None };
        bench.node.handle(bench.now, Event::Gateway { conn: GATEWAY, message }, &mut effects);
    }
    let loads = effects.iter().filter_map(|effect| match effect {
        Effect::Load { load, .. } => Some(*load),
        _ => None,
    });
    for load in loads.collect::<Vec<_>>() {
        let event = Event::Loaded { load, values: vec![Some(42)], records: vec![] };
        bench.node.handle(bench.now, event, &mut effects);
    }
    effects.extend(bench.on(Event::TurnEnded));
    let round = last_round(&effects).expect("both are asked");
    check(bench.on(round_answered(round, &[])), &["read [42]"]);
}

/// A leads with B in sync, and C is a learner.
fn learning() -> ShardRecord {
    let isr = of(&record(1, 1, A), &[A, B]);
    ShardRecord { learners: vec![C.store], version: Version(2), ..isr }
}

fn of(record: &ShardRecord, isr: &[StoreBoot]) -> ShardRecord {
    let stores: Vec<StoreId> = isr.iter().map(|member| member.store).collect();
    ShardRecord { isr: stores.clone(), target: stores, ..record.clone() }
}

fn ack(conn: Conn, n: u64) -> Event {
    Event::FromFollower { conn, message: FromFollower::Ack { n } }
}

/// Lets time pass, in which only these peers send heartbeats.
fn pass(bench: &mut Bench, ms: u64, peers: &[Conn]) -> Vec<Effect> {
    let peers: Vec<_> = peers.iter().map(|&conn| (conn, false)).collect();
    pass_full(bench, ms, &peers)
}

/// The same, where each peer reports whether its disk is full.
fn pass_full(bench: &mut Bench, ms: u64, peers: &[(Conn, bool)]) -> Vec<Effect> {
    let mut effects = Vec::new();
    for _ in 0..ms / 100 {
        bench.now = bench.now.plus_ms(100);
        for &(conn, full) in peers {
            let message = FromFollower::Alive {
                sent: 0,
                fsync_age_ms: 0,
                full,
                wall: TimeMs(0),
                room_bytes: u64::MAX,
                digests: vec![],
            };
            effects.extend(bench.on(Event::FromFollower { conn, message }));
        }
        effects.extend(bench.on(Event::TurnEnded));
    }
    effects
}

fn proposed(effects: &[Effect]) -> Option<ShardRecord> {
    effects.iter().find_map(|effect| match effect {
        Effect::Propose { record, .. } => Some(record.clone()),
        _ => None,
    })
}

/// With a `min_in_sync` of three one member lost data, is tainted and being filled, and another
/// falls silent. When the first is whole again it is trusted, and the silent one stays: the set has
/// not become larger.
#[test]
fn a_member_that_is_trusted_again_makes_no_room() {
    let mut bench = three(3);
    let record = of(&record(1, 1, A), &[A, B, C]);
    bench.deliver(ShardRecord { tainted: vec![B.store], ..record });
    bench.on(Event::Durable { group: 1 });
    bench.on(ack(TO_C, 1));
    pass(&mut bench, 1_500, &[TO_B]);
    bench.on(Event::LeaseConfirmed);
    let next = proposed(&bench.on(ack(TO_B, 1))).expect("B is trusted again");
    assert_eq!((next.isr, next.tainted), (vec![A.store, B.store, C.store], vec![]));
}

fn leads(bench: &Bench) -> &Primary {
    bench.node.replica(SHARD).primary().expect("A leads")
}

/// A leads with B and C in sync, everything acknowledged and all of them in contact, etcd too.
fn well(min_in_sync: usize, isr: &[StoreBoot]) -> Bench {
    let mut bench = three(min_in_sync);
    bench.deliver(of(&record(1, 1, A), isr));
    bench.on(Event::LeaseConfirmed);
    bench.on(Event::Durable { group: 1 });
    bench.on(ack(TO_B, 1));
    bench.on(ack(TO_C, 1));
    assert!(leads(&bench).active);
    bench
}

fn reject(conn: Conn, n: u64, reason: Reject) -> Event {
    let message = FromFollower::Reject { n, shard: SHARD, reason };
    Event::FromFollower { conn, message }
}

fn states(effects: &[Effect]) -> Vec<ShardAvailability> {
    let of = |effect: &Effect| match effect {
        Effect::Gateway { reply: NodeReply::ShardState { state, .. }, .. } => Some(*state),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

/// At `min_in_sync`, and the other member's disk is full: it lives and answers, but it takes
/// nothing.
#[test]
fn at_the_floor_with_a_full_member_the_shard_is_frozen() {
    let mut bench = well(2, &[A, B]);
    bench.frame(1, add(1));
    bench.on(Event::Durable { group: 2 });
    // No room is made: the write is refused, tried again, and refused.
    for _ in 0..20 {
        let effects = pass(&mut bench, 100, &[TO_B]);
        let sent = effects.iter().find_map(|effect| match effect {
            Effect::ToFollower { conn: TO_B, message: ToFollower::Append { n, .. } } => Some(*n),
            _ => None,
        });
        let n = sent.unwrap_or(2);
        bench.on(reject(TO_B, n, Reject::NoSpace));
        bench.on(ack(TO_B, n));
    }
    assert!(leads(&bench).frozen);
    check(bench.frame(2, add(2)), &["Refused(Frozen)"]);
    // If its own disk is full as well, it reports that, since an operator can fix it.
    let full = bench.on(Event::DiskFull(true));
    assert_eq!(states(&full), [ShardAvailability::Open]);
    check(bench.frame(3, add(3)), &["Refused(NoSpace)"]);
    let room = bench.on(Event::DiskFull(false));
    assert_eq!(states(&room), [ShardAvailability::Frozen]);
}

/// At `min_in_sync` B is gone, and the learner C has everything, on a disk that is full: C takes
/// B's place, so that the barrier is committed and reads are answered. C does not take the place of
/// a member that has acknowledged the barrier, and whose own disk is full.
#[test]
fn at_the_floor_a_full_learner_replaces_a_member_that_is_gone() {
    for (b_is_full, want) in [(false, Some(vec![A.store, C.store])), (true, None)] {
        let mut bench = three(2);
        let isr = of(&record(1, 1, A), &[A, B]);
        bench.deliver(ShardRecord { learners: vec![C.store], ..isr });
        bench.on(Event::Durable { group: 1 });
        bench.on(ack(TO_C, 1));
        if b_is_full {
            bench.on(ack(TO_B, 1));
        }
        let mut effects = Vec::new();
        for _ in 0..15 {
            let peers =
                if b_is_full { vec![(TO_C, true), (TO_B, true)] } else { vec![(TO_C, true)] };
            effects.extend(pass_full(&mut bench, 100, &peers));
            bench.on(Event::LeaseConfirmed);
        }
        assert_eq!(proposed(&effects).map(|next| next.isr), want);
    }
}

/// The copy of C was found wrong while it was not in the record that A knew: A's proposal was not
/// answered. Then the record comes, and C counts.
#[test]
fn a_member_that_needs_a_whole_copy_is_marked_and_gets_one() {
    let mut bench = well(2, &[A, B]);
    let effects = bench.deliver(learning());
    let opening = effects.iter().find_map(|effect| match effect {
        Effect::ToFollower { conn: TO_C, message: ToFollower::Append { n, .. } } => Some(*n),
        _ => None,
    });
    let n = opening.expect("C is fed");
    let effects = bench.on(ack(TO_C, n));
    let next = proposed(&effects).expect("C has all there is");
    assert_eq!(next.isr, [A.store, B.store, C.store]);
    let proposal = effects.iter().find_map(|effect| match effect {
        Effect::Propose { proposal, .. } => Some(*proposal),
        _ => None,
    });
    bench.on(Event::Proposed { proposal: proposal.unwrap(), outcome: CasOutcome::Unknown });
    bench.frame(1, add(1));
    bench.on(reject(TO_C, n + 1, Reject::Stopped));
    bench.on(ack(TO_C, n + 1));
    bench.on(Event::Durable { group: 3 });
    let effects = bench.deliver(next.clone());
    let without = proposed(&effects).expect("C can't acknowledge");
    assert_eq!(without.isr, [A.store, B.store]);
}

/// At `min_in_sync` nothing is committed without B, whose copy is wrong: so nothing was applied
/// that a snapshot could be made of, and never would be.
#[test]
fn a_member_is_filled_though_nothing_was_ever_applied() {
    let mut bench = three(2);
    let record = of(&record(1, 1, A), &[A, B]);
    bench.deliver(record.clone());
    bench.on(Event::Durable { group: 1 });
    let next = proposed(&bench.on(reject(TO_B, 1, Reject::Stopped))).expect("B is marked");
    assert_eq!(next.tainted, [B.store]);
    let mut effects = bench.deliver(next);
    effects.extend(pass(&mut bench, 500, &[TO_B, TO_C]));
    let flush = effects.iter().find_map(|effect| match effect {
        Effect::Flush { flush, shards, .. } => Some((*flush, shards.clone())),
        _ => None,
    });
    let (flush, shards) = flush.expect("there is a record to send");
    assert_eq!(shards[0].1.applied, Position::default());
    let mut effects = bench.on(Event::Ingested { flush });
    effects.extend(pass(&mut bench, 500, &[TO_B, TO_C]));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::MeasureSnapshot { .. })));
}

/// The answer of the proposal is lost, and then C dies while etcd is away: C counts, and can't
/// leave.
#[test]
fn an_unsettled_addition_that_dies_freezes_the_shard() {
    let mut bench = well(2, &[A, B]);
    bench.deliver(learning());
    let effects = bench.on(ack(TO_C, 2));
    assert!(proposed(&effects).is_some());
    let proposal = effects.iter().find_map(|effect| match effect {
        Effect::Propose { proposal, .. } => Some(*proposal),
        _ => None,
    });
    bench.on(Event::Proposed { proposal: proposal.unwrap(), outcome: CasOutcome::Unknown });
    bench.on(Event::Closed { conn: TO_C });
    pass(&mut bench, 2_000, &[TO_B]);
    assert!(leads(&bench).frozen);
}

/// A member falls silent while etcd is away: the set is above `min_in_sync`, but the member can't
/// leave.
#[test]
fn a_member_that_cannot_leave_freezes_the_shard_above_the_floor() {
    let mut bench = well(2, &[A, B, C]);
    bench.on(Event::Closed { conn: TO_C });
    pass(&mut bench, 2_000, &[TO_B]);
    assert!(leads(&bench).frozen);
}

/// A set below `min_in_sync`, as an operator may write it: nothing commits.
#[test]
fn a_set_below_the_floor_is_frozen() {
    let mut bench = three(3);
    bench.deliver(of(&record(1, 1, A), &[A, B]));
    bench.on(Event::Durable { group: 1 });
    bench.on(ack(TO_B, 1));
    pass(&mut bench, 200, &[TO_B, TO_C]);
    assert!(leads(&bench).frozen);
}

/// The primary's own disk does not answer.
#[test]
fn a_primary_whose_disk_stands_still_is_frozen() {
    let mut bench = well(2, &[A, B]);
    bench.frame(1, add(1));
    bench.on(ack(TO_B, 2));
    pass(&mut bench, 2_000, &[TO_B]);
    assert!(leads(&bench).frozen);
    let opened = bench.on(Event::Durable { group: 2 });
    bench.now = bench.now.plus_ms(100);
    let opened = [opened, bench.on(Event::TurnEnded)].concat();
    assert_eq!(states(&opened), [ShardAvailability::Open]);
}

/// A member answers, and what it is sent stays without an ack for less than a second.
#[test]
fn a_short_pause_freezes_nothing() {
    let mut bench = well(2, &[A, B]);
    bench.frame(1, add(1));
    bench.on(Event::Durable { group: 2 });
    pass(&mut bench, 900, &[TO_B]);
    assert!(!leads(&bench).frozen);
    check(bench.on(ack(TO_B, 2)), &["applied []"]);
    assert!(!leads(&bench).frozen);
}

/// Gateways keep the state *frozen* for the connection: a primary that steps down takes it back.
#[test]
fn a_primary_that_steps_down_announces_open() {
    let mut bench = well(2, &[A, B]);
    bench.on(Event::Closed { conn: TO_B });
    let effects = pass(&mut bench, 1_500, &[TO_C]);
    assert_eq!(states(&effects), [ShardAvailability::Frozen]);
    let effects = bench.deliver(record(2, 2, B));
    assert_eq!(states(&effects), [ShardAvailability::Open]);
}

/// While etcd is away an addition would not be answered, and would count for as long: a learner's
/// death would stop writes.
#[test]
fn no_store_is_added_while_etcd_is_away() {
    let mut bench = well(2, &[A, B]);
    pass(&mut bench, 10_000, &[TO_B, TO_C]);
    bench.deliver(learning());
    assert_eq!(proposed(&bench.on(ack(TO_C, 2))), None);
    bench.on(Event::LeaseConfirmed);
    assert!(proposed(&pass(&mut bench, 100, &[TO_B, TO_C])).is_some());
}

/// The opening slice was sent, and the first answer is the ack of an older message: a copy is
/// judged by the answer to what was sent to it.
#[test]
fn a_feed_is_open_once_its_first_slice_is_acknowledged() {
    let mut bench = well(2, &[A, B]);
    bench.deliver(learning());
    // The same copy is announced again: opened a second time.
    let copy = FromFollower::Copy { shard: SHARD, copy: CopyNo(1) };
    let follower = |bench: &mut Bench| {
        bench.node.shared.shards.follower_mut(C.store, SHARD).unwrap().acked = Seq(1);
    };
    bench.on(Event::FromFollower { conn: TO_C, message: copy });
    follower(&mut bench);
    assert_eq!(proposed(&pass(&mut bench, 200, &[TO_B, TO_C])), None);
    assert!(proposed(&bench.on(ack(TO_C, 3))).is_some());
}

/// The member reports a full disk by itself: no entry is ordered in vain to detect it.
#[test]
fn a_member_that_reports_a_full_disk_is_full_until_it_reports_otherwise() {
    let mut bench = well(2, &[A, B]);
    let alive = |full| FromFollower::Alive {
        sent: 0,
        fsync_age_ms: 0,
        full,
        wall: TimeMs(0),
        room_bytes: u64::MAX,
        digests: vec![],
    };
    let reports = |bench: &mut Bench, full| {
        bench.now = bench.now.plus_ms(100);
        bench.on(Event::FromFollower { conn: TO_B, message: alive(full) })
    };
    assert_eq!(states(&reports(&mut bench, true)), [ShardAvailability::Frozen]);
    assert_eq!(bench.node.hindered_by(SHARD), [(B.store, ReplicaHealth::Full)]);
    check(bench.frame(1, add(1)), &["Refused(Frozen)"]);
    assert_eq!(states(&reports(&mut bench, false)), [ShardAvailability::Open]);
    check(bench.frame(2, add(2)), &["append 2", "send 2", "sync 2"]);
}

/// Every entry is committed before the learner has it; each of its acks is a moment late. The
/// commit waits for it once, and it is added.
#[test]
fn a_learner_that_is_always_a_moment_late_joins() {
    let mut bench = well(2, &[A, B]);
    bench.deliver(learning());
    let mut sent = BTreeMap::new();
    for (message, group) in (1..=30).zip(2..) {
        let mut effects = bench.frame(message, add(message));
        effects.extend(bench.on(Event::Durable { group }));
        for effect in &effects {
            if let Effect::ToFollower { conn, message: ToFollower::Append { n, .. } } = effect {
                sent.insert(*conn, *n);
            }
        }
        effects.extend(bench.on(ack(TO_B, sent[&TO_B])));
        bench.on(Event::LeaseConfirmed);
        effects.extend(pass(&mut bench, 100, &[TO_B, TO_C]));
        // C is one entry behind with each of its acks.
        effects.extend(bench.on(ack(TO_C, sent[&TO_C] - 1)));
        if let Some(record) = proposed(&effects) {
            assert_eq!(record.isr, [A.store, B.store, C.store]);
            return;
        }
    }
    panic!("C never joins");
}

/// A primary whose copy is wrong would send wrong entries.
#[test]
fn a_primary_whose_copy_is_wrong_sends_no_copies() {
    let mut bench = well(2, &[A, B]);
    bench.frame(1, add(1));
    bench.on(Event::Durable { group: 2 });
    bench.on(ack(TO_B, 2));
    bench.deliver(learning());
    bench.node.replica_mut(SHARD).flushed.seq = Seq(1);
    bench.node.replica_mut(SHARD).trust = crate::replica::trust::Trust::Wrong("found by a scrub");
    bench.on(reject(TO_C, 3, Reject::Stopped));
    let effects = pass(&mut bench, 200, &[TO_B, TO_C]);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::SendSnapshot { .. })));
}
