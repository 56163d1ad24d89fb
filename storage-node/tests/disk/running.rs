//! A running disk gives its loop the right view, the right order, and a loud failure.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use engine::entry::{Body, Entry, Position};
use engine::ids::{CopyNo, Epoch, Seq, ShardId, Slots, TimeMs};
use engine::key::{self, CounterKey};
use engine::node::Event;
use engine::shard::apply::Needs;
use engine::shard::digest;
use engine::shard::state::ShardState;
use engine::store::log::LogRecord;
use engine::store::log::catch_up::{LogPart, WantedEntries};
use engine::store::log::index::Needed;
use engine::store::log::scan::LogLocation;
use engine::store::table::{SealedTable, Table};
use storage_node::disk_settings::DiskSettings;
use storage_node::error::DiskError;

use crate::opening::{Bench, SHARD};
use crate::pair::settings;
use crate::torn;

pub(crate) fn counter(name: &str) -> CounterKey {
    CounterKey::new(b"ns", name.as_bytes()).unwrap()
}

/// A table that adds to these counters, and the shard's state as of seq `seq` if they began at 0.
pub(crate) fn flush_of(
    seq: u64,
    adds: &[(&str, i128)],
) -> (std::sync::Arc<SealedTable>, ShardState) {
    let mut table = Table::new();
    let mut state = ShardState { slots: Slots::ALL, ..ShardState::default() };
    state.applied = Position { epoch: Epoch(1), seq: Seq(seq), ..Position::default() };
    for (name, delta) in adds {
        let counter = counter(name);
        table.add(counter.name(), key::hash(counter.name()), *delta);
        let share = digest::share(digest::weight(counter.name()), *delta);
        state.counter_digest = state.counter_digest.wrapping_add(share);
    }
    (table.seal().into(), state)
}

pub(crate) fn flush(bench: &mut Bench, number: u64, adds: &[(&str, i128)]) {
    let (table, state) = flush_of(number, adds);
    bench.disk.flush(number, table, vec![(CopyNo(1), state)]);
}

pub(crate) fn load(bench: &mut Bench, name: &str) -> Option<i128> {
    let needs = Needs { counters: vec![counter(name)], ..Needs::default() };
    bench.disk.load(9, needs);
    loop {
        if let Event::Loaded { load: 9, values, .. } = bench.event() {
            return values[0];
        }
    }
}

fn open() -> (tempfile::TempDir, Bench) {
    let folder = tempfile::tempdir().unwrap();
    let bench = Bench::open(folder.path()).unwrap();
    (folder, bench)
}

/// The state contains the flush already, but the state machine does not know it yet: its table
/// still holds the same changes, so a load must not see them.
#[test]
fn a_load_sees_an_ingest_only_once_it_was_accepted() {
    let (_folder, mut bench) = open();
    flush(&mut bench, 1, &[("a", 5)]);
    let ingested = bench.next_unaccepted().unwrap();
    assert_eq!(load(&mut bench, "a"), None);
    assert!(matches!(bench.disk.accept(ingested), Event::Ingested { flush: 1 }));
    assert_eq!(load(&mut bench, "a"), Some(5));
}

/// There are no waits in between, and yet each change sees the result of those before it.
#[test]
fn changes_of_the_state_happen_in_the_order_asked_for() {
    let (_folder, mut bench) = open();
    flush(&mut bench, 1, &[("a", 5)]);
    let first = bench.disk.snapshot_reader(Slots::ALL);
    flush(&mut bench, 2, &[("a", 1)]);
    bench.disk.drop_rows(SHARD, Slots::ALL);
    let none = bench.disk.snapshot_reader(Slots::ALL);
    flush(&mut bench, 3, &[("a", 7)]);
    assert!(first.blocking_recv().unwrap().is_some());
    assert!(none.blocking_recv().unwrap().is_none());
    let events: Vec<_> = (0..4).map(|_| format!("{:?}", bench.event())).collect();
    let want = [
        "Ingested { flush: 1 }",
        "Ingested { flush: 2 }",
        "RowsDropped { shard: ShardId(0) }",
        "Ingested { flush: 3 }",
    ];
    assert_eq!(events, want);
    assert_eq!(load(&mut bench, "a"), Some(7));
}

pub(crate) fn wanted(after: u64) -> Vec<WantedEntries> {
    let after = Position { seq: Seq(after), ..Position::default() };
    vec![WantedEntries { shard: SHARD, after }]
}

