//! The parts that all processes of a run share: virtual time, the queue of future events, the
//! random stream, and the models of network and etcd.
//!
//! Processes never call each other. Each schedules a [`SimEvent`] for later, and the world takes
//! them one by one in the order of (time, number): there is no other order, hence no other run.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use engine::ids::{Conn, Now, ShardId, StoreBoot};
use engine::message::{HealthReport, NodeQuery, NodeQueryReply};
use engine::records::PromoteIntent;

use super::clients::{ClientReply, ClientRequest};
use super::disk::DiskDone;
use super::etcd::{Etcd, EtcdWatchEvent, PendingCall, Reply};
use super::network::{Side, SimNetwork, WireMessage};
use super::oracle::Oracle;
use super::pauses::Pauses;
use super::plan::Plan;
use super::rng::Rng;
use super::token_clients;
use super::trace::Trace;

/// A place where a process can run.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Place {
    Node(u8),
    Gateway(u8),
    Coordinator(u8),
    /// A second coordinator that acts at random.
    Chaos,
    /// Another machine, on which a copy of a node's folder is started.
    Twin,
    Etcd,
}

/// One start of one process. An event for an earlier incarnation never reaches a later one.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct ProcessId {
    pub place: Place,
    pub incarnation: u32,
}

/// The inputs that a process receives.
#[derive(Debug)]
pub enum ProcessInput {
    Start,
    /// The state machine's next deadline may have come.
    Wake,
    /// The process was paused and continues.
    Resumed,
    /// A tick of the driver's own clock: keep-alives, dialling, the wall clock.
    Tock,
    /// A peer may be dialled again.
    Redial,
    Disk(DiskDone),
    // -- network
    Accepted {
        conn: Conn,
        from: Place,
    },
    Dialled {
        dial: u64,
        conn: Conn,
        /// The store that answers there, according to its handshake; `None` if it is no storage
        /// node.
        peer: Option<StoreBoot>,
    },
    DialFailed {
        dial: u64,
        refused: bool,
    },
    Received {
        conn: Conn,
        wire: WireMessage,
    },
    Closed {
        conn: Conn,
    },
    Query {
        from: ProcessId,
        query: u64,
        message: NodeQuery,
    },
    QueryReply {
        query: u64,
        reply: NodeQueryReply,
    },
    QueryFailed {
        query: u64,
        refused: bool,
    },
    /// A health report of a node, or of a gateway (`from` is `None`).
    Report {
        from: Option<StoreBoot>,
        report: HealthReport,
    },
    // -- etcd
    Etcd {
        call: u64,
        reply: Reply,
    },
    EtcdTimeout {
        call: u64,
    },
    Watched(Vec<EtcdWatchEvent>),
    // -- clients
    Request(ClientRequest),
    TokenRequest(Box<token_clients::TokenSend>),
}

/// An event that will happen at a known time.
#[derive(Debug)]
pub enum SimEvent {
    Input(ProcessId, ProcessInput),
    /// As `Input`, for whatever incarnation runs there when it arrives.
    Query {
        to: Place,
        from: ProcessId,
        query: u64,
        message: NodeQuery,
    },
    Report {
        to: Place,
        from: Option<StoreBoot>,
        report: HealthReport,
    },
    Request {
        to: Place,
        request: ClientRequest,
    },
    DialArrives {
        link: u64,
    },
    DialEnds {
        link: u64,
        refused: bool,
    },
    Deliver {
        link: u64,
        to: Side,
        wire: WireMessage,
    },
    Drain {
        link: u64,
        to: Side,
    },
    Close {
        link: u64,
        side: Side,
    },
    LinkTimeout {
        link: u64,
    },
    EtcdArrives {
        from: ProcessId,
        asked: PendingCall,
    },
    EtcdWatch {
        watcher: usize,
    },
    EtcdRelist {
        watcher: usize,
    },
    EtcdLeases,
    /// The real etcd replaces a restored one again: processes that noticed are restarted.
    EtcdPutRight,
    Answered(ClientReply),
    Client {
        client: usize,
    },
    FinalRead {
        counter: usize,
    },
    TokenClient {
        client: usize,
    },
    TokenRequest {
        to: Place,
        send: Box<token_clients::TokenSend>,
    },
    TokenAnswered(token_clients::TokenReply),
    Fault,
    DiskFault,
    /// Clocks leap by this much when nothing is in flight.
    Leap {
        far: u64,
        since: u64,
    },
    FaultEnds {
        fault: u64,
    },
    /// One step of a fault that has several.
    FaultStep {
        pair: (Place, Place),
        blocks: bool,
    },
    Resume {
        process: ProcessId,
    },
    Restart {
        place: Place,
    },
    OperatorLooks,
    /// A record that an operator writes into etcd; `None`: it is withdrawn.
    OperatorWants {
        shard: ShardId,
        intent: Option<PromoteIntent>,
    },
    /// The disk of a node is mounted again.
    PutBack {
        place: Place,
    },
}

