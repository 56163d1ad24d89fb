//! The state machine of one gateway worker: operations in, batches out, each decided exactly once.
//!
//! ```text
//!   driver                                         batcher
//!   ──────                                         ───────
//!   HTTP      ── Write{request}, Read{request} ──▶  split by shard, queued
//!             ── TurnEnded ───────────────────────▶  sealed, packed into frames
//!   sockets   ◀── Send{conn, Frame | Read} ────────
//!             ── Reply{conn} ─────────────────────▶  decided, rejected, or still in flight
//!   HTTP      ◀── Wrote{request}, ReadDone ────────
//!   etcd      ── Session, ShardRecord ────────────▶
//! ```
//!
//! **How to drive it.** Wait until something has happened or `next_deadline` has come. Pass every
//! event that is ready to the batcher, one by one, then [`Event::TurnEnded`], once, and perform the
//! effects in the order given. Nothing is sent and no deadline expires before the turn ends: this
//! is what lets a thousand requests that were ready together travel in one frame. A superfluous
//! `TurnEnded` is harmless, a missing one delays everything.
//!
//! **Easy to get wrong.** A batch that was sent once is immutable: the same bytes are sent again
//! under the same number, to the present primary, until the batch is decided, whatever answer its
//! clients have got meanwhile. A sent operation may be reported as "not applied" only if *every*
//! send of its batch was answered, and none with an effect. The batch is then *rejected*: its
//! operations go back to the queue or fail, and its number is free for other bytes. A closed
//! connection or a time-out is not an answer.
//!
//! The modules: a part owns its state, and what takes several parts borrows them by name.
//!
//! | part | what it owns |
//! |---|---|
//! | [`intake`] | the intake of requests: their numbers, and the buffers to split them |
//! | [`session`] | the session for new batches |
//! | [`routes`] | the shard map, and the connections to nodes |
//! | [`shard_queues`] | all operations that wait or are in flight; a [`queue`] per shard |
//! | [`pending_writes`] | the writes that wait for their answer |
//! | [`pending_reads`] | the reads that do |
//! | [`agenda`] | the shards and connections to review when the turn ends |
//!
//! [`queueing`] admits operations, moves and expires them; [`sends`] packs batches; [`answers`]
//! handles those of nodes. A [`part`] is what a request has in one shard; [`seal`] makes a batch of
//! parts, and [`in_flight`] decides whether it is rejected; [`bounded`] chooses the follower for a
//! bounded-stale read, and computes the age of its answer. A [`window`] limits what is sent to a
//! node before its answers come.

pub mod router;
pub mod shard_map;
pub mod window;

mod agenda;
mod answers;
mod bounded;
mod in_flight;
mod intake;
mod outcome;
mod part;
mod pending_reads;
mod pending_writes;
mod queue;
mod queueing;
mod read_queue;
mod routes;
mod seal;
mod sends;
mod session;
mod shard_queues;

#[cfg(test)]
mod tests;

use self::agenda::TurnAgenda;
use self::answers::Answering;
use self::intake::RequestIntake;
use self::pending_reads::PendingReads;
use self::pending_writes::PendingWrites;
use self::queue::ShardQueue;
use self::queueing::Queueing;
use self::routes::Routes;
use self::sends::Sending;
use self::session::BatchSessions;
use self::shard_queues::ShardQueues;
use self::window::WindowSettings;
use crate::batch::{BATCH_BYTES_LIMIT, BATCH_BYTES_MAX, BATCH_OPS_MAX};
use crate::batcher::shard_map::ShardMap;
use crate::ids::{Conn, Now, SessionId, Slot, Slots, StoreBoot, StoreId, TimeMs};
use crate::key::CounterKey;
use crate::message::{GatewayMessage, HealthReport, NodeReply, REFUSAL_LABELS};
use crate::ops::Op;
use crate::planted::Planted;
use crate::shard::idempotency::ClientToken;
use crate::shard_record::ShardRecord;

