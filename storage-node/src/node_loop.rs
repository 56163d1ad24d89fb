//! The one task that owns the state machine and the disk.
//!
//! ```text
//!   wait for messages, or the next deadline
//!     ──▶ hand each to the state machine and perform its effects, in order
//!     ──▶ end the turn, perform the effects ──▶ let the sockets' tasks run ──▶ wait
//! ```
//!
//! All messages that have arrived are one turn: the more there is to do, the more of it travels in
//! one message and one fsync. Effects are performed after every single event, not once per turn: a
//! load must begin before the next event is handled. The loop runs among the tasks that read and
//! write sockets. With one thread for all of them, which is what a small machine has, a message
//! passes through the node without waking another thread. Nothing here blocks: messages go into
//! queues ([`crate::outbox`]), writes go to the disk's threads, and requests to etcd are tasks. The
//! only rule of the protocol kept here is the order of effects (docs/design.md#order-of-effects).
//!
//! The state machine itself notices a loop that was paused (SIGSTOP, a starved machine), by the
//! time between two events. A coordinator notices too, since only the loop answers probes.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use engine::ids::{Conn, Now, TimeMs};
use engine::message::{BatchReply, GatewayMessage, HealthReport, NodeQueryReply, NodeReply};
use engine::node::{Effect, Event, ExitReason, Node};
use process::ProcessExit;
use telemetry::CriticalTasks;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::disk::Disk;
use crate::etcd::{EtcdClient, newer_boot};
use crate::inbox::LoopMessage;
use crate::metrics::NodeMetrics;
use crate::names::StoreNames;
use crate::outbox::{NotSent, Outbox, Outboxes};
use crate::readiness::CatchUpTracker;
use crate::replica_logger::ReplicaLogger;
use crate::rpc::snapshot_transfer::{SnapshotSender, SnapshotTransfer};

/// The most messages that are handled in one turn.
const TURN_MESSAGES_MAX: usize = 1_000;
/// The interval of `WallClock` events; the state machine needs one every 100 ms.
const WALL_CLOCK_EVERY_MS: u64 = 50;
const LOG_EVERY_MS: u64 = 50;
const METRICS_EVERY_MS: u64 = 1_000;
/// The longest time that a stop waits for the disk to write the last group.
const STOP_WITHIN_MS: u64 = 2_000;

/// Monotonic time since the process began, including suspension of the machine: proofs age by it.
/// Copies agree.
#[derive(Clone, Copy, Debug)]
pub struct LoopClock(telemetry::Clock);

impl LoopClock {
    /// Starts the clock at 0.
    pub fn start() -> Self {
        Self(telemetry::Clock::start())
    }

    /// Returns the time since the start.
    pub fn now(self) -> Now {
        Now(u64::try_from(self.0.elapsed().as_micros()).unwrap_or(u64::MAX))
    }
}

/// The time at which the loop last learned of an fsync: old if the disk stalls or the loop does.
/// The lease is renewed only while it is young.
#[derive(Clone, Debug)]
pub struct LastFsync {
    clock: LoopClock,
    last: Arc<AtomicU64>,
}

impl LastFsync {
    /// Creates the shared time, set to now.
    pub fn new(clock: LoopClock) -> Self {
        Self { clock, last: Arc::new(AtomicU64::new(clock.now().0)) }
    }

    fn note(&self, now: Now) {
        self.last.store(now.0, Ordering::Release);
    }

    /// Returns the age of the last fsync in milliseconds.
    pub fn age_ms(&self) -> u64 {
        self.clock.now().ms_since(Now(self.last.load(Ordering::Acquire)))
    }
}

/// The parts that the loop is made of.
pub struct Parts {
    /// The state machine.
    pub node: Node,
    /// The disk.
    pub disk: Disk,
    /// The receiving end of the inbox.
    pub messages: UnboundedReceiver<LoopMessage>,
    /// The clock of the state machine.
    pub clock: LoopClock,
    /// The time of the last fsync, shared with the lease.
    pub last_fsync: LastFsync,
    /// The client of etcd.
    pub etcd: EtcdClient,
    /// The sender of snapshots.
    pub snapshots: SnapshotSender,
    /// The newest report to the coordinator.
    pub reports: watch::Sender<HealthReport>,
    /// The metrics.
    pub metrics: NodeMetrics,
    /// The names of stores.
    pub names: StoreNames,
    /// The tracker of copies that must catch up before the node is ready.
    pub catch_up: CatchUpTracker,
    /// The wrapper of the tasks that the loop starts.
    pub tasks: CriticalTasks,
}

