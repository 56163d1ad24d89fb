//! Reads: to the primary, and again until the deadline; or to a backup first, if the client says that
//! an older value will do ([`bounded`](super::bounded)).
//!
//! A read has no effect, so nothing here is as careful as with writes: whatever was sent to a node
//! that is no longer the primary, or whose connection is gone, is simply asked again. What one
//! request asks of one shard is one part; all parts of a shard that wait when a turn ends travel in
//! one message, so a node proves them current together.

use std::collections::{BTreeMap, BTreeSet};

use super::bounded::{self, Bound, Dated};
use super::outcome::{Failure, ReadValues};
use super::read_queue::{Part, Queue, Way};
use super::{Effect, Settings, Timing};
use crate::config::ShardConfig;
use crate::ids::{Conn, Epoch, Now, ShardId};
use crate::key::CounterKey;
use crate::message::{GatewayMessage, ReadResult, Refusal};
use crate::router::{Router, Window};
use crate::shard_map::ShardMap;

#[derive(Clone, Debug)]
pub(super) struct Reads {
    open: BTreeMap<u64, Read>,
    deadlines: BTreeSet<(Now, u64)>,
    queues: BTreeMap<Way, Queue>,
    /// Parts for which nobody to ask has been chosen yet.
    unrouted: Vec<(ShardId, u64, Part)>,
    sent: BTreeMap<u64, Sent>,
    last_id: u64,
    /// Keys of all open requests.
    keys: usize,
    /// Bounded reads that have all their values. Their clients are told when the turn ends, and
    /// that is the moment of which their age must hold (seed 5542: it was the reply's, two
    /// milliseconds before).
    aging: BTreeSet<u64>,
    due: BTreeSet<Way>,
    timers: BTreeSet<(Now, Way)>,
    /// When a message to a backup has waited for long enough.
    silent: BTreeSet<(Now, u64)>,
    window: Window,
    backup_wait_ms: u64,
    worker: usize,
    message_bytes: usize,
    timing: Timing,
}

/// A request that waits for its values.
#[derive(Clone, Debug)]
struct Read {
    deadline: Now,
    missing: usize,
    values: Vec<i128>,
    shards: Vec<ShardId>,
    /// Parts whose values are of a backup.
    dated: Vec<Dated>,
    /// When the first question was sent to a primary whose answer is among the values. Linearizable
    /// then, it ages beside the parts of backups that took longer.
    asked_primary: Option<Now>,
}

/// A message without an answer.
#[derive(Clone, Debug)]
struct Sent {
    conn: Conn,
    epoch: Epoch,
    way: Way,
    at: Now,
    parts: Vec<(u64, Part)>,
}

impl Reads {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            open: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            queues: BTreeMap::new(),
            unrouted: Vec::new(),
            sent: BTreeMap::new(),
            last_id: 0,
            keys: 0,
            aging: BTreeSet::new(),
            due: BTreeSet::new(),
            timers: BTreeSet::new(),
            silent: BTreeSet::new(),
            window: Window { messages: settings.window, us: settings.window_us },
            backup_wait_ms: settings.backup_wait_ms,
            worker: settings.worker,
            message_bytes: settings.sizes.read_message_bytes,
            timing: settings.timing,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    pub(super) fn keys(&self) -> usize {
        self.keys
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        let deadline = self.deadlines.first().map(|&(at, _)| at);
        let timer = self.timers.first().map(|&(at, _)| at);
        let silent = self.silent.first().map(|&(at, _)| at);
        [deadline, timer, silent].into_iter().flatten().min()
    }

