//! Snapshots: transferred, verified, installed in one step, or leaving nothing behind.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use engine::ids::{Conn, CopyNo, Epoch, Slots};
use engine::node::Event;
use engine::shard::idempotency::{RecordId, TokenLimits, TokenRecord};
use engine::store::layout;
use engine::store::log::LogRecord;
use storage_node::snapshot_files::{NotStaged, Stager};

use crate::opening::{Bench, SHARD};
use crate::pair::settings;
use crate::running::{counter, flush, flush_of, load};

const CONN: Conn = Conn(3);
const TRANSFER: u64 = 8;

fn open() -> (tempfile::TempDir, Bench) {
    let folder = tempfile::tempdir().unwrap();
    let bench = Bench::open(folder.path()).unwrap();
    (folder, bench)
}

type Rows = Vec<(Bytes, Bytes)>;

fn row(name: &str, value: i128) -> (Bytes, Bytes) {
    let counter = counter(name);
    let key = layout::counter_key(counter.slot(), counter.name());
    (key.into(), layout::counter_value(value).into())
}

/// Rows in the order of their keys.
fn rows(counters: &[(&str, i128)]) -> Rows {
    let mut rows: Vec<_> = counters.iter().map(|&(name, value)| row(name, value)).collect();
    rows.sort();
    rows
}

fn record(counters: &[(&str, i128)]) -> Vec<u8> {
    layout::encode_shard(CopyNo(4), &flush_of(9, counters).1)
}

fn begin(bench: &Bench, counters: &[(&str, i128)]) -> Stager {
    bench.disk.staging().begin(CONN, TRANSFER, Slots::ALL, &record(counters)).unwrap()
}

fn left_over(folder: &Path) -> usize {
    fs::read_dir(folder.join("state.files")).unwrap().count()
}

#[test]
fn an_installed_copy_takes_the_place_of_all_that_was_there() {
    let (folder, mut bench) = open();
    bench.begin_copy();
    flush(&mut bench, 1, &[("a", 5), ("old", 1)]);
    bench.event();
    let counters = [("a", 70), ("b", -3), ("c", i128::MAX)];
    let mut stager = begin(&bench, &counters);
    for rows in rows(&counters).chunks(2) {
        stager.rows(rows).unwrap();
    }
    let state = stager.finish().unwrap();
    assert_eq!(load(&mut bench, "a"), Some(5), "staged is not installed");
    bench.disk.install_snapshot((CONN, TRANSFER), CopyNo(2), state.slots, state.clone());
    assert!(matches!(bench.event(), Event::SnapshotInstalled { conn: CONN, transfer: TRANSFER }));
    for (name, value) in counters {
        assert_eq!(load(&mut bench, name), Some(value));
    }
    assert_eq!(load(&mut bench, "old"), None);
    assert_eq!(left_over(folder.path()), 0);
    // The log does not know the new copy, as after a crash right here.
    drop(bench);
    let bench = Bench::open(folder.path()).unwrap();
    let replica = &bench.opened.replicas[0];
    assert_eq!(replica.copy, CopyNo(2));
    let content = replica.content.as_ref().unwrap();
    assert_eq!((&content.state, content.suspect), (&*state, false));
}

/// A crash between the two would otherwise leave a copy that the log does not know, as if it had
/// lost it (found by the simulator, with the log's real bytes on a slow disk).
#[test]
fn a_copy_is_installed_only_once_the_log_records_durably_what_came_before_it() {
    let (_folder, mut bench) = open();
    let stager = begin(&bench, &[]);
    let state = stager.finish().unwrap();
    bench.disk.write(LogRecord::Promise { shard: SHARD, epoch: Epoch(1) });
    bench.disk.install_snapshot((CONN, TRANSFER), CopyNo(2), state.slots, state);
    // This is time for a wrong event; nothing waits for the right one.
    assert!(bench.events.recv_timeout(Duration::from_millis(100)).is_err());
    bench.disk.sync(2);
    assert!(matches!(bench.event(), Event::Durable { group: 2 }));
    assert!(matches!(bench.event(), Event::SnapshotInstalled { conn: CONN, transfer: TRANSFER }));
}

