//! A split, applied: the copy of a shard becomes the copies of two.
//!
//! ```text
//!   the split is the next entry      promise for the child ──▶ durable ┐
//!   all before it is in the state    flush ──▶ Ingested ───────────────┴▶ CountRows
//!   RowsCounted                      both states, in memory; the left child goes on
//!   the next flush                   both shard records, in one ingest
//!   Ingested                         the copy of the right child exists
//! ```
//!
//! A crash before that ingest leaves the parent, whose next entry is the split. After it recovery
//! finds a copy that the log does not know, as after the install of a snapshot, and goes on with
//! it. In between nothing of the right child can be acknowledged, since there is no copy of it.
//!
//! The promise comes first, since a state without a promise in the log means a log that was lost.

use std::collections::BTreeMap;

use crate::entry::{Body, Position};
use crate::ids::{CopyNo, Epoch, Seq, ShardId, Slots};
use crate::node::event::Effect;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::trust::Trust;
use crate::replica::{PendingChild, Replica};
use crate::shard::division::{self, DividedState, RowCounts};

/// The splits that are being applied.
#[derive(Clone, Debug, Default)]
pub(super) struct Divisions {
    /// By shard: how far its next entry, a split, has come.
    under_way: BTreeMap<ShardId, Division>,
}

/// A split that is the next entry to apply.
#[derive(Clone, Copy, Debug)]
struct Division {
    seq: Seq,
    copy: CopyNo,
    /// The group that makes the promise for the right child durable.
    promised: Option<u64>,
    /// The number of the count that was requested.
    count: Option<u64>,
}

impl Divisions {
    pub(super) fn shards(&self) -> impl Iterator<Item = ShardId> {
        self.under_way.keys().copied()
    }
}

impl NodeTurn<'_> {
    /// Goes on with a split, which is the next entry to apply.
    pub(super) fn advance_division(&mut self, shard: ShardId, seq: Seq) {
        let Some(replica) = self.shards.get(shard) else { return };
        let Some(at) = split_at(replica, seq) else { return };
        let (copy, slots) = (replica.copy, replica.slots);
        let Some(entry) = replica.log.position(seq) else { return };
        let is_flushed = replica.flushed.seq == replica.state.applied.seq;
        let of_now = |one: &&Division| (one.seq, one.copy) == (seq, copy);
        let known = self.storage.divisions.under_way.get(&shard).copied();
        let mut division = known.filter(|one| of_now(&one)).unwrap_or_else(|| {
            let promised = self.promise_for_child(Slots { lo: at, ..slots }, entry.epoch);
            Division { seq, copy, promised, count: None }
        });
        let is_promised =
            division.promised.is_none_or(|group| group <= self.storage.groups.durable());
        let ignores_tables = self.planted(Planted::SplitIgnoresTables);
        if !is_flushed && !ignores_tables {
            self.request_flush();
            self.flush_if_due();
        } else if is_promised && division.count.is_none() {
            let count = self.fresh_id();
            division.count = Some(count);
            self.effects.push(Effect::CountRows { count, slots, at });
        }
        self.storage.divisions.under_way.insert(shard, division);
    }

    /// Promises the epoch of the split for the right child. Returns the group that makes it
    /// durable.
    fn promise_for_child(&mut self, slots: Slots, epoch: Epoch) -> Option<u64> {
        let child = slots.shard();
        self.shards.get_or_insert(child, || Replica::empty(child, slots));
        let (replica, mut turn) = self.replica_in_turn(child)?;
        if replica.promised < epoch {
            replica.promise(&mut turn, epoch);
        }
        self.storage.groups.covering()
    }

    /// Divides the state of the shard whose rows were counted.
    pub(in crate::node) fn on_rows_counted(&mut self, count: u64, counts: &RowCounts) {
        let mut under_way = self.storage.divisions.under_way.iter();
        let found = under_way.find(|(_, one)| one.count == Some(count));
        let Some((&shard, &Division { seq, copy, .. })) = found else { return };
        self.storage.divisions.under_way.remove(&shard);
        let (limits, planted) = (self.settings.limits(), self.settings.planted);
        let Some(replica) = self.shards.get(shard) else { return };
        let Some(at) = split_at(replica, seq) else { return };
        if replica.copy != copy || replica.next_to_apply() != Some(seq) {
            return;
        }
        let Some(position) = replica.log.position(seq) else { return };
        if self.is_flushing() && self.storage.has_full_table(self.settings.table_bytes_max) {
            // The records of the right child have no room: the rows are counted again later.
            let again = Division { seq, copy, promised: None, count: None };
            self.storage.divisions.under_way.insert(shard, again);
            return;
        }
        let mut state = replica.state.clone();
        state.tokens.advance_time(&limits, state.applied.time, position.time);
        match division::divide(&state, position, counts, planted) {
            Ok(divided) => self.take_divided(shard, at, position, divided),
            Err(division::RowsDiffer) => {
                let Some((replica, mut turn)) = self.replica_in_turn(shard) else { return };
                replica.stop(&mut turn, "the rows of a shard that is split differ from its digest");
            }
        }
        self.shards.to_advance.insert(shard);
    }

    fn take_divided(&mut self, shard: ShardId, at: u16, position: Position, divided: DividedState) {
        let child = ShardId(at);
        let DividedState { left, right, copied } = divided;
        let number = self.shards.get(child).map_or(CopyNo(0), |known| known.copy);
        let is_held = self.shards.get(child).is_some_and(|known| known.trust.exists());
        let Some(replica) = self.shards.get_mut(shard) else { return };
        let is_good = replica.trust == Trust::Good;
        replica.slots = left.slots;
        replica.state = left;
        replica.on_applied(position.seq, &self.settings.sizes);
        if !is_held {
            let copy = CopyNo(number.0 + 1);
            let child = PendingChild { copy, state: right, flush: None, is_good };
            replica.child = Some(Box::new(child));
            for (id, record) in copied {
                self.storage.tables.active.put_record(id, record);
            }
        }
        self.storage.memory.on_applied(shard, position.seq);
        self.storage.flushing.note_change(self.now);
        self.request_flush();
        self.flush_if_due();
        self.shards.to_review.insert(shard);
        self.count_log(shard);
        if self.planted(Planted::ChildBeforeFlush) {
            self.begin_children(u64::MAX);
        }
    }

    /// Begins the copies of the right children that this flush has written, and returns those.
    pub(in crate::node) fn begin_children(&mut self, flush: u64) -> Vec<ShardId> {
        let mut due = Vec::new();
        for replica in self.shards.iter_mut() {
            let is_written = |child: &mut Box<PendingChild>| {
                child.flush.is_some_and(|written| written <= flush) || flush == u64::MAX
            };
            due.extend(replica.child.take_if(is_written));
        }
        let mut begun = Vec::new();
        for child in due {
            let PendingChild { state, is_good, .. } = *child;
            let (shard, slots) = (state.slots.shard(), state.slots);
            let replica = self.shards.get_or_insert(shard, || Replica::empty(shard, slots));
            replica.slots = slots;
            let Some((replica, mut turn)) = self.replica_in_turn(shard) else { continue };
            replica.begin_child(&mut turn, state, is_good);
            begun.push(shard);
        }
        begun
    }
}

/// The slot at which the entry splits the shard, if it does.
fn split_at(replica: &Replica, seq: Seq) -> Option<u16> {
    match replica.log.get(seq)?.entry.body {
        Body::Split { at } => Some(at),
        _ => None,
    }
}
