//! The part of a replica's log that is in memory: everything above what is applied, and as much
//! below as the memory limit permits. Older entries are read from disk when a follower needs them.
//!
//! Invariants:
//!   - entries are contiguous, each follows the one before, the first follows `base`;
//!   - `base.seq ≤ durable ≤ last`.

use std::collections::VecDeque;

use crate::entry::{Body, Entry, Position};
use crate::ids::{Epoch, Seq};
use crate::memory;
use crate::ops;
use crate::shard::apply::{Decoded, Loaded};

/// The number of entries that a log has room for, however few it holds, so that it does not
/// allocate for each.
const ROOM_MIN: usize = 8;

/// An entry in memory.
#[derive(Clone, Debug)]
pub struct CachedEntry {
    /// The entry.
    pub entry: Entry,
    /// The state of what the entry needs before it is applied; `None` once it is applied.
    pub work: Option<Box<ApplyWork>>,
    /// The bytes of all entries that this log has ever accepted, up to and with this one.
    end: u64,
}

/// The state of what an entry needs before it can be applied.
#[derive(Clone, Debug)]
pub struct ApplyWork {
    /// The entry's operations.
    pub decoded: Decoded,
    /// The state of the load.
    pub loading: Loading,
}

/// The state of loading an entry's counters and records.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Loading {
    /// The entry needs nothing of the state.
    NotNeeded,
    /// The load was not requested yet.
    NotAsked,
    /// The load was requested.
    Asked {
        /// The number of the load.
        load: u64,
        /// The number of ingests when it was requested.
        ingests: u64,
    },
    /// The load is complete.
    Ready {
        /// The rows.
        loaded: Loaded,
        /// The number of ingests when it was requested. After a later one the rows are stale.
        ingests: u64,
    },
}

/// The bytes of memory that entries take.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct LogBytes {
    /// The bytes of entries that are applied, and kept for followers that lag.
    pub kept: usize,
    /// The bytes of entries that are not applied, with everything that applying them needs.
    pub pending: usize,
    /// The part of `pending` that is committed and durable: only this node's own work delays it.
    pub ready: usize,
}

/// The log of one replica, as far as it is in memory.
#[derive(Clone, Debug)]
pub struct ReplicaLog {
    /// The position before the first entry in memory.
    base: Position,
    /// The position of the last entry, or the base: at hand without a look at the entries.
    last: Position,
    entries: VecDeque<CachedEntry>,
    kept_bytes: usize,
    pending_bytes: usize,
    /// [`CachedEntry::end`] of the last entry applied, and of the last one taken.
    applied_end: u64,
    end: u64,
    durable: Seq,
    /// The first seq of each epoch from `base` on (the base itself stands for what lies below),
    /// ascending.
    epochs: Vec<(Epoch, Seq)>,
}

impl LogBytes {
    /// This sum, with `now` in place of `before`.
    pub fn changed(self, before: Self, now: Self) -> Self {
        Self {
            kept: self.kept + now.kept - before.kept,
            pending: self.pending + now.pending - before.pending,
            ready: self.ready + now.ready - before.ready,
        }
    }
}

impl CachedEntry {
    /// The bytes that it takes once it is applied.
    fn kept_bytes(&self) -> usize {
        let content = match &self.entry.body {
            Body::Ops(batch) => memory::of_bytes(batch.payload.len()),
            Body::ExpireSessions { survivors, .. } => {
                memory::allocated(size_of_val(survivors.as_slice()))
            }
            Body::Unknown { bytes, .. } => memory::of_bytes(bytes.len()),
            Body::Barrier | Body::ExpireTokens { .. } | Body::Split { .. } => 0,
        };
        // A queue that grows by doubling has room for another entry beside each.
        2 * size_of::<Self>() + content
    }

    /// The bytes that it takes now.
    fn bytes(&self) -> usize {
        self.kept_bytes() + self.work.as_ref().map_or(0, |work| work.bytes(&self.entry))
    }
}

impl ApplyWork {
    fn bytes(&self, entry: &Entry) -> usize {
        let decoded = match (&self.decoded, &entry.body) {
            (Decoded::Ops(ops), Body::Ops(batch)) => {
                ops.bytes() + memory::of_bytes(ops::unpacked_bytes(batch))
            }
            _ => 0,
        };
        let loaded = match &self.loading {
            Loading::Ready { loaded, .. } => loaded.bytes(),
            Loading::NotNeeded | Loading::NotAsked | Loading::Asked { .. } => 0,
        };
        memory::allocated(size_of::<Self>()) + decoded + loaded
    }
}