/// The files are ingested in one call, and a missing one would go unnoticed: the digests were
/// compared when the snapshot was staged.
#[test]
fn a_copy_of_several_files_is_installed_whole() {
    let folder = tempfile::tempdir().unwrap();
    let mut small = settings(folder.path());
    // Each block makes a file of its own.
    small.state.file_bytes = 1;
    let mut bench = Bench::with(small).unwrap();
    bench.begin_copy();
    let names: Vec<String> =
        (0..300).map(|number| format!("{number}-{}", "x".repeat(600))).collect();
    let counters: Vec<(&str, i128)> =
        names.iter().zip(1..).map(|(name, value)| (name.as_str(), value)).collect();
    let mut stager = begin(&bench, &counters);
    for rows in rows(&counters).chunks(7) {
        stager.rows(rows).unwrap();
    }
    let state = stager.finish().unwrap();
    assert!(left_over(folder.path()) > 3, "{} files", left_over(folder.path()));
    bench.disk.install_snapshot((CONN, TRANSFER), CopyNo(2), state.slots, state);
    assert!(matches!(bench.event(), Event::SnapshotInstalled { .. }));
    for (name, value) in counters {
        assert_eq!(load(&mut bench, name), Some(value));
    }
    assert_eq!(left_over(folder.path()), 0);
}

