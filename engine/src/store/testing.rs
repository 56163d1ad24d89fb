//! Random numbers and random logs for tests: a seed gives the same run everywhere.

use std::collections::BTreeMap;

use crate::batch::{Batch, Codec};
use crate::entry::{Body, Entry, Position};
use crate::ids::{BatchSeq, CopyNo, Epoch, Revision, SessionId, ShardId, Slots, StoreId, TimeMs};
use crate::store::log::LogRecord;
use crate::store::log::group::Owner;
use crate::store::log::writer::{LogEncoder, Output, Resume};

/// The generator splitmix64.
pub(crate) struct SplitMix64(u64);

impl SplitMix64 {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// The files of a log.
pub(crate) type Segments = BTreeMap<u64, Vec<u8>>;

pub(crate) struct RandomLog {
    pub(crate) segments: Segments,
    /// The records of each group.
    pub(crate) groups: Vec<Vec<LogRecord>>,
}

/// Applies the encoder's output to the files, as the driver does.
pub(crate) fn put(segments: &mut Segments, output: Output) {
    if let Some(header) = output.new_segment {
        let mut bytes = vec![0; output.segment_bytes];
        bytes[..header.len()].copy_from_slice(&header);
        segments.insert(output.segment, bytes);
    }
    let bytes = segments.get_mut(&output.segment).expect("made before it is written");
    bytes[output.offset..output.offset + output.bytes.len()].copy_from_slice(&output.bytes);
}

/// A log as an honest node writes it: two shards, each group fsynced before the next.
pub(crate) fn random_log(seed: u64, groups: u64, segment_bytes: usize) -> RandomLog {
    let mut random = SplitMix64::new(seed);
    let owner = Owner { cluster: 1, store: StoreId(2) };
    let mut writer = LogEncoder::new(Resume { owner, ..Resume::default() }, segment_bytes);
    let mut log = RandomLog { segments: Segments::new(), groups: Vec::new() };
    let mut history = vec![vec![Position::default()]; 2];
    for number in 1..=groups {
        let mut records = Vec::new();
        for (index, history) in history.iter_mut().enumerate() {
            let shard = ShardId(index as u16 * 16);
            if number == 1 {
                let slots = Slots { lo: shard.0, hi: shard.0 + 15 };
                let base = Position::default();
                records.push(LogRecord::Copy { shard, slots, copy: CopyNo(1), base });
            }
            records.extend(random_records(&mut random, shard, history));
        }
        for record in &records {
            writer.write(record.clone());
        }
        put(&mut log.segments, writer.sync(number));
        writer.durable(number);
        log.groups.push(records);
    }
    log
}

fn random_records(
    random: &mut SplitMix64,
    shard: ShardId,
    history: &mut Vec<Position>,
) -> Vec<LogRecord> {
    let mut out = Vec::new();
    if random.below(4) == 0 {
        out.push(LogRecord::Promise { shard, epoch: Epoch(random.below(9)) });
    }
    if random.below(4) == 0 {
        history.truncate(1 + random.below(history.len() as u64) as usize);
        out.push(LogRecord::Truncate { shard, after: history[history.len() - 1].seq });
    }
    for _ in 0..random.below(3) {
        let body = match random.below(2) {
            0 => Body::Barrier,
            _ => Body::Ops(random_batch(random)),
        };
        let last = history[history.len() - 1];
        let entry = Entry::after(last, last.epoch, TimeMs(last.time.0 + 1), body);
        history.push(entry.position());
        out.push(LogRecord::Append { shard, entry });
    }
    out
}

fn random_batch(random: &mut SplitMix64) -> Batch {
    let session = SessionId(Revision { incarnation: 1, revision: random.below(100) });
    let payload: Vec<u8> = (0..random.below(30)).map(|_| random.next() as u8).collect();
    Batch::seal(Slots::ALL, session, BatchSeq(1), BatchSeq(1), Codec::Raw, payload.into())
}
