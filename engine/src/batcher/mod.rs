//! One gateway worker: operations in, batches out, each decided exactly once.
//!
//! ```text
//!   driver                                         worker machine
//!   ──────                                         ──────────────
//!   HTTP      ── Write{request}, Read{request} ──▶  split by shard, queued
//!             ── TurnEnded ───────────────────────▶  sealed, packed into frames
//!   sockets   ◀── Send{conn, Frame | Read} ────────
//!             ── Reply{conn} ─────────────────────▶  decided, refused, or still open
//!   HTTP      ◀── Wrote{request}, ReadDone ────────
//!   etcd      ── Session, Config ─────────────────▶
//! ```
//!
//! **How to drive it.** Wait until something has happened or `next_deadline` has come. Give the
//! machine every event that is ready, one by one; then give it [`Event::TurnEnded`], once, and
//! perform the effects in the order given. Nothing is sent and no deadline is looked at before the
//! turn ends: that is what lets a thousand requests that were ready together travel in one frame.
//! A `TurnEnded` too many is harmless, one too few delays everything.
//!
//! **What a newcomer would get wrong.** A batch that was sent once is immutable: the same bytes
//! under the same number are sent again, to whoever is primary, until it is decided, whatever its
//! clients have been told meanwhile. "Not applied" may be said of a sent operation only if *every*
//! send of its batch was answered, and none with an effect: then the batch is *definite*, is
//! dissolved, and its number is free for other bytes. A closed connection or a time-out answers
//! nothing.

//! The rooms: [`writes`] splits and admits requests; [`queue`] holds one shard's operations;
//! [`seal`] makes a batch of them; [`sends`] ends the turn; [`answers`] is the table of DESIGN §11;
//! [`undecided`] knows whether a batch is definite; [`requests`] and [`reads`] know who waits;
//! [`bounded`] knows which backup to ask and how old its answer is.

mod answers;
mod bounded;
mod outcome;
mod queue;
mod read_queue;
mod reads;
mod requests;
mod seal;
mod sends;
mod undecided;
mod writes;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use self::queue::Queue;
use self::reads::Reads;
use self::requests::Requests;
use self::seal::Sealer;
use self::writes::Splitter;
use crate::batch::{BATCH_BYTES_LIMIT, BATCH_BYTES_MAX, BATCH_OPS_MAX};
use crate::config::ShardConfig;
use crate::idempotency::Token;
use crate::ids::{Conn, Now, SessionId, ShardId, StoreBoot, StoreId, TimeMs};
use crate::key::CounterKey;
use crate::message::{GatewayMessage, NodeReply, Report};
use crate::ops::Op;
use crate::planted::Planted;
use crate::router::Router;
use crate::shard_map::ShardMap;

pub use outcome::{Failure, Outcome, ReadValues, WriteResult};

/// Everything that can happen to a worker.
#[derive(Clone, Debug)]
pub enum Event {
    // -- HTTP
    /// One request: 1 to 100,000 operations on counters of any shards. Answered by one `Wrote`, by
    /// the end of the turn in which `deadline` passes. `request` is the driver's own number; it
    /// counts up and is never used twice, for writes and reads together.
    ///
    /// With a token: the operations as the client gave them, in its order, all of one namespace (the
    /// worker sums those of one counter); of [`Scope::Counter`](crate::idempotency::Scope::Counter)
    /// exactly one. What one shard has to do is done as a whole or not at all, and fails as a whole.
    Write {
        request: u64,
        ops: Vec<Op>,
        token: Option<Token>,
        deadline: Now,
    },
    /// A read of any counters. Answered by one `ReadDone`. Linearizable, unless the client is
    /// content with values of this age.
    Read {
        request: u64,
        keys: Vec<CounterKey>,
        max_staleness_ms: Option<u64>,
        deadline: Now,
    },

    // -- etcd
    /// This worker's key in etcd was created (the id is its create_revision), or is gone. Losing it
    /// ends nothing: the worker goes on with the old session until there is a new one, and then
    /// changes over shard by shard, each as soon as it has no undecided batch.
    Session(Option<SessionId>),
    /// A shard's record, as a watch or a list has shown it. Any order, any number of times.
    Config(ShardConfig),

