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
//! The modules: [`writes`] splits and admits requests; a [`part`] is what a request has in one
//! shard, and [`queue`] holds one shard's parts; [`seal`] makes a batch of them; [`sends`] ends the
//! turn; [`answers`] handles the replies of nodes; [`in_flight`] decides whether a batch is
//! rejected; [`requests`] and [`reads`] hold the requests that wait; [`bounded`] chooses the
//! follower for a bounded-stale read and computes the age of its answer.

mod answers;
mod bounded;
mod in_flight;
mod outcome;
mod part;
mod queue;
mod read_queue;
mod reads;
mod requests;
mod seal;
mod sends;
mod writes;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use self::queue::ShardQueue;
use self::reads::PendingReads;
use self::requests::PendingWrites;
use self::seal::Sealer;
use self::writes::Splitter;
use crate::batch::{BATCH_BYTES_LIMIT, BATCH_BYTES_MAX, BATCH_OPS_MAX};
use crate::idempotency::ClientToken;
use crate::ids::{Conn, Now, SessionId, ShardId, StoreBoot, StoreId, TimeMs};
use crate::key::CounterKey;
use crate::message::{GatewayMessage, HealthReport, NodeReply, REFUSAL_LABELS};
use crate::ops::Op;
use crate::planted::Planted;
use crate::router::Router;
use crate::shard_map::ShardMap;
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
    /// [`Scope::Counter`](crate::idempotency::Scope::Counter) exactly one. The part of each shard
    /// is applied as a whole or not at all, and fails as a whole.
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
    /// The number of messages to one node that may be without an answer.
    pub window: usize,
    /// A message that is older than this no longer counts in the window.
    pub window_us: u64,
    /// The bytes of waiting operations of one shard at which new ones are refused. One request may
    /// exceed the limit, since an empty queue never refuses a request.
    pub queue_bytes_max: usize,
    /// The same for all shards together, batches in flight included.
    pub total_bytes_max: usize,
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
            window: 2,
            window_us: 5_000,
            queue_bytes_max: 16 << 20,
            total_bytes_max: 128 << 20,
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
    /// The number of batches that were not taken, by reason, in the order of [`REFUSAL_LABELS`].
    pub refusals: [u64; REFUSAL_LABELS.len()],
}

impl Counts {
    fn refused(&mut self, reason: &str) {
        let known = REFUSAL_LABELS.iter().zip(&mut self.refusals);
        known.filter(|(label, _)| **label == reason).for_each(|(_, count)| *count += 1);
    }
}

/// The object to review when a timer fires. A superfluous timer does no harm.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum BatcherTimer {
    Shard(ShardId),
    Connection(Conn),
}

/// The state machine of one gateway worker. See the module.
#[derive(Clone, Debug)]
pub struct Batcher {
    settings: Settings,
    now: Now,
    stopping: bool,
    last_request: u64,

    map: ShardMap,
    router: Router,
    /// The session whose key exists in etcd.
    session: Option<SessionId>,
    /// The session for new batches: the last one whose key existed, unless it was given up.
    present: Option<SessionId>,
    /// The session that was given up last.
    abandoned: Option<SessionId>,

    /// The newest time of any shard, and when the answer with it came.
    newest: Option<(TimeMs, Now)>,
    queues: BTreeMap<ShardId, ShardQueue>,
    requests: PendingWrites,
    reads: PendingReads,
    /// The number of batches in flight.
    in_flight: usize,
    /// The memory of all operations that wait or are in flight, in bytes.
    bytes: usize,

    /// Shards that something has happened to since the last turn ended.
    due: BTreeSet<ShardId>,
    /// Connections that something has happened to since the last turn ended.
    touched: BTreeSet<Conn>,
    timers: BTreeSet<(Now, BatcherTimer)>,

    splitter: Splitter,
    sealer: Sealer,
    counts: Counts,
}

impl Batcher {
    /// A batcher without a shard map, a session and connections.
    pub fn new(settings: Settings) -> Self {
        let reads = PendingReads::new(&settings);
        Self {
            sealer: Sealer::new(match Planted::BatchUnlimited.is_in(settings.planted) {
                true => BatchSizes::default(),
                false => settings.sizes,
            }),
            settings,
            now: Now(0),
            stopping: false,
            last_request: 0,
            map: ShardMap::default(),
            router: Router::default(),
            session: None,
            present: None,
            newest: None,
            abandoned: None,
            queues: BTreeMap::new(),
            requests: PendingWrites::default(),
            reads,
            in_flight: 0,
            bytes: 0,
            due: BTreeSet::new(),
            touched: BTreeSet::new(),
            timers: BTreeSet::new(),
            splitter: Splitter::default(),
            counts: Counts::default(),
        }
    }

    /// Handles one event, and appends the effects that follow from it.
    pub fn handle(&mut self, now: Now, event: Event, effects: &mut Vec<Effect>) {
        self.now = now;
        match event {
            Event::Write { request, ops, token, deadline } => {
                self.on_write(request, ops, token, deadline, effects);
            }
            Event::Read { request, keys, max_staleness_ms, deadline } => {
                self.on_read(request, keys, max_staleness_ms, deadline, effects);
            }
            Event::Session(session) => self.on_session(session),
            Event::ShardRecord(record) => self.learn(record),
            Event::Connected { conn, node } => self.on_connected(conn, node),
            Event::Closed { conn } => self.on_closed(conn),
            Event::DialRefused { store } => self.on_dial_refused(store, effects),
            Event::Reply { conn, reply } => self.on_reply(conn, reply, effects),
            Event::TurnEnded => self.on_turn_ended(effects),
            Event::Stop => self.stopping = true,
        }
    }

