//! Group commit, and what a replica may use while it handles an event.
//!
//! Everything written since the last `Sync` belongs to the next group; a group is one log record
//! and one fsync. While one fsync is in flight the next group gathers, so the fsync itself is what
//! makes groups large under load and small at rest.

use std::collections::{BTreeMap, VecDeque};

use crate::ids::{Now, Seq, ShardId, StoreBoot};
use crate::node::event::Effect;
use crate::node::settings::Settings;
use crate::planted::Planted;
use crate::store::log::LogRecord;

/// The state that a replica may touch in one turn, that is while it handles one event: the log
/// being written, and the effects.
pub struct ReplicaTurn<'a> {
    /// The time of the event.
    pub now: Now,
    /// The store and the boot that this node is.
    pub me: StoreBoot,
    /// The settings of the node.
    pub settings: &'a Settings,
    /// True if the disk is full.
    pub disk_full: bool,
    /// The groups of the log.
    pub groups: &'a mut GroupCommit,
    /// The effects of the event.
    pub effects: &'a mut Vec<Effect>,
}

impl ReplicaTurn<'_> {
    /// Writes a record into the group being gathered.
    pub fn write(&mut self, record: LogRecord) {
        self.groups.note(&record);
        self.effects.push(Effect::Write(record));
        let full = self.groups.gathered_bytes >= self.settings.sizes.group_bytes_max;
        if full && !self.planted(Planted::GroupUnlimited) {
            self.groups.close(self.now, self.effects);
        }
    }

    /// Returns whether this bug is planted.
    pub fn planted(&self, bug: Planted) -> bool {
        bug.is_in(self.settings.planted)
    }
}

/// The last seq of each shard in one group, with the mark of the copy that it belongs to, in the
/// order of writing. A shard may come more than once.
type Marks = Vec<(ShardId, CopyMark, Seq)>;

/// Counts how often a copy of the shard has begun or ended on this node: an fsync makes entries
/// durable only while no other copy has begun.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CopyMark(pub u64);

/// The groups of log records: the one being gathered, and those being fsynced.
#[derive(Clone, Debug)]
pub struct GroupCommit {
    /// The number of the group being gathered.
    next: u64,
    gathered: Marks,
    gathered_records: usize,
    gathered_bytes: usize,
    in_flight: VecDeque<InFlightGroup>,
    durable: u64,
    /// When an fsync last completed.
    pub last_durable: Now,
    copies: BTreeMap<ShardId, CopyMark>,
}

#[derive(Clone, Debug)]
struct InFlightGroup {
    group: u64,
    since: Now,
    marks: Marks,
}

impl GroupCommit {
    /// Creates the groups of a log whose next group is `next`.
    pub fn new(next: u64, now: Now) -> Self {
        Self {
            next,
            gathered: Marks::new(),
            gathered_records: 0,
            gathered_bytes: 0,
            in_flight: VecDeque::new(),
            durable: next.saturating_sub(1),
            last_durable: now,
            copies: BTreeMap::new(),
        }
    }

    fn note(&mut self, record: &LogRecord) {
        self.gathered_records += 1;
        self.gathered_bytes += 32;
        match record {
            LogRecord::Append { shard, entry } => {
                self.gathered_bytes += entry.size();
                let mark = self.copies.get(shard).copied().unwrap_or_default();
                match self.gathered.last_mut() {
                    Some((last, of, seq)) if (*last, *of) == (*shard, mark) => *seq = entry.seq,
                    _ => self.gathered.push((*shard, mark, entry.seq)),
                }
            }
            LogRecord::Truncate { shard, after } => {
                // An entry that was cut and written again may lie in a group that is still in
                // flight.
                let in_flight = self.in_flight.iter_mut().map(|group| &mut group.marks);
                let marks = in_flight.chain([&mut self.gathered]).flatten();
                for (_, _, seq) in marks.filter(|(marked, ..)| marked == shard) {
                    *seq = (*seq).min(*after);
                }
            }
            LogRecord::Copy { shard, .. } | LogRecord::Drop { shard, .. } => {
                self.copies.entry(*shard).or_default().0 += 1;
            }
            _ => {}
        }
    }

    /// Returns the group whose fsync makes everything written so far durable; `None` if everything
    /// is durable.
    pub fn covering(&self) -> Option<u64> {
        if self.gathered_records > 0 {
            return Some(self.next);
        }
        self.in_flight.back().map(|group| group.group)
    }

    /// Begins the next fsync if there is something to write and none is in flight.
    pub fn sync_if_idle(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if self.in_flight.is_empty() && self.gathered_records > 0 {
            self.close(now, effects);
        }
    }

    /// Begins an fsync of an empty group, as a probe of the disk.
    pub fn probe(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if self.in_flight.is_empty() {
            self.close(now, effects);
        }
    }

