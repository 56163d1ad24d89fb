//! Flushing the table into the state, and trimming the log to what is still needed.

use std::collections::BTreeSet;

use crate::entry::Position;
use crate::ids::{CopyNo, Now, Seq, ShardId, StoreId};
use crate::message::DigestPoint;
use crate::node::event::Effect;
use crate::node::shared::NodeTurn;
use crate::node::snapshots::Snapshots;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::primary::{Feed, Primary};
use crate::shard::state::ShardState;
use crate::shard_record::ShardRecord;
use crate::store::log::index::Needed;

/// The flush in flight, and what waits for one.
#[derive(Clone, Debug, Default)]
pub(super) struct Flushing {
    /// The number of the last flush begun.
    last: u64,
    in_flight: Option<FlushInFlight>,
    /// The time when the first entry was applied that is not in a flush yet.
    unflushed_since: Option<Now>,
    /// True to flush although it is not due.
    wanted: bool,
    /// The next flush writes the records of these shards, even if nothing of them was applied.
    records: BTreeSet<ShardId>,
}

#[derive(Clone, Debug)]
struct FlushInFlight {
    flush: u64,
    shards: Vec<(CopyNo, Position, DigestPoint)>,
    /// The number of counters of the sealed table, and how many of them are written.
    counters: usize,
    written: usize,
}

impl Flushing {
    /// Records that the tables have a change which is in no flush yet.
    pub(in crate::node) fn note_change(&mut self, now: Now) {
        self.unflushed_since.get_or_insert(now);
    }
}