    // -- sockets
    /// A connection to this process stands (its handshake named it). A later one to the same store
    /// takes the place of an earlier one, which the driver closes in its own time.
    Connected {
        conn: Conn,
        node: StoreBoot,
    },
    /// Nothing more will come from it. What was sent and not answered stays unanswered for ever.
    Closed {
        conn: Conn,
    },
    /// The store's address refused a connection, or reset one and refused the next: the process is
    /// gone, if the machine can believe it.
    DialRefused {
        store: StoreId,
    },
    Reply {
        conn: Conn,
        reply: NodeReply,
    },

    /// All that was ready has been handled, or the time given by `next_deadline` has come.
    TurnEnded,
    /// A graceful stop: requests from now on are refused; what is queued and undecided goes on. The
    /// driver ends when [`Worker::is_idle`], or when it has no more patience.
    Stop,
}

/// Everything a worker can ask of its driver.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Effect {
    /// In order per connection. If it can't be sent, the connection is closed and told so.
    Send { conn: Conn, message: GatewayMessage },
    /// Every operation of the request is decided, or its deadline has passed.
    Wrote { request: u64, result: WriteResult },
    /// The values, or why there are none. A read that fails has no effect, whatever the reason.
    ReadDone { request: u64, result: Result<ReadValues, Failure> },
    /// A hint for the coordinator: it asks the store itself before it acts.
    Report(Report),
    /// A shard has collected the session, or a node answered "out of order", which no correct run
    /// shows (`counts` tells which). Make a new key for this worker, and tell it by `Session`; the
    /// old key may go when its lease does.
    AbandonSession(SessionId),
}

/// What is tuned, and what a test makes small.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A queue waits this long for company before it is sent. 0: only for the end of the turn.
    pub linger_us: u64,
    /// So many messages to one node may be without an answer …
    pub window: usize,
    /// … and one that is older than this no longer counts.
    pub window_us: u64,
    /// Operations of one shard waiting, in bytes; at or above it new ones are refused. One request
    /// may go beyond it, since a request is never refused by an empty queue.
    pub queue_bytes_max: usize,
    /// The same for all shards together, undecided batches included.
    pub worker_bytes_max: usize,
    /// Payloads of undecided batches on the way to one node.
    pub lane_bytes_max: usize,
    /// What was heard of a shard's time serves operations with a token for so long, as the time at which
    /// they were issued. Then the shard is asked: by a batch without operations, whose answer tells.
    pub heard_for_ms: u64,
    /// Reads waiting, in keys; at or above it new ones are refused.
    pub read_keys_max: usize,
    /// A backup that has not answered a bounded-stale read by then is done without. Longer than it
    /// waits itself for a proof.
    pub backup_wait_ms: u64,
    /// This worker's number: each begins with another backup.
    pub worker: usize,
    pub sizes: Sizes,
    pub timing: Timing,
    pub planted: Option<Planted>,
}

/// Limits of one batch and of one message.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// A batch is closed at this many ops …
    pub batch_ops_max: usize,
    /// … or at this many bytes of encoded ops …
    pub batch_bytes_max: usize,
    /// … or when so many of them ask for a value (a token's outcome counts as one): the results of a batch are kept by
    /// every replica until they are acknowledged.
    pub batch_values_max: usize,
    /// What a request with a token may need for its part of one shard: at most what the nodes order.
    pub batch_bytes_limit: usize,
    /// A message is closed at so many bytes of payloads: with one more batch, which may be a request
    /// with a token of 12 MiB, and its table it stays below the 16 MiB that a node takes.
    pub message_bytes: usize,
    /// A message of reads is closed at so many bytes of names.
    pub read_message_bytes: usize,
}

