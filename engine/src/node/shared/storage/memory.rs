//! The memory of a node: how it is counted, and what is dropped first.
//!
//! **Counted once, where it changes.** Each shard's log knows its size; the sums over all shards
//! are kept here, since they are needed with every message and a node may have a thousand shards. A
//! log is counted again whenever it has grown and whenever its shard is advanced, so a sum can't
//! drift for longer than one turn.
//!
//! **The log that is kept for lagging followers** has one limit for all shards together. Beyond it
//! the entries that were applied first are dropped first, whatever their shard: so every shard
//! keeps the same stretch of time, and a follower that was away for less than that is fed from
//! memory, from a busy shard and from a quiet one alike. (A share for each shard would keep hours
//! of the quiet ones and seconds of the busy ones, and the memory of a node would grow with its
//! shards.) A follower that was away for longer is fed from the log on disk.
//!
//! **What waits to be applied** is bounded without any limit on what other nodes order. While one
//! table is being flushed, entries are applied into the other one no faster than the flush goes on,
//! and never into a full one, so tables stay within their limit on followers, too. A primary
//! answers later then, gateways wait with what comes next, and so clients are slowed down instead
//! of refused. Committed entries that wait are in the log, and beyond
//! [`Settings::pending_bytes_max`] of them a primary refuses batches, and this node acknowledges
//! nothing to the primaries that it follows. Their windows fill, and they slow down; or they eject
//! it after a second, as a node whose disk has stalled, and add it again once it has caught up. For
//! acknowledgements the limit counts only entries that nothing but this node's own work holds up.
//! If it counted those whose commit waits for others, full nodes could wait for each other in a
//! circle, for ever.
//!
//! [`Settings::pending_bytes_max`]: crate::node::Settings::pending_bytes_max

use std::collections::{BTreeSet, VecDeque};
use std::ops::Bound;

use crate::ids::{Seq, ShardId};
use crate::node::shared::storage::loads::PendingLoad;
use crate::node::shared::{NodeTurn, Shards, Storage};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::log::LogBytes;

#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    /// The sum of what the shards' logs were counted as last.
    logs: LogBytes,
    /// Shards in the order in which their entries were applied, each with its last seq.
    kept: VecDeque<(ShardId, Seq)>,
    /// Shards with entries to apply for which the tables have no room.
    held_up: BTreeSet<ShardId>,
    /// The place at which the shards begin when there is room again, so that they take turns: the
    /// shard that was held up first, or the one after it if it had used some of the room.
    held_up_first: Option<Bound<ShardId>>,
    /// Bytes of the loads in flight for entries that wait.
    pub loads: usize,
}

impl Memory {
    pub(in crate::node) fn of<'a>(replicas: impl Iterator<Item = &'a mut Replica>) -> Self {
        let mut memory = Self::default();
        replicas.for_each(|replica| memory.count(replica));
        memory
    }

    fn count(&mut self, replica: &mut Replica) {
        let now = replica.log_bytes();
        let before = std::mem::replace(&mut replica.counted, now);
        self.logs = self.logs.changed(before, now);
    }

    /// Records that the shard's entries up to `seq` are applied.
    pub(in crate::node) fn on_applied(&mut self, shard: ShardId, seq: Seq) {
        match self.kept.back_mut() {
            Some((last, upto)) if *last == shard => *upto = seq,
            _ => self.kept.push_back((shard, seq)),
        }
    }

    fn queue_bytes(&self) -> usize {
        self.kept.capacity() * size_of::<(ShardId, Seq)>()
    }

    fn hold_up(&mut self, shard: ShardId, has_applied: bool) {
        if self.held_up.is_empty() {
            let first = if has_applied { Bound::Excluded } else { Bound::Included };
            self.held_up_first = Some(first(shard));
        }
        self.held_up.insert(shard);
    }

    pub(in crate::node) fn held_up(&mut self) -> BTreeSet<ShardId> {
        std::mem::take(&mut self.held_up)
    }
}

