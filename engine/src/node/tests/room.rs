//! Snapshots and the room for them: measured first, refused where they do not fit, tried again once
//! they do.

use super::*;
use crate::message::SnapshotOutcome;

fn announce(bench: &mut Bench, transfer: u64, bytes: u64) -> Option<SnapshotOutcome> {
    let (shard, epoch, copy) = (SHARD, Epoch(1), CopyNo(1));
    let message = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes };
    let effects = bench.on(Event::FromPrimary { conn: FROM_A, message });
    effects.iter().find_map(|effect| match effect {
        Effect::ToPrimary { message: FromFollower::Snapshot { outcome, .. }, .. } => Some(*outcome),
        _ => None,
    })
}

/// The follower has promised its primary's epoch.
fn follower() -> Bench {
    let mut bench = new_follower();
    let entries = log(&[1]);
    bench.append(1, slice(1, &entries, 0, true));
    bench
}

#[test]
fn a_copy_that_has_no_room_is_refused() {
    let mut bench = follower();
    let accepted = Some(SnapshotOutcome::Accepted);
    let refused = Some(SnapshotOutcome::NoSpace);
    assert_eq!(announce(&mut bench, 1, u64::MAX), accepted, "nothing is known of the disk");
    bench.on(Event::Room { bytes: 1_000 });
    assert_eq!(announce(&mut bench, 2, 1_001), refused);
    assert_eq!(announce(&mut bench, 3, 1_000), accepted);
    // The same snapshot once more: its primary has given up the one before.
    assert_eq!(announce(&mut bench, 4, 1_000), accepted);
    bench.on(Event::Room { bytes: 0 });
    assert_eq!(announce(&mut bench, 5, 1), refused);
}

/// The follower has entries of the shard that it can't apply, and needs a snapshot, which removes
/// them: if it refused the snapshot, the log would stay too long for ever (simulator, seed
/// 1883155431686259).
#[test]
fn a_log_that_is_too_long_takes_no_room_from_a_copy() {
    let mut bench = follower();
    bench.on(Event::Room { bytes: 1_000 });
    bench.on(Event::DiskFull(true));
    assert_eq!(announce(&mut bench, 1, 1_000), Some(SnapshotOutcome::Accepted));
}

/// Seq 1 opens epoch 1, seq 2 is a write of it, and seq 3 opens epoch 2.
fn two_epochs() -> Vec<Entry> {
    let mut entries = log(&[1]);
    for (epoch, body) in [(1, Body::Ops(add(1))), (2, Body::Barrier)] {
        let last = entries.last().map(Entry::position).unwrap();
        entries.push(Entry::after(last, Epoch(epoch), TimeMs(1), body));
    }
    entries
}

fn held(bench: &Bench) -> Seq {
    bench.node.replicas().next().expect("there is one").last.seq
}

/// All disks of a cluster are full, and all nodes were restarted: without the barrier of the new
/// primary no read would be answered until there is room. The barrier stands on the entries that
/// were in flight before.
#[test]
fn a_full_member_takes_the_barrier_of_a_new_primary_and_what_lies_below_it() {
    let mut bench = follower();
    bench.on(Event::DiskFull(true));
    let entries = two_epochs();
    bench.append(2, slice(1, &entries[..2], 1, false));
    assert_eq!(held(&bench), Seq(1), "a write of this epoch is refused");
    bench.append(3, slice(2, &entries, 1, true));
    assert_eq!(held(&bench), Seq(3));
    // In the new epoch a write is refused, too, and an entry that drops old records is taken.
    let last = entries[2].position();
    let write = Entry::after(last, Epoch(2), TimeMs(1), Body::Ops(add(2)));
    let expire = Entry::after(last, Epoch(2), TimeMs(1), Body::ExpireTokens { bucket: 1 });
    let with = |entry| [&entries[..], &[entry]].concat();
    bench.append(4, slice(2, &with(write), 3, false));
    assert_eq!(held(&bench), Seq(3));
    bench.append(5, slice(2, &with(expire), 3, true));
    assert_eq!(held(&bench), Seq(4));
}

