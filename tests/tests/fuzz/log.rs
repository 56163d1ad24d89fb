//! A whole log: the output of the writer, then damaged at any place.
//!
//! Scanning must not panic, and must not return a group whose bytes are not as they were written:
//! every group that it returns is one that was written, in order, each at most once.

use std::collections::BTreeMap;

use bytes::Bytes;
use engine::ids::StoreId;
use engine::store::log::LogRecord;
use engine::store::log::group::{Owner, SegmentHeader};
use engine::store::log::scan::{Scanned, Scanner};
use engine::store::log::writer::{LogEncoder, Resume};
use engine::store::recovery::Recovery;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::{bytes::outside, config, values};

const OWNER: Owner = Owner { cluster: 1, store: StoreId(2) };

/// Segments by number, and the records of each group by its number.
#[derive(Clone, Debug, Default)]
struct Log {
    segments: BTreeMap<u64, Vec<u8>>,
    groups: BTreeMap<u64, Vec<LogRecord>>,
}

fn log() -> impl Strategy<Value = Log> {
    vec(vec(values::record(), 0..4), 1..8).prop_map(|groups| {
        let mut log = Log::default();
        let mut writer = LogEncoder::new(Resume { owner: OWNER, ..Resume::default() }, 1_000);
        for (number, records) in (1..).zip(groups) {
            records.iter().for_each(|record| writer.write(record.clone()));
            let output = writer.sync(number);
            if let Some(header) = output.new_segment {
                let mut bytes = vec![0; output.segment_bytes];
                bytes[..header.len()].copy_from_slice(&header);
                log.segments.insert(output.segment, bytes);
            }
            let segment = log.segments.get_mut(&output.segment).expect("made before it is written");
            segment[output.offset..][..output.bytes.len()].copy_from_slice(&output.bytes);
            writer.durable(number);
            log.groups.insert(number, records);
        }
        log
    })
}

/// Scans and recovers, as a start does; returns the groups, by number, and the verdict.
fn read(segments: &BTreeMap<u64, Vec<u8>>) -> (Vec<(u64, Vec<LogRecord>)>, Scanned) {
    let bytes = |segment: &u64| Bytes::from(segments[segment].clone());
    let owner = segments.keys().find_map(|segment| SegmentHeader::decode(&bytes(segment)).ok());
    let mut scanner = Scanner::new(owner.map(|header| header.owner));
    let (mut groups, mut recovery) = (Vec::new(), Recovery::new(Vec::new()));
    for segment in segments.keys() {
        for group in scanner.segment(*segment, &bytes(segment)) {
            groups.push((group.number, group.records.clone()));
            recovery.group(group);
        }
    }
    let scanned = scanner.finish();
    let _ = recovery.finish(scanned.clone());
    (groups, scanned)
}

/// A segment may repeat checkpoints before the records it was given.
fn ends_with(read: &[LogRecord], given: &[LogRecord]) -> bool {
    read.ends_with(given)
}

#[test]
fn an_honest_log_reads_back_whole() {
    TestRunner::new(config())
        .run(&log(), |log| {
            let (groups, scanned) = read(&log.segments);
            prop_assert!(scanned.damage.is_empty() && !scanned.torn);
            prop_assert_eq!(groups.len(), log.groups.len());
            for ((number, records), (wanted, given)) in groups.iter().zip(&log.groups) {
                prop_assert_eq!(number, wanted);
                prop_assert!(ends_with(records, given));
            }
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn a_harmed_log_hands_out_only_what_was_written() {
    let harmed = log().prop_flat_map(|log| {
        let which = 0..log.segments.len();
        (Just(log), which).prop_flat_map(|(log, which)| {
            let (&segment, good) = log.segments.iter().nth(which).expect("below the length");
            let harmed = outside(Just(good.clone()));
            (Just(log), Just(segment), harmed)
        })
    });
    TestRunner::new(config())
        .run(&harmed, |(mut log, segment, bytes)| {
            log.segments.insert(segment, bytes);
            let (groups, _) = read(&log.segments);
            prop_assert!(groups.is_sorted_by(|(a, _), (b, _)| a < b));
            for (number, records) in &groups {
                let given = log.groups.get(number);
                prop_assert!(
                    given.is_some_and(|given| ends_with(records, given)),
                    "group {number}"
                );
            }
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}
