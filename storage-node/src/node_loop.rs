//! The one thread that owns the machine and the disk.
//!
//! ```text
//!   wait for something, or the next deadline
//!     ──▶ hand it to the machine ──▶ perform the effects, in order ──▶ next, if something is ready
//! ```
//!
//! Effects are performed after every single event, not once per turn: a load must begin before the next event is handled,
//! and a message that leaves now leaves earlier than one that waits for the rest of the turn. Nothing here blocks:
//! messages go into queues ([`crate::outbox`]), writes to the disk's threads, etcd is asked by tasks. No rule of the
//! protocol lives here but the order of effects.
//!
//! A loop that stood still (SIGSTOP, a starved machine) is noticed by the machine itself, by the time between two events;
//! and a coordinator notices, since only the loop answers probes.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::ids::{Conn, Now, TimeMs};
use engine::message::{Answer, GatewayMessage, NodeQueryReply, NodeReply, Report};
use engine::node::{Effect, Event, ExitReason, Node};
use telemetry::Vital;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tracing::{info, warn};

use crate::chronicle::Chronicle;
use crate::disk::Disk;
use crate::etcd::{Etcd, Wish};
use crate::exit::Exit;
use crate::inbox::Told;
use crate::metrics::NodeMetrics;
use crate::names::Names;
use crate::outbox::{NotSent, Outbox, Outboxes};
use crate::readiness::CatchingUp;
use crate::snapshot_transfer::{Sender, Transfer};

/// Deadlines are looked at after this many events at the latest.
const EVENTS_PER_TURN_MAX: usize = 1_000;
/// The machine wants to hear the wall clock every 100 ms.
const WALL_CLOCK_EVERY_MS: u64 = 50;
const STORY_EVERY_MS: u64 = 50;
const METRICS_EVERY_MS: u64 = 1_000;
/// A disk that takes longer to write the last group is not waited for.
const STOP_WITHIN_MS: u64 = 2_000;

/// Monotonic time since the process began, the machine's sleep included: proofs age by it. Copies agree.
#[derive(Clone, Copy, Debug)]
pub struct Clock(telemetry::Clock);

impl Clock {
    pub fn start() -> Self {
        Self(telemetry::Clock::start())
    }