/// Story: a primary had ordered writes on top of its barrier, which was not committed since one
/// member was away. That member returned with the barrier and a full disk. It refused the writes,
/// and with them to acknowledge the barrier: no read was answered until there was room (simulator,
/// seed 50059).
#[test]
fn a_full_member_acknowledges_the_barrier_below_what_it_refuses() {
    for held in [0, 1] {
        let mut bench = beginning();
        bench.deliver(record(1, 1, A));
        bench.frame(1, add(1));
        bench.on(Event::Durable { group: 2 });
        bench.on(Event::Closed { conn: TO_B });
        bench.on(Event::Dialled { conn: TO_B, peer: B });
        let copies = vec![(SHARD, CopyNo(1))];
        let message = FromFollower::Welcome { from: B, copies };
        let mut todo = bench.on(Event::FromFollower { conn: TO_B, message });
        let mut joined = false;
        // The member takes nothing but the barrier, at seq 1.
        for _ in 0..10 {
            for effect in std::mem::take(&mut todo) {
                let Effect::ToFollower { message: ToFollower::Append { n, slices }, .. } = effect
                else {
                    continue;
                };
                let slice = &slices[0];
                joined |= slice.prev.seq <= Seq(held);
                let refused = if !joined {
                    let applied = Position::default();
                    let barrier = bench.node.replica(SHARD).log.position(Seq(1));
                    let ends = barrier.filter(|_| held == 1).into_iter().collect();
                    Some(Reject::Mismatch { ends, applied })
                } else {
                    slice.entries.iter().any(|entry| entry.seq > Seq(1)).then_some(Reject::NoSpace)
                };
                if let Some(reason) = refused {
                    let message = FromFollower::Reject { n, shard: SHARD, reason };
                    todo.extend(bench.on(Event::FromFollower { conn: TO_B, message }));
                }
                let message = FromFollower::Ack { n };
                todo.extend(bench.on(Event::FromFollower { conn: TO_B, message }));
            }
        }
        let view = bench.node.replicas().next().expect("it leads");
        assert!(view.primary.expect("it leads").active, "B has {held} entries: {view:?}");
    }
}

/// Story: a learner became a member, and its disk full, before its watch of etcd delivered the
/// record. It refused what a member takes, and its primary did not try again, since the disk stayed
/// full: no read was answered until there was room (simulator, seed 517990).
#[test]
fn a_full_member_that_learns_late_that_it_is_one_takes_the_barrier() {
    let mut bench = follower();
    let isr = vec![A.store];
    bench.deliver(ShardRecord { isr, learners: vec![B.store], ..record(1, 2, A) });
    bench.on(Event::DiskFull(true));
    let entries = two_epochs();
    bench.append(2, slice(2, &entries, 1, true));
    assert_eq!(held(&bench), Seq(1));
    let announced = |effects: Vec<Effect>| {
        let copy = FromFollower::Copy { shard: SHARD, copy: CopyNo(1) };
        let from_b = effects.into_iter().filter_map(|effect| match effect {
            Effect::ToPrimary { conn: FROM_A, message } => Some(message),
            _ => None,
        });
        from_b.filter(|message| *message == copy).count()
    };
    assert_eq!(announced(bench.deliver(record(1, 3, A))), 1, "its primary tries again");
    bench.append(3, slice(2, &entries, 1, true));
    assert_eq!(held(&bench), Seq(3));
    // A record that changes nothing about its membership causes no announcement.
    assert_eq!(announced(bench.deliver(record(2, 4, A))), 0);
}

/// The primary tries again, although the disk reports full.
#[test]
fn a_primary_tries_a_full_follower_again_that_announces_its_copy() {
    let mut bench = beginning();
    bench.deliver(record(1, 1, A));
    let alive = FromFollower::Alive {
        sent: 0,
        fsync_age_ms: 0,
        full: true,
        room_bytes: 0,
        wall: TimeMs(1),
        digests: vec![],
    };
    bench.on(Event::FromFollower { conn: TO_B, message: alive });
    let reject = FromFollower::Reject { n: 1, shard: SHARD, reason: Reject::NoSpace };
    bench.on(Event::FromFollower { conn: TO_B, message: reject });
    let copy = FromFollower::Copy { shard: SHARD, copy: CopyNo(1) };
    let effects = bench.on(Event::FromFollower { conn: TO_B, message: copy });
    let sent = effects.iter().find_map(|effect| match effect {
        Effect::ToFollower { conn: TO_B, message: ToFollower::Append { slices, .. } } => {
            Some(&slices[0])
        }
        _ => None,
    });
    assert!(sent.is_some_and(|slice| slice.resume), "{effects:?}");
}