pub use outcome::{Failure, Outcome, ReadValues, WriteResult};

/// Everything that can happen to a batcher.
#[derive(Clone, Debug)]
pub enum Event {
    // -- HTTP
    /// One request of 1 to 100,000 operations on counters of any shards. It is answered by one
    /// `Wrote`, at the latest at the end of the turn in which `deadline` passes.
    ///
    /// With a token, `ops` are the operations as the client gave them, in its order and all of one
    /// namespace (the batcher sums those of one counter); with
    /// [`Scope::Counter`](crate::token::Scope::Counter) exactly one. The part of each shard is
    /// applied as a whole or not at all, and fails as a whole.
    Write {
        /// The driver's own number. Numbers increase and are never used twice, for writes and reads
        /// together.
        request: u64,
        /// The operations.
        ops: Vec<Op>,
        /// The client's idempotency key, if there is one.
        token: Option<ClientToken>,
        /// The time at which the request is answered by what is known then.
        deadline: Now,
    },
    /// A read of any counters, answered by one `ReadDone`.
    Read {
        /// The driver's own number; see `Write`.
        request: u64,
        /// The counters to read.
        keys: Vec<CounterKey>,
        /// The age of values that the client accepts; `None` for a linearizable read.
        max_staleness_ms: Option<u64>,
        /// The time at which the read fails.
        deadline: Now,
    },

    // -- etcd
    /// The worker's key in etcd was created (the id is its create_revision), or is gone. The loss
    /// of the key ends nothing: the batcher goes on with the old session until there is a new one,
    /// and then changes over shard by shard, each as soon as it has no batch in flight.
    Session(Option<SessionId>),
    /// A shard's record, from a watch or a list, in any order, any number of times.
    ShardRecord(ShardRecord),

    // -- sockets
    /// A connection to this process is established (its handshake named the process). A later one
    /// to the same store replaces an earlier one, which the driver closes in its own time.
    Connected {
        /// The connection.
        conn: Conn,
        /// The process at its other end.
        node: StoreBoot,
    },
    /// The connection is closed. Messages that were sent on it without an answer stay unanswered
    /// for ever.
    Closed {
        /// The connection.
        conn: Conn,
    },
    /// The store's address refused a connection, or reset one and refused the next: the process is
    /// gone, if this host's network can be trusted.
    DialRefused {
        /// The store.
        store: StoreId,
    },
    /// A node's reply.
    Reply {
        /// The connection on which it came.
        conn: Conn,
        /// The reply.
        reply: NodeReply,
    },

    /// All events that were ready have been handled, or the time given by `next_deadline` has come.
    TurnEnded,
    /// A graceful stop: requests from now on are refused; queued and sent ones go on. The driver
    /// ends when [`Batcher::is_idle`], or when its own time-out has passed.
    Stop,
}

/// Everything a batcher can ask of its driver.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// Send a message, in order per connection. If it can't be sent, the driver closes the
    /// connection and reports `Closed`.
    Send {
        /// The connection.
        conn: Conn,
        /// The message.
        message: GatewayMessage,
    },
    /// Answer a write: every operation is decided, or the deadline has passed.
    Wrote {
        /// The number of the request.
        request: u64,
        /// The outcome of its operations.
        result: WriteResult,
    },
    /// Answer a read. A read that fails has no effect, whatever the reason.
    ReadDone {
        /// The number of the request.
        request: u64,
        /// The values, or the reason for their absence.
        result: Result<ReadValues, Failure>,
    },
    /// Send a hint to the coordinator, which probes the store itself before it acts.
    Report(HealthReport),
    /// A shard has expired the session, or a node answered "out of order", which no correct run
    /// shows (`counts` distinguishes them). Create a new key for this worker, and report it by
    /// `Session`; the old key may go when its lease does.
    AbandonSession(SessionId),
}