/// Reads all that follows `after`, block by block, at most so many bytes per read.
fn read_log(bench: &mut Bench, mut after: u64, bytes_max: usize) -> Vec<u64> {
    let mut seqs = Vec::new();
    let mut place = LogLocation::default();
    loop {
        bench.disk.read_log(wanted(after), place, bytes_max);
        let parts = loop {
            if let Event::LogRead { at, parts } = bench.event() {
                place = at;
                break parts;
            }
        };
        let [LogPart { shard: SHARD, prev, entries }] = &parts[..] else { panic!("{parts:?}") };
        assert_eq!(prev.seq, Seq(after));
        let Some(last) = entries.last() else { return seqs };
        after = last.seq.0;
        seqs.extend(entries.iter().map(|entry| entry.seq.0));
    }
}

fn needed(flushed: u64, members: u64) -> Vec<Needed> {
    let flushed = Seq(flushed);
    vec![Needed { shard: SHARD, flushed, applied: flushed, members: Seq(members) }]
}

#[test]
fn the_log_is_read_back_until_it_is_trimmed() {
    let (folder, mut bench) = open();
    bench.begin_copy();
    bench.append(30, 2_000);
    assert_eq!(read_log(&mut bench, 0, usize::MAX), (1..=30).collect::<Vec<_>>());
    assert_eq!(read_log(&mut bench, 3, 1), (4..=30).collect::<Vec<_>>());
    assert_eq!(read_log(&mut bench, 30, usize::MAX), Vec::<u64>::new());
    let before = torn::segments(folder.path()).len();
    bench.disk.trim(needed(30, 12));
    assert_eq!(read_log(&mut bench, 0, usize::MAX), Vec::<u64>::new());
    assert_eq!(read_log(&mut bench, 12, usize::MAX), (13..=30).collect::<Vec<_>>());
    let after = torn::segments(folder.path()).len();
    assert!(after < before && after > 1, "{before} segments, then {after}");
    // Trimmed entries were flushed; here they were not, and a start notices it.
    drop(bench);
    assert!(Bench::open(folder.path()).unwrap().opened.is_suspect());
}

/// The tail of a frozen shard can't be flushed and so not be trimmed: the disk refuses before it is
/// full.
#[test]
fn a_log_that_can_not_shrink_refuses_until_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let small =
        DiskSettings { log_keep_bytes: 40_000, log_slack_bytes: 40_000, ..settings(folder.path()) };
    let mut bench = Bench::with(small).unwrap();
    bench.begin_copy();
    bench.append(30, 2_000);
    assert_eq!(bench.full, Vec::<bool>::new());
    bench.append(30, 2_000);
    assert_eq!(bench.full, [true]);
    bench.disk.trim(needed(60, 60));
    bench.append(1, 10);
    assert_eq!(bench.full, [true, false]);
}

/// One copy, of a shard of its own, applies nothing, among the first groups of the log: it would
/// hold everything after it. Its entries are written again and the log shrinks; a start finds them
/// at their new place.
#[test]
fn what_alone_keeps_the_log_long_is_carried() {
    const STUCK: ShardId = ShardId(9);
    let folder = tempfile::tempdir().unwrap();
    let small =
        DiskSettings { log_keep_bytes: 40_000, log_slack_bytes: 40_000, ..settings(folder.path()) };
    let mut bench = Bench::with(small.clone()).unwrap();
    bench.begin_copy();
    let slots = Slots { lo: STUCK.0, hi: STUCK.0 };
    let (copy, base) = (CopyNo(1), Position::default());
    bench.group(vec![LogRecord::Copy { shard: STUCK, slots, copy, base }]);
    let mut stuck = base;
    for _ in 0..5 {
        let entry = Entry::after(stuck, Epoch(1), TimeMs(0), Body::Barrier);
        stuck = entry.position();
        bench.group(vec![LogRecord::Append { shard: STUCK, entry }]);
    }
    bench.append(60, 2_000);
    assert_eq!(bench.full, [true]);
    let nothing = Seq(0);
    let (members, applied) = (nothing, nothing);
    let needs = Needed { shard: STUCK, flushed: nothing, applied, members };
    // Each trim deletes what it may; carried entries are read on the second thread and written with
    // the groups that follow.
    let begun = Instant::now();
    while bench.disk.log_bytes() > 40_000 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} bytes", bench.disk.log_bytes());
        bench.disk.trim([needed(60, 60), vec![needs]].concat());
        bench.group(Vec::new());
    }
    bench.append(1, 10);
    assert_eq!(bench.full, [true, false]);
    drop(bench);
    let opened = Bench::with(small).unwrap().opened;
    let found = opened.replicas.iter().find(|replica| replica.shard == STUCK).unwrap();
    let content = found.content.as_ref().expect("its copy");
    let seqs: Vec<_> = content.entries.iter().map(|entry| entry.seq.0).collect();
    assert_eq!((seqs, content.suspect), ((1..=5).collect(), false));
}

#[test]
fn a_disk_nearly_full_refuses_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench =
        Bench::with(DiskSettings { free_bytes_min: u64::MAX, ..settings(folder.path()) }).unwrap();
    bench.begin_copy();
    assert_eq!(bench.full, [true]);
}