/// The state machine and everything that its effects touch.
pub struct NodeLoop {
    node: Node,
    disk: Disk,
    messages: UnboundedReceiver<LoopMessage>,
    clock: LoopClock,
    now: Now,
    outboxes: Outboxes,
    queries: HashMap<u64, oneshot::Sender<NodeQueryReply>>,
    next_query: u64,
    etcd: EtcdClient,
    snapshots: SnapshotSender,
    reports: watch::Sender<HealthReport>,
    effects: Vec<Effect>,
    /// The room in the intakes that the messages of this turn take.
    rooms: Vec<OwnedSemaphorePermit>,
    /// Connections on which a message could not be sent, of which the state machine does not know
    /// yet.
    broken: VecDeque<(Conn, Outbox)>,
    next_wall_clock: Now,
    next_log: Now,
    next_metrics: Now,
    last_fsync: LastFsync,
    /// The groups that are being written, each with the time it began.
    syncing: VecDeque<(u64, Now)>,
    arrivals: Arrivals,
    metrics: NodeMetrics,
    names: StoreNames,
    replica_logger: ReplicaLogger,
    catch_up: CatchUpTracker,
    tasks: CriticalTasks,
    /// Set once the state machine has handed over what it led.
    left: bool,
    /// Set while the node stops: no work is accepted, and groups in flight are awaited until then.
    stopping: Option<Now>,
    exit: Option<ProcessExit>,
}

/// The reason why the loop ended.
#[derive(Debug)]
pub enum LoopEnd {
    /// The process was asked to stop.
    Stopped,
    /// An error ended the loop.
    Exit(ProcessExit),
}

impl NodeLoop {
    /// Creates a loop from its parts.
    pub fn new(parts: Parts) -> Self {
        let now = parts.clock.now();
        Self {
            node: parts.node,
            disk: parts.disk,
            messages: parts.messages,
            clock: parts.clock,
            now,
            outboxes: Outboxes::default(),
            queries: HashMap::new(),
            next_query: 0,
            etcd: parts.etcd,
            snapshots: parts.snapshots,
            reports: parts.reports,
            effects: Vec::new(),
            rooms: Vec::new(),
            broken: VecDeque::new(),
            next_wall_clock: now,
            next_log: now,
            next_metrics: now,
            last_fsync: parts.last_fsync,
            syncing: VecDeque::new(),
            arrivals: Arrivals::default(),
            metrics: parts.metrics,
            replica_logger: ReplicaLogger::new(parts.names.clone()),
            names: parts.names,
            catch_up: parts.catch_up,
            tasks: parts.tasks,
            left: false,
            stopping: None,
            exit: None,
        }
    }

    /// Runs until a stop is requested or an error ends the loop. `early` are events of the disk
    /// from before the loop began. The disk is returned with the reason: closing it may take long,
    /// and the end of the process must not wait for that.
    pub async fn run(mut self, early: Vec<Event>) -> (LoopEnd, Disk) {
        for event in early {
            self.handle(event);
        }
        let mut messages = Vec::new();
        loop {
            self.end_turn();
            if let Some(ended) = self.ended() {
                return (ended, self.disk);
            }
            // The sockets' tasks send what the turn has queued, and read what has arrived.
            tokio::task::yield_now().await;
            let limit = self.wait_limit();
            let received = self.messages.recv_many(&mut messages, TURN_MESSAGES_MAX);
            if let Ok(0) = timeout(limit, received).await {
                let why = ProcessExit::Failed("all senders to the loop have ended".into());
                return (LoopEnd::Exit(why), self.disk);
            }
            messages.drain(..).for_each(|message| self.on_message(message));
        }
    }

    /// Does what is due by the clock, and lets the state machine draw the consequences of all that
    /// was handled since the last turn. Connections may break meanwhile: then their ends are
    /// handled, and the turn ends again.
    fn end_turn(&mut self) {
        self.on_time();
        while self.handle(Event::TurnEnded) || self.stop_if_left() {}
        self.rooms.clear();
    }

    /// Returns how long to wait for the next message.
    fn wait_limit(&self) -> Duration {
        let deadlines = [self.node.next_deadline(), Some(self.next_wall_clock), self.stopping];
        let next = deadlines.into_iter().flatten().min().unwrap_or(self.next_wall_clock);
        Duration::from_micros(next.0.saturating_sub(self.clock.now().0))
    }