    pub fn now(self) -> Now {
        Now(u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

/// When an fsync last came back *to the loop*: old if the disk stands still, or the loop does. Shared with the lease.
#[derive(Clone, Debug)]
pub struct Pulse {
    clock: Clock,
    last: Arc<AtomicU64>,
}

impl Pulse {
    pub fn new(clock: Clock) -> Self {
        Self { clock, last: Arc::new(AtomicU64::new(clock.now().0)) }
    }

    fn beat(&self, now: Now) {
        self.last.store(now.0, Ordering::Release);
    }

    pub fn age_ms(&self) -> u64 {
        self.clock.now().ms_since(Now(self.last.load(Ordering::Acquire)))
    }
}

/// What the loop is made of.
pub struct Parts {
    pub node: Node,
    pub disk: Disk,
    pub told: Receiver<Told>,
    pub clock: Clock,
    pub pulse: Pulse,
    pub etcd: Etcd,
    pub copies: Sender,
    pub reports: watch::Sender<Report>,
    pub metrics: NodeMetrics,
    pub names: Names,
    pub catching_up: CatchingUp,
    pub vital: Vital,
    pub runtime: Handle,
}

/// The machine and everything that its effects touch.
pub struct NodeLoop {
    node: Node,
    disk: Disk,
    told: Receiver<Told>,
    clock: Clock,
    now: Now,
    outboxes: Outboxes,
    queries: HashMap<u64, oneshot::Sender<NodeQueryReply>>,
    next_query: u64,
    etcd: Etcd,
    copies: Sender,
    reports: watch::Sender<Report>,
    runtime: Handle,
    effects: Vec<Effect>,
    /// Connections that a message could not be sent on; the machine does not know yet.
    broken: VecDeque<(Conn, Outbox)>,
    next_wall_clock: Now,
    next_story: Now,
    next_metrics: Now,
    pulse: Pulse,
    /// Groups being written, and since when.
    syncing: VecDeque<(u64, Now)>,
    arrivals: Arrivals,
    metrics: NodeMetrics,
    names: Names,
    chronicle: Chronicle,
    catching_up: CatchingUp,
    vital: Vital,
    /// Nobody misses this node any more.
    left: bool,
    /// No work is taken any more; what is under way is waited for until then.
    stopping: Option<Now>,
    exit: Option<Exit>,
}

/// How the loop ended.
#[derive(Debug)]
pub enum Ended {
    /// It was asked to.
    Stopped,
    Exit(Exit),
}

impl NodeLoop {
    pub fn new(parts: Parts) -> Self {
        let now = parts.clock.now();
        Self {
            node: parts.node,
            disk: parts.disk,
            told: parts.told,
            clock: parts.clock,
            now,
            outboxes: Outboxes::default(),
            queries: HashMap::new(),
            next_query: 0,
            etcd: parts.etcd,
            copies: parts.copies,
            reports: parts.reports,
            runtime: parts.runtime,
            effects: Vec::new(),
            broken: VecDeque::new(),
            next_wall_clock: now,
            next_story: now,
            next_metrics: now,
            pulse: parts.pulse,
            syncing: VecDeque::new(),
            arrivals: Arrivals::default(),
            metrics: parts.metrics,
            chronicle: Chronicle::new(parts.names.clone()),
            names: parts.names,
            catching_up: parts.catching_up,
            vital: parts.vital,
            left: false,
            stopping: None,
            exit: None,
        }
    }

    /// Runs until it is asked to stop or something ends it. `early`: what the disk told before. The disk comes back with
    /// the reason: closing it may take long, and whoever ends must not wait for that.
    pub fn run(mut self, early: Vec<Event>) -> (Ended, Disk) {
        for event in early {
            self.handle(event);
        }
        loop {
            self.on_time();
            if let Some(ended) = self.ended() {
                return (ended, self.disk);
            }
            match self.told.recv_timeout(self.patience()) {
                Ok(told) => self.take(told),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    let why = Exit::Failed("everybody who speaks to the loop has ended".into());
                    return (Ended::Exit(why), self.disk);
                }
            }
            for _ in 0..EVENTS_PER_TURN_MAX {
                let Ok(told) = self.told.try_recv() else { break };
                self.take(told);
            }
        }
    }

    /// How long to wait for something to happen.
    fn patience(&self) -> Duration {
        let deadlines = [self.node.next_deadline(), Some(self.next_wall_clock), self.stopping];
        let next = deadlines.into_iter().flatten().min().unwrap_or(self.next_wall_clock);
        Duration::from_micros(next.0.saturating_sub(self.clock.now().0))
    }

    fn on_time(&mut self) {
        self.now = self.clock.now();
        if self.now >= self.next_wall_clock {
            self.next_wall_clock = self.now.plus_ms(WALL_CLOCK_EVERY_MS);
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
            self.handle(Event::WallClock(TimeMs(ms)));
        }
        if self.node.next_deadline().is_some_and(|deadline| deadline <= self.now) {
            self.handle(Event::Tick);
        }
        if self.now >= self.next_story {
            self.next_story = self.now.plus_ms(STORY_EVERY_MS);
            self.chronicle.look(self.node.replicas());
            self.catching_up.look(self.node.replicas());
        }
        if self.now >= self.next_metrics {
            self.next_metrics = self.now.plus_ms(METRICS_EVERY_MS);
            self.metrics.look(&self.node, &self.names, &self.disk);
        }
    }

    fn ended(&mut self) -> Option<Ended> {
        if let Some(exit) = self.exit.take() {
            return Some(Ended::Exit(exit));
        }
        if std::mem::take(&mut self.left) {
            self.stop();
        }
        let until = self.stopping?;
        if self.syncing.is_empty() {
            return Some(Ended::Stopped);
        }
        if self.now >= until {
            warn!("stopping without the last fsync");
            return Some(Ended::Stopped);
        }
        None
    }

    fn take(&mut self, told: Told) {
        self.now = self.clock.now();
        match told {
            Told::Event(event) => match closed(&event) {
                // The machine has closed it itself: it has heard the last of it.
                Some(conn) => {
                    if let Some(outbox) = self.outboxes.remove(conn) {
                        self.forget(conn, &outbox);
                    }
                }
                None => self.handle(event),
            },
            Told::ShardsListed => self.catching_up.listed(),
            Told::Disk(told) => {
                let event = self.disk.accept(told);
                if let Event::Durable { group } = event {
                    self.on_durable(group);
                }
                self.handle(event);
            }
            Told::Received(event, _room) => self.received(event),
            Told::Opened { conn, outbox } => {
                if self.stopping.is_some() && matches!(outbox, Outbox::Gateway(_)) {
                    return; // Dropped, and so closed.
                }
                let event = outbox.opening(conn);
                self.outboxes.insert(conn, outbox);
                self.handle(event);
            }
            Told::Query { message, reply } => {
                self.next_query += 1;
                self.queries.insert(self.next_query, reply);
                self.handle(Event::Query { query: self.next_query, message });
            }
            Told::Stop => {
                info!("stopping");
                self.handle(Event::Leave);
            }
            Told::Exit(exit) => self.exit = Some(exit),
        }
    }

    /// Something from a socket: not heard any more if the connection was closed here.
    fn received(&mut self, event: Event) {
        let (Event::Gateway { conn, .. }
        | Event::FromFollower { conn, .. }
        | Event::ToFollower { conn, .. }) = &event
        else {
            return self.handle(event);
        };
        if !self.outboxes.is_open(*conn) {
            return;
        }
        if let Event::Gateway { conn, message: GatewayMessage::Frame { message, batches } } = &event
        {
            self.metrics.batches_came(batches.len());
            self.arrivals.came(*conn, *message, batches.len(), self.now);
        }
        self.handle(event);
    }

    /// Hands an event to the machine and does what it wants, and so on for what breaks while that is done.
    fn handle(&mut self, event: Event) {
        self.catching_up.note(&event);
        let mut next = Some(event);
        while let Some(event) = next.filter(|_| self.exit.is_none()) {
            let mut effects = std::mem::take(&mut self.effects);
            self.node.handle(self.now, event, &mut effects);
            for effect in effects.drain(..) {
                self.perform(effect);
            }
            self.effects = effects;
            next = self.broken.pop_front().map(|(conn, outbox)| {
                self.arrivals.forget(conn);
                outbox.closing(conn)
            });
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Write(record) => self.disk.write(record),
            Effect::Sync { group } => {
                self.syncing.push_back((group, self.now));
                self.disk.sync(group);
            }
            Effect::Load { load, needs } => self.disk.load(load, needs),
            Effect::ReadLog { wanted, from, bytes_max } => {
                self.disk.read_log(wanted, from, bytes_max)
            }
            Effect::Flush { flush, table, shards } => self.disk.flush(flush, table, shards),
            Effect::Trim { shards } => self.disk.trim(shards),

            Effect::ToFollower { conn, message } => {
                let sent = self.outboxes.to_follower(conn, message);
                self.sent(conn, sent);
            }
            Effect::FromFollower { conn, message } => {
                let sent = self.outboxes.from_follower(conn, message);
                self.sent(conn, sent);
            }
            Effect::Gateway { conn, reply } => {
                self.note_reply(conn, &reply);
                let sent = self.outboxes.to_gateway(conn, reply);
                self.sent(conn, sent);
            }
            Effect::Close { conn } => {
                self.outboxes.remove(conn);
            }
            Effect::QueryReply { query, reply } => {
                if let Some(asker) = self.queries.remove(&query) {
                    // Nobody may be waiting any more.
                    let _gone = asker.send(reply);
                }
            }
            Effect::Report(report) => {
                self.reports.send_replace(report);
            }

            Effect::MeasureSnapshot { transfer, slots } => self.disk.measure(transfer, slots),
            Effect::SendSnapshot { conn, transfer, shard: _, slots } => {
                self.send_snapshot(conn, transfer, slots);
            }
            Effect::InstallSnapshot { conn, transfer, copy, state } => {
                self.disk.install_snapshot(conn, transfer, copy, state);
            }
            Effect::DiscardSnapshot { conn, transfer } => {
                self.disk.discard_snapshot(conn, transfer)
            }
            Effect::DropRows { shard, slots } => self.disk.drop_rows(shard, slots),
            Effect::Scrub { scrub, shards, bytes_per_s } => {
                self.disk.scrub(scrub, shards, bytes_per_s)
            }
            Effect::Found(finding) => self.chronicle.found(&finding),

            Effect::ReadConfig { read, shard } => {
                self.etcd.perform(Wish::ReadConfig { read, shard })
            }
            Effect::Propose { proposal, expect, config, candidate } => {
                self.etcd.perform(Wish::Propose { proposal, expect, config, candidate });
            }
            Effect::CheckEtcd { check, shards } => {
                self.etcd.perform(Wish::CheckEtcd { check, shards });
            }
            Effect::ListSessions => self.etcd.perform(Wish::ListSessions),

            Effect::Left => self.left = true,
            Effect::Exit(ExitReason::NewerBoot(newer)) => self.exit = Some(Exit::NewerBoot(newer)),
            Effect::Exit(ExitReason::Disk(why)) => self.exit = Some(Exit::Disk(why)),
        }
    }

    /// A message that could not be sent ends its connection. The machine is told like of any other end, but as
    /// the next thing, not in the middle of this one's effects.
    fn sent(&mut self, conn: Conn, sent: Result<(), NotSent>) {
        let Err(not_sent) = sent else { return };
        if not_sent == NotSent::Full {
            warn!(conn = conn.0, "connection closed: the other end does not read");
            self.metrics.closed_full();
        }
        if let Some(outbox) = self.outboxes.remove(conn) {
            self.broken.push_back((conn, outbox));
        }
    }

    fn forget(&mut self, conn: Conn, outbox: &Outbox) {
        self.arrivals.forget(conn);
        self.handle(outbox.closing(conn));
    }

    fn send_snapshot(&self, conn: Conn, transfer: u64, slots: engine::ids::Slots) {
        let Some((to, address)) = self.outboxes.dialled(conn) else { return };
        let reader = self.disk.snapshot_reader(slots);
        let address = address.to_owned();
        let copy = Transfer { conn, transfer, slots, to, address, reader };
        self.runtime.spawn(self.vital.job("sending a copy", self.copies.clone().send(copy)));
    }

    fn on_durable(&mut self, group: u64) {
        self.pulse.beat(self.now);
        while let Some((_, began)) = self.syncing.pop_front_if(|(first, _)| *first <= group) {
            self.metrics.synced(began, self.now);
        }
    }

    fn note_reply(&mut self, conn: Conn, reply: &NodeReply) {
        self.metrics.replied(reply);
        if let NodeReply::Answer { message, answer, .. } = reply {
            let arrived = self.arrivals.answered(conn, *message);
            if let (Some(arrived), Answer::Applied { .. }) = (arrived, answer) {
                self.metrics.committed(arrived, self.now);
            }
        }
    }

    /// No more work from gateways; what is being written is waited for.
    fn stop(&mut self) {
        self.stopping = Some(self.now.plus_ms(STOP_WITHIN_MS));
        for conn in self.outboxes.gateways() {
            if let Some(outbox) = self.outboxes.remove(conn) {
                self.forget(conn, &outbox);
            }
        }
    }
}

/// The connection that the event says is gone.
fn closed(event: &Event) -> Option<Conn> {
    match event {
        Event::GatewayGone { conn } | Event::Closed { conn } => Some(*conn),
        _ => None,
    }
}

/// When frames came, until all their batches are answered: for one metric.
#[derive(Debug, Default)]
struct Arrivals {
    /// By connection: message, when it came, batches without an answer.
    frames: BTreeMap<Conn, VecDeque<(u64, Now, usize)>>,
}

/// Frames remembered per connection. A gateway has two under way; more only wait for slow shards.
const ARRIVALS_MAX: usize = 1_024;

impl Arrivals {
    fn came(&mut self, conn: Conn, message: u64, batches: usize, now: Now) {
        let frames = self.frames.entry(conn).or_default();
        if frames.len() >= ARRIVALS_MAX {
            frames.pop_front();
        }
        if frames.back().is_none_or(|last| last.0 < message) {
            frames.push_back((message, now, batches));
        }
    }

    fn answered(&mut self, conn: Conn, message: u64) -> Option<Now> {
        let frames = self.frames.get_mut(&conn)?;
        let at = frames.binary_search_by_key(&message, |frame| frame.0).ok()?;
        let (_, came, left) = &mut frames[at];
        let came = *came;
        *left = left.saturating_sub(1);
        while frames.pop_front_if(|frame| frame.2 == 0).is_some() {}
        Some(came)
    }

    fn forget(&mut self, conn: Conn) {
        self.frames.remove(&conn);
    }
}