impl Default for Sizes {
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

/// Waits, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A refusal that asks for another primary: so far apart while the config stays the same …
    pub refused_ms: u64,
    /// … doubled each time up to this.
    pub refused_ms_max: u64,
    /// After "overloaded" and "no space".
    pub overloaded_ms: u64,
    /// A word that a shard is frozen is believed for so long, unless it is taken back.
    pub frozen_ms: u64,
    /// A backup that could not answer is asked after the others for so long.
    pub shun_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            refused_ms: 10,
            refused_ms_max: 200,
            overloaded_ms: 50,
            frozen_ms: 1_000,
            shun_ms: 1_000,
        }
    }
}

impl Timing {
    /// How long to wait after so many refusals in a row.
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
            worker_bytes_max: 128 << 20,
            lane_bytes_max: 16 << 20,
            heard_for_ms: 1_000,
            read_keys_max: 200_000,
            backup_wait_ms: 400,
            worker: 0,
            sizes: Sizes::default(),
            timing: Timing::default(),
            planted: None,
        }
    }
}

/// What `/readyz` waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotReady {
    /// Some slots have no shard yet.
    Map,
    /// No session: etcd has not answered, or the key is gone and not made again.
    Session,
    /// No connection to this primary.
    Primary(StoreBoot),
    Stopping,
}

/// How often what happened, since the start: for metrics.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Batches sealed.
    pub batches: u64,
    /// Sends of batches, the first of each included.
    pub sends: u64,
    /// Operations put into batches, before adds of one key became one.
    pub ops: u64,
    /// The same after it.
    pub ops_sent: u64,
    /// Answers `Refused`, by reason, in the order of [`REFUSAL_REASONS`].
    pub refusals: [u64; REFUSAL_REASONS.len()],
}

/// The labels of `dkc_refusals_total` as a gateway counts them.
pub const REFUSAL_REASONS: [&str; 9] = [
    "not-primary",
    "no-such-shard",
    "frozen",
    "overloaded",
    "no-space",
    "too-large",
    "damaged",
    "expired",
    "order",
];

impl Counts {
    fn refused(&mut self, reason: &str) {
        if let Some(at) = REFUSAL_REASONS.iter().position(|&known| known == reason) {
            self.refusals[at] += 1;
        }
    }
}

/// What is to be looked at when its time comes. One that has become needless does no harm.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Timer {
    Shard(ShardId),
    Lane(Conn),
}

/// One gateway worker. See the module.
#[derive(Clone, Debug)]
pub struct Worker {
    settings: Settings,
    now: Now,
    stopping: bool,
    last_request: u64,

    map: ShardMap,
    router: Router,
    /// The session whose key stands.
    session: Option<SessionId>,
    /// The session for new batches: the last one whose key stood, unless it was given up.
    present: Option<SessionId>,
    abandoned: Option<SessionId>,

    /// The newest time of any shard, and when it was heard.
    newest: Option<(TimeMs, Now)>,
    queues: BTreeMap<ShardId, Queue>,
    requests: Requests,
    reads: Reads,
    /// How many batches are out.
    undecided: usize,
    /// What all operations cost that wait or are out.
    bytes: usize,

    /// Shards and lanes that something has happened to since the last turn ended.
    due: BTreeSet<ShardId>,
    touched: BTreeSet<Conn>,
    timers: BTreeSet<(Now, Timer)>,

    splitter: Splitter,
    sealer: Sealer,
    counts: Counts,
}

impl Worker {
    pub fn new(settings: Settings) -> Self {
        let reads = Reads::new(&settings);
        Self {
            sealer: Sealer::new(match Planted::BatchUnlimited.is_in(settings.planted) {
                true => Sizes::default(),
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
            requests: Requests::default(),
            reads,
            undecided: 0,
            bytes: 0,
            due: BTreeSet::new(),
            touched: BTreeSet::new(),
            timers: BTreeSet::new(),
            splitter: Splitter::default(),
            counts: Counts::default(),
        }
    }

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
            Event::Config(config) => self.learn(config),
            Event::Connected { conn, node } => self.on_connected(conn, node),
            Event::Closed { conn } => self.on_closed(conn),
            Event::DialRefused { store } => self.on_dial_refused(store, effects),
            Event::Reply { conn, reply } => self.on_reply(conn, reply, effects),
            Event::TurnEnded => self.on_turn_ended(effects),
            Event::Stop => self.stopping = true,
        }
    }