/// The follower may lack any amount of what former epochs wrote.
#[test]
fn a_full_learner_takes_no_writes_of_former_epochs() {
    let mut bench = follower();
    let isr = vec![A.store];
    bench.deliver(ShardRecord { isr, learners: vec![B.store], ..record(1, 2, A) });
    bench.on(Event::DiskFull(true));
    bench.append(2, slice(2, &two_epochs(), 1, true));
    assert_eq!(held(&bench), Seq(1));
}

/// Two snapshots that have room one by one may have none together.
#[test]
fn what_was_accepted_has_taken_its_room() {
    let mut bench = follower();
    bench.on(Event::Room { bytes: 1_000 });
    assert_eq!(announce(&mut bench, 1, 600), Some(SnapshotOutcome::Accepted));
    assert_eq!(bench.node.room_for_snapshots(), 400);
    let message = ToFollower::Heartbeat { sent: 1, commits: vec![] };
    let effects = bench.on(Event::FromPrimary { conn: FROM_A, message });
    let room = effects.iter().find_map(|effect| match effect {
        Effect::ToPrimary { message: FromFollower::Alive { room_bytes, .. }, .. } => {
            Some(*room_bytes)
        }
        _ => None,
    });
    assert_eq!(room, Some(400));
    // The connection is gone, and the snapshots that were to come on it.
    bench.on(Event::Closed { conn: FROM_A });
    assert_eq!(bench.node.room_for_snapshots(), 1_000);
}

/// A's follower needs a snapshot, and the state has a record to send.
fn measuring() -> (Bench, u64) {
    let mut bench = primary();
    flush(&mut bench);
    bench.deliver(ShardRecord {
        version: Version(2),
        isr: vec![A.store],
        learners: vec![B.store],
        ..record(1, 2, A)
    });
    let reject = FromFollower::Reject { n: 2, shard: SHARD, reason: Reject::Stopped };
    bench.frame(1, add(1));
    let effects = bench.on(Event::FromFollower { conn: TO_B, message: reject });
    let transfer = measured(&effects).expect("the copy is measured first");
    (bench, transfer)
}

fn measured(effects: &[Effect]) -> Option<u64> {
    effects.iter().find_map(|effect| match effect {
        Effect::MeasureSnapshot { transfer, .. } => Some(*transfer),
        _ => None,
    })
}

fn answer(bench: &mut Bench, transfer: u64, outcome: SnapshotOutcome) -> Vec<Effect> {
    let message = FromFollower::Snapshot { transfer, shard: SHARD, outcome };
    bench.on(Event::FromFollower { conn: TO_B, message })
}

fn reports_room(bench: &mut Bench, room_bytes: u64) {
    let message = FromFollower::Alive {
        sent: 0,
        fsync_age_ms: 0,
        full: false,
        room_bytes,
        wall: TimeMs(0),
        digests: vec![],
    };
    bench.on(Event::FromFollower { conn: TO_B, message });
}

fn feed(bench: &Bench) -> crate::replica::primary::Feed {
    bench.node.replica(SHARD).primary().unwrap().followers[&B.store].feed.clone()
}

fn is_sent(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::SendSnapshot { .. }))
}

#[test]
fn nothing_of_a_copy_is_sent_before_it_is_accepted() {
    let (mut bench, transfer) = measuring();
    let effects = bench.on(Event::SnapshotMeasured { transfer, bytes: 700 });
    let notice = effects.iter().find_map(|effect| match effect {
        Effect::ToFollower { message: ToFollower::Snapshot { bytes, .. }, .. } => Some(*bytes),
        _ => None,
    });
    assert_eq!((notice, is_sent(&effects)), (Some(700), false));
    assert!(is_sent(&answer(&mut bench, transfer, SnapshotOutcome::Accepted)));
}

