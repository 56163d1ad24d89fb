//! Reads: from the primary, with retries until the deadline; or from a follower first, if the
//! client accepts an older value ([`bounded`](super::bounded)).
//!
//! A read has no effect, so retries are simple: a message to a node that is no longer the primary,
//! or whose connection is gone, is just sent again. The keys of one request in one shard are one
//! part. What waits for a node when a turn ends is one *round*: a message per shard, which one
//! proof of the node covers. Rounds keep a [window](crate::batcher::window), so they grow with the
//! load.

use std::collections::{BTreeMap, BTreeSet};

use super::bounded::{self, DatedPart};
use super::outcome::{Failure, ReadValues};
use super::read_queue::{ReadPart, ReadQueue, ReadRounds, ReadTarget, RoundKind, StalenessBound};
use super::routes::Routes;
use super::{BatcherTiming, Effect, Settings};
use crate::batcher::window::WindowSettings;
use crate::ids::{Conn, Epoch, Now, ShardId};
use crate::key::CounterKey;
use crate::message::{GatewayMessage, ReadResult, Refusal};
use crate::shard_record::ShardRecord;

/// All reads that have not been answered.
#[derive(Clone, Debug)]
pub(super) struct PendingReads {
    open: BTreeMap<u64, PendingRead>,
    deadlines: BTreeSet<(Now, u64)>,
    queues: BTreeMap<ReadTarget, ReadQueue>,
    rounds: BTreeMap<RoundKind, ReadRounds>,
    /// Parts for which no node has been chosen yet.
    unrouted: Vec<(ShardId, u64, ReadPart)>,
    /// The messages without an answer, by their number.
    sent: BTreeMap<u64, SentRead>,
    last_id: u64,
    /// The number of keys of all open requests.
    keys: usize,
    /// Bounded reads that have all their values. They are answered when the turn ends, and their
    /// age must be computed for that moment. (It was computed for the moment of the reply once, and
    /// the answer was two milliseconds too young.)
    aging: BTreeSet<u64>,
    due: BTreeSet<ReadTarget>,
    timers: BTreeSet<(Now, ReadTarget)>,
    /// The times at which messages to followers time out.
    silent: BTreeSet<(Now, u64)>,
    window: WindowSettings,
    follower_wait_ms: u64,
    number: usize,
    message_bytes: usize,
    timing: BatcherTiming,
}

/// A request that waits for its values.
#[derive(Clone, Debug)]
struct PendingRead {
    deadline: Now,
    /// The number of parts without values.
    missing: usize,
    values: Vec<i128>,
    shards: Vec<ShardId>,
    /// The parts whose values came from a follower.
    dated: Vec<DatedPart>,
    /// The time of the first message to a primary whose answer is among the values. That answer was
    /// linearizable then, and ages beside the parts of followers that took longer.
    asked_primary: Option<Now>,
}

/// A message without an answer.
#[derive(Clone, Debug)]
struct SentRead {
    conn: Conn,
    epoch: Epoch,
    target: ReadTarget,
    at: Now,
    /// The number of its round in the window of the connection.
    round: u64,
    parts: Vec<(u64, ReadPart)>,
}

