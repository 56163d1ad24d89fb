//! Applying entries of the log to the table, and flushing the table into the state.
//!
//! ```text
//!   Durable ──▶ commit moves ──▶ apply ──▶ active table ───seal───▶ Flush ──▶ Ingested
//!                                  ▲
//!                     Load ──▶ Loaded (ops that ask for a value)
//! ```
//!
//! A loaded value is added to the tables as they are when the entry is applied. That is right as
//! long as no ingest has come between: an ingest moves table content below the value that was
//! loaded. So every load records how many ingests there had been, and is repeated if there was
//! another.

use std::collections::BTreeSet;

use crate::apply::{self, Loaded, Needs, ShardState, Values};
use crate::entry::Position;
use crate::idempotency::TokenRecord;
use crate::ids::{CopyNo, Now, Seq, ShardId, StoreId};
use crate::key::CounterKey;
use crate::memory;
use crate::message::{BatchReply, DigestPoint, NodeReply};
use crate::node::{Effect, Node, turn_of};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::log::Loading;
use crate::replica::primary::Feed;
use crate::replica::trust::Trust;
use crate::store::log::index::Needed;

/// A load in flight: what it reads, and the entry or read that waits for it.
#[derive(Clone, Debug)]
pub(super) struct PendingLoad {
    needs: Needs,
    purpose: LoadPurpose,
}