impl ReplicaLog {
    /// A log whose last entry, not in memory, is at `base`, durable.
    pub fn from(base: Position) -> Self {
        let epochs = if base.seq == Seq(0) { vec![] } else { vec![(base.epoch, base.seq)] };
        Self {
            base,
            last: base,
            entries: VecDeque::new(),
            kept_bytes: 0,
            pending_bytes: 0,
            applied_end: 0,
            end: 0,
            durable: base.seq,
            epochs,
        }
    }

    /// The position before the first entry in memory.
    pub fn base(&self) -> Position {
        self.base
    }

    /// The position of the last entry.
    pub fn last(&self) -> Position {
        self.last
    }

    /// The last seq that has been fsynced.
    pub fn durable(&self) -> Seq {
        self.durable
    }

    /// The bytes that the entries take. `ready`: the entries up to this one are committed, and may
    /// be applied as soon as it is their turn.
    pub fn bytes(&self, ready: Option<Seq>) -> LogBytes {
        let ready_end = ready.and_then(|ready| self.get(ready.min(self.durable)));
        let ready = ready_end.map_or(0, |cached| cached.end.saturating_sub(self.applied_end));
        LogBytes {
            kept: self.kept_bytes,
            pending: self.pending_bytes,
            ready: usize::try_from(ready).expect("it is in memory"),
        }
    }

    /// Like [`ReplicaLog::bytes`], recounted by looking at every entry: both must agree.
    pub fn walked_bytes(&self) -> usize {
        self.entries.iter().map(CachedEntry::bytes).sum()
    }

    /// Notes that the entry has been applied, and releases what that needed.
    pub fn on_applied(&mut self, seq: Seq) {
        let Some(cached) = self.get_mut(seq) else { return };
        let (pending, end) = (cached.bytes(), cached.end);
        cached.work = None;
        let kept = cached.kept_bytes();
        self.pending_bytes -= pending;
        self.kept_bytes += kept;
        self.applied_end = end;
    }

    /// Appends an entry, which must follow the last one.
    pub fn append(&mut self, entry: Entry, decoded: Decoded) {
        if self.epoch_at(entry.seq.prev()) != Some(entry.epoch) {
            self.epochs.push((entry.epoch, entry.seq));
        }
        let loading = if decoded.loads() { Loading::NotAsked } else { Loading::NotNeeded };
        let work = Some(Box::new(ApplyWork { decoded, loading }));
        self.last = entry.position();
        let mut cached = CachedEntry { entry, work, end: 0 };
        self.pending_bytes += cached.bytes();
        self.end += cached.bytes() as u64;
        cached.end = self.end;
        self.entries.push_back(cached);
    }

    /// Sets the state of an entry's load.
    pub fn set_loading(&mut self, seq: Seq, loading: Loading) {
        let Some(cached) = self.get_mut(seq) else { return };
        let before = cached.bytes();
        if let Some(work) = &mut cached.work {
            work.loading = loading;
        }
        let after = cached.bytes();
        self.pending_bytes = self.pending_bytes - before + after;
    }

    /// Drops every entry above `after`; none of them is applied.
    pub fn truncate(&mut self, after: Seq) {
        while let Some(cached) = self.entries.pop_back_if(|cached| cached.entry.seq > after) {
            self.pending_bytes -= cached.bytes();
        }
        let last = self.entries.back();
        self.end = last.map_or(self.applied_end, |cached| cached.end);
        self.last = last.map_or(self.base, |cached| cached.entry.position());
        self.durable = self.durable.min(after);
        self.epochs.retain(|&(_, first)| first <= after);
    }

    /// Notes that the log is fsynced up to `seq`.
    pub fn on_durable(&mut self, seq: Seq) {
        self.durable = self.durable.max(seq.min(self.last().seq));
    }

    /// Removes the oldest entries from memory, all of them applied, up to `upto`, until `bytes` are
    /// free.
    pub fn shrink(&mut self, upto: Seq, bytes: usize) {
        let enough = self.kept_bytes.saturating_sub(bytes);
        while self.kept_bytes > enough
            && let Some(cached) = self.entries.pop_front_if(|cached| cached.entry.seq <= upto)
        {
            self.kept_bytes -= cached.kept_bytes();
            self.base = cached.entry.position();
        }
        // A burst must not leave its capacity behind in a shard that is quiet afterwards.
        if self.entries.len() < self.entries.capacity() / 4 {
            self.entries.shrink_to((2 * self.entries.len()).max(ROOM_MIN));
        }
    }