/// The shared parts of a run, see the module.
pub struct Core {
    pub now: u64,
    /// The sum of leaps of the processes' clocks beyond `now`.
    pub leapt: u64,
    /// The clients are paused.
    pub at_rest: bool,
    pub step: u64,
    pub rng: Rng,
    pub plan: Plan,
    pub trace: Trace,
    pub net: SimNetwork,
    pub etcd: Etcd,
    pub pauses: Pauses,
    pub oracle: Oracle,
    /// The decisions of coordinators, by kind.
    pub decisions: BTreeMap<&'static str, u64>,
    /// The nodes whose wall clocks were set.
    pub clocks_set: BTreeSet<usize>,
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    slab: Vec<Option<SimEvent>>,
    free: Vec<usize>,
    next: u64,
}

impl Core {
    pub fn new(plan: Plan, rng: Rng, trace: Trace) -> Self {
        Self {
            now: 0,
            leapt: 0,
            at_rest: false,
            step: 0,
            rng,
            trace,
            net: SimNetwork::default(),
            etcd: Etcd::default(),
            pauses: Pauses::default(),
            oracle: Oracle::new(&plan),
            decisions: BTreeMap::new(),
            clocks_set: BTreeSet::new(),
            plan,
            heap: BinaryHeap::new(),
            slab: Vec::new(),
            free: Vec::new(),
            next: 0,
        }
    }

    pub fn at(&mut self, at: u64, event: SimEvent) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            self.slab.len() - 1
        });
        self.slab[slot] = Some(event);
        self.next += 1;
        self.heap.push(Reverse((at.max(self.now), self.next, slot)));
    }

    pub fn after(&mut self, micros: u64, event: SimEvent) {
        self.at(self.now + micros, event);
    }

    pub fn input_after(&mut self, micros: u64, to: ProcessId, input: ProcessInput) {
        self.after(micros, SimEvent::Input(to, input));
    }

    /// The next event, with the clock moved to it.
    pub fn pop(&mut self) -> Option<SimEvent> {
        let Reverse((at, number, slot)) = self.heap.pop()?;
        self.now = at;
        self.step += 1;
        self.trace.mix(at);
        self.trace.mix(number);
        self.free.push(slot);
        self.slab[slot].take()
    }

    /// The time of the next event.
    pub fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at, ..))| *at)
    }

    /// The time that a message takes on the way. Mostly short, now and then long: reordering
    /// between connections comes from the long ones.
    pub fn delay(&mut self) -> u64 {
        let base = self.plan.network_delay;
        match self.rng.below(1000) {
            0..900 => self.rng.between(base / 2, base * 2),
            900..1000 if !self.plan.jitter => self.rng.between(base, base * 4),
            900..990 => self.rng.between(base, base * 20),
            _ => self.rng.between(base, base * 300),
        }
    }
}

/// A state machine's clock starts with its driver.
pub fn since(started: u64, now: u64) -> Now {
    Now(now - started)
}
