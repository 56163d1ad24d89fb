//! Linearizable reads: capture the values, prove them current, answer.
//!
//! A value is what the tables contain of a counter, over what the state contains below them. Both
//! are taken as they are at one moment: the tables' part is copied, the state's part is read by a
//! load that begins before anything else happens. [`read_index`](super::read_index) explains why
//! captured values may be returned later.

use std::collections::BTreeMap;

use crate::ids::{Conn, Epoch, Now, Slots, TimeMs};
use crate::key::CounterKey;
use crate::memory;
use crate::message::{NodeReply, ReadResult, Refusal};
use crate::node::event::Effect;
use crate::node::reads::Reads;
use crate::node::reads::read_index::ClaimOutcome;
use crate::node::settings::NodeSizes;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::shard::apply::Values;
use crate::store::table::Cell;

#[derive(Clone, Debug, Default)]
pub(super) struct CapturedReads {
    waiting: BTreeMap<u64, CapturedRead>,
    /// The bytes of memory of the captured reads.
    bytes: usize,
}

/// The request of a gateway: all keys lie in the shard's slots.
#[derive(Clone, Debug)]
pub(in crate::node) struct ReadRequest {
    pub conn: Conn,
    pub id: u64,
    pub slots: Slots,
    pub keys: Vec<CounterKey>,
}

#[derive(Clone, Debug)]
struct CapturedRead {
    request: ReadRequest,
    basis: ReadBasis,
    /// The value of each key in the tables at the capture.
    cells: Vec<Option<Cell>>,
    /// The values in the state below the tables; `None` while they are being loaded.
    base: Option<Values>,
    time: TimeMs,
}

/// The condition under which captured values may be returned.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReadBasis {
    /// The values are current once it is proved that this node led in this epoch at the capture.
    Leading { epoch: Epoch, proven: bool },
    /// The values contain everything that was acknowledged by then.
    AsOf(Now),
}

impl CapturedReads {
    pub(in crate::node) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Returns whether there is no room for another read.
    pub(in crate::node) fn is_full(&self, sizes: &NodeSizes) -> bool {
        self.waiting.len() >= sizes.waiting_reads_max || self.bytes >= sizes.waiting_read_bytes_max
    }

    /// Returns the bytes of memory of the captured reads, as counted.
    pub(in crate::node) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the same, computed from every read.
    pub(in crate::node) fn walked_bytes(&self) -> usize {
        self.waiting.values().map(CapturedRead::walked_bytes).sum()
    }

    fn insert(&mut self, read: u64, waiting: CapturedRead) {
        self.bytes += waiting.request.bytes();
        self.waiting.insert(read, waiting);
    }

    fn remove(&mut self, read: u64) -> Option<CapturedRead> {
        let waiting = self.waiting.remove(&read)?;
        self.bytes -= waiting.request.bytes();
        Some(waiting)
    }

    /// Discards the reads of a closed connection. Returns their numbers.
    fn forget(&mut self, conn: Conn) -> Vec<u64> {
        let gone = self.waiting.iter().filter(|(_, read)| read.request.conn == conn);
        let gone: Vec<u64> = gone.map(|(&read, _)| read).collect();
        gone.iter().for_each(|&read| drop(self.remove(read)));
        gone
    }
}

impl CapturedRead {
    fn walked_bytes(&self) -> usize {
        let base = self.base.as_ref().map_or(0, BTreeMap::len);
        self.request.walked_bytes()
            + memory::of_map::<u64, Self>(1)
            + memory::allocated(self.cells.capacity() * size_of::<Option<Cell>>())
            + memory::of_map::<CounterKey, i128>(base)
    }
}

impl Reads {
    /// Handles a linearizable read.
    pub(super) fn on_linearizable_read(&mut self, turn: &mut NodeTurn<'_>, request: ReadRequest) {
        match self.may_read(turn, &request) {
            Ok(epoch) => {
                let shard = request.slots.shard();
                let proven = turn.planted(Planted::ReadUnproven);
                let read = self.capture(turn, request, ReadBasis::Leading { epoch, proven });
                self.prove_leadership(turn, read, shard, epoch);
            }
            Err(refusal) => refuse(turn, &request, refusal),
        }
    }

    fn may_read(&self, turn: &NodeTurn<'_>, request: &ReadRequest) -> Result<Epoch, Refusal> {
        let shard = request.slots.shard();
        let redirect = || turn.shards.redirect(shard);
        let replica =
            turn.shards.get(shard).ok_or_else(|| redirect().unwrap_or(Refusal::NoSuchShard))?;
        let primary =
            replica.primary().ok_or_else(|| redirect().unwrap_or(Refusal::NotPrimary(None)))?;
        if !request.is_of(replica) {
            return Err(Refusal::NoSuchShard);
        }
        // A value captured before the barrier is applied may lack what a former primary has
        // acknowledged: a committed barrier is not applied while an entry waits for a load.
        let applied =
            replica.state.applied.seq >= primary.barrier || turn.planted(Planted::ReadBelowBarrier);
        if !primary.active || !applied || !replica.trust.is_working() {
            return Err(if primary.frozen { Refusal::Frozen } else { Refusal::NotPrimary(None) });
        }
        let full = self.captured.is_full(&turn.settings.sizes);
        if full && !turn.planted(Planted::WaitingUnbounded) {
            return Err(Refusal::Overloaded);
        }
        Ok(primary.epoch)
    }