impl PendingReads {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            open: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            queues: BTreeMap::new(),
            rounds: BTreeMap::new(),
            unrouted: Vec::new(),
            sent: BTreeMap::new(),
            last_id: 0,
            keys: 0,
            aging: BTreeSet::new(),
            due: BTreeSet::new(),
            timers: BTreeSet::new(),
            silent: BTreeSet::new(),
            window: settings.window,
            follower_wait_ms: settings.follower_wait_ms,
            number: settings.number,
            message_bytes: settings.sizes.read_message_bytes,
            timing: settings.timing,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        let deadline = self.deadlines.first().map(|&(at, _)| at);
        let timer = self.timers.first().map(|&(at, _)| at);
        let silent = self.silent.first().map(|&(at, _)| at);
        let waiting = self.rounds.values().filter(|rounds| !rounds.due.is_empty());
        let opens_at = waiting.filter_map(|rounds| rounds.opens_at).min();
        [deadline, timer, silent, opens_at].into_iter().flatten().min()
    }

    /// The reason why there is no room for a read of these keys; `None` if there is. If one of them
    /// has no reachable primary, that is the reason: the reads before it wait for that primary,
    /// too.
    pub(super) fn refusal(
        &self,
        settings: &Settings,
        routes: &Routes,
        keys: &[CounterKey],
    ) -> Option<Failure> {
        let has_primary = |key: &CounterKey| {
            let record = routes.map.of_slot(key.slot());
            record.is_some_and(|record| routes.router.to(record.primary).is_some())
        };
        let reason = || match keys.iter().all(has_primary) {
            true => Failure::QueueFull,
            false => Failure::NoPrimary,
        };
        (self.keys >= settings.read_keys_max).then(reason)
    }

    /// Takes a read that was admitted. Every key must belong to a known shard, or the read fails at
    /// once.
    pub(super) fn begin(
        &mut self,
        request: u64,
        keys: Vec<CounterKey>,
        max_staleness_ms: Option<u64>,
        deadline: Now,
        routes: &Routes,
        effects: &mut Vec<Effect>,
    ) {
        let count = keys.len();
        let mut parts: BTreeMap<ShardId, ReadPart> = BTreeMap::new();
        for (index, key) in (0u32..).zip(keys) {
            let Some(record) = routes.map.of_slot(key.slot()) else {
                return effects.push(Effect::ReadDone { request, result: Err(Failure::NoShard) });
            };
            let part = parts.entry(record.shard()).or_default();
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
        let read = PendingRead { deadline, missing, values, shards, dated, asked_primary };
        let bound =
            max_staleness_ms.map(|ms| StalenessBound { max_staleness_ms: ms, tried: Vec::new() });
        for (shard, part) in parts {
            self.enqueue(shard, request, ReadPart { bound: bound.clone(), ..part });
        }
        self.keys += count;
        self.deadlines.insert((deadline, request));
        self.open.insert(request, read);
    }

    fn enqueue(&mut self, shard: ShardId, request: u64, part: ReadPart) {
        if part.bound.is_some() {
            self.unrouted.push((shard, request, part));
            return;
        }
        let target = ReadTarget::primary(shard);
        self.queues.entry(target).or_default().waiting.insert(request, part);
        self.due.insert(target);
    }

    /// Takes a node's answer. Returns the shard's record, if the answer contains it.
    pub(super) fn answered(
        &mut self,
        now: Now,
        conn: Conn,
        id: u64,
        result: Result<ReadResult, Refusal>,
        effects: &mut Vec<Effect>,
    ) -> Option<ShardRecord> {
        if self.sent.get(&id)?.conn != conn {
            return None;
        }
        let sent = self.take_sent(now, id)?;
        let asked: usize = sent.parts.iter().map(|(_, part)| part.keys.len()).sum();
        match result {
            Ok(found) if found.values.len() == asked => {
                self.queues.entry(sent.target).or_default().refusals = 0;
                let mut values = found.values.into_iter();
                let (target, at, staleness_us) = (sent.target, sent.at, found.staleness_us);
                for (request, part) in sent.parts {
                    self.found(request, &part, values.by_ref());
                    if let Some(read) = self.open.get_mut(&request) {
                        match target.follower {
                            Some(_) => {
                                let shard = target.shard;
                                read.dated.push(DatedPart { shard, part, sent: at, staleness_us });
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
            Err(refusal) if sent.target.follower.is_some() => {
                self.next_follower(now, sent);
                match refusal {
                    Refusal::NotPrimary(hint) => hint.map(|record| *record),
                    _ => None,
                }
            }
            Err(Refusal::Frozen) => self.fail_all(sent, Failure::Frozen, effects),
            Err(Refusal::Overloaded) => self.fail_all(sent, Failure::Overloaded, effects),
            Err(Refusal::NoSpace) => self.fail_all(sent, Failure::NoSpace, effects),
            Err(Refusal::TooLarge) => self.fail_all(sent, Failure::TooLarge, effects),
            Err(Refusal::NotPrimary(hint)) => {
                self.refused(now, sent);
                hint.map(|record| *record)
            }
            // `Ok` here is an answer with too few or too many values, which can't be assigned to
            // keys.
            Err(Refusal::NoSuchShard | Refusal::Damaged | Refusal::Stale) | Ok(_) => {
                self.refused(now, sent);
                None
            }
        }
    }

    fn found(&mut self, request: u64, part: &ReadPart, values: impl Iterator<Item = i128>) {
        // The values are taken in any case, since those of the next part follow.
        let values = values.take(part.keys.len());
        let Some(read) = self.open.get_mut(&request) else { return values.for_each(drop) };
        for (&index, value) in part.indexes.iter().zip(values) {
            read.values[index as usize] = value;
        }
        read.missing -= 1;
    }

    /// Answers a read that has all its values, or marks it for the end of the turn if it has an
    /// age.
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

    /// Answers a read that has an age, which is that of its oldest part. Parts that have become too
    /// old, since other parts took their time, are read again from the primary; so are all others
    /// if that is true of the primary's own answer, and the read is linearizable then.
    fn finish_aging(&mut self, now: Now, request: u64, effects: &mut Vec<Effect>) {
        let Some(read) = self.open.get_mut(&request).filter(|read| read.missing == 0) else {
            return;
        };
        let primary_us = read.asked_primary.map_or(0, |asked| now.0 - asked.0);
        let too_old = |dated: &mut DatedPart| {
            dated.is_too_old(now) || !dated.allows(primary_us.div_ceil(1_000))
        };
        let again: Vec<DatedPart> = read.dated.extract_if(.., too_old).collect();
        read.missing = again.len();
        if again.is_empty() {
            let Some(read) = self.take_open(request) else { return };
            let parts = read.dated.iter().map(|dated| dated.staleness_ms(now));
            let staleness_ms = parts.max().unwrap_or(0).max(primary_us.div_ceil(1_000));
            let result = Ok(ReadValues { values: read.values, staleness_ms });
            return effects.push(Effect::ReadDone { request, result });
        }
        for DatedPart { shard, part, .. } in again {
            self.enqueue(shard, request, ReadPart { bound: None, ..part });
        }
    }

    /// Asks another follower, or lastly the primary, since this one could not prove its values or
    /// did not answer.
    fn next_follower(&mut self, now: Now, sent: SentRead) {
        let ReadTarget { shard, follower } = sent.target;
        self.queues.entry(sent.target).or_default().avoided_until =
            now.plus_ms(self.timing.avoid_ms);
        for (request, mut part) in sent.parts {
            if let Some(bound) = &mut part.bound {
                bound.tried.extend(follower);
            }
            if self.open.contains_key(&request) {
                self.enqueue(shard, request, part);
            }
        }
    }

    /// Lets the parts of a refused message wait for another primary.
    fn refused(&mut self, now: Now, sent: SentRead) {
        if sent.target.follower.is_some() {
            return self.next_follower(now, sent);
        }
        let queue = self.queues.entry(sent.target).or_default();
        queue.refusals += 1;
        queue.retry_at = now.plus_ms(self.timing.backoff_ms(queue.refusals));
        // Parts that have joined the next round meanwhile wait, too.
        for rounds in self.rounds.values_mut() {
            rounds.due.remove(&sent.target);
        }
        self.wait_again(now, sent);
    }

    fn wait_again(&mut self, now: Now, sent: SentRead) {
        if sent.target.follower.is_some() {
            return self.next_follower(now, sent);
        }
        let queue = self.queues.entry(sent.target).or_default();
        let open = |(request, _): &(u64, ReadPart)| self.open.contains_key(request);
        queue.waiting.extend(sent.parts.into_iter().filter(open));
        self.due.insert(sent.target);
    }

    fn fail_all(
        &mut self,
        sent: SentRead,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) -> Option<ShardRecord> {
        for (request, _) in sent.parts {
            self.fail(request, failure, effects);
        }
        None
    }

    /// Fails a whole request: partial answers are never given.
    fn fail(&mut self, request: u64, failure: Failure, effects: &mut Vec<Effect>) {
        if let Some(read) = self.take_open(request) {
            for shard in read.shards {
                for (_, queue) in self.queues.range_mut(ReadTarget::all(shard)) {
                    queue.waiting.remove(&request);
                }
            }
            effects.push(Effect::ReadDone { request, result: Err(failure) });
        }
    }

    fn take_open(&mut self, request: u64) -> Option<PendingRead> {
        let read = self.open.remove(&request)?;
        self.deadlines.remove(&(read.deadline, request));
        self.keys -= read.values.len();
        Some(read)
    }

    fn take_sent(&mut self, now: Now, id: u64) -> Option<SentRead> {
        let sent = self.sent.remove(&id)?;
        if let Some(rounds) = self.rounds.get_mut(&RoundKind::of(sent.conn, sent.target)) {
            rounds.window.answered(now, sent.round);
        }
        self.silent.remove(&(sent.at.plus_ms(self.follower_wait_ms), id));
        Some(sent)
    }

    /// Sends again the messages that were lost with a connection.
    pub(super) fn closed(&mut self, now: Now, conn: Conn) {
        let closed = self.rounds.extract_if(.., |kind, _| kind.conn == conn);
        self.due.extend(closed.flat_map(|(_, rounds)| rounds.due));
        self.ask_again(now, |sent| sent.conn == conn);
        // Parts that waited for this connection are routed to the followers that are still
        // connected.
        for (target, queue) in
            self.queues.iter_mut().filter(|(target, _)| target.follower.is_some())
        {
            let waiting = std::mem::take(&mut queue.waiting);
            self.unrouted.extend(waiting.into_iter().map(|(id, part)| (target.shard, id, part)));
        }
    }

    /// Reads from the primary of the shard's newer record. The proof of a follower stays valid.
    pub(super) fn moved(&mut self, now: Now, record: &ShardRecord, conn: Option<Conn>) {
        let target = ReadTarget::primary(record.shard());
        if let Some(queue) = self.queues.get_mut(&target) {
            queue.retry_at = Now(0);
            queue.refusals = 0;
            self.due.insert(target);
        }
        let here = |sent: &SentRead| Some(sent.conn) == conn && sent.epoch == record.epoch;
        self.ask_again(now, |sent| sent.target == target && !here(sent));
    }

    fn ask_again(&mut self, now: Now, which: impl Fn(&SentRead) -> bool) {
        let again = self.sent.iter().filter(|(_, sent)| which(sent));
        let ids: Vec<u64> = again.map(|(&id, _)| id).collect();
        for id in ids {
            if let Some(sent) = self.take_sent(now, id) {
                self.wait_again(now, sent);
            }
        }
    }

    /// Reviews the shards of a new connection, and those whose parts waited for an earlier one.
    pub(super) fn connected(&mut self, shards: Vec<ShardId>) {
        for rounds in self.rounds.values_mut() {
            self.due.append(&mut rounds.due);
            rounds.opens_at = None;
        }
        self.due.extend(shards.into_iter().map(ReadTarget::primary));
    }

    pub(super) fn turn_ended(&mut self, now: Now, routes: &Routes, effects: &mut Vec<Effect>) {
        for request in std::mem::take(&mut self.aging) {
            self.finish_aging(now, request, effects);
        }
        while let Some(&(at, request)) = self.deadlines.first()
            && at <= now
        {
            let reason = self.late_reason(request, routes);
            self.fail(request, reason, effects);
        }
        while let Some(&(at, target)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            self.due.insert(target);
        }
        while let Some(&(at, id)) = self.silent.first()
            && at <= now
        {
            self.silent.pop_first();
            if let Some(sent) = self.take_sent(now, id) {
                self.next_follower(now, sent);
            }
        }
        for target in Vec::from_iter(self.due.iter().copied()) {
            self.sort_again(target, routes);
        }
        self.route(now, routes);
        for target in std::mem::take(&mut self.due) {
            self.join_round(now, target, routes);
        }
        let due = self.rounds.iter().filter(|(_, rounds)| !rounds.due.is_empty());
        let kinds: Vec<RoundKind> = due.map(|(&kind, _)| kind).collect();
        for kind in kinds {
            self.send_round(now, kind, routes, effects);
        }
    }

    /// The connection to the node that is to be asked, if there is one.
    fn connection_to(target: ReadTarget, routes: &Routes) -> Option<Conn> {
        match target.follower {
            None => routes.to_primary(target.shard).map(|(conn, _)| conn),
            Some(follower) => routes.router.to_store(follower),
        }
    }

    /// Sorts the parts that wait for a shard again if it was split since.
    fn sort_again(&mut self, target: ReadTarget, routes: &Routes) {
        let Some(known) = routes.map.get(target.shard).map(|record| record.slots) else { return };
        let Some(queue) = self.queues.get_mut(&target) else { return };
        let before = queue.slots.replace(known).unwrap_or(known);
        queue.was_split |= before != known;
        if !queue.was_split {
            return;
        }
        let is_outside = |key: &CounterKey| !known.contains(key.slot());
        let misplaced = |_: &u64, part: &mut ReadPart| part.keys.iter().any(is_outside);
        let parts: Vec<_> = queue.waiting.extract_if(.., misplaced).collect();
        for (request, part) in parts {
            let mut sorted: BTreeMap<ShardId, ReadPart> = BTreeMap::new();
            for (index, key) in part.indexes.into_iter().zip(part.keys) {
                // The shard of an unknown slot is this one, for now.
                let shard = routes.map.of_slot(key.slot()).map_or(target.shard, |it| it.shard());
                let sorted = sorted.entry(shard).or_default();
                sorted.indexes.push(index);
                sorted.keys.push(key);
            }
            let Some(read) = self.open.get_mut(&request) else { continue };
            read.missing += sorted.len() - 1;
            let known = read.shards.clone();
            read.shards.extend(sorted.keys().filter(|shard| !known.contains(shard)));
            for (shard, sorted) in sorted {
                let bound = part.bound.clone();
                self.enqueue(shard, request, ReadPart { bound, ..sorted });
            }
        }
    }

    /// Lets the parts that wait for a node travel in its next round.
    fn join_round(&mut self, now: Now, target: ReadTarget, routes: &Routes) {
        let Some(queue) = self.queues.get(&target).filter(|queue| !queue.waiting.is_empty()) else {
            return;
        };
        let Some(conn) = Self::connection_to(target, routes) else { return };
        if queue.retry_at > now {
            self.timers.insert((queue.retry_at, target));
            return;
        }
        self.rounds.entry(RoundKind::of(conn, target)).or_default().due.insert(target);
    }

    /// Sends the next round on a connection, if it has parts and its window allows it.
    fn send_round(
        &mut self,
        now: Now,
        kind: RoundKind,
        routes: &Routes,
        effects: &mut Vec<Effect>,
    ) {
        let Some(rounds) = self.rounds.get_mut(&kind) else { return };
        rounds.opens_at = None;
        let waiting = rounds.due.iter().filter_map(|target| self.queues.get(target));
        let load = waiting.map(|queue| queue.waiting.len()).sum();
        let least = rounds.window.least_load(now, self.window);
        if least.is_none_or(|least| load < least) {
            rounds.opens_at = rounds.window.opens_at(now, self.window);
            return;
        }
        let round = rounds.window.next_message();
        let mut messages = 0;
        for target in std::mem::take(&mut rounds.due) {
            // If the target has moved to another connection, its parts wait for a round there.
            if Self::connection_to(target, routes) == Some(kind.conn) {
                messages += self.send(now, (kind.conn, round), target, routes, effects);
            }
        }
        if let Some(rounds) = self.rounds.get_mut(&kind).filter(|_| messages > 0) {
            rounds.window.sent(now, messages, load, self.window);
        }
    }

    /// Chooses for each unrouted part the node to ask next.
    fn route(&mut self, now: Now, routes: &Routes) {
        for (shard, request, part) in std::mem::take(&mut self.unrouted) {
            if !self.open.contains_key(&request) {
                continue;
            }
            let choose = |bound: &StalenessBound| {
                let record = routes.map.get(shard)?;
                bounded::choose(bound, record, routes, &self.queues, self.number, now)
            };
            let Some(follower) = part.bound.as_ref().and_then(choose) else {
                self.enqueue(shard, request, ReadPart { bound: None, ..part });
                continue;
            };
            let target = ReadTarget { shard, follower: Some(follower) };
            self.queues.entry(target).or_default().waiting.insert(request, part);
            self.due.insert(target);
        }
    }

    /// The reason why a read was not answered by its deadline.
    fn late_reason(&self, request: u64, routes: &Routes) -> Failure {
        let Some(read) = self.open.get(&request) else { return Failure::Slow };
        let waits = |shard: &&ShardId| {
            let mut queues = self.queues.range(ReadTarget::all(**shard));
            queues.any(|(_, queue)| queue.waiting.contains_key(&request))
        };
        let Some(&shard) = read.shards.iter().find(waits) else { return Failure::Deadline };
        let primary = routes.to_primary(shard);
        let queue = self.queues.get(&ReadTarget::primary(shard));
        let refused = queue.is_some_and(|queue| queue.refusals > 0);
        if primary.is_none() || refused { Failure::NoPrimary } else { Failure::Slow }
    }

    /// Sends the parts that wait, in as few messages as possible. Returns their number.
    fn send(
        &mut self,
        now: Now,
        (conn, round): (Conn, u64),
        target: ReadTarget,
        routes: &Routes,
        effects: &mut Vec<Effect>,
    ) -> usize {
        let Some(queue) = self.queues.get_mut(&target) else { return 0 };
        let Some(record) = routes.map.get(target.shard) else { return 0 };
        let mut messages = 0;
        while !queue.waiting.is_empty() {
            self.last_id += 1;
            let id = self.last_id;
            let (parts, max_staleness_ms) = queue.take(self.message_bytes);
            if target.follower.is_some() {
                self.silent.insert((now.plus_ms(self.follower_wait_ms), id));
            }
            let keys = parts.iter().flat_map(|(_, part)| &part.keys).cloned().collect();
            let slots = record.slots;
            let message = GatewayMessage::Read { id, slots, keys, max_staleness_ms };
            effects.push(Effect::Send { conn, message });
            let epoch = record.epoch;
            self.sent.insert(id, SentRead { conn, epoch, target, at: now, round, parts });
            messages += 1;
        }
        messages
    }
}
