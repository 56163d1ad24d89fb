//! The intake of requests: numbered, refused or split by shard, and queued where they are admitted.

use super::outcome::{Failure, WriteResult};
use super::part::{HOME, Issued, PartToken, QueuedOp, RequestPart, slot_of};
use super::pending_writes::PendingWrite;
use super::queueing::Queueing;
use crate::batcher::shard_map::ShardMap;
use crate::ids::{Now, ShardId, TimeMs};
use crate::key;
use crate::ops::{Op, OpKind};
use crate::planted::Planted;
use crate::shard::idempotency::{ClientToken, IssueTime, Scope, Tag};

/// The state of the intake. See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct RequestIntake {
    stopping: bool,
    last_request: u64,
    splitter: Splitter,
}

/// Buffers that are reused for every request, and empty in between.
#[derive(Clone, Debug, Default)]
struct Splitter {
    /// Per operation: the upper half of its hash, and the index of its shard in the map.
    placed: Vec<(u64, u32)>,
    /// Per shard of the map: the number of its operations.
    counts: Vec<u32>,
    /// Per shard of the map: its operations.
    parts: Vec<Vec<QueuedOp>>,
    /// The shards with operations, in the order of their first one.
    touched: Vec<u32>,
}

/// The index of no shard.
const NOWHERE: u32 = u32::MAX;

/// The upper half of an operation's hash, and the index of its shard in the map.
fn placed(map: &ShardMap, op: &Op) -> (u64, u32) {
    let hash = (key::hash(op.counter.name()) >> 64) as u64;
    (hash, map.index_of(slot_of(hash)).map_or(NOWHERE, |at| at as u32))
}

impl Splitter {
    /// The operations of each shard, in the order of the request, and the indexes of those that
    /// belong to no known shard. Every name is hashed once: the hash is kept with the operation.
    fn split(&mut self, map: &ShardMap, ops: Vec<Op>) -> (Vec<(u32, Vec<QueuedOp>)>, Vec<u32>) {
        if let [op] = ops.as_slice() {
            let (hash, place) = placed(map, op);
            let queued = |op| QueuedOp { op, hash, index: 0, entry: 0 };
            return match place {
                NOWHERE => (Vec::new(), vec![0]),
                _ => (vec![(place, ops.into_iter().map(queued).collect())], Vec::new()),
            };
        }
        self.counts.resize(map.iter().len(), 0);
        self.parts.resize_with(map.iter().len(), Vec::new);
        for op in &ops {
            let (hash, place) = placed(map, op);
            self.placed.push((hash, place));
            let Some(count) = self.counts.get_mut(place as usize) else { continue };
            if *count == 0 {
                self.touched.push(place);
            }
            *count += 1;
        }
        for &place in &self.touched {
            let place = place as usize;
            self.parts[place].reserve_exact(self.counts[place] as usize);
            self.counts[place] = 0;
        }
        let mut nowhere = Vec::new();
        for (index, (op, (hash, place))) in (0u32..).zip(ops.into_iter().zip(self.placed.drain(..)))
        {
            match self.parts.get_mut(place as usize) {
                Some(part) => part.push(QueuedOp { op, hash, index, entry: 0 }),
                None => nowhere.push(index),
            }
        }
        let parts = &mut self.parts;
        let taken = |place: u32| (place, std::mem::take(&mut parts[place as usize]));
        (self.touched.drain(..).map(taken).collect(), nowhere)
    }
}

/// The token of a request, and the issue time that the client stated.
type StatedToken = (Tag, Option<TimeMs>);

impl RequestIntake {
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Refuses all requests from now on.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
    }

    /// Checks that request numbers increase: parts are kept in the order of their requests.
    pub(super) fn number(&mut self, request: u64) {
        assert!(request > self.last_request, "the driver numbers requests upwards");
        self.last_request = request;
    }

    pub(super) fn on_write(
        &mut self,
        queueing: &mut Queueing<'_>,
        request: u64,
        ops: Vec<Op>,
        token: Option<ClientToken>,
        deadline: Now,
    ) {
        self.number(request);
        let (shards, held) = (Vec::new(), Vec::new());
        let mut open = PendingWrite {
            deadline,
            pending: 0,
            shards,
            held,
            asks_home: false,
            result: WriteResult::default(),
        };
        let token = token.and_then(|token| Some((token.tag(&ops)?, token.issued)));
        let home = token.and_then(|(tag, _)| home(queueing, &tag, &ops));
        let refused = if self.stopping {
            Some(Failure::Stopping)
        } else if queueing.sessions.present().is_none() {
            Some(Failure::NoSession)
        } else {
            home.as_ref().and_then(|home| home.as_ref().err().copied())
        };
        if let Some(failure) = refused {
            open.result.failed = (0..ops.len() as u32).map(|index| (index, failure)).collect();
        } else {
            let (mut parts, nowhere) = self.splitter.split(&queueing.routes.map, ops);
            open.result.failed.extend(nowhere.into_iter().map(|index| (index, Failure::NoShard)));
            let home = home.and_then(Result::ok);
            let has_home = home.is_some();
            if let Some(home) = home {
                at_home_first(&mut parts, home);
            }
            queue_parts(queueing, &mut open, (request, token), parts, has_home);
        }
        queueing.writes.begin(request, open, queueing.turn.effects);
    }
}