    /// Captures the applied values of a replica on this node, as they are now. Returns the number
    /// of the read.
    pub(super) fn capture(
        &mut self,
        turn: &mut NodeTurn<'_>,
        request: ReadRequest,
        basis: ReadBasis,
    ) -> u64 {
        let cells: Vec<_> = request.keys.iter().map(|key| turn.storage.cell(key)).collect();
        let below = request.keys.iter().zip(&cells);
        let to_load: Vec<_> = below
            .filter(|(_, cell)| !matches!(cell, Some(Cell::Absolute(_))))
            .map(|(key, _)| key.clone())
            .collect();
        let base = to_load.is_empty().then(Values::new);
        let replica = turn.shards.get(request.slots.shard());
        let time = replica.map_or(TimeMs(0), |replica| replica.state.applied.time);
        let read = turn.fresh_id();
        self.captured.insert(read, CapturedRead { request, basis, cells, base, time });
        if !to_load.is_empty() && !turn.planted(Planted::TableThenDatabase) {
            turn.load_for_read(read, to_load);
        }
        read
    }

    /// Handles the values that a load has read for this read.
    pub(in crate::node) fn on_loaded(
        &mut self,
        turn: &mut NodeTurn<'_>,
        read: u64,
        values: Values,
    ) {
        if let Some(waiting) = self.captured.waiting.get_mut(&read) {
            waiting.base = Some(values);
        }
        self.answer_if_ready(turn, read);
    }

    pub(super) fn on_read_claim_settled(
        &mut self,
        turn: &mut NodeTurn<'_>,
        read: u64,
        outcome: ClaimOutcome,
    ) {
        let Some(waiting) = self.captured.waiting.get_mut(&read) else { return };
        match outcome {
            ClaimOutcome::Current => {}
            ClaimOutcome::Replaced => {
                return self.refuse_read(turn, read, Refusal::NotPrimary(None));
            }
            ClaimOutcome::Unknown => return self.refuse_read(turn, read, Refusal::Frozen),
        }
        if let ReadBasis::Leading { proven, .. } = &mut waiting.basis {
            *proven = true;
        }
        if waiting.base.is_none() && turn.planted(Planted::TableThenDatabase) {
            let keys = waiting.request.keys.clone();
            turn.load_for_read(read, keys);
        }
        self.answer_if_ready(turn, read);
    }

    pub(super) fn answer_if_ready(&mut self, turn: &mut NodeTurn<'_>, read: u64) {
        let Some(waiting) = self.captured.waiting.get(&read) else { return };
        let Some(base) = &waiting.base else { return };
        let staleness_us = match waiting.basis {
            ReadBasis::Leading { proven: false, .. } => return,
            ReadBasis::Leading { epoch, .. }
                if !turn.shards.leads(waiting.request.slots.shard(), epoch) =>
            {
                return self.refuse_read(turn, read, Refusal::NotPrimary(None));
            }
            ReadBasis::Leading { .. } => 0,
            ReadBasis::AsOf(then) => turn.now.0 - then.0,
        };
        let value = |(key, cell): (&CounterKey, &Option<Cell>)| {
            let below = base.get(key).copied().unwrap_or(0);
            cell.map_or(below, |cell| cell.value(Some(below)))
        };
        let values = waiting.request.keys.iter().zip(&waiting.cells).map(value).collect();
        let result = Ok(ReadResult { values, time: waiting.time, staleness_us });
        let (conn, id) = (waiting.request.conn, waiting.request.id);
        self.captured.remove(read);
        turn.effects.push(Effect::Gateway { conn, reply: NodeReply::Read { id, result } });
    }

    fn refuse_read(&mut self, turn: &mut NodeTurn<'_>, read: u64, refusal: Refusal) {
        let Some(waiting) = self.captured.remove(read) else { return };
        let shard = waiting.request.slots.shard();
        let refusal = match refusal {
            Refusal::NotPrimary(None) => turn.shards.redirect(shard).unwrap_or(refusal),
            other => other,
        };
        refuse(turn, &waiting.request, refusal);
    }

    pub(super) fn forget_reads(&mut self, conn: Conn) {
        self.captured.forget(conn).into_iter().for_each(|read| self.read_index.forget(read));
    }
}

impl ReadRequest {
    /// Returns the most bytes of memory of the request while it waits: its keys, and for each what
    /// the tables and the state contain, where the load has another list of the keys.
    pub(in crate::node) fn bytes(&self) -> usize {
        let keys = self.keys.len();
        let each = 2 * size_of::<CounterKey>() + size_of::<Option<Cell>>();
        self.name_bytes()
            + memory::of_map::<u64, CapturedRead>(1)
            + memory::allocated(keys * each)
            + memory::of_map::<CounterKey, i128>(keys)
    }

    /// Returns the bytes of memory of the request itself.
    pub(in crate::node) fn walked_bytes(&self) -> usize {
        self.name_bytes() + memory::allocated(self.keys.capacity() * size_of::<CounterKey>())
    }

    /// Returns the bytes of the names, which lie in one allocation.
    fn name_bytes(&self) -> usize {
        memory::of_bytes(self.keys.iter().map(|key| key.name().len()).sum())
    }

    /// Returns whether all keys are counters of this replica.
    pub(in crate::node) fn is_of(&self, replica: &Replica) -> bool {
        let inside = |key: &CounterKey| self.slots.contains(key.slot());
        replica.slots == self.slots && self.keys.iter().all(inside)
    }
}

pub(super) fn refuse(turn: &mut NodeTurn<'_>, request: &ReadRequest, refusal: Refusal) {
    let reply = NodeReply::Read { id: request.id, result: Err(refusal) };
    turn.effects.push(Effect::Gateway { conn: request.conn, reply });
}
