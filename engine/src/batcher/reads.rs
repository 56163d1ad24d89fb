//! Linearizable reads: to the primary, and again until the deadline.
//!
//! A read has no effect, so nothing here is as careful as with writes: whatever was sent to a node
//! that is no longer the primary, or whose connection is gone, is simply asked again. What one
//! request asks of one shard is one part; all parts of a shard that wait when a turn ends travel in
//! one message, so a node proves them current together.

use std::collections::{BTreeMap, BTreeSet};

use super::Effect;
use super::answers::backoff_ms;
use super::outcome::Failure;
use crate::config::ShardConfig;
use crate::ids::{Conn, Epoch, Now, ShardId};
use crate::key::CounterKey;
use crate::message::{GatewayMessage, ReadResult, Refusal};
use crate::router::{Router, Window};
use crate::shard_map::ShardMap;

/// A message is closed at so many bytes of names.
const MESSAGE_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Reads {
    open: BTreeMap<u64, Read>,
    deadlines: BTreeSet<(Now, u64)>,
    queues: BTreeMap<ShardId, Queue>,
    sent: BTreeMap<u64, Sent>,
    last_id: u64,
    /// Keys of all open requests.
    keys: usize,
    due: BTreeSet<ShardId>,
    timers: BTreeSet<(Now, ShardId)>,
    window: Window,
}

/// A request that waits for its values.
#[derive(Debug)]
struct Read {
    deadline: Now,
    missing: usize,
    values: Vec<i128>,
    shards: Vec<ShardId>,
}

/// What one request asks of one shard.
#[derive(Debug, Default)]
struct Part {
    indexes: Vec<u32>,
    keys: Vec<CounterKey>,
}

#[derive(Debug, Default)]
struct Queue {
    /// By request.
    waiting: BTreeMap<u64, Part>,
    /// Messages without an answer, and when they were sent.
    on_the_way: Vec<(u64, Now)>,
    retry_at: Now,
    refusals: u32,
}

/// A message without an answer.
#[derive(Debug)]
struct Sent {
    conn: Conn,
    epoch: Epoch,
    shard: ShardId,
    parts: Vec<(u64, Part)>,
}