/// The settings of one batcher.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The batching delay, like Kafka's `linger.ms`: a queue waits this long for more operations. 0
    /// means until the end of the turn.
    pub linger_us: u64,
    /// The messages to one node that may be without an answer.
    pub window: WindowSettings,
    /// The bytes of waiting operations of one shard at which new ones are refused. One request may
    /// exceed the limit, since an empty queue never refuses a request.
    pub queue_bytes_max: usize,
    /// The same for all shards together, batches in flight included.
    pub total_bytes_max: usize,
    /// The bytes of operations up to which there is [room](Batcher::room) for large requests:
    /// enough to keep all nodes busy, and as little as that, since what waits for long leaves the
    /// caches.
    pub room_bytes: usize,
    /// The payload bytes of batches in flight to one node at which no more are sent.
    pub connection_bytes_max: usize,
    /// The time for which a known shard time serves as the issue time of operations with a token.
    /// After that the shard is asked again, by a batch without operations.
    pub shard_time_valid_ms: u64,
    /// The keys of waiting reads at which new reads are refused.
    pub read_keys_max: usize,
    /// A follower that has not answered a bounded-stale read by then is given up. This is longer
    /// than the follower itself waits for a read proof.
    pub follower_wait_ms: u64,
    /// The number of the gateway worker. Each one begins with another follower.
    pub number: usize,
    /// The limits of batches and messages.
    pub sizes: BatchSizes,
    /// Further waits.
    pub timing: BatcherTiming,
    /// A planted bug, in tests only.
    pub planted: Option<Planted>,
}

/// The limits of one batch and of one message.
#[derive(Clone, Copy, Debug)]
pub struct BatchSizes {
    /// A batch is closed at this many ops.
    pub batch_ops_max: usize,
    /// A batch is closed at this many bytes of encoded ops.
    pub batch_bytes_max: usize,
    /// A batch is closed when this many of its ops ask for a value (a token's outcome counts as
    /// one): every replica keeps the results of a batch until they are acknowledged.
    pub batch_values_max: usize,
    /// The bytes that a request with a token may need for its part of one shard: at most what the
    /// nodes accept.
    pub batch_bytes_limit: usize,
    /// A message is closed at this many bytes of payloads: with one more batch, which may be a
    /// request with a token of 12 MiB, and its table it stays below the 16 MiB that a node accepts.
    pub message_bytes: usize,
    /// A message of reads is closed at this many bytes of names.
    pub read_message_bytes: usize,
}

impl Default for BatchSizes {
    fn default() -> Self {
        Self {
            batch_ops_max: BATCH_OPS_MAX,
            batch_bytes_max: BATCH_BYTES_MAX,
            // 64 KiB of values of up to 19 bytes.
            batch_values_max: 64 * 1024 / 19,
            batch_bytes_limit: BATCH_BYTES_LIMIT,
            message_bytes: 3 << 20,
            read_message_bytes: 1 << 20,
        }
    }
}

/// The waits of a batcher, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct BatcherTiming {
    /// The first pause after a refusal that asks for another primary, while the record stays the
    /// same. It doubles each time up to `refused_ms_max`.
    pub refused_ms: u64,
    /// The most that `refused_ms` grows to.
    pub refused_ms_max: u64,
    /// The pause after "overloaded" and "no space".
    pub overloaded_ms: u64,
    /// The time for which a `Frozen` notice of a shard stays valid without renewal.
    pub frozen_ms: u64,
    /// The time for which a follower that could not answer is asked after the others.
    pub avoid_ms: u64,
}

impl Default for BatcherTiming {
    fn default() -> Self {
        Self {
            refused_ms: 10,
            refused_ms_max: 200,
            overloaded_ms: 50,
            frozen_ms: 1_000,
            avoid_ms: 1_000,
        }
    }
}

