//! The memory of a node: how it is counted, and what is dropped first.
//!
//! **Counted once, where it changes.** Each shard's log knows its size; the sums over all shards
//! are kept here, since they are needed with every message and a node may have a thousand shards. A
//! log is counted again whenever its shard is dirty, so a sum can't drift for longer than one
//! event.
//!
//! **The log that is kept for lagging followers** has one limit for all shards together. Beyond it
//! the entries that were applied first are dropped first, whatever their shard: so every shard
//! keeps the same stretch of time, and a follower that was away for less than that is fed from
//! memory, from a busy shard and from a quiet one alike. (A share for each shard would keep hours
//! of the quiet ones and seconds of the busy ones, and the memory of a node would grow with its
//! shards.) A follower that was away for longer is fed from the log on disk.
//!
//! **What waits to be applied** is bounded without any limit on what other nodes order. No entry is
//! applied into a full table while another table is being flushed, so tables stay within their
//! limit on followers, too. Committed entries then pile up in the log, and beyond
//! [`Settings::pending_bytes_max`] of them this node acknowledges nothing to the primaries that it
//! follows. Their windows fill, and they slow down; or they eject it after a second, as a node
//! whose disk has stalled, and add it again once it has caught up. The limit counts only entries
//! that nothing but this node's own work holds up. If it counted those whose commit waits for
//! others, full nodes could wait for each other in a circle, for ever.
//!
//! [`Settings::pending_bytes_max`]: crate::node::Settings::pending_bytes_max

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::ids::{Seq, ShardId};
use crate::node::apply_and_flush::PendingLoad;
use crate::node::{Effect, Node};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::log::LogBytes;
use crate::store::table::EMPTY_BYTES;

#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    /// The size of each shard's log when it was last counted.
    by_shard: BTreeMap<ShardId, LogBytes>,
    /// The sum of `by_shard`.
    logs: LogBytes,
    /// Shards in the order in which their entries were applied, each with its last seq.
    kept: VecDeque<(ShardId, Seq)>,
    /// Shards with entries to apply for which the tables have no room.
    held_up: BTreeSet<ShardId>,
    /// Bytes of the loads in flight for entries that wait.
    pub(super) loads: usize,
}

impl Memory {
    pub(super) fn of<'a>(replicas: impl Iterator<Item = &'a Replica>) -> Self {
        let mut memory = Self::default();
        replicas.for_each(|replica| memory.count(replica));
        memory
    }

    fn count(&mut self, replica: &Replica) {
        let now = replica.log_bytes();
        let before = self.by_shard.insert(replica.shard, now).unwrap_or_default();
        let all = &mut self.logs;
        all.kept = all.kept + now.kept - before.kept;
        all.pending = all.pending + now.pending - before.pending;
        all.ready = all.ready + now.ready - before.ready;
    }

    /// Records that the shard's entries up to `seq` are applied.
    pub(super) fn on_applied(&mut self, shard: ShardId, seq: Seq) {
        match self.kept.back_mut() {
            Some((last, upto)) if *last == shard => *upto = seq,
            _ => self.kept.push_back((shard, seq)),
        }
    }

    pub(super) fn pending_bytes(&self) -> usize {
        self.logs.pending
    }

    fn queue_bytes(&self) -> usize {
        self.kept.capacity() * size_of::<(ShardId, Seq)>()
    }

    pub(super) fn held_up(&mut self) -> BTreeSet<ShardId> {
        std::mem::take(&mut self.held_up)
    }
}

impl Node {
    /// Counts the shard's log again.
    pub(super) fn count_log(&mut self, shard: ShardId) {
        if let Some(replica) = self.replicas.get(&shard) {
            self.memory.count(replica);
        }
    }

    /// Drops applied entries beyond the limit, those first that were applied first.
    pub(super) fn shrink_logs(&mut self) {
        let max = self.settings.log_memory_bytes;
        while let Some(over) = (self.memory.logs.kept + self.memory.queue_bytes()).checked_sub(max)
            && over > 0
            && let Some(&(shard, upto)) = self.memory.kept.front()
        {
            let Some(replica) = self.replicas.get_mut(&shard) else { break };
            // If the copy was replaced meanwhile, no more than this is applied.
            let upto = upto.min(replica.state.applied.seq);
            replica.log.shrink(upto, over);
            let done = replica.log.base().seq >= upto;
            self.count_log(shard);
            if done {
                self.memory.kept.pop_front();
            }
        }
        if self.memory.kept.len() < self.memory.kept.capacity() / 4 {
            self.memory.kept.shrink_to(2 * self.memory.kept.len());
        }
    }

    /// Returns the counted bytes of what grows with the node's work; its limits refer to this
    /// number. (Session rows are counted by the shard, and some kilobytes that each shard and each
    /// connection always takes are not counted.)
    pub fn counted_bytes(&self) -> usize {
        let logs = self.memory.logs;
        logs.kept
            + logs.pending
            + self.memory.queue_bytes()
            + self.memory.loads
            + self.tables.bytes()
            + self.reads.bytes()
            + self.bounded.bytes()
    }

    /// Returns the same number, computed from everything in memory.
    pub fn held_bytes(&self) -> usize {
        let logs = self.replicas.values().map(|replica| replica.log.walked_bytes());
        let loads = self.loads.values().map(PendingLoad::bytes);
        logs.sum::<usize>()
            + self.memory.queue_bytes()
            + loads.sum::<usize>()
            + self.tables.walked_bytes()
            + self.reads.walked_bytes()
            + self.bounded.walked_bytes()
    }

    /// Panics if the counted sums differ from the sizes of the logs.
    pub(super) fn check_memory(&self) {
        let logs = Memory::of(self.replicas.values()).logs;
        assert_eq!(self.memory.logs, logs, "every change of a log is counted");
    }

    /// Makes room in the tables for another entry of this shard: a full table is flushed. Returns
    /// `false` while the table before it is still being flushed.
    pub(super) fn make_room(&mut self, shard: ShardId, effects: &mut Vec<Effect>) -> bool {
        if !self.has_full_table() || Planted::ApplyWithoutRoom.is_in(self.settings.planted) {
            return true;
        }
        if self.is_flushing() {
            self.memory.held_up.insert(shard);
            return false;
        }
        self.begin_flush(effects);
        true
    }

    /// Returns whether the active table has grown to its limit. (A table without any change holds
    /// nothing up, however small the limit.)
    pub fn has_full_table(&self) -> bool {
        self.is_table_full() && self.tables.active.bytes() > EMPTY_BYTES
    }

    /// Returns whether more entries wait for this node's own work than it may keep: it acknowledges
    /// nothing to the primaries that it follows.
    pub fn is_behind(&self) -> bool {
        self.memory.logs.ready >= self.settings.pending_bytes_max
    }
}