#[test]
fn a_copy_that_was_refused_is_offered_again_once_there_is_room() {
    let (mut bench, transfer) = measuring();
    bench.on(Event::SnapshotMeasured { transfer, bytes: 700 });
    reports_room(&mut bench, 600);
    assert!(!is_sent(&answer(&mut bench, transfer, SnapshotOutcome::NoSpace)));
    assert_eq!(feed(&bench), crate::replica::primary::Feed::Full);
    for (room, want) in [(600, false), (699, false), (700, true)] {
        reports_room(&mut bench, room);
        bench.now = bench.now.plus_ms(bench.node.shared.settings.heartbeat_ms);
        bench.on(Event::TurnEnded);
        let full = feed(&bench) == crate::replica::primary::Feed::Full;
        assert_eq!(!full, want, "with room for {room}");
    }
}

/// The cause of a failed snapshot is not always known here: a quota may have stopped it. It is not
/// sent again and again.
#[test]
fn a_copy_that_failed_rests_before_it_is_begun_again() {
    let (mut bench, transfer) = measuring();
    bench.on(Event::SnapshotMeasured { transfer, bytes: 7 });
    answer(&mut bench, transfer, SnapshotOutcome::Accepted);
    assert_eq!(measured(&bench.on(Event::SnapshotFailed { transfer })), None);
    let rests = bench.node.shared.settings.timing.copy_again_ms;
    bench.now = bench.now.plus_ms(rests - 1);
    assert_eq!(measured(&bench.on(Event::TurnEnded)), None);
    bench.now = bench.now.plus_ms(bench.node.shared.settings.timing.review_every_ms);
    assert!(measured(&bench.on(Event::TurnEnded)).is_some());
}

/// The follower could not install it: another snapshot may fail in the same way.
#[test]
fn a_copy_that_was_not_installed_rests_before_it_is_begun_again() {
    let (mut bench, transfer) = measuring();
    bench.on(Event::SnapshotMeasured { transfer, bytes: 7 });
    let effects = answer(&mut bench, transfer, SnapshotOutcome::NotInstalled);
    assert_eq!(measured(&effects), None);
    bench.now = bench.now.plus_ms(bench.node.shared.settings.timing.copy_again_ms - 1);
    assert_eq!(measured(&bench.on(Event::TurnEnded)), None);
    bench.now = bench.now.plus_ms(bench.node.shared.settings.timing.review_every_ms);
    assert!(measured(&bench.on(Event::TurnEnded)).is_some());
}

/// Chaos, seed 7: an install waited for open files, and the next primary sent 414 snapshots into
/// its staging meanwhile.
#[test]
fn no_copy_is_taken_while_another_one_is_being_installed() {
    let mut bench = follower();
    let (shard, epoch, copy) = (SHARD, Epoch(1), CopyNo(1));
    let announce = |bench: &mut Bench, transfer| {
        let notice = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes: 1 };
        let effects = bench.on(Event::FromPrimary { conn: FROM_A, message: notice });
        effects.iter().find_map(|effect| match effect {
            Effect::ToPrimary { message: FromFollower::Snapshot { outcome, .. }, .. } => {
                Some(*outcome)
            }
            _ => None,
        })
    };
    assert_eq!(announce(&mut bench, 7), Some(SnapshotOutcome::Accepted));
    let state = Box::new(ShardState { slots: Slots::ALL, ..ShardState::default() });
    bench.on(Event::SnapshotStaged { conn: FROM_A, transfer: 7, state });
    assert_eq!(announce(&mut bench, 8), Some(SnapshotOutcome::NotInstalled));
}

/// A late snapshot was meant to replace a copy that has been replaced since, and has acknowledged.
#[test]
fn a_copy_that_was_meant_for_an_older_one_is_not_installed() {
    let state = || Box::new(ShardState { slots: Slots::ALL, ..ShardState::default() });
    for (copy, fits) in [(CopyNo(0), false), (CopyNo(1), true), (CopyNo(2), false)] {
        let mut bench = follower();
        let (shard, epoch, transfer) = (SHARD, Epoch(1), 7);
        let notice = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes: 1 };
        bench.on(Event::FromPrimary { conn: FROM_A, message: notice });
        let staged = Event::SnapshotStaged { conn: FROM_A, transfer, state: state() };
        let effects = bench.on(staged);
        let discarded = |effect: &Effect| matches!(effect, Effect::DiscardSnapshot { .. });
        assert_eq!(!effects.iter().any(discarded), fits, "in place of {copy:?}: {effects:?}");
        let outcome = effects.iter().find_map(|effect| match effect {
            Effect::ToPrimary { message: FromFollower::Snapshot { outcome, .. }, .. } => {
                Some(*outcome)
            }
            _ => None,
        });
        assert_eq!(outcome, (!fits).then_some(SnapshotOutcome::NotInstalled));
    }
}