    /// The time at which to pass [`Event::TurnEnded`] although nothing has happened.
    pub fn next_deadline(&self) -> Option<Now> {
        let timers = self.timers.first().map(|&(at, _)| at);
        [self.requests.deadline(), self.reads.deadline(), timers].into_iter().flatten().min()
    }

    // ---- accessors -----------------------------------------------------------------------------

    /// The known records of the shards.
    pub fn map(&self) -> &ShardMap {
        &self.map
    }

    /// The session whose key exists in etcd.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// The reason why `/readyz` is not 200 yet, if it is not: the first of map, session,
    /// connections.
    pub fn not_ready(&self) -> Option<NotReady> {
        if self.stopping {
            return Some(NotReady::Stopping);
        }
        if !self.map.is_complete() {
            return Some(NotReady::Map);
        }
        if self.session.is_none() {
            return Some(NotReady::Session);
        }
        self.unconnected().first().copied().map(NotReady::Primary)
    }

    /// Primaries in the map without a connection to that very process: to be dialled.
    pub fn unconnected(&self) -> Vec<StoreBoot> {
        let mut primaries = self.map.primaries();
        primaries.retain(|&primary| self.router.to(primary).is_none());
        primaries
    }

    /// Returns whether no request waits and no batch is in flight.
    pub fn is_idle(&self) -> bool {
        self.requests() == 0 && self.in_flight == 0
    }

    /// The number of requests without an answer.
    pub fn requests(&self) -> usize {
        self.requests.len() + self.reads.len()
    }

    /// The time of the shard whose clock is furthest ahead, advanced by the time that has passed
    /// since on the monotonic clock. `None` if no answer has contained a time yet.
    pub fn shard_time(&self, now: Now) -> Option<TimeMs> {
        self.newest.map(|(time, heard_at)| TimeMs(time.0.saturating_add(now.ms_since(heard_at))))
    }

    /// The bytes of operations that are held, waiting and in flight.
    pub fn bytes(&self) -> usize {
        self.bytes + self.requests.held_bytes()
    }

    /// The counters since the start.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    // ---- requests ------------------------------------------------------------------------------

    fn on_read(
        &mut self,
        request: u64,
        keys: Vec<CounterKey>,
        max_staleness_ms: Option<u64>,
        deadline: Now,
        effects: &mut Vec<Effect>,
    ) {
        self.counts_up(request);
        let refused = if self.stopping {
            Some(Failure::Stopping)
        } else {
            let full = self.reads.keys() >= self.settings.read_keys_max;
            full.then(|| self.no_room_reason(&keys))
        };
        match refused {
            Some(failure) => effects.push(Effect::ReadDone { request, result: Err(failure) }),
            None => {
                self.reads.begin(request, keys, max_staleness_ms, deadline, &self.map, effects);
            }
        }
    }

    /// The reason why a read of these keys finds no room. If one of them has no reachable primary,
    /// that is the reason: the reads before it wait for that primary, too.
    fn no_room_reason(&self, keys: &[CounterKey]) -> Failure {
        let has_primary = |key: &CounterKey| {
            let record = self.map.of_slot(key.slot());
            record.is_some_and(|record| self.router.to(record.primary).is_some())
        };
        if keys.iter().all(has_primary) { Failure::QueueFull } else { Failure::NoPrimary }
    }

    /// Checks that request numbers increase: parts are kept in the order of their requests.
    fn counts_up(&mut self, request: u64) {
        assert!(request > self.last_request, "the driver numbers requests upwards");
        self.last_request = request;
    }

    // ---- etcd ----------------------------------------------------------------------------------

    fn on_session(&mut self, session: Option<SessionId>) {
        self.session = session;
        if session.is_none() || session == self.abandoned {
            return;
        }
        self.present = session;
        self.due.extend(self.queues.keys());
    }

    /// Takes a shard's record, from etcd or from a refusal.
    fn learn(&mut self, record: ShardRecord) {
        if !self.map.learn(record.clone()) {
            return;
        }
        let shard = record.shard();
        if let Some(queue) = self.queues.get_mut(&shard) {
            queue.retry_at = Now(0);
            queue.refusals = 0;
            self.due.insert(shard);
        }
        self.reads.moved(self.now, &record, self.router.to(record.primary));
    }

    // ---- connections ---------------------------------------------------------------------------

    fn on_connected(&mut self, conn: Conn, node: StoreBoot) {
        self.router.connected(conn, node);
        let led = self.map.iter().filter(|record| record.primary == node);
        let shards: Vec<ShardId> = led.map(ShardRecord::shard).collect();
        self.due.extend(&shards);
        self.reads.connected(shards);
    }

    fn on_closed(&mut self, conn: Conn) {
        if self.router.closed(conn).is_none() {
            return;
        }
        for (&shard, queue) in &mut self.queues {
            let cut = queue.in_flight.as_mut().is_some_and(|in_flight| in_flight.closed(conn));
            let was_queued = queue.queued_on.take_if(|at| *at == conn).is_some();
            if cut || was_queued {
                self.due.insert(shard);
            }
        }
        self.reads.closed(self.now, conn);
    }

    /// Reports the store to the coordinator, which probes it itself before it acts.
    fn on_dial_refused(&mut self, store: StoreId, effects: &mut Vec<Effect>) {
        if self.map.iter().any(|record| record.primary.store == store) {
            effects.push(Effect::Report(HealthReport {
                silent: vec![store],
                ..HealthReport::default()
            }));
        }
    }
}
