//! Linearizable reads: capture, prove current, answer (DESIGN §8).
//!
//! A value is what the tables hold of a counter, over what the state holds below them. Both are
//! taken as they are at one moment: the tables' part is copied, the state's part is read by a load
//! that begins before anything else happens. Why what was captured may be told later stands in
//! [`proving`](super::proving).

use std::collections::BTreeMap;

use crate::apply::Values;
use crate::ids::{Conn, Epoch, Now, Slots, TimeMs};
use crate::key::{self, CounterKey};
use crate::memory;
use crate::message::{NodeReply, ReadResult, Refusal};
use crate::node::proving::Verdict;
use crate::node::{Effect, Node, Sizes};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::store::table::Cell;

#[derive(Clone, Debug, Default)]
pub(super) struct Reads {
    waiting: BTreeMap<u64, Waiting>,
    /// What they take of memory.
    bytes: usize,
}

/// What a gateway asks for: all keys lie in the shard's slots.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub conn: Conn,
    pub id: u64,
    pub slots: Slots,
    pub keys: Vec<CounterKey>,
}

#[derive(Clone, Debug)]
struct Waiting {
    ask: Ask,
    worth: Worth,
    /// What the tables held of each key at the capture.
    cells: Vec<Option<Cell>>,
    /// What the state held below them; none while it is being loaded.
    base: Option<Values>,
    time: TimeMs,
}

/// What makes a captured value worth telling.
#[derive(Clone, Copy, Debug)]
pub(super) enum Worth {
    /// It is current once it is proved that this node led in this epoch at the capture.
    Leading { epoch: Epoch, proven: bool },
    /// It holds everything that was acknowledged by then.
    AsOf(Now),
}

impl Reads {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// No room for another one.
    pub(super) fn is_full(&self, sizes: &Sizes) -> bool {
        self.waiting.len() >= sizes.waiting_reads_max || self.bytes >= sizes.waiting_read_bytes_max
    }

    /// What the waiting reads take of memory, as counted.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The same, by looking at every read.
    pub(super) fn walked_bytes(&self) -> usize {
        self.waiting.values().map(Waiting::walked_bytes).sum()
    }

    fn insert(&mut self, read: u64, waiting: Waiting) {
        self.bytes += waiting.ask.bytes();
        self.waiting.insert(read, waiting);
    }

    fn remove(&mut self, read: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&read)?;
        self.bytes -= waiting.ask.bytes();
        Some(waiting)
    }

    /// The connection is gone, and with it whoever asked: the numbers of what is not answered.
    fn forget(&mut self, conn: Conn) -> Vec<u64> {
        let gone = self.waiting.iter().filter(|(_, read)| read.ask.conn == conn);
        let gone: Vec<u64> = gone.map(|(&read, _)| read).collect();
        gone.iter().for_each(|&read| drop(self.remove(read)));
        gone
    }
}

impl Waiting {
    fn walked_bytes(&self) -> usize {
        let base = self.base.as_ref().map_or(0, BTreeMap::len);
        self.ask.walked_bytes()
            + memory::of_map::<u64, Self>(1)
            + memory::allocated(self.cells.capacity() * size_of::<Option<Cell>>())
            + memory::of_map::<CounterKey, i128>(base)
    }
}

impl Node {
    /// A linearizable read.
    pub(super) fn on_read(&mut self, ask: Ask, effects: &mut Vec<Effect>) {
        match self.may_read(&ask) {
            Ok(epoch) => {
                let shard = ask.slots.shard();
                let proven = Planted::ReadUnproven.is_in(self.settings.planted);
                let read = self.capture(ask, Worth::Leading { epoch, proven }, effects);
                self.claim(read, shard, epoch);
            }
            Err(refusal) => refuse(&ask, refusal, effects),
        }
    }

    fn may_read(&self, ask: &Ask) -> Result<Epoch, Refusal> {
        let shard = ask.slots.shard();
        let refer = || self.refer(shard);
        let replica =
            self.replicas.get(&shard).ok_or_else(|| refer().unwrap_or(Refusal::NoSuchShard))?;
        let primary =
            replica.primary().ok_or_else(|| refer().unwrap_or(Refusal::NotPrimary(None)))?;
        if !ask.is_of(replica) {
            return Err(Refusal::NoSuchShard);
        }
        // A value captured before the barrier is applied may lack what a former primary has
        // acknowledged. (Seed 16: apply waited for a load.)
        let applied = replica.state.applied.seq >= primary.barrier
            || Planted::ReadBelowBarrier.is_in(self.settings.planted);
        if !primary.active || !applied || !replica.trust.is_working() {
            return Err(if primary.frozen { Refusal::Frozen } else { Refusal::NotPrimary(None) });
        }
        let full = self.reads.is_full(&self.settings.sizes);
        if full && !Planted::WaitingUnbounded.is_in(self.settings.planted) {
            return Err(Refusal::Overloaded);
        }
        Ok(primary.epoch)
    }