/// Queues the parts of a request that are admitted. `has_home`: the first part is the one at the
/// token's home; the others are held until the home has recorded the token.
fn queue_parts(
    queueing: &mut Queueing<'_>,
    open: &mut PendingWrite,
    (request, token): (u64, Option<StatedToken>),
    parts: Vec<(u32, Vec<QueuedOp>)>,
    has_home: bool,
) {
    let (mut at_home, mut not_at_home) = (None, None);
    for (at, (place, ops)) in parts.into_iter().enumerate() {
        let slots = queueing.routes.map.at(place as usize).slots;
        let token = token.map(|token| issue(queueing, slots.shard(), token));
        let part = RequestPart::new(request, ops, token);
        let is_home = has_home && at == 0;
        let refused = not_at_home.or_else(|| queueing.admits(&part, slots.shard()).err());
        if let Some(failure) = refused {
            let asked = part.ops.iter().filter(|queued| queued.index != HOME);
            open.result.failed.extend(asked.map(|queued| (queued.index, failure)));
            not_at_home = not_at_home.or(refused.filter(|_| is_home));
            continue;
        }
        open.pending += part.ops.len();
        if is_home {
            at_home = Some((slots, part));
        } else if has_home {
            open.held.push((slots, part));
        } else {
            open.shards.push(slots.shard());
            queueing.enqueue(slots, part);
        }
    }
    if let Some((slots, part)) = at_home {
        // A token is not recorded if nothing of the request was admitted elsewhere.
        if part.asked() == 0 && open.held.is_empty() {
            open.pending = 0;
        } else {
            open.asks_home = true;
            open.shards.push(slots.shard());
            queueing.enqueue(slots, part);
        }
    }
}

/// The operation that carries the token of a batch to its home, and that shard's index in the map.
/// Returns `None` if there is no such token.
fn home(
    queueing: &Queueing<'_>,
    tag: &Tag,
    ops: &[Op],
) -> Option<Result<(u32, QueuedOp), Failure>> {
    if tag.scope != Scope::Batch || Planted::HomeNotAsked.is_in(queueing.turn.settings.planted) {
        return None;
    }
    let counter = tag.home(ops.first()?.counter.namespace())?;
    let hash = (key::hash(counter.name()) >> 64) as u64;
    let op = Op { counter, kind: OpKind::Add { delta: 0 } };
    let place = queueing.routes.map.index_of(slot_of(hash)).ok_or(Failure::NoShard);
    Some(place.map(|place| (place as u32, QueuedOp { op, hash, index: HOME, entry: 0 })))
}

/// The issue time of an operation: the client's own statement, or else a recent time of the shard.
fn issue(queueing: &Queueing<'_>, shard: ShardId, (tag, issued): StatedToken) -> PartToken {
    let (now, valid_ms) = (queueing.turn.now, queueing.turn.settings.shard_time_valid_ms);
    let known = || queueing.queues.get(shard)?.fresh_time(now, valid_ms);
    let stated = issued.map(IssueTime::Stated);
    let issued = stated.or_else(|| known().map(IssueTime::Arrived));
    PartToken { tag, issued: issued.map_or(Issued::Arrived(now), Issued::At) }
}

/// Moves the part at the token's home to the front: it is sent alone, and the others once it is
/// recorded. If the home has no operations of the request, that part is only `op`, which carries
/// the token.
fn at_home_first(parts: &mut Vec<(u32, Vec<QueuedOp>)>, (home, op): (u32, QueuedOp)) {
    match parts.iter().position(|&(place, _)| place == home) {
        Some(at) => parts.swap(0, at),
        None if parts.is_empty() => {}
        None => parts.insert(0, (home, vec![op])),
    }
}