impl NodeTurn<'_> {
    /// Begins a flush if the table is full or old enough, or one was requested, and none is in
    /// flight.
    pub(in crate::node) fn flush_if_due(&mut self) {
        let flushing = &mut self.storage.flushing;
        let Some(since) = flushing.unflushed_since else {
            flushing.wanted = false;
            return;
        };
        let due = flushing.wanted
            || self.now.ms_since(since) >= self.settings.flush_after_ms
            || self.storage.has_full_table(self.settings.table_bytes_max);
        if due && !self.is_flushing() {
            self.begin_flush();
        }
    }

    pub(in crate::node) fn is_flushing(&self) -> bool {
        self.storage.flushing.in_flight.is_some()
    }

    /// Returns whether the active table is filled further than the flush of the sealed one permits:
    /// the first half is free, the other half as far as the flush has come. So the more a flush
    /// lags, the slower entries are applied, and when it ends, the next one can begin.
    pub(super) fn is_ahead_of_flush(&self) -> bool {
        let Some(flush) = &self.storage.flushing.in_flight else { return false };
        let (filled, max) = self.storage.tables.active.filled(self.settings.table_bytes_max);
        let (written, all) = (flush.written as u128, flush.counters.max(1) as u128);
        filled as u128 * 2 * all > max as u128 * (all + written.min(all))
    }

    /// Handles the progress of a flush: entries that it has delayed go on.
    pub(in crate::node) fn on_flush_advanced(&mut self, flush: u64, counters: usize) {
        let in_flight = self.storage.flushing.in_flight.as_mut();
        if let Some(in_flight) = in_flight.filter(|in_flight| in_flight.flush == flush) {
            in_flight.written = counters;
            self.shards.to_advance.extend(self.storage.memory.held_up());
        }
    }

    pub(super) fn begin_flush(&mut self) {
        let table = self.storage.tables.seal();
        let flushing = &mut self.storage.flushing;
        flushing.last += 1;
        flushing.wanted = false;
        flushing.unflushed_since = None;
        let records = std::mem::take(&mut flushing.records);
        let (mut shards, mut marks) = (Vec::new(), Vec::new());
        for replica in self.shards.iter_mut() {
            if let Some(child) = &mut replica.child
                && child.flush.is_none()
            {
                child.flush = Some(flushing.last);
                shards.push((child.copy, child.state.clone()));
            }
            let asked = records.contains(&replica.shard);
            if !replica.trust.exists() {
                continue;
            }
            if asked || replica.state.applied.seq > replica.flushed.seq {
                shards.push((replica.copy, replica.state.clone()));
                marks.push((replica.copy, replica.state.applied, replica.digest()));
            }
        }
        let flush = flushing.last;
        let counters = table.len();
        flushing.in_flight = Some(FlushInFlight { flush, shards: marks, counters, written: 0 });
        if self.planted(Planted::FlushWithoutSessions) {
            let states = shards.iter_mut().map(|(_, state): &mut (_, ShardState)| state);
            states.for_each(|state| state.sessions.rows.clear());
        }
        self.effects.push(Effect::Flush { flush, table, shards });
    }

    /// Requests a flush of everything that is in the tables now. Returns its number; `None` if the
    /// state contains everything already.
    pub(in crate::node) fn request_flush(&mut self) -> Option<u64> {
        let flushing = &mut self.storage.flushing;
        if flushing.unflushed_since.is_some() {
            flushing.wanted = true;
            return Some(flushing.last + 1);
        }
        flushing.in_flight.as_ref().map(|in_flight| in_flight.flush)
    }

    /// Requests that the state contains a record of the shard: of an empty copy, if nothing was
    /// applied yet.
    pub(in crate::node) fn request_record(&mut self, shard: ShardId) {
        if self.planted(Planted::EmptyIsNoCopy) {
            self.request_flush();
            return;
        }
        let flushing = &mut self.storage.flushing;
        flushing.records.insert(shard);
        flushing.note_change(self.now);
        flushing.wanted = true;
    }

    /// Handles the end of a flush: what it wrote need not be written again, and the snapshots that
    /// waited for it go on.
    pub(in crate::node) fn on_ingested(&mut self, flush: u64, snapshots: &mut Snapshots) {
        let in_flight = &mut self.storage.flushing.in_flight;
        let Some(done) = in_flight.take_if(|in_flight| in_flight.flush == flush) else { return };
        self.storage.tables.sealed = None;
        self.storage.ingests += 1;
        self.shards.to_advance.extend(self.storage.memory.held_up());
        self.shards.to_advance.extend(self.storage.divisions.shards());
        for (copy, applied, point) in done.shards {
            let Some(replica) = self.shards.get_mut(point.shard) else { continue };
            if !replica.trust.exists() || replica.copy != copy {
                continue;
            }
            replica.recorded = true;
            if applied.seq > replica.flushed.seq {
                replica.flushed = applied;
                replica.flushed_point = point;
            }
        }
        snapshots.after_flush(self, flush);
        self.trim(snapshots);
        self.flush_if_due();
    }

    /// Records that an ingest has changed the state below the tables.
    pub(in crate::node) fn note_ingest(&mut self) {
        self.storage.ingests += 1;
    }

    // ---- the log -------------------------------------------------------------------------------

    /// Emits again what is needed of the log, which may have become less without a flush: a
    /// follower has acknowledged more, or a copy was replaced. Of an oldest segment kept by a few
    /// entries these are carried over, a part each time.
    pub(in crate::node) fn trim_if_due(&mut self, snapshots: &Snapshots) {
        if self.now >= self.storage.next_trim && !self.planted(Planted::TrimOnlyOnFlush) {
            self.trim(snapshots);
        }
    }

    /// Handles a change of the disk-full state: what a flush and a trim can free is freed now.
    pub(in crate::node) fn on_disk_full(&mut self, full: bool, snapshots: &Snapshots) {
        self.storage.disk_full = full;
        let all: Vec<ShardId> = self.shards.iter().map(|replica| replica.shard).collect();
        self.shards.to_review.extend(all);
        if full {
            self.request_flush();
            self.flush_if_due();
            self.storage.next_trim = self.now;
            self.trim_if_due(snapshots);
        }
    }

    fn trim(&mut self, snapshots: &Snapshots) {
        self.storage.next_trim = self.now.plus_ms(self.settings.timing.trim_every_ms);
        let existing = self.shards.iter().filter(|replica| replica.trust.exists());
        let shards = existing.map(|replica| self.needed(replica, snapshots)).collect();
        self.effects.push(Effect::Trim { shards });
    }

    /// Returns the part of the log that the shard still needs.
    fn needed(&self, replica: &Replica, snapshots: &Snapshots) -> Needed {
        let shard = replica.shard;
        let others = match replica.primary() {
            Some(primary) => needed_by_followers(primary, self.me.store),
            None if self.planted(Planted::FollowerTrimsForItself) => replica.flushed.seq,
            None => self.needed_by_successor(shard),
        };
        let pin = snapshots.pin(shard).unwrap_or(replica.flushed.seq);
        let members = replica.flushed.seq.min(others).min(pin);
        let (flushed, applied) = (replica.flushed.seq, replica.state.applied.seq);
        Needed { shard, flushed, applied, members }
    }

    /// Returns the seq above which others would need the log if this node led the shard next. A
    /// store of the target that is not in sync may lack any part of it. Without the log of its new
    /// primary it would need a snapshot, although no log is longer than it may be.
    fn needed_by_successor(&self, shard: ShardId) -> Seq {
        let record = self.shards.records.get(&shard).map(|record| &record.0);
        let lags = |record: &ShardRecord| {
            let mut wanted = record.target.iter().chain(&record.learners);
            wanted.any(|store| *store != self.me.store && !record.isr.contains(store))
        };
        if record.is_some_and(lags) { Seq(0) } else { Seq(u64::MAX) }
    }
}

/// Returns the seq above which followers need the log.
fn needed_by_followers(primary: &Primary, me: StoreId) -> Seq {
    let absent = |store: &StoreId| *store != me && !primary.followers.contains_key(store);
    if primary.record.target.iter().any(absent) {
        return Seq(0); // The store may return and continue from its log.
    }
    let takes_log = |feed: &Feed| !matches!(feed, Feed::NeedsSnapshot | Feed::Snapshot { .. });
    let fed = primary.followers.values().filter(|follower| takes_log(&follower.feed));
    fed.map(|follower| follower.acked).min().unwrap_or(Seq(u64::MAX))
}