#[track_caller]
fn refused(result: Result<(), NotStaged>, why: &str) {
    match result {
        Err(NotStaged::Refused(malformed)) => assert_eq!(malformed.0, why),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_copy_that_can_not_be_the_senders_state_is_refused() {
    let (folder, bench) = open();
    let counters = [("a", 1), ("b", 2)];
    let half = Slots { lo: 0, hi: 9 };
    let begun = bench.disk.staging().begin(CONN, TRANSFER, half, &record(&counters));
    refused(begun.map(drop), "shard record slots");
    let begun = bench.disk.staging().begin(CONN, TRANSFER, half, b"\x09");
    refused(begun.map(drop), "shard format");

    let stage = |rows: Rows| {
        let mut stager = begin(&bench, &counters);
        stager.rows(&rows)?;
        stager.finish().map(drop)
    };
    let with = |change: &dyn Fn(&mut Rows)| {
        let mut rows = rows(&counters);
        change(&mut rows);
        stage(rows)
    };
    refused(with(&|rows| rows.truncate(1)), "counter digest");
    refused(with(&|rows| rows[0].1 = layout::counter_value(7).into()), "counter digest");
    refused(with(&|rows| rows[0].1 = layout::counter_operand(1).into()), "counter value");
    refused(with(&|rows| rows[0].0 = Bytes::from_static(b"\x01\x00\x00ns\0a")), "row slot");
    let shard = layout::shard_key(Slots::ALL.shard());
    refused(
        with(&|rows| rows.push((shard.clone().into(), Bytes::new()))),
        "shard record among rows",
    );
    with(&|_| {}).unwrap();
    assert_eq!(left_over(folder.path()), 1, "the good one");
}

/// The counters add up, so only the digest of the idempotency records shows what is wrong.
#[test]
fn a_copy_whose_idempotency_records_are_not_the_senders_is_refused() {
    let (folder, bench) = open();
    let counters = [("a", 1)];
    let record = |fingerprint| TokenRecord { bucket: 3, fingerprint, values: vec![7] };
    let ids = [1, 2].map(|hash| RecordId { slot: counter("a").slot(), hash });
    let mut state = flush_of(9, &counters).1;
    let limits = TokenLimits { settings: Default::default(), planted: None };
    for (id, fingerprint) in ids.iter().zip(5..) {
        let share = layout::record_share(*id, &record(fingerprint));
        state.tokens.add(&limits, b"ns", 3, share);
    }
    let token = |id: &RecordId, fingerprint| {
        let key = layout::idempotency_key(id.slot, id.hash);
        (Bytes::from(key), Bytes::from(layout::encode_record(&record(fingerprint))))
    };
    let stage = |tokens: &[(Bytes, Bytes)]| {
        let header = layout::encode_shard(CopyNo(4), &state);
        let mut stager = bench.disk.staging().begin(CONN, TRANSFER, Slots::ALL, &header)?;
        stager.rows(&rows(&counters))?;
        stager.rows(tokens)?;
        stager.finish().map(drop)
    };
    let why = "idempotency digests";
    refused(stage(&[]), why);
    refused(stage(&[token(&ids[0], 5)]), why);
    refused(stage(&[token(&ids[0], 5), token(&ids[1], 5)]), why);
    let other = RecordId { hash: 9, ..ids[1] };
    refused(stage(&[token(&ids[0], 5), token(&ids[1], 6), token(&other, 6)]), why);
    assert_eq!(left_over(folder.path()), 0);
    stage(&[token(&ids[0], 5), token(&ids[1], 6)]).unwrap();
}

/// Rows of another shard would survive the range deletion of the install.
#[test]
fn a_row_of_another_shard_is_refused() {
    let (_folder, bench) = open();
    let slot = counter("a").slot().0;
    let elsewhere = if slot == 0 { Slots { lo: 1, hi: 9 } } else { Slots { lo: 0, hi: slot - 1 } };
    let mut state = flush_of(9, &[("a", 1)]).1;
    state.slots = elsewhere;
    let record = layout::encode_shard(CopyNo(4), &state);
    let mut stager = bench.disk.staging().begin(CONN, TRANSFER, elsewhere, &record).unwrap();
    refused(stager.rows(&rows(&[("a", 1)])), "row of another shard");
}

#[test]
fn a_copy_that_is_dropped_or_discarded_leaves_nothing() {
    let (folder, bench) = open();
    let counters = [("a", 1)];
    let mut stager = begin(&bench, &counters);
    stager.rows(&rows(&counters)).unwrap();
    assert_eq!(left_over(folder.path()), 1);
    drop(stager);
    assert_eq!(left_over(folder.path()), 0);

    let mut stager = begin(&bench, &counters);
    stager.rows(&rows(&counters)).unwrap();
    stager.finish().unwrap();
    bench.disk.discard_snapshot(CONN, TRANSFER);
    // This waits for the state's other jobs.
    assert!(bench.disk.snapshot_reader(Slots::ALL).blocking_recv().unwrap().is_none());
    assert_eq!(left_over(folder.path()), 0);
}

#[test]
fn what_is_read_out_is_what_is_staged() {
    let (_folder, mut bench) = open();
    bench.begin_copy();
    let names: Vec<String> =
        (0..3_000).map(|number| format!("{number}-{}", "x".repeat(600))).collect();
    let adds: Vec<(&str, i128)> = names.iter().map(|name| (name.as_str(), 3)).collect();
    flush(&mut bench, 1, &adds);
    let reader = bench.disk.snapshot_reader(Slots::ALL).blocking_recv().unwrap().unwrap();
    let record = reader.shard_record();
    let mut stager = bench.disk.staging().begin(CONN, TRANSFER, Slots::ALL, &record).unwrap();
    let mut checked = proto::SnapshotDecoder::default();
    let boot = engine::ids::StoreBoot::default();
    let header = proto::wire::SnapshotHeader {
        open: Some(proto::wire::Open::new(1, 1)),
        from: Some(boot.into()),
        to: Some(boot.into()),
        transfer: TRANSFER,
        slots: Some(Slots::ALL.into()),
        shard_record: record,
    };
    let kind = Some(proto::wire::snapshot_part::Kind::Header(header));
    checked.take(proto::wire::SnapshotPart { kind }).unwrap();
    let mut parts = 0;
    let sent = reader.send(|part| {
        parts += 1;
        if let proto::SnapshotEvent::Rows(rows) = checked.take(part).unwrap() {
            stager.rows(&rows).unwrap();
        }
        true
    });
    assert_eq!(sent, storage_node::snapshot_files::SnapshotReadEnd::Whole);
    assert!(parts > 2, "several chunks and the end");
    stager.finish().unwrap();
}

#[test]
fn a_receiver_that_wants_no_more_stops_the_reading() {
    let (_folder, mut bench) = open();
    flush(&mut bench, 1, &[("a", 1)]);
    let reader = bench.disk.snapshot_reader(Slots::ALL).blocking_recv().unwrap().unwrap();
    assert_eq!(reader.send(|_| false), storage_node::snapshot_files::SnapshotReadEnd::Stopped);
}