/// While the window had room for other shards only, the log of this shard was trimmed: the follower
/// has promised nothing yet (simulator, seed 505568).
#[test]
fn a_copy_is_installed_though_its_notice_is_the_first_of_the_epoch() {
    for (copy, fits) in [(CopyNo(1), true), (CopyNo(2), false)] {
        let mut bench = new_follower();
        let (shard, epoch, transfer) = (SHARD, Epoch(1), 7);
        let notice = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes: 1 };
        let effects = bench.on(Event::FromPrimary { conn: FROM_A, message: notice });
        let promised = |it: &Effect| matches!(it, Effect::Write(LogRecord::Promise { .. }));
        assert_eq!(effects.iter().any(promised), fits, "in place of {copy:?}: {effects:?}");
        let state = Box::new(ShardState { slots: Slots::ALL, ..ShardState::default() });
        let effects = bench.on(Event::SnapshotStaged { conn: FROM_A, transfer, state });
        let discarded = |effect: &Effect| matches!(effect, Effect::DiscardSnapshot { .. });
        assert_eq!(!effects.iter().any(discarded), fits, "in place of {copy:?}: {effects:?}");
    }
}

fn without_b() -> ShardRecord {
    ShardRecord { isr: vec![A.store], target: vec![A.store], ..record(1, 2, A) }
}

/// Etcd no longer names the copy. Answers those reads of the record that `answers` selects.
/// Returns how many reads it took until the copy was deleted, if it was.
fn reads_until_deleted(
    bench: &mut Bench,
    mut todo: Vec<Effect>,
    answers: impl Fn(u32) -> bool,
) -> Option<u32> {
    let record = without_b();
    let is_there = |bench: &Bench| bench.node.replicas().any(|view| view.exists);
    let mut reads = 0;
    for _ in 0..3 * bench.node.shared.settings.timing.copy_recheck_ms / 50 {
        for effect in std::mem::take(&mut todo) {
            let Effect::ReadRecord { read, .. } = effect else { continue };
            reads += 1;
            if answers(reads) {
                let record = record.clone();
                let event = Event::ShardRecord { record, mod_revision: 8, read: Some(read) };
                todo.extend(bench.on(event));
            }
        }
        if !is_there(bench) {
            return Some(reads);
        }
        bench.now = bench.now.plus_ms(50);
        todo.extend(bench.on(Event::TurnEnded));
    }
    None
}

/// No event repeats it: the answer of etcd was lost, and the copy stayed. A suspect store with an
/// unassigned copy is never cleared (simulator, seed 982).
#[test]
fn a_copy_that_etcd_does_not_name_is_asked_about_until_it_is_gone() {
    for (answered, want) in [(1, 1), (3, 3)] {
        let mut bench = follower();
        let effects = bench.deliver(without_b());
        assert_eq!(reads_until_deleted(&mut bench, effects, |read| read >= answered), Some(want));
    }
}

/// The answer came while the copy was being replaced (simulator, seed 2535).
#[test]
fn a_copy_that_is_wanted_no_more_by_the_time_that_it_is_installed_is_deleted() {
    let mut bench = follower();
    let (shard, epoch, transfer, copy) = (SHARD, Epoch(1), 7, CopyNo(1));
    let notice = ToFollower::Snapshot { transfer, shard, epoch, copy, bytes: 1 };
    bench.on(Event::FromPrimary { conn: FROM_A, message: notice });
    let state = Box::new(ShardState { slots: Slots::ALL, ..ShardState::default() });
    bench.on(Event::SnapshotStaged { conn: FROM_A, transfer, state });
    let effects = bench.deliver(without_b());
    assert_eq!(reads_until_deleted(&mut bench, effects, |read| read == 1), None);
    let installed = bench.on(Event::SnapshotInstalled { conn: FROM_A, transfer });
    assert!(reads_until_deleted(&mut bench, installed, |_| true).is_some());
}