    fn close(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let group = self.next;
        self.next += 1;
        let marks = std::mem::take(&mut self.gathered);
        self.gathered_records = 0;
        self.gathered_bytes = 0;
        self.in_flight.push_back(InFlightGroup { group, since: now, marks });
        effects.push(Effect::Sync { group });
    }

    /// Notes that group `group` and all before it are durable. Returns the seqs of present
    /// copies that they contained.
    pub fn on_durable(&mut self, group: u64, now: Now) -> Vec<(ShardId, Seq)> {
        self.last_durable = now;
        self.durable = self.durable.max(group);
        let mut reached = Vec::new();
        while let Some(done) = self.in_flight.pop_front_if(|first| first.group <= group) {
            let present = |shard: &ShardId| self.copies.get(shard).copied().unwrap_or_default();
            let current = done.marks.iter().filter(|(shard, mark, _)| present(shard) == *mark);
            reached.extend(current.map(|&(shard, _, seq)| (shard, seq)));
        }
        reached
    }

    /// Returns the last group that is durable.
    pub fn durable(&self) -> u64 {
        self.durable
    }

    /// Returns for how long the oldest fsync in flight has been waited for, in milliseconds.
    pub fn waiting_ms(&self, now: Now) -> u64 {
        self.in_flight.front().map_or(0, |group| now.ms_since(group.since))
    }

    /// Returns how long ago an fsync last completed, in milliseconds.
    pub fn fsync_age_ms(&self, now: Now) -> u64 {
        now.ms_since(self.last_durable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Body, Entry, Position};
    use crate::ids::{CopyNo, Epoch, Slots, TimeMs};

    fn append(seq: u64) -> LogRecord {
        append_to(0, seq)
    }

    fn append_to(shard: u16, seq: u64) -> LogRecord {
        let at = Position { seq: Seq(seq - 1), ..Position::default() };
        let entry = Entry::after(at, Epoch(1), TimeMs(0), Body::Barrier);
        LogRecord::Append { shard: ShardId(shard), entry }
    }

    fn groups(records: &[LogRecord]) -> GroupCommit {
        let mut groups = GroupCommit::new(1, Now(0));
        records.iter().for_each(|record| groups.note(record));
        groups
    }

    #[test]
    fn what_is_written_during_an_fsync_waits_for_the_next() {
        let mut groups = groups(&[append(1)]);
        let mut effects = Vec::new();
        groups.sync_if_idle(Now(0), &mut effects);
        groups.note(&append(2));
        groups.sync_if_idle(Now(0), &mut effects);
        assert_eq!(effects.len(), 1);
        assert_eq!(groups.covering(), Some(2));
        assert_eq!(groups.on_durable(1, Now(5)), [(ShardId(0), Seq(1))]);
    }

    /// Seq 2 was cut while its fsync was in flight, and another 2 waits: the first one's fsync must
    /// not make the second one durable.
    #[test]
    fn a_cut_reaches_the_group_under_way() {
        let mut groups = groups(&[append(1), append(2)]);
        groups.sync_if_idle(Now(0), &mut Vec::new());
        groups.note(&LogRecord::Truncate { shard: ShardId(0), after: Seq(1) });
        groups.note(&append(2));
        assert_eq!(groups.on_durable(1, Now(5)), [(ShardId(0), Seq(1))]);
    }

    /// A shard comes twice in the group, with another one between, and is cut in one case.
    #[test]
    fn the_last_seq_of_each_shard_counts() {
        let written = [append_to(0, 1), append_to(1, 1), append_to(0, 2), append_to(0, 3)];
        for (cut, reached) in [(None, 3), (Some(1), 1), (Some(2), 2)] {
            let mut groups = groups(&written);
            groups.sync_if_idle(Now(0), &mut Vec::new());
            if let Some(after) = cut {
                groups.note(&LogRecord::Truncate { shard: ShardId(0), after: Seq(after) });
            }
            let durable = groups.on_durable(1, Now(5));
            let of = |wanted| durable.iter().filter(move |(shard, _)| *shard == ShardId(wanted));
            assert_eq!(of(0).map(|&(_, seq)| seq).max(), Some(Seq(reached)));
            assert_eq!(of(1).map(|&(_, seq)| seq).max(), Some(Seq(1)));
        }
    }

    #[test]
    fn a_new_copy_is_not_made_durable_by_the_old_ones_fsync() {
        let mut groups = groups(&[append(1)]);
        groups.sync_if_idle(Now(0), &mut Vec::new());
        let base = Position::default();
        groups.note(&LogRecord::Copy {
            shard: ShardId(0),
            slots: Slots::ALL,
            copy: CopyNo(2),
            base,
        });
        assert_eq!(groups.on_durable(1, Now(5)), []);
    }
}