impl Storage {
    /// Returns the counted bytes of the logs, the loads and the tables.
    pub(in crate::node) fn counted_bytes(&self) -> usize {
        let logs = self.memory.logs;
        logs.kept
            + logs.pending
            + self.memory.queue_bytes()
            + self.memory.loads
            + self.tables.bytes()
    }

    /// Returns the same, computed from everything in memory.
    pub(in crate::node) fn walked_bytes(&self, shards: &Shards) -> usize {
        let logs = shards.iter().map(|replica| replica.log.walked_bytes());
        let loads = self.loads.values().map(PendingLoad::bytes);
        logs.sum::<usize>()
            + self.memory.queue_bytes()
            + loads.sum::<usize>()
            + self.tables.walked_bytes()
    }

    /// Panics if the counted sums differ from the sizes of the logs.
    pub(in crate::node) fn check_memory(&self, shards: &Shards) {
        let add = |sum: LogBytes, replica: &Replica| {
            assert_eq!(replica.counted, replica.log_bytes(), "every change of a log is counted");
            sum.changed(LogBytes::default(), replica.counted)
        };
        assert_eq!(self.memory.logs, shards.iter().fold(LogBytes::default(), add));
    }

    /// Returns the bytes of entries that are ordered and not yet applied.
    pub(in crate::node) fn pending_bytes(&self) -> usize {
        self.memory.logs.pending
    }

    /// Returns whether the active table has grown to this limit.
    pub(in crate::node) fn has_full_table(&self, bytes_max: usize) -> bool {
        self.tables.active.fills(bytes_max)
    }

    /// Returns whether more entries wait for this node's own work than this many bytes: it then
    /// acknowledges nothing to the primaries that it follows.
    pub(in crate::node) fn is_behind(&self, pending_bytes_max: usize) -> bool {
        self.memory.logs.ready >= pending_bytes_max
    }
}

impl NodeTurn<'_> {
    /// Counts the shard's log again.
    pub(in crate::node) fn count_log(&mut self, shard: ShardId) {
        if let Some(replica) = self.shards.get_mut(shard) {
            self.storage.memory.count(replica);
        }
    }

    /// Drops applied entries beyond the limit, those first that were applied first.
    pub(in crate::node) fn shrink_logs(&mut self) {
        let max = self.settings.log_memory_bytes;
        let memory = &mut self.storage.memory;
        while let Some(over) = (memory.logs.kept + memory.queue_bytes()).checked_sub(max)
            && over > 0
            && let Some(&(shard, upto)) = memory.kept.front()
        {
            let Some(replica) = self.shards.get_mut(shard) else { break };
            // If the copy was replaced meanwhile, no more than this is applied.
            let upto = upto.min(replica.state.applied.seq);
            replica.log.shrink(upto, over);
            memory.count(replica);
            if replica.log.base().seq >= upto {
                memory.kept.pop_front();
            }
        }
        if memory.kept.len() < memory.kept.capacity() / 4 {
            memory.kept.shrink_to(2 * memory.kept.len());
        }
    }

    /// Takes the next of the shards to advance.
    pub(in crate::node) fn next_to_advance(&mut self) -> Option<ShardId> {
        let first = self.storage.memory.held_up_first.unwrap_or(Bound::Unbounded);
        self.shards.to_advance.pop_from(first)
    }

    /// Makes room in the tables for another entry of this shard: a full table is flushed. Returns
    /// `false` while the flush of the table before it has to go on first. `has_applied` is whether
    /// the shard has used some of the room already.
    pub(super) fn make_room(&mut self, shard: ShardId, has_applied: bool) -> bool {
        let is_full = self.storage.has_full_table(self.settings.table_bytes_max);
        if self.planted(Planted::ApplyWithoutRoom) {
            return true;
        }
        if self.is_flushing() && (is_full || self.is_ahead_of_flush()) {
            self.storage.memory.hold_up(shard, has_applied);
            return false;
        }
        if is_full {
            self.begin_flush();
        }
        true
    }
}
