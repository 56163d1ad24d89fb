//! The part of a replica's log that is in memory: everything above what is applied, and as much
//! below as the memory limit allows. What lies further below is read from disk when a follower
//! needs it.
//!
//! Invariants:
//!   - entries are contiguous, each follows the one before, the first follows `base`;
//!   - `base.seq ≤ durable ≤ last`.

use std::collections::VecDeque;

use crate::apply::{Decoded, Loaded};
use crate::entry::{Entry, Position};
use crate::ids::{Epoch, Seq};

/// An entry, and what it needs before it can be applied.
#[derive(Clone, Debug)]
pub struct Held {
    pub entry: Entry,
    pub decoded: Decoded,
    pub loading: Loading,
}

/// How far the loading of an entry's counters has come.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Loading {
    /// Needs nothing, or has not been asked for.
    NotAsked,
    Asked {
        load: u64,
        /// The number of ingests when it was asked for.
        snapshot: u64,
    },
    Ready {
        loaded: Loaded,
        snapshot: u64,
    },
}

#[derive(Clone, Debug)]
pub struct ReplicaLog {
    /// The position before the first entry in memory.
    base: Position,
    entries: VecDeque<Held>,
    bytes: usize,
    /// Bytes of the entries that are not applied.
    pending_bytes: usize,
    durable: Seq,
    /// First seq of each epoch from `base` on (the base itself stands for what lies below),
    /// ascending.
    epochs: Vec<(Epoch, Seq)>,
}

impl ReplicaLog {
    /// A log whose last entry, not in memory, is at `base`, durable.
    pub fn from(base: Position) -> Self {
        let epochs = if base.seq == Seq(0) { vec![] } else { vec![(base.epoch, base.seq)] };
        Self {
            base,
            entries: VecDeque::new(),
            bytes: 0,
            pending_bytes: 0,
            durable: base.seq,
            epochs,
        }
    }

    pub fn base(&self) -> Position {
        self.base
    }

    pub fn last(&self) -> Position {
        self.entries.back().map_or(self.base, |held| held.entry.position())
    }

    /// The last seq that has been fsynced.
    pub fn durable(&self) -> Seq {
        self.durable
    }

    /// Bytes of the entries that are not applied.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// The entry has been applied.
    pub fn on_applied(&mut self, seq: Seq) {
        if let Some(held) = self.get(seq) {
            self.pending_bytes -= held.entry.size();
        }
    }

    pub fn append(&mut self, entry: Entry, decoded: Decoded) {
        self.bytes += entry.size();
        self.pending_bytes += entry.size();
        if self.epoch_at(entry.seq.prev()) != Some(entry.epoch) {
            self.epochs.push((entry.epoch, entry.seq));
        }
        self.entries.push_back(Held { entry, decoded, loading: Loading::NotAsked });
    }

    /// Drops every entry above `after`; none of them is applied.
    pub fn truncate(&mut self, after: Seq) {
        while let Some(held) = self.entries.pop_back_if(|held| held.entry.seq > after) {
            self.bytes -= held.entry.size();
            self.pending_bytes -= held.entry.size();
        }
        self.durable = self.durable.min(after);
        self.epochs.retain(|&(_, first)| first <= after);
    }

    /// The log is fsynced up to `seq`.
    pub fn on_durable(&mut self, seq: Seq) {
        self.durable = self.durable.max(seq.min(self.last().seq));
    }

    /// Forgets the oldest entries, up to `upto`, until `bytes_max` suffice.
    pub fn shrink(&mut self, upto: Seq, bytes_max: usize) {
        while self.bytes > bytes_max
            && let Some(held) = self.entries.pop_front_if(|held| held.entry.seq <= upto)
        {
            self.bytes -= held.entry.size();
            self.base = held.entry.position();
        }
    }

    pub fn get(&self, seq: Seq) -> Option<&Held> {
        self.entries.get(self.index(seq)?)
    }

    pub fn get_mut(&mut self, seq: Seq) -> Option<&mut Held> {
        let index = self.index(seq)?;
        self.entries.get_mut(index)
    }

    fn index(&self, seq: Seq) -> Option<usize> {
        let above_base = seq.0.checked_sub(self.base.seq.0 + 1)?;
        usize::try_from(above_base).ok()
    }

    /// Where the log stands at `seq`, if that is in memory.
    pub fn position(&self, seq: Seq) -> Option<Position> {
        if seq == self.base.seq {
            return Some(self.base);
        }
        self.get(seq).map(|held| held.entry.position())
    }

    pub fn epoch_at(&self, seq: Seq) -> Option<Epoch> {
        self.position(seq).map(|position| position.epoch)
    }

    /// The last seq of each epoch above `applied`, newest first: where a primary may join this log.
    pub fn ends_above(&self, applied: Seq) -> Vec<(Epoch, Seq)> {
        let mut ends = Vec::new();
        let mut end = self.last().seq;
        for &(epoch, first) in self.epochs.iter().rev() {
            if end <= applied {
                break;
            }
            ends.push((epoch, end));
            end = first.prev();
        }
        ends
    }

    /// The last seq of `epoch` in memory.
    pub fn end_of(&self, epoch: Epoch) -> Option<Seq> {
        let at = self.epochs.iter().position(|&(e, _)| e == epoch)?;
        Some(self.epochs.get(at + 1).map_or(self.last().seq, |&(_, first)| first.prev()))
    }

    /// Entries from `from` on, up to `bytes_max` (at least one), if they are in memory.
    pub fn slice(&self, from: Seq, bytes_max: usize) -> Vec<Entry> {
        let Some(index) = self.index(from) else { return Vec::new() };
        let mut bytes = 0;
        let mut entries = Vec::new();
        for held in self.entries.range(index.min(self.entries.len())..) {
            bytes += held.entry.size();
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(held.entry.clone());
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
        let want = [(Epoch(5), Seq(6)), (Epoch(4), Seq(3)), (Epoch(1), Seq(2))];
        assert_eq!(log().ends_above(Seq(0)), want);
        assert_eq!(log().ends_above(Seq(3)), want[..1]);
        assert_eq!(log().end_of(Epoch(1)), Some(Seq(2)));
        assert_eq!(log().end_of(Epoch(2)), None);
    }

    #[test]
    fn truncating_takes_entries_epochs_and_durability() {
        let mut log = log();
        log.on_durable(Seq(6));
        log.truncate(Seq(2));
        assert_eq!(log.last().seq, Seq(2));
        assert_eq!(log.durable(), Seq(2));
        assert_eq!(log.ends_above(Seq(0)), [(Epoch(1), Seq(2))]);
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
        log.shrink(Seq(3), 0);
        assert_eq!(log.base().seq, Seq(3));
        assert_eq!(log.position(Seq(3)).map(|p| p.epoch), Some(Epoch(4)));
        assert_eq!(log.position(Seq(2)), None);
        assert_eq!(log.slice(Seq(3), 1 << 20), vec![]);
        assert_eq!(log.slice(Seq(4), 0).len(), 1);
        assert_eq!(log.slice(Seq(4), 1 << 20).len(), 3);
        assert_eq!(log.slice(Seq(7), 1 << 20), vec![]);
    }
}
