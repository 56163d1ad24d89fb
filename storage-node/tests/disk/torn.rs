//! The effect of a power cut on a log: durable groups stay, and of the rest an arbitrary part.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use engine::store::log::group::{SEGMENT_HEADER_BYTES, SegmentHeader};
use engine::store::log::scan::{Group, Scanner};

use crate::ledger::Ledger;

/// The segments of a store's log, oldest first.
pub(crate) fn segments(folder: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = fs::read_dir(folder.join("log")) else { return Vec::new() };
    let number = |path: &Path| path.file_name()?.to_str()?.strip_suffix(".log")?.parse().ok();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut segments: Vec<(u64, PathBuf)> =
        paths.filter_map(|path| Some((number(&path)?, path))).collect();
    segments.sort();
    segments
}

/// The good groups of a log.
pub(crate) fn groups(folder: &Path) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut scanner = None;
    for (segment, path) in segments(folder) {
        let bytes = Bytes::from(fs::read(path).unwrap());
        let owner = SegmentHeader::decode(&bytes).unwrap().owner;
        let scanner = scanner.get_or_insert_with(|| Scanner::new(Some(owner)));
        groups.extend(scanner.segment(segment, &bytes));
    }
    groups
}

fn store_folder(folder: &Path, store: usize) -> PathBuf {
    folder.join(format!("store-{store}"))
}

/// Checks that every group that was reported as durable is there.
pub(crate) fn check_prefix(folder: &Path, store: usize) {
    let durable = Ledger::open(&folder.join("ledger")).durable[store];
    let last = groups(&store_folder(folder, store)).last().map_or(0, |group| group.number);
    assert!(last >= durable, "store {store}: group {durable} is gone, the last is {last}");
}

/// Zeroes, from some byte on, what was not durable in either store's log: at most its last group,
/// whole or in part, since each group waits for the fsync of the one before it.
pub(crate) fn tear(folder: &Path, seed: u64) {
    for store in 0..2 {
        let durable = Ledger::open(&folder.join("ledger")).durable[store];
        let folder = store_folder(folder, store);
        let Some(last) = groups(&folder).pop() else { continue };
        let end = last.offset + last.len;
        let mut in_part = false;
        for (segment, path) in segments(&folder).into_iter().filter(|one| one.0 >= last.segment) {
            let from = if segment == last.segment { end } else { SEGMENT_HEADER_BYTES };
            in_part |= tear_file(&path, from, seed);
        }
        if !in_part && last.number > durable {
            let (_, path) =
                segments(&folder).into_iter().find(|one| one.0 == last.segment).unwrap();
            tear_file(&path, last.offset, seed);
        }
    }
}

/// Zeroes the file from some byte above `from` on. Returns `false` if there are only zeros anyway.
fn tear_file(path: &Path, from: usize, seed: u64) -> bool {
    let mut bytes = fs::read(path).unwrap();
    let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    if used <= from {
        return false;
    }
    let from = from + seed.wrapping_mul(0x9e37_79b9) as usize % (used - from);
    bytes[from..].fill(0);
    fs::write(path, bytes).unwrap();
    true
}