    /// The entry at `seq`, if it is in memory.
    pub fn get(&self, seq: Seq) -> Option<&CachedEntry> {
        self.entries.get(self.index(seq)?)
    }

    fn get_mut(&mut self, seq: Seq) -> Option<&mut CachedEntry> {
        let index = self.index(seq)?;
        self.entries.get_mut(index)
    }

    fn index(&self, seq: Seq) -> Option<usize> {
        let above_base = seq.0.checked_sub(self.base.seq.0 + 1)?;
        usize::try_from(above_base).ok()
    }

    /// The position at `seq`, if it is in memory.
    pub fn position(&self, seq: Seq) -> Option<Position> {
        if seq == self.base.seq {
            return Some(self.base);
        }
        self.get(seq).map(|cached| cached.entry.position())
    }

    /// The epoch of the entry at `seq`, if it is in memory.
    pub fn epoch_at(&self, seq: Seq) -> Option<Epoch> {
        self.position(seq).map(|position| position.epoch)
    }

    /// The last position of each epoch above `applied`, newest first: the positions at which a
    /// primary may join this log.
    pub fn ends_above(&self, applied: Seq) -> Vec<Position> {
        let mut ends = Vec::new();
        let mut end = self.last().seq;
        for &(_, first) in self.epochs.iter().rev() {
            if end <= applied {
                break;
            }
            // Entries that are not applied are in memory.
            ends.extend(self.position(end));
            end = first.prev();
        }
        ends
    }

    /// The last seq of `epoch` in memory.
    pub fn end_of(&self, epoch: Epoch) -> Option<Seq> {
        let at = self.epochs.iter().position(|&(e, _)| e == epoch)?;
        Some(self.epochs.get(at + 1).map_or(self.last().seq, |&(_, first)| first.prev()))
    }

    /// The entries from `from` on, up to `bytes_max` (at least one), if they are in memory.
    pub fn slice(&self, from: Seq, bytes_max: usize) -> Vec<Entry> {
        let Some(index) = self.index(from) else { return Vec::new() };
        let mut bytes = 0;
        let mut entries = Vec::new();
        for cached in self.entries.range(index.min(self.entries.len())..) {
            bytes += cached.entry.size();
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(cached.entry.clone());
        }
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Body;
    use crate::ids::TimeMs;

    /// Epoch 1 at 1 and 2, epoch 4 at 3, epoch 5 at 4 to 6.
    fn log() -> ReplicaLog {
        let mut log = ReplicaLog::from(Position::default());
        for epoch in [1, 1, 4, 5, 5, 5] {
            let entry = Entry::after(log.last(), Epoch(epoch), TimeMs(0), Body::Barrier);
            log.append(entry, Decoded::NoOps);
        }
        log
    }

    #[test]
    fn ends_are_the_last_seqs_of_the_epochs() {
        let log = log();
        let want = [6, 3, 2].map(|seq| log.position(Seq(seq)).unwrap());
        assert_eq!(log.ends_above(Seq(0)), want);
        assert_eq!(log.ends_above(Seq(3)), want[..1]);
        assert_eq!(log.end_of(Epoch(1)), Some(Seq(2)));
        assert_eq!(log.end_of(Epoch(2)), None);
    }

    #[test]
    fn truncating_takes_entries_epochs_and_durability() {
        let mut log = log();
        log.on_durable(Seq(6));
        log.truncate(Seq(2));
        assert_eq!(log.last().seq, Seq(2));
        assert_eq!(log.durable(), Seq(2));
        assert_eq!(log.ends_above(Seq(0)), [log.last()]);
    }

    #[test]
    fn durable_never_passes_the_end() {
        let mut log = log();
        log.truncate(Seq(4));
        log.on_durable(Seq(6));
        assert_eq!(log.durable(), Seq(4));
    }

    #[test]
    fn shrinking_keeps_what_is_not_applied() {
        let mut log = log();
        (1..=3).for_each(|seq| log.on_applied(Seq(seq)));
        log.shrink(Seq(3), usize::MAX);
        assert_eq!(log.base().seq, Seq(3));
        assert_eq!(log.position(Seq(3)).map(|p| p.epoch), Some(Epoch(4)));
        assert_eq!(log.position(Seq(2)), None);
        assert_eq!(log.slice(Seq(3), 1 << 20), vec![]);
        assert_eq!(log.slice(Seq(4), 0).len(), 1);
        assert_eq!(log.slice(Seq(4), 1 << 20).len(), 3);
        assert_eq!(log.slice(Seq(7), 1 << 20), vec![]);
    }
}
