//! A scrub reads cold data too, and finds damage there first.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::ids::{CopyNo, Slots};
use engine::node::Event;
use engine::node::ScrubbedShard;
use storage_node::error::DiskError;

use crate::opening::{Bench, state_file};
use crate::running::{flush, flush_of};
use crate::torn;

const FAST: u64 = u64::MAX;

/// Counters in many blocks, and several segments of log, all of it on the disk.
fn filled(folder: &Path) -> Bench {
    let mut bench = Bench::open(folder).unwrap();
    bench.begin_copy();
    bench.append(30, 2_000);
    let names: Vec<String> = (0..20_000).map(|number| format!("counter-{number}")).collect();
    let adds: Vec<(&str, i128)> = names.iter().map(|name| (name.as_str(), 3)).collect();
    flush(&mut bench, 1, &adds);
    bench.event();
    bench
}

fn scrub(bench: &mut Bench, only: Vec<Slots>) -> Result<Vec<ScrubbedShard>, DiskError> {
    bench.disk.scrub(5, only, FAST);
    loop {
        let event = bench.next_unaccepted()?;
        if let Event::Scrubbed { scrub: 5, found } = bench.disk.accept(event) {
            return Ok(found);
        }
    }
}

#[test]
fn what_is_well_adds_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = filled(folder.path());
    let found = scrub(&mut bench, vec![]).unwrap();
    let [on_disk] = &found[..] else { panic!("{found:?}") };
    assert_eq!((on_disk.copy, on_disk.point.seq.0), (CopyNo(1), 1));
    assert_eq!(on_disk.counters, on_disk.point.counters);
    assert_ne!(on_disk.counters, 0);
    // No shard here has these slots; and nothing is left behind.
    assert_eq!(scrub(&mut bench, vec![Slots { lo: 7, hi: 9 }]).unwrap(), []);
    assert_eq!(fs::read_dir(folder.path().join("state.files")).unwrap().count(), 0);
}

/// Checksums are good: only the sum shows that a row is not what it should be.
#[test]
fn rows_that_do_not_match_the_digest_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = Bench::open(folder.path()).unwrap();
    bench.begin_copy();
    let (table, mut state) = flush_of(1, &[("a", 5), ("b", 7)]);
    state.counter_digest = state.counter_digest.wrapping_add(1);
    bench.disk.flush(1, table, vec![(CopyNo(1), state)]);
    bench.event();
    let found = scrub(&mut bench, vec![]).unwrap();
    assert_eq!(found[0].counters.wrapping_add(1), found[0].point.counters);
}

fn change(path: &Path, at: impl Fn(usize) -> usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = at(bytes.len());
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn cut_short(path: &Path, len: usize) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..len]).unwrap();
}

/// A byte is changed under the running disk; a start after the scrub knows of it.
#[track_caller]
fn check(spoil: impl Fn(&Path), want: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = filled(folder.path());
    spoil(folder.path());
    let failed = scrub(&mut bench, vec![]).expect_err("a failure");
    assert!(failed.to_string().contains(want), "{failed}");
    assert_eq!(failed.exit_code(), 5);
    drop(bench);
    let again = Bench::open(folder.path()).unwrap();
    assert!(again.opened.damage.contains(&failed.to_string()), "{:?}", again.opened.damage);
    assert!(again.opened.is_suspect());
}

fn segment(folder: &Path, number: usize) -> PathBuf {
    torn::segments(folder)[number].1.clone()
}

#[test]
fn a_changed_byte_is_found_wherever_it_is() {
    check(|folder| change(&state_file(folder, "", ".sst"), |len| len / 2), "state: Corruption");
    check(|folder| change(&state_file(folder, "", ".sst"), |len| len - 1), "state: ");
    check(|folder| change(&state_file(folder, "MANIFEST", ""), |_| 10), "state: Corruption");
    check(|folder| change(&state_file(folder, "CURRENT", ""), |_| 10), "state: CURRENT names");
    // These change a closed segment's header and a group in it, and the segment being written.
    check(|folder| change(&segment(folder, 0), |_| 9), "log segment 1 at byte 0");
    check(|folder| change(&segment(folder, 1), |_| 1_000), "log segment 2 at byte");
    // These cut a closed segment within a group, and right after its header.
    check(|folder| cut_short(&segment(folder, 1), 1_000), "log segment 2 at byte");
    check(|folder| cut_short(&segment(folder, 1), 80), "log segment 2 at byte");
    let last = |folder: &Path| torn::groups(folder).pop().unwrap();
    check(
        |folder| {
            let group = last(folder);
            let path = torn::segments(folder).pop().unwrap().1;
            change(&path, |_| group.offset + group.len - 1);
        },
        "log segment",
    );
}

#[test]
fn a_scrub_keeps_its_rate_and_ends_with_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let bench = filled(folder.path());
    // At this rate the scrub would take minutes.
    bench.disk.scrub(5, vec![], 1_000);
    std::thread::sleep(Duration::from_millis(300));
    assert!(bench.events.try_recv().is_err(), "too fast");
    let began = Instant::now();
    drop(bench);
    assert!(began.elapsed() < Duration::from_secs(5));
}