impl BatcherTiming {
    /// The pause after this many consecutive refusals.
    fn backoff_ms(&self, refusals: u32) -> u64 {
        (self.refused_ms << refusals.saturating_sub(1).min(10)).min(self.refused_ms_max)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            linger_us: 0,
            window: WindowSettings::default(),
            queue_bytes_max: 16 << 20,
            total_bytes_max: 128 << 20,
            room_bytes: 32 << 20,
            connection_bytes_max: 16 << 20,
            shard_time_valid_ms: 1_000,
            read_keys_max: 200_000,
            follower_wait_ms: 400,
            number: 0,
            sizes: BatchSizes::default(),
            timing: BatcherTiming::default(),
            planted: None,
        }
    }
}

/// The reason why `/readyz` is not 200 yet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotReady {
    /// Some slots have no shard yet.
    Map,
    /// There is no session: etcd has not answered, or the key is gone and was not created again.
    Session,
    /// There is no connection to this primary.
    Primary(StoreBoot),
    /// The gateway is stopping.
    Stopping,
}

/// Counters since the start, for metrics.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// The number of batches sealed.
    pub batches: u64,
    /// The number of sends of batches, the first of each included.
    pub sends: u64,
    /// The number of operations put into batches, before adds of one key were merged.
    pub ops: u64,
    /// The same number after the merge.
    pub ops_sent: u64,
    /// The sends of batches that were not taken, by reason, in the order of [`REFUSAL_LABELS`].
    pub refusals: [u64; REFUSAL_LABELS.len()],
}

impl Counts {
    fn refused(&mut self, reason: &str) {
        let known = REFUSAL_LABELS.iter().zip(&mut self.refusals);
        known.filter(|(label, _)| **label == reason).for_each(|(_, count)| *count += 1);
    }
}

/// The state machine of one gateway worker. See the module.
#[derive(Clone, Debug)]
pub struct Batcher {
    settings: Settings,
    counts: Counts,
    agenda: TurnAgenda,
    intake: RequestIntake,
    sessions: BatchSessions,
    routes: Routes,
    queues: ShardQueues,
    writes: PendingWrites,
    reads: PendingReads,
}

/// The inputs and outputs of one call of `handle`, which every part may use.
struct BatcherTurn<'a> {
    now: Now,
    settings: &'a Settings,
    counts: &'a mut Counts,
    agenda: &'a mut TurnAgenda,
    effects: &'a mut Vec<Effect>,
}

impl BatcherTurn<'_> {
    fn reborrow(&mut self) -> BatcherTurn<'_> {
        BatcherTurn { counts: self.counts, agenda: self.agenda, effects: self.effects, ..*self }
    }
}

impl Batcher {
    /// A batcher without a shard map, a session and connections.
    pub fn new(settings: Settings) -> Self {
        Self {
            counts: Counts::default(),
            agenda: TurnAgenda::default(),
            intake: RequestIntake::default(),
            sessions: BatchSessions::default(),
            routes: Routes::default(),
            queues: ShardQueues::new(&settings),
            writes: PendingWrites::default(),
            reads: PendingReads::new(&settings),
            settings,
        }
    }