/// The sender waits for an answer, and would wait for ever.
#[test]
fn a_copy_that_was_never_announced_is_discarded_and_answered() {
    let mut bench = follower();
    let state = Box::new(ShardState { slots: Slots::ALL, ..ShardState::default() });
    let effects = bench.on(Event::SnapshotStaged { conn: FROM_A, transfer: 7, state });
    let [Effect::DiscardSnapshot { .. }, Effect::ToPrimary { message, .. }] = &effects[..] else {
        panic!("{effects:?}")
    };
    let (shard, outcome) = (SHARD, SnapshotOutcome::NotInstalled);
    assert_eq!(*message, FromFollower::Snapshot { transfer: 7, shard, outcome });
}

/// Without it the log would not reach back to the end of the snapshot, and a second one would have
/// to follow it.
#[test]
fn the_log_is_kept_from_where_a_copy_on_its_way_ends() {
    let (mut bench, transfer) = measuring();
    bench.node.shared.settings.min_in_sync = 1;
    let pin = bench.node.replica(SHARD).flushed.seq;
    bench.on(Event::SnapshotMeasured { transfer, bytes: 700 });
    answer(&mut bench, transfer, SnapshotOutcome::Accepted);
    let review = bench.node.shared.settings.timing.review_every_ms;
    for batch_seq in 2..5 {
        bench.now = bench.now.plus_ms(review);
        bench.on(Event::TurnEnded);
        bench.frame(batch_seq, add(batch_seq));
        bench.on(Event::Durable { group: batch_seq });
    }
    while let Some(load) = bench.loads.pop_front() {
        bench.on(Event::Loaded { load, values: vec![Some(42)], records: vec![] });
    }
    let flushed = flush(&mut bench);
    assert!(flushed > pin, "the state has moved on: {flushed:?}");
    assert_eq!(kept_above(&mut bench), Some(pin));
    answer(&mut bench, transfer, SnapshotOutcome::NotInstalled);
    assert_ne!(kept_above(&mut bench), Some(pin), "it is not on its way any more");
}

/// Regression: while a node was down, another primary died. The next one had trimmed its log, as a
/// follower, to what it needed itself, so the node needed snapshots although the logs were short.
#[test]
fn a_follower_keeps_the_log_for_a_store_that_is_not_in_sync() {
    let absent = StoreId(3);
    let mut bench = primary();
    let flushed = flush(&mut bench);
    let target = vec![A.store, B.store, absent];
    bench.deliver(ShardRecord { target, ..record(2, 2, B) });
    assert_eq!(kept_above(&mut bench), Some(Seq(0)));
    let all = vec![A.store, B.store, absent];
    bench.deliver(ShardRecord { target: all.clone(), isr: all, ..record(2, 3, B) });
    assert_eq!(kept_above(&mut bench), Some(flushed));
    let learners = vec![absent];
    bench.deliver(ShardRecord { learners, ..record(2, 4, B) });
    assert_eq!(kept_above(&mut bench), Some(Seq(0)));
}

/// Flushes what is applied, and returns the last seq of it.
fn flush(bench: &mut Bench) -> Seq {
    bench.now = bench.now.plus_ms(bench.node.shared.settings.flush_after_ms);
    let effects = bench.on(Event::TurnEnded);
    let flush = effects.iter().find_map(|effect| match effect {
        Effect::Flush { flush, .. } => Some(*flush),
        _ => None,
    });
    bench.on(Event::Ingested { flush: flush.expect("something was applied") });
    bench.node.replica(SHARD).flushed.seq
}

/// The seq above which the log is kept for others.
fn kept_above(bench: &mut Bench) -> Option<Seq> {
    bench.now = bench.now.plus_ms(bench.node.shared.settings.timing.trim_every_ms);
    bench.on(Event::TurnEnded).iter().find_map(|effect| match effect {
        Effect::Trim { shards } => Some(shards[0].members),
        _ => None,
    })
}
