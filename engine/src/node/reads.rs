//! Linearizable reads without a clock: capture, prove current, answer (DESIGN §8).
//!
//! The order is the whole argument. A value is captured first; then every other member of M says,
//! to a round that began after the capture, that it has promised no higher epoch. A newer primary
//! would have needed the promise of one of them before it could commit anything, so nothing was
//! acknowledged by the moment of the capture that the value lacks. A pause after the proof does no
//! harm: the read then answers with what was right while it was under way.
//!
//! One round serves all reads that wait for it. A round that some peer does not answer in time is
//! replaced by one linearizable etcd read, begun after the captures too.

use std::collections::{BTreeMap, BTreeSet};

use crate::apply::Loaded;
use crate::config::ShardConfig;
use crate::ids::{Conn, Epoch, Now, ShardId, Slots, StoreId, TimeMs};
use crate::key::{self, CounterKey};
use crate::message::{NodeReply, ReadResult, Refusal, ToFollower};
use crate::node::{Effect, Node};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::store::table::Cell;

/// Reads waiting at once, all connections together.
const WAITING_MAX: usize = 100_000;

#[derive(Debug, Default)]
pub(super) struct Reads {
    waiting: BTreeMap<u64, Waiting>,
    /// Captured, and in no round yet.
    unproven: BTreeSet<u64>,
    round: Option<Round>,
    /// Reads that a round did not prove in time.
    for_etcd: BTreeSet<u64>,
    /// The etcd read under way, and the reads that it will prove.
    check: Option<(u64, BTreeSet<u64>)>,
    next_check: Now,
}

#[derive(Debug)]
struct Waiting {
    conn: Conn,
    id: u64,
    shard: ShardId,
    epoch: Epoch,
    keys: Vec<CounterKey>,
    /// What the tables held of each key at the capture.
    cells: Vec<Option<Cell>>,
    /// What the state held below them; none while it is being loaded.
    base: Option<Loaded>,
    time: TimeMs,
    since: Now,
    proven: bool,
}

/// One question to all peers.
#[derive(Debug)]
struct Round {
    number: u64,
    until: Now,
    reads: BTreeSet<u64>,
    /// Peers whose answer a shard still waits for.
    missing: BTreeMap<ShardId, BTreeSet<StoreId>>,
}

impl Reads {
    /// When to look again although nothing has come.
    pub(super) fn deadline(&self) -> Option<Now> {
        let round = self.round.as_ref().map(|round| round.until);
        let check = (!self.for_etcd.is_empty() && self.check.is_none()).then_some(self.next_check);
        round.into_iter().chain(check).min()
    }

    /// Whoever asked is gone: so is what was to prove it.
    fn nobody_waits(&mut self) {
        self.unproven.clear();
        self.for_etcd.clear();
        self.round = None;
    }

    /// The connection is gone, and with it whoever asked.
    pub(super) fn forget(&mut self, conn: Conn) {
        self.waiting.retain(|_, read| read.conn != conn);
    }
}

impl Node {
    pub(super) fn on_read(
        &mut self,
        conn: Conn,
        id: u64,
        slots: Slots,
        keys: Vec<CounterKey>,
        effects: &mut Vec<Effect>,
    ) {
        match self.capture(conn, id, slots, keys, effects) {
            Ok(read) => {
                let joins_old_round = Planted::CheckReadBeforeCapture.is_in(self.settings.planted);
                match &mut self.reads.round {
                    Some(round) if joins_old_round => {
                        round.reads.insert(read);
                    }
                    _ => {
                        self.reads.unproven.insert(read);
                    }
                }
            }
            Err(refusal) => {
                let reply = NodeReply::Read { id, result: Err(refusal) };
                effects.push(Effect::Gateway { conn, reply });
            }
        }
    }

