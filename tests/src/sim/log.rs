//! The log of one store. For now records in groups; the real bytes come with `engine::store`.

use std::collections::BTreeMap;

use engine::apply::ShardState;
use engine::entry::{Entry, Position};
use engine::ids::{CopyNo, Epoch, Seq, ShardId, Slots};
use engine::node::{RecoveredContent, RecoveredReplica};
use engine::store::log::Record;
use engine::store::log::index::Needed;
use engine::store::table::Frozen;

use super::journal::Journal;
use super::rng::Rng;

#[derive(Default)]
pub struct Log {
    groups: Vec<Vec<Record>>,
    open: Vec<Record>,
    /// Number of groups that are durable, and of those sealed by this process, the first's number.
    durable: usize,
    sealed: BTreeMap<u64, usize>,
    replicas: BTreeMap<ShardId, Replica>,
}

/// What the log says of one shard.
#[derive(Clone, Debug, Default)]
struct Replica {
    slots: Slots,
    promised: Epoch,
    copy: CopyNo,
    base: Option<Position>,
    entries: BTreeMap<Seq, Entry>,
}

impl Log {
    pub fn write(&mut self, journal: &mut Journal, record: Record) {
        let replica = self.replicas.entry(shard_of(&record)).or_default();
        if let Record::Append { entry, .. } = &record {
            journal.mix(entry.chain.0);
        }
        replica.take(&record);
        self.open.push(record);
    }

    pub fn seal(&mut self, group: u64) {
        self.groups.push(std::mem::take(&mut self.open));
        self.sealed.insert(group, self.groups.len());
    }

    pub fn durable(&mut self, group: u64) {
        self.durable = self.sealed.remove(&group).expect("sealed before it is durable");
    }

    pub fn read(&self, shard: ShardId, from: Seq, bytes_max: usize) -> Vec<Entry> {
        let Some(replica) = self.replicas.get(&shard) else { return Vec::new() };
        if !replica.entries.contains_key(&from) {
            return Vec::new();
        }
        let mut bytes = 0;
        let fits = |(_, entry): &(&Seq, &Entry)| {
            bytes += entry.size();
            bytes <= bytes_max || bytes == entry.size()
        };
        replica.entries.range(from..).take_while(fits).map(|(_, entry)| entry.clone()).collect()
    }

    pub fn trim(&mut self, _marks: &[Needed]) {}

    pub fn crash(&mut self, rng: &mut Rng, power_lost: bool) {
        self.open.clear();
        self.sealed.clear();
        if power_lost {
            let written = self.groups.len() - self.durable;
            let kept = self.durable + rng.index(written + 1);
            self.groups.truncate(kept);
        }
        self.replicas.clear();
        for record in self.groups.iter().flatten() {
            self.replicas.entry(shard_of(record)).or_default().take(record);
        }
    }

    pub fn next_group(&self) -> u64 {
        self.groups.len() as u64 + 1
    }

    pub fn recover(
        &mut self,
        records: &BTreeMap<ShardId, (CopyNo, ShardState)>,
    ) -> Vec<RecoveredReplica> {
        self.durable = self.groups.len();
        let recovered = |(&shard, replica): (&ShardId, &Replica)| {
            let record = records.get(&shard);
            RecoveredReplica {
                shard,
                slots: replica.slots,
                promised: replica.promised,
                copy: record.map_or(replica.copy, |(copy, _)| replica.copy.max(*copy)),
                content: replica.content(record),
            }
        };
        self.replicas.iter().map(recovered).collect()
    }
}

impl Replica {
    fn take(&mut self, record: &Record) {
        match record {
            Record::Append { entry, .. } => {
                self.entries.insert(entry.seq, entry.clone());
            }
            Record::Truncate { after, .. } => {
                self.entries.split_off(&after.next());
            }
            Record::Promise { epoch, .. } => self.promised = *epoch,
            Record::Copy { slots, copy, base, .. } => {
                self.slots = *slots;
                self.copy = *copy;
                self.base = Some(*base);
                self.entries.clear();
            }
            Record::Drop { copy, .. } => {
                self.copy = *copy;
                self.base = None;
                self.entries.clear();
            }
            Record::Suspect { .. } | Record::Identity(_) | Record::Shard { .. } => {}
        }
    }

    fn content(&self, record: Option<&(CopyNo, ShardState)>) -> Option<RecoveredContent> {
        if let Some((copy, state)) = record
            && *copy > self.copy
        {
            // Installed, and then the process ended before the log said so.
            let state = state.clone();
            return Some(RecoveredContent { state, entries: Vec::new(), suspect: false });
        }
        let base = self.base?;
        let state = match record {
            Some((copy, state)) if *copy == self.copy => state.clone(),
            _ => ShardState { slots: self.slots, applied: base, ..ShardState::default() },
        };
        let above = self.entries.range(state.applied.seq.next()..);
        let entries = above.map(|(_, entry)| entry.clone()).collect();
        Some(RecoveredContent { state, entries, suspect: false })
    }
}

fn shard_of(record: &Record) -> ShardId {
    match record {
        Record::Append { shard, .. }
        | Record::Truncate { shard, .. }
        | Record::Promise { shard, .. }
        | Record::Copy { shard, .. }
        | Record::Drop { shard, .. }
        | Record::Suspect { shard, .. }
        | Record::Shard { shard, .. } => *shard,
        Record::Identity(_) => ShardId(u16::MAX),
    }
}

/// A flush's rows into the state.
pub fn flush(rows: &mut BTreeMap<(u16, Vec<u8>), i128>, table: &Frozen) {
    for (_, name, cell) in table.sorted() {
        let slot = engine::key::slot_of(engine::key::hash(name));
        let row = rows.entry((slot.0, name.to_vec())).or_default();
        *row = cell.value(Some(*row));
    }
}