    /// Handles one event, and appends the effects that follow from it.
    pub fn handle(&mut self, now: Now, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Write { request, ops, token, deadline } => {
                let (intake, mut queueing) = self.intake(now, effects);
                intake.on_write(&mut queueing, request, ops, token, deadline);
            }
            Event::Read { request, keys, max_staleness_ms, deadline } => {
                self.on_read(request, keys, max_staleness_ms, deadline, effects);
            }
            Event::Session(session) => {
                if self.sessions.register(session) {
                    self.agenda.shards.extend(self.queues.shards());
                }
            }
            Event::ShardRecord(record) => self.learn(now, record),
            Event::Connected { conn, node } => {
                let shards = self.routes.connected(conn, node);
                self.agenda.shards.extend(shards.iter().copied());
                self.reads.connected(shards);
            }
            Event::Closed { conn } => {
                if self.routes.router.closed(conn).is_some() {
                    self.agenda.shards.extend(self.queues.closed(conn));
                    self.reads.closed(now, conn);
                }
            }
            Event::DialRefused { store } => self.on_dial_refused(store, effects),
            Event::Reply { conn, reply } => self.on_reply(now, conn, reply, effects),
            Event::TurnEnded => self.on_turn_ended(now, effects),
            Event::Stop => self.intake.stop(),
        }
    }

    /// The time at which to pass [`Event::TurnEnded`] although nothing has happened.
    pub fn next_deadline(&self) -> Option<Now> {
        let deadlines = [self.writes.deadline(), self.reads.deadline(), self.agenda.deadline()];
        deadlines.into_iter().flatten().min()
    }

    // ---- accessors -----------------------------------------------------------------------------

    /// The known records of the shards.
    pub fn map(&self) -> &ShardMap {
        &self.routes.map
    }

    /// The session whose key exists in etcd.
    pub fn session(&self) -> Option<SessionId> {
        self.sessions.registered()
    }

    /// The reason why `/readyz` is not 200 yet, if it is not: the first of map, session,
    /// connections.
    pub fn not_ready(&self) -> Option<NotReady> {
        if self.intake.is_stopping() {
            return Some(NotReady::Stopping);
        }
        if !self.map().is_complete() {
            return Some(NotReady::Map);
        }
        if self.session().is_none() {
            return Some(NotReady::Session);
        }
        self.unconnected().first().copied().map(NotReady::Primary)
    }

    /// Primaries in the map without a connection to that very process: to be dialled.
    pub fn unconnected(&self) -> Vec<StoreBoot> {
        self.routes.unconnected()
    }

    /// Returns whether no request waits and no batch is in flight.
    pub fn is_idle(&self) -> bool {
        self.requests() == 0 && !self.queues.are_in_flight()
    }

    /// The number of requests without an answer.
    pub fn requests(&self) -> usize {
        self.writes.len() + self.reads.len()
    }

    /// The time of the shard whose clock is furthest ahead, advanced by the time that has passed
    /// since on the monotonic clock. `None` if no answer has contained a time yet.
    pub fn shard_time(&self, now: Now) -> Option<TimeMs> {
        self.queues.newest_time(now)
    }

    /// The bytes of operations that are held, waiting and in flight.
    pub fn bytes(&self) -> usize {
        self.queues.bytes() + self.writes.held_bytes()
    }

    /// The bytes of operations for which there is room. Without any, the driver lets large requests
    /// wait before it parses them.
    pub fn room(&self) -> usize {
        let max = self.settings.room_bytes;
        max.saturating_sub(self.queues.spread_bytes(max, self.map().iter().len()))
    }

    /// The counters since the start.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    // ---- events that concern several parts -----------------------------------------------------

    fn on_read(
        &mut self,
        request: u64,
        keys: Vec<CounterKey>,
        max_staleness_ms: Option<u64>,
        deadline: Now,
        effects: &mut Vec<Effect>,
    ) {
        self.intake.number(request);
        let refused = match self.intake.is_stopping() {
            true => Some(Failure::Stopping),
            false => self.reads.refusal(&self.settings, &self.routes, &keys),
        };
        match refused {
            Some(failure) => effects.push(Effect::ReadDone { request, result: Err(failure) }),
            None => {
                self.reads.begin(request, keys, max_staleness_ms, deadline, &self.routes, effects);
            }
        }
    }

    /// Takes a shard's record, from etcd or from a refusal.
    fn learn(&mut self, now: Now, record: ShardRecord) {
        let before = self.routes.map.of_slot(Slot(record.slots.lo)).map(|known| known.slots);
        if !self.routes.map.learn(record.clone()) {
            return;
        }
        if let Some(before) = before.filter(|&before| before != record.slots) {
            // From the last one on: each is carved out of the parent's queue, which keeps the rest.
            self.routes.map.within(before).into_iter().rev().for_each(|slots| self.carve(slots));
        }
        if self.queues.change(record.shard(), ShardQueue::moved).is_some() {
            self.agenda.shards.add(record.shard());
        }
        self.reads.moved(now, &record, self.routes.router.to(record.primary));
    }

    /// Divides the queue of a shard that was split, if these are the slots of its right child.
    fn carve(&mut self, slots: Slots) {
        let planted = self.settings.planted;
        let Some(parent) = self.queues.carve(slots, planted) else { return };
        let child = slots.shard();
        self.agenda.shards.add(parent);
        self.agenda.shards.add(child);
        let Some(in_flight) = self.queues.in_flight(child) else { return };
        for part in &in_flight.parts {
            self.writes.went_to(part.request, child);
        }
        // The sends to the parent take their room twice, until both have their answers.
        for conn in in_flight.open_on() {
            if let Some(connection) = self.routes.router.connection_mut(conn) {
                connection.bytes += in_flight.batch.payload.len();
            }
        }
    }

    /// Reports the store to the coordinator, which probes it itself before it acts.
    fn on_dial_refused(&mut self, store: StoreId, effects: &mut Vec<Effect>) {
        if self.routes.map.iter().any(|record| record.primary.store == store) {
            let report = HealthReport { silent: vec![store], ..HealthReport::default() };
            effects.push(Effect::Report(report));
        }
    }

    fn on_reply(&mut self, now: Now, conn: Conn, reply: NodeReply, effects: &mut Vec<Effect>) {
        // Nothing from a closed connection is handled.
        if self.routes.router.connection(conn).is_none() {
            return;
        }
        let record = match reply {
            NodeReply::Answer { message, slots, session, batch_seq, answer } => {
                let number = (session, batch_seq);
                self.answering(now, effects).on_answer((conn, message), slots, number, answer)
            }
            NodeReply::ShardState { slots, state } => {
                self.answering(now, effects).note_state(conn, slots.shard(), state);
                None
            }
            NodeReply::Read { id, result } => self.reads.answered(now, conn, id, result, effects),
        };
        if let Some(record) = record {
            self.learn(now, record);
        }
    }

    fn on_turn_ended(&mut self, now: Now, effects: &mut Vec<Effect>) {
        self.queueing(now, effects).expire_late();
        self.agenda.fire_timers(now);
        self.review_shards(now, effects);
        // Operations that were rerouted are due again, in another shard.
        self.review_shards(now, effects);
        for conn in self.agenda.connections.take() {
            self.sending(now, effects).pack(conn);
        }
        self.reads.turn_ended(now, &self.routes, effects);
    }

    fn review_shards(&mut self, now: Now, effects: &mut Vec<Effect>) {
        for shard in self.agenda.shards.take() {
            self.queueing(now, effects).review(shard);
            self.sending(now, effects).queue_shard(shard);
        }
    }

    // ---- what is lent --------------------------------------------------------------------------

    fn intake<'a>(
        &'a mut self,
        now: Now,
        effects: &'a mut Vec<Effect>,
    ) -> (&'a mut RequestIntake, Queueing<'a>) {
        let Self { settings, counts, agenda, intake, sessions, routes, queues, writes, .. } = self;
        let turn = BatcherTurn { now, settings, counts, agenda, effects };
        (intake, Queueing { turn, sessions, routes, queues, writes })
    }

    fn queueing<'a>(&'a mut self, now: Now, effects: &'a mut Vec<Effect>) -> Queueing<'a> {
        self.intake(now, effects).1
    }

    fn sending<'a>(&'a mut self, now: Now, effects: &'a mut Vec<Effect>) -> Sending<'a> {
        let Self { settings, counts, agenda, sessions, routes, queues, .. } = self;
        let turn = BatcherTurn { now, settings, counts, agenda, effects };
        Sending { turn, sessions, routes, queues }
    }

    fn answering<'a>(&'a mut self, now: Now, effects: &'a mut Vec<Effect>) -> Answering<'a> {
        let Self { settings, counts, agenda, sessions, routes, queues, writes, .. } = self;
        let turn = BatcherTurn { now, settings, counts, agenda, effects };
        Answering { turn, sessions, routes, queues, writes }
    }
}