    /// Takes the applied values of a replica that is here, as they are now.
    pub(super) fn capture(&mut self, ask: Ask, worth: Worth, effects: &mut Vec<Effect>) -> u64 {
        let cell = |key: &CounterKey| self.tables.cell(key.name(), key::hash(key.name()));
        let cells: Vec<_> = ask.keys.iter().map(cell).collect();
        let below = ask.keys.iter().zip(&cells);
        let to_load: Vec<_> = below
            .filter(|(_, cell)| !matches!(cell, Some(Cell::Absolute(_))))
            .map(|(key, _)| key.clone())
            .collect();
        let base = to_load.is_empty().then(Values::new);
        let replica = self.replicas.get(&ask.slots.shard());
        let time = replica.map_or(TimeMs(0), |replica| replica.state.applied.time);
        let read = self.fresh_id();
        self.reads.insert(read, Waiting { ask, worth, cells, base, time });
        if !to_load.is_empty() && !Planted::TableThenDatabase.is_in(self.settings.planted) {
            self.load_for_read(read, to_load, effects);
        }
        read
    }

    pub(super) fn on_read_loaded(&mut self, read: u64, values: Values, effects: &mut Vec<Effect>) {
        if let Some(waiting) = self.reads.waiting.get_mut(&read) {
            waiting.base = Some(values);
        }
        self.answer_if_ready(read, effects);
    }

    pub(super) fn on_read_judged(
        &mut self,
        read: u64,
        verdict: Verdict,
        effects: &mut Vec<Effect>,
    ) {
        let Some(waiting) = self.reads.waiting.get_mut(&read) else { return };
        match verdict {
            Verdict::Current => {}
            Verdict::Replaced => return self.refuse_read(read, Refusal::NotPrimary(None), effects),
            Verdict::Unknown => return self.refuse_read(read, Refusal::Frozen, effects),
        }
        if let Worth::Leading { proven, .. } = &mut waiting.worth {
            *proven = true;
        }
        if waiting.base.is_none() && Planted::TableThenDatabase.is_in(self.settings.planted) {
            let keys = waiting.ask.keys.clone();
            self.load_for_read(read, keys, effects);
        }
        self.answer_if_ready(read, effects);
    }

    pub(super) fn answer_if_ready(&mut self, read: u64, effects: &mut Vec<Effect>) {
        let Some(waiting) = self.reads.waiting.get(&read) else { return };
        let Some(base) = &waiting.base else { return };
        let staleness_us = match waiting.worth {
            Worth::Leading { proven: false, .. } => return,
            Worth::Leading { epoch, .. } if !self.leads(waiting.ask.slots.shard(), epoch) => {
                return self.refuse_read(read, Refusal::NotPrimary(None), effects);
            }
            Worth::Leading { .. } => 0,
            Worth::AsOf(then) => self.now.0 - then.0,
        };
        let value = |(key, cell): (&CounterKey, &Option<Cell>)| {
            let below = base.get(key).copied().unwrap_or(0);
            cell.map_or(below, |cell| cell.value(Some(below)))
        };
        let values = waiting.ask.keys.iter().zip(&waiting.cells).map(value).collect();
        let result = Ok(ReadResult { values, time: waiting.time, staleness_us });
        let (conn, id) = (waiting.ask.conn, waiting.ask.id);
        self.reads.remove(read);
        effects.push(Effect::Gateway { conn, reply: NodeReply::Read { id, result } });
    }

    fn refuse_read(&mut self, read: u64, refusal: Refusal, effects: &mut Vec<Effect>) {
        let Some(waiting) = self.reads.remove(read) else { return };
        let refusal = match refusal {
            Refusal::NotPrimary(None) => {
                self.refer(waiting.ask.slots.shard()).unwrap_or(Refusal::NotPrimary(None))
            }
            other => other,
        };
        refuse(&waiting.ask, refusal, effects);
    }

    pub(super) fn forget_reads(&mut self, conn: Conn) {
        self.reads.forget(conn).into_iter().for_each(|read| self.proving.forget(read));
    }
}

impl Ask {
    /// What it takes of memory at most while it waits: its keys, and for each what the tables held and
    /// what the state holds, which is asked for by another list of the keys.
    pub(super) fn bytes(&self) -> usize {
        let keys = self.keys.len();
        let each = 2 * size_of::<CounterKey>() + size_of::<Option<Cell>>();
        self.name_bytes()
            + memory::of_map::<u64, Waiting>(1)
            + memory::allocated(keys * each)
            + memory::of_map::<CounterKey, i128>(keys)
    }

    /// What it takes now, by itself.
    pub(super) fn walked_bytes(&self) -> usize {
        self.name_bytes() + memory::allocated(self.keys.capacity() * size_of::<CounterKey>())
    }

    /// Its names lie in one piece.
    fn name_bytes(&self) -> usize {
        memory::of_bytes(self.keys.iter().map(|key| key.name().len()).sum())
    }

    /// It asks for this replica's counters.
    pub(super) fn is_of(&self, replica: &Replica) -> bool {
        let inside = |key: &CounterKey| self.slots.contains(key.slot());
        replica.slots == self.slots && self.keys.iter().all(inside)
    }
}

pub(super) fn refuse(ask: &Ask, refusal: Refusal, effects: &mut Vec<Effect>) {
    let reply = NodeReply::Read { id: ask.id, result: Err(refusal) };
    effects.push(Effect::Gateway { conn: ask.conn, reply });
}