impl Reads {
    pub(super) fn new(window: Window) -> Self {
        Self {
            open: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            queues: BTreeMap::new(),
            sent: BTreeMap::new(),
            last_id: 0,
            keys: 0,
            due: BTreeSet::new(),
            timers: BTreeSet::new(),
            window,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    pub(super) fn keys(&self) -> usize {
        self.keys
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        let deadlines = self.deadlines.first().map(|&(at, _)| at);
        deadlines.into_iter().chain(self.timers.first().map(|&(at, _)| at)).min()
    }

    /// A read that was admitted. Every key must belong to a known shard, else it fails at once.
    pub(super) fn begin(
        &mut self,
        request: u64,
        keys: Vec<CounterKey>,
        deadline: Now,
        map: &ShardMap,
        effects: &mut Vec<Effect>,
    ) {
        let count = keys.len();
        let mut parts: BTreeMap<ShardId, Part> = BTreeMap::new();
        for (index, key) in (0u32..).zip(keys) {
            let Some(config) = map.of_slot(key.slot()) else {
                return effects.push(Effect::ReadDone { request, result: Err(Failure::NoShard) });
            };
            let part = parts.entry(config.shard()).or_default();
            part.indexes.push(index);
            part.keys.push(key);
        }
        if count == 0 {
            return effects.push(Effect::ReadDone { request, result: Ok(Vec::new()) });
        }
        let shards = parts.keys().copied().collect();
        let read = Read { deadline, missing: parts.len(), values: vec![0; count], shards };
        for (shard, part) in parts {
            self.queues.entry(shard).or_default().waiting.insert(request, part);
            self.due.insert(shard);
        }
        self.keys += count;
        self.deadlines.insert((deadline, request));
        self.open.insert(request, read);
    }

    /// A node's answer. Returns what it knows of the shard's config, if it says so.
    pub(super) fn answered(
        &mut self,
        now: Now,
        conn: Conn,
        id: u64,
        result: Result<ReadResult, Refusal>,
        effects: &mut Vec<Effect>,
    ) -> Option<ShardConfig> {
        if self.sent.get(&id)?.conn != conn {
            return None;
        }
        let sent = self.take_sent(id)?;
        let asked: usize = sent.parts.iter().map(|(_, part)| part.keys.len()).sum();
        match result {
            Ok(found) if found.values.len() == asked => {
                self.queues.entry(sent.shard).or_default().refusals = 0;
                let mut values = found.values.into_iter();
                for (request, part) in sent.parts {
                    self.found(request, &part, values.by_ref(), effects);
                }
                None
            }
            Err(Refusal::Frozen) => self.fail_all(sent, Failure::Frozen, effects),
            Err(Refusal::Overloaded) => self.fail_all(sent, Failure::Overloaded, effects),
            Err(Refusal::NoSpace) => self.fail_all(sent, Failure::NoSpace, effects),
            Err(Refusal::TooLarge) => self.fail_all(sent, Failure::TooLarge, effects),
            Err(Refusal::NotPrimary(hint)) => {
                self.refused(now, sent);
                hint.map(|config| *config)
            }
            // The last: an answer with too few or too many values is nobody's.
            Err(Refusal::NoSuchShard | Refusal::Damaged) | Ok(_) => {
                self.refused(now, sent);
                None
            }
        }
    }

    fn found(
        &mut self,
        request: u64,
        part: &Part,
        values: impl Iterator<Item = i128>,
        effects: &mut Vec<Effect>,
    ) {
        // The values are taken in any case: those of the next part follow.
        let values = values.take(part.keys.len());
        let Some(read) = self.open.get_mut(&request) else { return values.for_each(drop) };
        for (&index, value) in part.indexes.iter().zip(values) {
            read.values[index as usize] = value;
        }
        read.missing -= 1;
        if read.missing == 0
            && let Some(read) = self.take_open(request)
        {
            effects.push(Effect::ReadDone { request, result: Ok(read.values) });
        }
    }

    /// They wait for another primary.
    fn refused(&mut self, now: Now, sent: Sent) {
        let queue = self.queues.entry(sent.shard).or_default();
        queue.refusals += 1;
        queue.retry_at = now.plus_ms(backoff_ms(queue.refusals));
        self.wait_again(sent);
    }

    fn wait_again(&mut self, sent: Sent) {
        let queue = self.queues.entry(sent.shard).or_default();
        let open = |(request, _): &(u64, Part)| self.open.contains_key(request);
        queue.waiting.extend(sent.parts.into_iter().filter(open));
        self.due.insert(sent.shard);
    }

    fn fail_all(
        &mut self,
        sent: Sent,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) -> Option<ShardConfig> {
        for (request, _) in sent.parts {
            self.fail(request, failure, effects);
        }
        None
    }

    /// A whole request fails: nobody is served half an answer.
    fn fail(&mut self, request: u64, failure: Failure, effects: &mut Vec<Effect>) {
        if let Some(read) = self.take_open(request) {
            for shard in read.shards {
                self.queues.entry(shard).or_default().waiting.remove(&request);
            }
            effects.push(Effect::ReadDone { request, result: Err(failure) });
        }
    }

    fn take_open(&mut self, request: u64) -> Option<Read> {
        let read = self.open.remove(&request)?;
        self.deadlines.remove(&(read.deadline, request));
        self.keys -= read.values.len();
        Some(read)
    }

    fn take_sent(&mut self, id: u64) -> Option<Sent> {
        let sent = self.sent.remove(&id)?;
        if let Some(queue) = self.queues.get_mut(&sent.shard) {
            queue.on_the_way.retain(|&(other, _)| other != id);
        }
        self.due.insert(sent.shard);
        Some(sent)
    }

    /// What was asked there is asked again.
    pub(super) fn closed(&mut self, conn: Conn) {
        self.ask_again(|sent| sent.conn == conn);
    }

    /// The shard has a newer config: whoever leads it now is asked.
    pub(super) fn moved(&mut self, config: &ShardConfig, conn: Option<Conn>) {
        if let Some(queue) = self.queues.get_mut(&config.shard()) {
            queue.retry_at = Now(0);
            queue.refusals = 0;
            self.due.insert(config.shard());
        }
        let here = |sent: &Sent| Some(sent.conn) == conn && sent.epoch == config.epoch;
        self.ask_again(|sent| sent.shard == config.shard() && !here(sent));
    }

    fn ask_again(&mut self, which: impl Fn(&Sent) -> bool) {
        let again = self.sent.iter().filter(|(_, sent)| which(sent));
        let ids: Vec<u64> = again.map(|(&id, _)| id).collect();
        for id in ids {
            if let Some(sent) = self.take_sent(id) {
                self.wait_again(sent);
            }
        }
    }

    /// A connection stands: its shards are looked at.
    pub(super) fn connected(&mut self, shards: Vec<ShardId>) {
        self.due.extend(shards);
    }

    pub(super) fn turn_ended(
        &mut self,
        now: Now,
        map: &ShardMap,
        router: &Router,
        effects: &mut Vec<Effect>,
    ) {
        while let Some(&(at, request)) = self.deadlines.first()
            && at <= now
        {
            let reason = self.why_late(request, map, router);
            self.fail(request, reason, effects);
        }
        while let Some(&(at, shard)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            self.due.insert(shard);
        }
        for shard in std::mem::take(&mut self.due) {
            self.send(now, shard, map, router, effects);
        }
    }

    fn why_late(&self, request: u64, map: &ShardMap, router: &Router) -> Failure {
        let Some(read) = self.open.get(&request) else { return Failure::Slow };
        let waits = |shard: &&ShardId| {
            self.queues.get(shard).is_some_and(|queue| queue.waiting.contains_key(&request))
        };
        let Some(&shard) = read.shards.iter().find(waits) else { return Failure::Deadline };
        let primary = map.get(shard).and_then(|config| router.to(config.primary));
        let refused = self.queues.get(&shard).is_some_and(|queue| queue.refusals > 0);
        if primary.is_none() || refused { Failure::NoPrimary } else { Failure::Slow }
    }

    /// Sends what waits for a shard, in as few messages as it takes.
    fn send(
        &mut self,
        now: Now,
        shard: ShardId,
        map: &ShardMap,
        router: &Router,
        effects: &mut Vec<Effect>,
    ) {
        let Some(queue) = self.queues.get_mut(&shard) else { return };
        let Some(config) = map.get(shard) else { return };
        let Some(conn) = router.to(config.primary) else { return };
        while !queue.waiting.is_empty() {
            if let Some(at) = queue.blocked_until(now, self.window) {
                self.timers.insert((at, shard));
                return;
            }
            self.last_id += 1;
            let id = self.last_id;
            let parts = queue.take();
            queue.on_the_way.push((id, now));
            let keys = parts.iter().flat_map(|(_, part)| &part.keys).cloned().collect();
            let slots = config.slots;
            effects.push(Effect::Send { conn, message: GatewayMessage::Read { id, slots, keys } });
            self.sent.insert(id, Sent { conn, epoch: config.epoch, shard, parts });
        }
    }
}

impl Queue {
    fn blocked_until(&self, now: Now, window: Window) -> Option<Now> {
        if self.retry_at > now {
            return Some(self.retry_at);
        }
        let ends = self.on_the_way.iter().map(|&(_, sent)| Now(sent.0.saturating_add(window.us)));
        let counting: Vec<Now> = ends.filter(|&end| end > now).collect();
        counting.iter().min().copied().filter(|_| counting.len() >= window.messages)
    }

    /// The parts of one message.
    fn take(&mut self) -> Vec<(u64, Part)> {
        let mut parts = Vec::new();
        let mut bytes = 0;
        while bytes < MESSAGE_BYTES
            && let Some((request, part)) = self.waiting.pop_first()
        {
            bytes += part.keys.iter().map(|key| key.name().len()).sum::<usize>();
            parts.push((request, part));
        }
        parts
    }
}