    fn on_time(&mut self) {
        self.now = self.clock.now();
        if self.now >= self.next_wall_clock {
            self.next_wall_clock = self.now.plus_ms(WALL_CLOCK_EVERY_MS);
            self.handle(Event::WallClock(TimeMs(telemetry::wall_clock_ms())));
        }
        if self.now >= self.next_log {
            self.next_log = self.now.plus_ms(LOG_EVERY_MS);
            self.replica_logger.log_changes(self.node.replicas());
            self.catch_up.update(self.node.replicas());
        }
        if self.now >= self.next_metrics {
            self.next_metrics = self.now.plus_ms(METRICS_EVERY_MS);
            self.metrics.update(&self.node, &self.names, &self.disk);
        }
    }

    fn ended(&mut self) -> Option<LoopEnd> {
        if let Some(exit) = self.exit.take() {
            return Some(LoopEnd::Exit(exit));
        }
        let until = self.stopping?;
        if self.syncing.is_empty() {
            return Some(LoopEnd::Stopped);
        }
        if self.now >= until {
            warn!("stopping without waiting for the last fsync");
            return Some(LoopEnd::Stopped);
        }
        None
    }

    fn on_message(&mut self, message: LoopMessage) {
        self.now = self.clock.now();
        match message {
            LoopMessage::Event(event) => match closed(&event) {
                // The state machine has closed the connection itself and needs no event about it.
                Some(conn) => {
                    if let Some(outbox) = self.outboxes.remove(conn) {
                        self.forget(conn, &outbox);
                    }
                }
                None => drop(self.handle(event)),
            },
            LoopMessage::ShardsListed => self.catch_up.note_listed(),
            LoopMessage::Disk(event) => {
                let event = self.disk.accept(event);
                if let Event::Durable { group } = event {
                    self.on_durable(group);
                }
                self.handle(event);
                self.disk.free_flushed_table();
            }
            LoopMessage::Received(event, room) => {
                self.rooms.push(room);
                self.received(event);
            }
            LoopMessage::Opened { conn, outbox } => {
                if self.stopping.is_some() && matches!(outbox, Outbox::Gateway(_)) {
                    return; // Dropped, and so closed.
                }
                let event = outbox.opening(conn);
                self.outboxes.insert(conn, outbox);
                self.handle(event);
            }
            LoopMessage::Query { message, reply } => {
                self.next_query += 1;
                self.queries.insert(self.next_query, reply);
                self.handle(Event::Query { query: self.next_query, message });
            }
            LoopMessage::Stop => {
                info!("stopping");
                self.handle(Event::Leave);
            }
            LoopMessage::Exit(exit) => self.exit = Some(exit),
        }
    }

    /// Handles an event from a socket; events of a connection that was closed here are ignored.
    fn received(&mut self, event: Event) {
        let (Event::Gateway { conn, .. }
        | Event::FromFollower { conn, .. }
        | Event::FromPrimary { conn, .. }) = &event
        else {
            self.handle(event);
            return;
        };
        if !self.outboxes.is_open(*conn) {
            return;
        }
        if let Event::Gateway { conn, message: GatewayMessage::Frame { message, batches } } = &event
        {
            self.metrics.count_frame(batches.len());
            self.arrivals.note(*conn, *message, batches.len(), self.now);
        }
        self.handle(event);
    }

    /// Hands an event to the state machine and performs its effects, then the same for each
    /// connection that broke meanwhile. Returns whether there was one.
    fn handle(&mut self, event: Event) -> bool {
        self.catch_up.note(&event);
        let (mut next, mut has_broken) = (Some(event), false);
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
            has_broken |= next.is_some();
        }
        has_broken
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Write(record) => self.disk.write(record),
            Effect::Sync { group } => {
                self.syncing.push_back((group, self.now));
                self.disk.sync(group);
            }
            Effect::Load { load, needs } => self.disk.load(load, needs),
            Effect::CountRows { count, slots, at } => self.disk.count_rows(count, slots, at),
            Effect::ReadLog { wanted, from, bytes_max } => {
                self.disk.read_log(wanted, from, bytes_max)
            }
            Effect::Flush { flush, table, shards } => self.disk.flush(flush, table, shards),
            Effect::Trim { shards } => self.disk.trim(shards),