    /// Takes the applied values as they are now. The tables are copied; the state below them is
    /// read as it is now, by a load that begins before anything else happens.
    fn capture(
        &mut self,
        conn: Conn,
        id: u64,
        slots: Slots,
        keys: Vec<CounterKey>,
        effects: &mut Vec<Effect>,
    ) -> Result<u64, Refusal> {
        let shard = slots.shard();
        let refer = || self.refer(shard);
        let replica =
            self.replicas.get(&shard).ok_or_else(|| refer().unwrap_or(Refusal::NoSuchShard))?;
        let primary =
            replica.primary().ok_or_else(|| refer().unwrap_or(Refusal::NotPrimary(None)))?;
        if replica.slots != slots || keys.iter().any(|key| !slots.contains(key.slot())) {
            return Err(Refusal::NoSuchShard);
        }
        // A value captured before the barrier is applied may lack what a former primary has
        // acknowledged. (Seed 16: apply waited for a load.)
        let applied = replica.state.applied.seq >= primary.barrier;
        if !primary.active || !applied || replica.stopped.is_some() {
            return Err(if primary.frozen { Refusal::Frozen } else { Refusal::NotPrimary(None) });
        }
        if self.reads.waiting.len() >= WAITING_MAX {
            return Err(Refusal::Overloaded);
        }
        let (epoch, time) = (primary.epoch, replica.state.applied.time);
        let cell = |key: &CounterKey| self.tables.cell(key.name(), key::hash(key.name()));
        let cells: Vec<_> = keys.iter().map(cell).collect();
        let below = keys.iter().zip(&cells);
        let to_load: Vec<_> = below
            .filter(|(_, cell)| !matches!(cell, Some(Cell::Absolute(_))))
            .map(|(key, _)| key.clone())
            .collect();
        let base = to_load.is_empty().then(Loaded::new);
        let read = self.fresh_id();
        let since = self.now;
        let waiting =
            Waiting { conn, id, shard, epoch, keys, cells, base, time, since, proven: false };
        self.reads.waiting.insert(read, waiting);
        if !to_load.is_empty() && !Planted::TableThenDatabase.is_in(self.settings.planted) {
            self.load_for_read(read, to_load, effects);
        }
        Ok(read)
    }

    pub(super) fn on_read_loaded(&mut self, read: u64, values: Loaded, effects: &mut Vec<Effect>) {
        if let Some(waiting) = self.reads.waiting.get_mut(&read) {
            waiting.base = Some(values);
        }
        self.answer_if_ready(read, effects);
    }

    /// Begins what can begin: a round for what was captured, an etcd read for what no round proved.
    pub(super) fn advance_reads(&mut self, effects: &mut Vec<Effect>) {
        if self.reads.waiting.is_empty() {
            self.reads.nobody_waits();
            return;
        }
        self.close_late_round(effects);
        self.begin_round(effects);
        self.begin_etcd_check(effects);
        self.give_up(effects);
    }

    fn begin_round(&mut self, effects: &mut Vec<Effect>) {
        if self.reads.round.is_some() || self.reads.unproven.is_empty() {
            return;
        }
        let reads = std::mem::take(&mut self.reads.unproven);
        let number = self.fresh_id();
        let mut missing = BTreeMap::new();
        let mut questions: BTreeMap<StoreId, Vec<(ShardId, Epoch)>> = BTreeMap::new();
        let shards: BTreeSet<_> =
            reads.iter().filter_map(|read| Some(self.reads.waiting.get(read)?.shard)).collect();
        for shard in shards {
            let Some(primary) = self.replicas.get(&shard).and_then(Replica::primary) else {
                continue;
            };
            let mut members = primary.members(None);
            members.remove(&self.me.store);
            for &member in &members {
                questions.entry(member).or_default().push((shard, primary.epoch));
            }
            missing.insert(shard, members);
        }
        for (store, shards) in questions {
            let Some(&conn) = self.dialled_to.get(&store) else { continue };
            let message = ToFollower::ReadIndex { round: number, shards };
            effects.push(Effect::ToFollower { conn, message });
        }
        self.reads.round = Some(Round {
            number,
            until: self.now.plus_ms(self.settings.read_index_ms),
            reads,
            missing,
        });
        self.finish_round_if_answered(effects);
    }

    pub(super) fn on_read_index_answer(
        &mut self,
        store: StoreId,
        number: u64,
        newer: &[(ShardId, Epoch)],
        effects: &mut Vec<Effect>,
    ) {
        let Some(round) = &mut self.reads.round else { return };
        if round.number != number {
            return;
        }
        for (shard, missing) in &mut round.missing {
            if !newer.iter().any(|(newer, _)| newer == shard) {
                missing.remove(&store);
            }
        }
        self.finish_round_if_answered(effects);
    }

    fn finish_round_if_answered(&mut self, effects: &mut Vec<Effect>) {
        let Some(round) = &self.reads.round else { return };
        if round.missing.values().any(|missing| !missing.is_empty()) {
            return;
        }
        if let Some(round) = self.reads.round.take() {
            round.reads.into_iter().for_each(|read| self.on_proven(read, effects));
        }
        self.begin_round(effects);
    }