impl PendingLoad {
    /// Returns the bytes of memory that it takes; the names are those of the entry or the read.
    pub(super) fn bytes(&self) -> usize {
        match self.purpose {
            LoadPurpose::Entry { .. } => memory::of_map::<u64, Self>(1) + self.needs.bytes(),
            LoadPurpose::Read { .. } => 0, // Counted with the read.
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum LoadPurpose {
    Entry { shard: ShardId, seq: Seq },
    Read { read: u64 },
}

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
}

impl Node {
    pub(super) fn on_durable(&mut self, group: u64, effects: &mut Vec<Effect>) {
        for (shard, seq) in self.groups.on_durable(group, self.now) {
            if let Some(replica) = self.replicas.get_mut(&shard) {
                replica.on_durable(seq);
                self.dirty.insert(shard);
            }
        }
        self.send_due_acks(effects);
    }

    /// Moves a shard's commit, then applies what is committed.
    pub(super) fn advance(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let (me, min, planted) = (self.me.store, self.min_in_sync(), self.settings.planted);
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let mut durable = replica.log.durable();
        if Planted::CountOwnUnsynced.is_in(planted) {
            durable = replica.log.last().seq;
        }
        if let Some(primary) = replica.primary_mut()
            && let Some(seq) = primary.committable(me, durable, min, planted)
        {
            if !primary.active {
                primary.active = true;
                self.to_review.insert(shard);
            }
            replica.commit = replica.commit.max(seq);
        }
        self.apply_committed(shard, planted, effects);
    }

    fn apply_committed(
        &mut self,
        shard: ShardId,
        planted: Option<Planted>,
        effects: &mut Vec<Effect>,
    ) {
        let before = self.replicas.get(&shard).map_or(Seq(0), |replica| replica.state.applied.seq);
        loop {
            let next = self.replicas.get(&shard).and_then(Replica::next_to_apply);
            let Some(seq) = next.filter(|_| self.make_room(shard, effects)) else { break };
            let Some(replica) = self.replicas.get_mut(&shard) else { return };
            let Some(held) = replica.log.get(seq) else { break };
            let Some(work) = &held.work else { break };
            let none = Loaded::default();
            let loaded = match &work.loading {
                Loading::Ready { loaded, ingests }
                    if *ingests == self.ingests || Planted::UseStaleLoad.is_in(planted) =>
                {
                    loaded
                }
                Loading::Asked { .. } => break,
                _ if apply::needs(&work.decoded, replica.state.slots).is_empty() => &none,
                _ => {
                    self.load_for_entry(shard, seq, effects);
                    break;
                }
            };
            let (entry, decoded) = (&held.entry, &work.decoded);
            let (state, limits) = (&mut replica.state, self.settings.limits());
            let answer = apply::apply(state, &mut self.tables, entry, decoded, loaded, &limits);
            let batch = match &entry.body {
                crate::entry::Body::Ops(batch) => {
                    Some((batch.slots, batch.session, batch.batch_seq))
                }
                _ => None,
            };
            replica.on_applied(seq, &self.settings.sizes);
            self.memory.on_applied(shard, seq);
            if let Some(BatchReply::Applied { tokens, .. }) = &answer
                && replica.primary().is_some()
            {
                self.token_counts.count(tokens);
            }
            self.flushing.unflushed_since.get_or_insert(self.now);
            let waiting = replica.primary_mut().and_then(|primary| primary.waiting.remove(&seq));
            if let Some((((conn, message), answer), (slots, session, batch_seq))) =
                waiting.zip(answer).zip(batch)
            {
                let reply = NodeReply::Answer { message, slots, session, batch_seq, answer };
                effects.push(Effect::Gateway { conn, reply });
            }
        }
        self.compare_if_reached(shard, before, effects);
    }

    // ---- loads ---------------------------------------------------------------------------------

    /// Loads what the entries from `from` on will need, while they wait for their commit.
    pub(super) fn prefetch(&mut self, shard: ShardId, from: Seq, effects: &mut Vec<Effect>) {
        let mut seq = from;
        while let Some(replica) = self.replicas.get(&shard)
            && let Some(held) = replica.log.get(seq)
        {
            let Some(work) = &held.work else { return };
            let needs = || apply::needs(&work.decoded, replica.state.slots);
            if work.loading == Loading::NotAsked && !needs().is_empty() {
                self.load_for_entry(shard, seq, effects);
            }
            seq = seq.next();
        }
    }

    fn load_for_entry(&mut self, shard: ShardId, seq: Seq, effects: &mut Vec<Effect>) {
        let (load, ingests) = (self.fresh_id(), self.ingests);
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let Some(work) = replica.log.get(seq).and_then(|held| held.work.as_ref()) else { return };
        let needs = apply::needs(&work.decoded, replica.state.slots);
        replica.log.set_loading(seq, Loading::Asked { load, ingests });
        let purpose = LoadPurpose::Entry { shard, seq };
        self.await_load(load, PendingLoad { needs: needs.clone(), purpose });
        effects.push(Effect::Load { load, needs });
    }

    fn await_load(&mut self, load: u64, pending: PendingLoad) {
        self.memory.loads += pending.bytes();
        self.loads.insert(load, pending);
    }

    pub(super) fn load_for_read(
        &mut self,
        read: u64,
        counters: Vec<CounterKey>,
        effects: &mut Vec<Effect>,
    ) {
        let load = self.fresh_id();
        let purpose = LoadPurpose::Read { read };
        let needs = Needs { counters, records: Vec::new() };
        self.await_load(load, PendingLoad { needs: needs.clone(), purpose });
        effects.push(Effect::Load { load, needs });
    }

    pub(super) fn on_loaded(
        &mut self,
        load: u64,
        values: Vec<Option<i128>>,
        records: Vec<Option<TokenRecord>>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(asked) = self.loads.remove(&load) else { return };
        self.memory.loads -= asked.bytes();
        let pairs = asked.needs.counters.into_iter().zip(values);
        let values: Values = pairs.map(|(key, value)| (key, value.unwrap_or(0))).collect();
        let pairs = asked.needs.records.into_iter().zip(records);
        let records = pairs.filter_map(|(id, record)| Some((id, record?))).collect();
        match asked.purpose {
            LoadPurpose::Read { read } => self.on_read_loaded(read, values, effects),
            LoadPurpose::Entry { shard, seq } => {
                let Some(replica) = self.replicas.get_mut(&shard) else { return };
                let held = replica.log.get(seq).and_then(|held| held.work.as_ref());
                match held.map(|work| &work.loading) {
                    Some(&Loading::Asked { load: asked, ingests }) if asked == load => {
                        let loaded = Loaded { values, records };
                        replica.log.set_loading(seq, Loading::Ready { loaded, ingests });
                        self.dirty.insert(shard);
                    }
                    _ => {} // The entry was cut and replaced by another one.
                }
            }
        }
    }

    // ---- flushing ------------------------------------------------------------------------------

    /// Begins a flush if the table is full or old enough, or one was requested, and none is in
    /// flight.
    pub(super) fn flush_if_due(&mut self, effects: &mut Vec<Effect>) {
        let Some(since) = self.flushing.unflushed_since else {
            self.flushing.wanted = false;
            return;
        };
        let due = self.flushing.wanted
            || self.now.ms_since(since) >= self.settings.flush_after_ms
            || self.is_table_full();
        if due && !self.is_flushing() {
            self.begin_flush(effects);
        }
    }

    /// Returns whether the active table has reached its limit.
    pub(super) fn is_table_full(&self) -> bool {
        self.tables.active.fills(self.settings.table_bytes_max)
    }

    pub(super) fn is_flushing(&self) -> bool {
        self.flushing.in_flight.is_some()
    }

    pub(super) fn begin_flush(&mut self, effects: &mut Vec<Effect>) {
        self.flushing.last += 1;
        self.flushing.wanted = false;
        self.flushing.unflushed_since = None;
        let flush = self.flushing.last;
        let active = std::mem::take(&mut self.tables.active);
        let table = std::sync::Arc::new(active.seal());
        self.tables.sealed = Some(table.clone());
        let records = std::mem::take(&mut self.flushing.records);
        let (mut shards, mut marks) = (Vec::new(), Vec::new());
        for replica in self.replicas.values().filter(|replica| replica.trust.exists()) {
            let asked = records.contains(&replica.shard);
            if asked || replica.state.applied.seq > replica.flushed.seq {
                shards.push((replica.copy, replica.state.clone()));
                marks.push((replica.copy, replica.state.applied, replica.digest()));
            }
        }
        if Planted::FlushWithoutSessions.is_in(self.settings.planted) {
            shards
                .iter_mut()
                .for_each(|(_, state): &mut (_, ShardState)| state.sessions.rows.clear());
        }
        self.flushing.in_flight = Some(FlushInFlight { flush, shards: marks });
        effects.push(Effect::Flush { flush, table, shards });
    }

    /// Requests a flush of everything that is in the tables now. Returns its number; `None` if the
    /// state contains everything already.
    pub(super) fn request_flush(&mut self) -> Option<u64> {
        if self.flushing.unflushed_since.is_some() {
            self.flushing.wanted = true;
            return Some(self.flushing.last + 1);
        }
        self.flushing.in_flight.as_ref().map(|in_flight| in_flight.flush)
    }

    /// Requests that the state contains a record of the shard: of an empty copy, if nothing was
    /// applied yet.
    pub(super) fn request_record(&mut self, shard: ShardId) {
        if Planted::EmptyIsNoCopy.is_in(self.settings.planted) {
            self.request_flush();
            return;
        }
        self.flushing.records.insert(shard);
        self.flushing.unflushed_since.get_or_insert(self.now);
        self.flushing.wanted = true;
    }

    pub(super) fn on_ingested(&mut self, flush: u64, effects: &mut Vec<Effect>) {
        let Some(done) = self.flushing.in_flight.take_if(|in_flight| in_flight.flush == flush)
        else {
            return;
        };
        self.tables.sealed = None;
        self.ingests += 1;
        self.dirty.extend(self.memory.held_up());
        for (copy, applied, point) in done.shards {
            let Some(replica) = self.replicas.get_mut(&point.shard) else { continue };
            if !replica.trust.exists() || replica.copy != copy {
                continue;
            }
            replica.recorded = true;
            if applied.seq > replica.flushed.seq {
                replica.flushed = applied;
                replica.flushed_point = point;
            }
        }
        self.after_flush(flush, effects);
        self.trim(effects);
        self.flush_if_due(effects);
    }

    /// Emits again what is needed of the log, which may have become less without a flush: a
    /// follower has acknowledged more, or a copy was replaced. Of an oldest segment kept by a few
    /// entries these are carried over, a part each time.
    pub(super) fn trim_if_due(&mut self, effects: &mut Vec<Effect>) {
        if self.now >= self.next_trim && !Planted::TrimOnlyOnFlush.is_in(self.settings.planted) {
            self.trim(effects);
        }
    }

    /// Handles a change of the disk-full state: what a flush and a trim can free is freed now.
    pub(super) fn on_disk_full(&mut self, full: bool, effects: &mut Vec<Effect>) {
        self.disk_full = full;
        self.to_review.extend(self.replicas.keys().copied());
        if full {
            self.request_flush();
            self.flush_if_due(effects);
            self.next_trim = self.now;
            self.trim_if_due(effects);
        }
    }

    fn trim(&mut self, effects: &mut Vec<Effect>) {
        self.next_trim = self.now.plus_ms(self.settings.timing.trim_every_ms);
        let existing = self.replicas.values().filter(|replica| replica.trust.exists());
        let shards = existing.map(|replica| self.needed(replica)).collect();
        effects.push(Effect::Trim { shards });
    }

    fn needed(&self, replica: &Replica) -> Needed {
        let mut members = replica.flushed.seq;
        if let Some(primary) = replica.primary() {
            for follower in primary.followers.values() {
                let fed_otherwise =
                    matches!(follower.feed, Feed::NeedsSnapshot | Feed::Snapshot { .. });
                if !fed_otherwise {
                    members = members.min(follower.acked);
                }
            }
            let absent =
                |store: &StoreId| *store != self.me.store && !primary.followers.contains_key(store);
            if primary.record.target.iter().any(absent) {
                members = Seq(0); // The store may return and continue from its log.
            }
        }
        if let Some(pin) = self.transfers.pin(replica.shard) {
            members = members.min(pin);
        }
        let (flushed, applied) = (replica.flushed.seq, replica.state.applied.seq);
        Needed { shard: replica.shard, flushed, applied, members }
    }

    /// Creates an empty copy of a shard that etcd assigns to this store.
    pub(super) fn create_copy(&mut self, shard: ShardId, fit: bool, effects: &mut Vec<Effect>) {
        let Some((record, _)) = self.records.get(&shard) else { return };
        let slots = record.slots;
        let replica = self.replicas.entry(shard).or_insert_with(|| Replica::empty(shard, slots));
        if replica.trust.exists() {
            return;
        }
        if replica.trust == (Trust::Absent { clean: false }) {
            // After a start that found the number of a dropped copy, its slots are not known.
            replica.slots = slots;
            self.drop_rows(shard, effects); // The copy is created once they are gone.
            return;
        }
        replica.create(&mut turn_of!(self, effects), slots, fit);
        self.announce_copy(shard, effects);
    }
}