            Effect::ToFollower { conn, message } => {
                let sent = self.outboxes.to_follower(conn, message);
                self.sent(conn, sent);
            }
            Effect::ToPrimary { conn, message } => {
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
                    // The caller may have gone.
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
            Effect::InstallSnapshot { conn, transfer, copy, replaces, state } => {
                self.disk.install_snapshot((conn, transfer), copy, replaces, state);
            }
            Effect::DiscardSnapshot { conn, transfer } => {
                self.disk.discard_snapshot(conn, transfer)
            }
            Effect::DropRows { shard, slots } => self.disk.drop_rows(shard, slots),
            Effect::Scrub { scrub, shards, bytes_per_s } => {
                self.disk.scrub(scrub, shards, bytes_per_s)
            }
            Effect::Audit(finding) => self.replica_logger.log_finding(&finding),

            Effect::ReadRecord { read, shard } => {
                self.etcd.perform(|etcd| etcd.read_record(read, shard));
            }
            Effect::Propose { proposal, expect, record, candidate } => {
                self.etcd.perform(|etcd| etcd.propose(proposal, expect, record, candidate));
            }
            Effect::ProposeSplit { proposal, expect, left, right } => {
                self.etcd.perform(|etcd| etcd.propose_split(proposal, expect, left, right));
            }
            Effect::CheckEtcd { check, shards } => {
                self.etcd.perform(|etcd| etcd.check(check, shards));
            }
            Effect::ListSessions => self.etcd.perform(EtcdClient::list_sessions),

            Effect::Left => self.left = true,
            Effect::Exit(ExitReason::NewerBoot(newer)) => self.exit = Some(newer_boot(newer)),
            Effect::Exit(ExitReason::Disk(why)) => self.exit = Some(ProcessExit::Disk(why)),
        }
    }

    /// A message that could not be sent ends its connection. The state machine is informed as of
    /// any other end, but as the next event, not in the middle of this one's effects.
    fn sent(&mut self, conn: Conn, sent: Result<(), NotSent>) {
        let Err(not_sent) = sent else { return };
        if not_sent == NotSent::Full {
            warn!(conn = conn.0, "connection closed: the other end does not read");
            self.metrics.count_closed_full();
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
        let snapshot = SnapshotTransfer { conn, transfer, slots, to, address, reader };
        let sending = self.snapshots.clone().send(snapshot);
        tokio::spawn(self.tasks.job("sending a snapshot", sending));
    }

    fn on_durable(&mut self, group: u64) {
        self.last_fsync.note(self.now);
        while let Some((_, began)) = self.syncing.pop_front_if(|(first, _)| *first <= group) {
            self.metrics.observe_fsync(began, self.now);
        }
    }

    fn note_reply(&mut self, conn: Conn, reply: &NodeReply) {
        self.metrics.count_reply(reply);
        if let NodeReply::Answer { message, answer, .. } = reply {
            let arrived = self.arrivals.answered(conn, *message);
            if let (Some(arrived), BatchReply::Applied { .. }) = (arrived, answer) {
                self.metrics.observe_commit(arrived, self.now);
            }
        }
    }

    /// Once the state machine has left: closes the gateways' connections. Groups in flight are
    /// awaited. Returns whether it stopped now.
    fn stop_if_left(&mut self) -> bool {
        if !std::mem::take(&mut self.left) {
            return false;
        }
        self.stopping = Some(self.now.plus_ms(STOP_WITHIN_MS));
        for conn in self.outboxes.gateways() {
            if let Some(outbox) = self.outboxes.remove(conn) {
                self.forget(conn, &outbox);
            }
        }
        true
    }
}

/// Returns the connection whose end the event reports.
fn closed(event: &Event) -> Option<Conn> {
    match event {
        Event::GatewayGone { conn } | Event::Closed { conn } => Some(*conn),
        _ => None,
    }
}

/// The arrival times of frames with unanswered batches, for the metric of commit times.
#[derive(Debug, Default)]
struct Arrivals {
    /// By connection: the message's number, its arrival, and its batches without an answer.
    frames: BTreeMap<Conn, VecDeque<(u64, Now, usize)>>,
}

/// The most frames remembered per connection. A gateway has two in flight; more only wait for slow
/// shards.
const ARRIVALS_MAX: usize = 1_024;

impl Arrivals {
    fn note(&mut self, conn: Conn, message: u64, batches: usize, now: Now) {
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