    /// A peer has not answered in time: reads of other shards are proved all the same, the rest is
    /// left to etcd.
    fn close_late_round(&mut self, effects: &mut Vec<Effect>) {
        let Some(round) = self.reads.round.take_if(|round| self.now >= round.until) else { return };
        for read in round.reads {
            let shard = self.reads.waiting.get(&read).map(|read| read.shard);
            let missing = shard.and_then(|shard| round.missing.get(&shard));
            if missing.is_some_and(BTreeSet::is_empty) {
                self.on_proven(read, effects);
            } else {
                self.reads.for_etcd.insert(read);
            }
        }
    }

    fn begin_etcd_check(&mut self, effects: &mut Vec<Effect>) {
        let idle = self.reads.check.is_none() && !self.reads.for_etcd.is_empty();
        if !idle || self.now < self.reads.next_check {
            return;
        }
        self.reads.next_check = self.now.plus_ms(self.settings.etcd_check_every_ms);
        let reads = std::mem::take(&mut self.reads.for_etcd);
        let shards: BTreeSet<_> =
            reads.iter().filter_map(|read| Some(self.reads.waiting.get(read)?.shard)).collect();
        let check = self.fresh_id();
        self.reads.check = Some((check, reads));
        effects.push(Effect::CheckEtcd { check, shards: shards.into_iter().collect() });
    }

    pub(super) fn on_etcd_checked(
        &mut self,
        check: u64,
        configs: Option<Vec<ShardConfig>>,
        effects: &mut Vec<Effect>,
    ) {
        let Some((_, reads)) = self.reads.check.take_if(|(number, _)| *number == check) else {
            return;
        };
        let Some(configs) = configs else {
            self.reads.for_etcd.extend(reads); // Etcd did not answer: ask again.
            return;
        };
        for read in reads {
            let Some(waiting) = self.reads.waiting.get(&read) else { continue };
            let current = configs.iter().any(|config| {
                config.shard() == waiting.shard
                    && config.epoch == waiting.epoch
                    && config.primary == self.me
            });
            if current {
                self.on_proven(read, effects);
            } else {
                self.refuse_read(read, Refusal::NotPrimary(None), effects);
            }
        }
    }

    fn on_proven(&mut self, read: u64, effects: &mut Vec<Effect>) {
        let Some(waiting) = self.reads.waiting.get_mut(&read) else { return };
        waiting.proven = true;
        if waiting.base.is_none() && Planted::TableThenDatabase.is_in(self.settings.planted) {
            let keys = waiting.keys.clone();
            self.load_for_read(read, keys, effects);
        }
        self.answer_if_ready(read, effects);
    }

    fn answer_if_ready(&mut self, read: u64, effects: &mut Vec<Effect>) {
        let Some(waiting) = self.reads.waiting.get(&read) else { return };
        let Some(base) = waiting.base.as_ref().filter(|_| waiting.proven) else { return };
        let leads = self
            .replicas
            .get(&waiting.shard)
            .and_then(Replica::primary)
            .is_some_and(|primary| primary.epoch == waiting.epoch);
        if !leads {
            self.refuse_read(read, Refusal::NotPrimary(None), effects);
            return;
        }
        let value = |(key, cell): (&CounterKey, &Option<Cell>)| {
            let below = base.get(key).copied().unwrap_or(0);
            cell.map_or(below, |cell| cell.value(Some(below)))
        };
        let values = waiting.keys.iter().zip(&waiting.cells).map(value).collect();
        let result = Ok(ReadResult { values, time: waiting.time });
        let (conn, id) = (waiting.conn, waiting.id);
        self.reads.waiting.remove(&read);
        effects.push(Effect::Gateway { conn, reply: NodeReply::Read { id, result } });
    }

    fn refuse_read(&mut self, read: u64, refusal: Refusal, effects: &mut Vec<Effect>) {
        let Some(waiting) = self.reads.waiting.remove(&read) else { return };
        let refusal = match refusal {
            Refusal::NotPrimary(None) => {
                self.refer(waiting.shard).unwrap_or(Refusal::NotPrimary(None))
            }
            other => other,
        };
        let reply = NodeReply::Read { id: waiting.id, result: Err(refusal) };
        effects.push(Effect::Gateway { conn: waiting.conn, reply });
    }

    fn give_up(&mut self, effects: &mut Vec<Effect>) {
        let limit = self.settings.read_give_up_ms;
        // Reads are numbered as they come, so the oldest is the first.
        while let Some((&read, waiting)) = self.reads.waiting.first_key_value()
            && self.now.ms_since(waiting.since) >= limit
        {
            self.refuse_read(read, Refusal::Frozen, effects);
        }
    }
}