/// Returns the one file of the state.
fn sst(folder: &Path) -> std::path::PathBuf {
    let files = fs::read_dir(folder.join("state")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|end| end == "sst")).collect();
    let [file] = &files[..] else { panic!("{files:?}") };
    file.clone()
}

#[test]
fn a_changed_byte_in_the_state_ends_the_process() {
    let (folder, mut bench) = open();
    // There are many blocks: the first and the last are read, and cached, by the ingest.
    let names: Vec<String> = (0..20_000).map(|number| format!("counter-{number}")).collect();
    let adds: Vec<(&str, i128)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    flush(&mut bench, 1, &adds);
    assert!(matches!(bench.event(), Event::Ingested { flush: 1 }));
    assert_eq!(bench.advanced, [4_096, 8_192, 12_288, 16_384]);
    let path = sst(folder.path());
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let counters = names.iter().map(|name| counter(name)).collect();
    bench.disk.load(1, Needs { counters, ..Needs::default() });
    let failed = bench.next_unaccepted().expect_err("a failure");
    assert!(matches!(failed, DiskError::State(_)), "{failed}");
    assert_eq!(failed.exit_code(), 5);
    drop(bench);
    // The start does not read the bad place again, whether etcd knows of the damage or not.
    let mut bench = Bench::open(folder.path()).unwrap();
    assert_eq!(bench.opened.damage, [failed.to_string()]);
    assert_eq!(load(&mut bench, &names[10_000]), None);
}

#[test]
fn a_changed_byte_in_the_log_is_never_read_as_missing() {
    let (folder, mut bench) = open();
    bench.begin_copy();
    bench.append(3, 100);
    let group = torn::groups(folder.path()).pop().unwrap();
    let (_, path) = torn::segments(folder.path()).pop().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[group.offset + group.len - 1] ^= 1;
    fs::write(&path, bytes).unwrap();
    bench.disk.read_log(wanted(2), LogLocation::default(), usize::MAX);
    let failed = bench.next_unaccepted().expect_err("a failure");
    assert!(matches!(failed, DiskError::Damage { .. }), "{failed}");
    assert_eq!(failed.exit_code(), 5);
}

/// After a failure nothing more is done and nothing more is reported.
#[test]
fn a_failed_group_is_the_last() {
    let (folder, mut bench) = open();
    bench.begin_copy();
    // The next segment can't be made.
    fs::remove_dir_all(folder.path().join("log")).unwrap();
    for group in 3..10 {
        let record = bench.next_entry(15_000);
        bench.disk.write(record);
        bench.disk.sync(group);
    }
    let mut durable = 0;
    let failed = loop {
        match bench.next_unaccepted().map(|event| bench.disk.accept(event)) {
            Ok(event) => durable += u32::from(matches!(event, Event::Durable { .. })),
            Err(failed) => break failed,
        }
    };
    assert_eq!(failed.exit_code(), 5);
    assert!(durable < 3, "{durable} groups in a segment");
    drop(bench.disk);
    assert!(bench.events.try_recv().is_err(), "an event after the end");
}

/// A crash between the two would otherwise look as if the state had lost a copy that the log still
/// knows. The kill loop hit this on a busy machine.
#[test]
fn rows_are_dropped_only_once_the_log_records_durably_that_their_copy_is_gone() {
    let (_folder, mut bench) = open();
    bench.begin_copy();
    flush(&mut bench, 1, &[("a", 5)]);
    bench.event();
    bench.disk.write(LogRecord::Drop { shard: SHARD, copy: CopyNo(1) });
    bench.disk.drop_rows(SHARD, Slots::ALL);
    // This is time for a wrong event; nothing waits for the right one.
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(100) {
        assert_eq!(load(&mut bench, "a"), Some(5));
    }
    bench.disk.sync(3);
    assert!(matches!(bench.event(), Event::Durable { group: 3 }));
    assert!(matches!(bench.event(), Event::RowsDropped { shard: SHARD }));
    bench.disk.drop_rows(SHARD, Slots::ALL);
    assert!(matches!(bench.event(), Event::RowsDropped { shard: SHARD }), "nothing to wait for");
}

#[test]
fn stale_rows_of_a_dropped_copy_are_gone_after_a_start() {
    let (folder, mut bench) = open();
    bench.begin_copy();
    flush(&mut bench, 1, &[("a", 5)]);
    bench.event();
    bench.group(vec![LogRecord::Drop { shard: ShardId(0), copy: CopyNo(1) }]);
    drop(bench);
    let mut bench = Bench::open(folder.path()).unwrap();
    assert!(bench.opened.replicas[0].content.is_none());
    assert_eq!(bench.opened.replicas[0].copy, CopyNo(1));
    assert_eq!(load(&mut bench, "a"), None);
}