    /// When to give it [`Event::TurnEnded`] although nothing has happened.
    pub fn next_deadline(&self) -> Option<Now> {
        let timers = self.timers.first().map(|&(at, _)| at);
        [self.requests.deadline(), self.reads.deadline(), timers].into_iter().flatten().min()
    }

    // ---- what can be asked of it ---------------------------------------------------------------

    /// What this worker knows of the shards.
    pub fn map(&self) -> &ShardMap {
        &self.map
    }

    /// The session whose key stands in etcd.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// Why `/readyz` is not 200 yet, if so: the first of map, session, connections.
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

    /// No request waits and no batch is undecided.
    pub fn is_idle(&self) -> bool {
        self.requests() == 0 && self.undecided == 0
    }

    /// Requests without an answer.
    pub fn requests(&self) -> usize {
        self.requests.len() + self.reads.len()
    }

    /// What the shard says that is furthest ahead, if its time has passed since as the monotonic
    /// clock does. None: no answer has told a time yet.
    pub fn shard_time(&self, now: Now) -> Option<TimeMs> {
        self.newest.map(|(time, heard)| TimeMs(time.0.saturating_add(now.ms_since(heard))))
    }

    /// Bytes of operations held, waiting and undecided.
    pub fn bytes(&self) -> usize {
        self.bytes + self.requests.held_bytes()
    }

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
            full.then(|| self.why_no_room(&keys))
        };
        match refused {
            Some(failure) => effects.push(Effect::ReadDone { request, result: Err(failure) }),
            None => {
                self.reads.begin(request, keys, max_staleness_ms, deadline, &self.map, effects);
            }
        }
    }

    /// Why a read of these keys finds no room. Where one of them has no primary that can be reached, that is the reason:
    /// the reads before it wait for it, too.
    fn why_no_room(&self, keys: &[CounterKey]) -> Failure {
        let has_primary = |key: &CounterKey| {
            let config = self.map.of_slot(key.slot());
            config.is_some_and(|config| self.router.to(config.primary).is_some())
        };
        if keys.iter().all(has_primary) { Failure::QueueFull } else { Failure::NoPrimary }
    }

    /// Parts are kept in the order of their requests.
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
    fn learn(&mut self, config: ShardConfig) {
        if !self.map.learn(config.clone()) {
            return;
        }
        let shard = config.shard();
        if let Some(queue) = self.queues.get_mut(&shard) {
            queue.retry_at = Now(0);
            queue.refusals = 0;
            self.due.insert(shard);
        }
        self.reads.moved(self.now, &config, self.router.to(config.primary));
    }

    // ---- connections ---------------------------------------------------------------------------

    fn on_connected(&mut self, conn: Conn, node: StoreBoot) {
        self.router.connected(conn, node);
        let led = self.map.iter().filter(|config| config.primary == node);
        let shards: Vec<ShardId> = led.map(ShardConfig::shard).collect();
        self.due.extend(&shards);
        self.reads.connected(shards);
    }

    fn on_closed(&mut self, conn: Conn) {
        if self.router.closed(conn).is_none() {
            return;
        }
        for (&shard, queue) in &mut self.queues {
            let cut = queue.undecided.as_mut().is_some_and(|undecided| undecided.closed(conn));
            let was_in_line = queue.in_line.take_if(|lane| *lane == conn).is_some();
            if cut || was_in_line {
                self.due.insert(shard);
            }
        }
        self.reads.closed(self.now, conn);
    }

    /// The coordinator asks the store itself before it believes it.
    fn on_dial_refused(&mut self, store: StoreId, effects: &mut Vec<Effect>) {
        if self.map.iter().any(|config| config.primary.store == store) {
            effects.push(Effect::Report(Report { silent: vec![store], ..Report::default() }));
        }
    }
}