    /// A read that was admitted. Every key must belong to a known shard, else it fails at once.
    pub(super) fn begin(
        &mut self,
        request: u64,
        keys: Vec<CounterKey>,
        max_staleness_ms: Option<u64>,
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
            let result = Ok(ReadValues::default());
            return effects.push(Effect::ReadDone { request, result });
        }
        let shards = parts.keys().copied().collect();
        let (missing, values) = (parts.len(), vec![0; count]);
        let (dated, asked_primary) = (Vec::new(), None);
        let read = Read { deadline, missing, values, shards, dated, asked_primary };
        let bound = max_staleness_ms.map(|ms| Bound { max_staleness_ms: ms, tried: Vec::new() });
        for (shard, part) in parts {
            self.enqueue(shard, request, Part { bound: bound.clone(), ..part });
        }
        self.keys += count;
        self.deadlines.insert((deadline, request));
        self.open.insert(request, read);
    }

    fn enqueue(&mut self, shard: ShardId, request: u64, part: Part) {
        if part.bound.is_some() {
            self.unrouted.push((shard, request, part));
            return;
        }
        let way = Way::primary(shard);
        self.queues.entry(way).or_default().waiting.insert(request, part);
        self.due.insert(way);
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
                self.queues.entry(sent.way).or_default().refusals = 0;
                let mut values = found.values.into_iter();
                let (way, at, staleness_us) = (sent.way, sent.at, found.staleness_us);
                for (request, part) in sent.parts {
                    self.found(request, &part, values.by_ref());
                    if let Some(read) = self.open.get_mut(&request) {
                        match way.backup {
                            Some(_) => {
                                let shard = way.shard;
                                read.dated.push(Dated { shard, part, sent: at, staleness_us });
                            }
                            None => {
                                let first = read.asked_primary.map_or(at, |first| first.min(at));
                                read.asked_primary = Some(first);
                            }
                        }
                    }
                    self.finish_if_answered(request, effects);
                }
                None
            }
            Err(refusal) if sent.way.backup.is_some() => {
                self.next_backup(now, sent);
                match refusal {
                    Refusal::NotPrimary(hint) => hint.map(|config| *config),
                    _ => None,
                }
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
            Err(Refusal::NoSuchShard | Refusal::Damaged | Refusal::Stale) | Ok(_) => {
                self.refused(now, sent);
                None
            }
        }
    }

    fn found(&mut self, request: u64, part: &Part, values: impl Iterator<Item = i128>) {
        // The values are taken in any case: those of the next part follow.
        let values = values.take(part.keys.len());
        let Some(read) = self.open.get_mut(&request) else { return values.for_each(drop) };
        for (&index, value) in part.indexes.iter().zip(values) {
            read.values[index as usize] = value;
        }
        read.missing -= 1;
    }

    /// Answers a read that has all its values; one that has an age when the turn ends.
    fn finish_if_answered(&mut self, request: u64, effects: &mut Vec<Effect>) {
        let Some(read) = self.open.get(&request).filter(|read| read.missing == 0) else {
            return;
        };
        if !read.dated.is_empty() {
            self.aging.insert(request);
            return;
        }
        let Some(read) = self.take_open(request) else { return };
        let result = Ok(ReadValues { values: read.values, staleness_ms: 0 });
        effects.push(Effect::ReadDone { request, result });
    }

    /// The same for a read that has an age, which is that of its oldest part. What has become too old
    /// meanwhile, since other parts took their time, is asked of the primary; where that is what the
    /// primary has said, so are all others: the read is linearizable then.
    fn finish_aging(&mut self, now: Now, request: u64, effects: &mut Vec<Effect>) {
        let Some(read) = self.open.get_mut(&request).filter(|read| read.missing == 0) else {
            return;
        };
        let primary_us = read.asked_primary.map_or(0, |asked| now.0 - asked.0);
        let too_old =
            |dated: &mut Dated| dated.is_too_old(now) || !dated.allows(primary_us.div_ceil(1_000));
        let again: Vec<Dated> = read.dated.extract_if(.., too_old).collect();
        read.missing = again.len();
        if again.is_empty() {
            let Some(read) = self.take_open(request) else { return };
            let parts = read.dated.iter().map(|dated| dated.staleness_ms(now));
            let staleness_ms = parts.max().unwrap_or(0).max(primary_us.div_ceil(1_000));
            let result = Ok(ReadValues { values: read.values, staleness_ms });
            return effects.push(Effect::ReadDone { request, result });
        }
        for Dated { shard, part, .. } in again {
            self.enqueue(shard, request, Part { bound: None, ..part });
        }
    }

    /// The backup can't tell, or says nothing: another one is asked, lastly the primary.
    fn next_backup(&mut self, now: Now, sent: Sent) {
        let Way { shard, backup } = sent.way;
        self.queues.entry(sent.way).or_default().shunned_until = now.plus_ms(self.timing.shun_ms);
        for (request, mut part) in sent.parts {
            if let Some(bound) = &mut part.bound {
                bound.tried.extend(backup);
            }
            if self.open.contains_key(&request) {
                self.enqueue(shard, request, part);
            }
        }
    }

    /// They wait for another primary.
    fn refused(&mut self, now: Now, sent: Sent) {
        if sent.way.backup.is_some() {
            return self.next_backup(now, sent);
        }
        let queue = self.queues.entry(sent.way).or_default();
        queue.refusals += 1;
        queue.retry_at = now.plus_ms(self.timing.backoff_ms(queue.refusals));
        self.wait_again(now, sent);
    }

    fn wait_again(&mut self, now: Now, sent: Sent) {
        if sent.way.backup.is_some() {
            return self.next_backup(now, sent);
        }
        let queue = self.queues.entry(sent.way).or_default();
        let open = |(request, _): &(u64, Part)| self.open.contains_key(request);
        queue.waiting.extend(sent.parts.into_iter().filter(open));
        self.due.insert(sent.way);
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
                for (_, queue) in self.queues.range_mut(Way::all(shard)) {
                    queue.waiting.remove(&request);
                }
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
        if let Some(queue) = self.queues.get_mut(&sent.way) {
            queue.on_the_way.retain(|&(other, _)| other != id);
        }
        self.silent.remove(&(sent.at.plus_ms(self.backup_wait_ms), id));
        self.due.insert(sent.way);
        Some(sent)
    }

    /// What was asked there is asked again.
    pub(super) fn closed(&mut self, now: Now, conn: Conn) {
        self.ask_again(now, |sent| sent.conn == conn);
        // What waited for a place on it: whoever is connected is chosen anew.
        for (way, queue) in self.queues.iter_mut().filter(|(way, _)| way.backup.is_some()) {
            let waiting = std::mem::take(&mut queue.waiting);
            self.unrouted.extend(waiting.into_iter().map(|(id, part)| (way.shard, id, part)));
        }
    }

    /// The shard has a newer config: whoever leads it now is asked. What a backup proves stays right.
    pub(super) fn moved(&mut self, now: Now, config: &ShardConfig, conn: Option<Conn>) {
        let way = Way::primary(config.shard());
        if let Some(queue) = self.queues.get_mut(&way) {
            queue.retry_at = Now(0);
            queue.refusals = 0;
            self.due.insert(way);
        }
        let here = |sent: &Sent| Some(sent.conn) == conn && sent.epoch == config.epoch;
        self.ask_again(now, |sent| sent.way == way && !here(sent));
    }

    fn ask_again(&mut self, now: Now, which: impl Fn(&Sent) -> bool) {
        let again = self.sent.iter().filter(|(_, sent)| which(sent));
        let ids: Vec<u64> = again.map(|(&id, _)| id).collect();
        for id in ids {
            if let Some(sent) = self.take_sent(id) {
                self.wait_again(now, sent);
            }
        }
    }

    /// A connection stands: its shards are looked at.
    pub(super) fn connected(&mut self, shards: Vec<ShardId>) {
        self.due.extend(shards.into_iter().map(Way::primary));
    }

    pub(super) fn turn_ended(
        &mut self,
        now: Now,
        map: &ShardMap,
        router: &Router,
        effects: &mut Vec<Effect>,
    ) {
        for request in std::mem::take(&mut self.aging) {
            self.finish_aging(now, request, effects);
        }
        while let Some(&(at, request)) = self.deadlines.first()
            && at <= now
        {
            let reason = self.why_late(request, map, router);
            self.fail(request, reason, effects);
        }
        while let Some(&(at, way)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            self.due.insert(way);
        }
        while let Some(&(at, id)) = self.silent.first()
            && at <= now
        {
            self.silent.pop_first();
            if let Some(sent) = self.take_sent(id) {
                self.next_backup(now, sent);
            }
        }
        self.route(now, map, router);
        for way in std::mem::take(&mut self.due) {
            self.send(now, way, map, router, effects);
        }
    }

    /// Chooses for each part whom to ask next.
    fn route(&mut self, now: Now, map: &ShardMap, router: &Router) {
        for (shard, request, part) in std::mem::take(&mut self.unrouted) {
            if !self.open.contains_key(&request) {
                continue;
            }
            let choose = |bound: &Bound| {
                let config = map.get(shard)?;
                bounded::choose(bound, config, router, &self.queues, self.worker, now)
            };
            let Some(backup) = part.bound.as_ref().and_then(choose) else {
                self.enqueue(shard, request, Part { bound: None, ..part });
                continue;
            };
            let way = Way { shard, backup: Some(backup) };
            self.queues.entry(way).or_default().waiting.insert(request, part);
            self.due.insert(way);
        }
    }

    fn why_late(&self, request: u64, map: &ShardMap, router: &Router) -> Failure {
        let Some(read) = self.open.get(&request) else { return Failure::Slow };
        let waits = |shard: &&ShardId| {
            let mut queues = self.queues.range(Way::all(**shard));
            queues.any(|(_, queue)| queue.waiting.contains_key(&request))
        };
        let Some(&shard) = read.shards.iter().find(waits) else { return Failure::Deadline };
        let primary = map.get(shard).and_then(|config| router.to(config.primary));
        let queue = self.queues.get(&Way::primary(shard));
        let refused = queue.is_some_and(|queue| queue.refusals > 0);
        if primary.is_none() || refused { Failure::NoPrimary } else { Failure::Slow }
    }

    /// Sends what waits, in as few messages as it takes.
    fn send(
        &mut self,
        now: Now,
        way: Way,
        map: &ShardMap,
        router: &Router,
        effects: &mut Vec<Effect>,
    ) {
        let Some(queue) = self.queues.get_mut(&way) else { return };
        let Some(config) = map.get(way.shard) else { return };
        let conn = match way.backup {
            None => router.to(config.primary),
            Some(backup) => router.to_store(backup),
        };
        let Some(conn) = conn else { return };
        while !queue.waiting.is_empty() {
            if let Some(at) = queue.blocked_until(now, self.window) {
                self.timers.insert((at, way));
                return;
            }
            self.last_id += 1;
            let id = self.last_id;
            let (parts, max_staleness_ms) = queue.take(self.message_bytes);
            queue.on_the_way.push((id, now));
            if way.backup.is_some() {
                self.silent.insert((now.plus_ms(self.backup_wait_ms), id));
            }
            let keys = parts.iter().flat_map(|(_, part)| &part.keys).cloned().collect();
            let slots = config.slots;
            let message = GatewayMessage::Read { id, slots, keys, max_staleness_ms };
            effects.push(Effect::Send { conn, message });
            self.sent.insert(id, Sent { conn, epoch: config.epoch, way, at: now, parts });
        }
    }
}
