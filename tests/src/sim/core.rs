//! What all parts of a run share: virtual time, the queue of what will happen, chance, and the
//! models of network and etcd.
//!
//! Processes never call each other. Each schedules a [`Happening`] for later, and the world takes
//! them one by one in the order of (time, number): there is no other order, hence no other run.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use engine::ids::{Conn, Now, ShardId, StoreBoot};
use engine::message::{HealthReport, NodeQuery, NodeQueryReply};
use engine::records::PromoteIntent;

use super::clients::{Answered, Request};
use super::disk::DiskDone;
use super::etcd::{Asked, Etcd, Reply, WatchEvent};
use super::journal::Journal;
use super::network::{Network, Side, Wire};
use super::oracle::Oracle;
use super::pauses::Pauses;
use super::plan::Plan;
use super::rng::Rng;
use super::token_clients;

/// A place where a process can run.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Place {
    Node(u8),
    Gateway(u8),
    Coordinator(u8),
    /// A second coordinator, that acts at random.
    Chaos,
    /// Another machine, on which somebody starts a copy of a node's folder.
    Twin,
    Etcd,
}

/// One run of one process. What was meant for an earlier life never reaches a later one.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Process {
    pub place: Place,
    pub life: u32,
}

/// What a process is told.
#[derive(Debug)]
pub enum Told {
    Start,
    /// The machine's next deadline may have come.
    Wake,
    /// It stood still, and goes on.
    Resumed,
    /// The driver's own clock: keep-alives, dialling, the wall clock.
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
        /// Who answers there, as its handshake says; none if it is no storage node.
        peer: Option<StoreBoot>,
    },
    DialFailed {
        dial: u64,
        refused: bool,
    },
    Received {
        conn: Conn,
        wire: Wire,
    },
    Closed {
        conn: Conn,
    },
    Query {
        from: Process,
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
    /// From a node, or else from a gateway.
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
    Watched(Vec<WatchEvent>),
    // -- clients
    Request(Request),
    TokenRequest(Box<token_clients::Send>),
}

/// Something that will happen at a known time.
#[derive(Debug)]
pub enum Happening {
    Tell(Process, Told),
    /// As `Tell`, to whatever life runs there when it comes.
    Query {
        to: Place,
        from: Process,
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
        request: Request,
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
        wire: Wire,
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
        from: Process,
        asked: Asked,
    },
    EtcdWatch {
        watcher: usize,
    },
    EtcdRelist {
        watcher: usize,
    },
    EtcdLeases,
    /// A restored etcd is taken away again: processes that noticed are started anew.
    EtcdPutRight,
    Answered(Answered),
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
        send: Box<token_clients::Send>,
    },
    TokenAnswered(token_clients::Answered),
    Fault,
    DiskFault,
    /// Clocks leap by so much when nothing is in flight.
    Leap {
        far: u64,
        since: u64,
    },
    FaultEnds {
        fault: u64,
    },
    /// One more step of a fault that has several.
    FaultStep {
        pair: (Place, Place),
        blocks: bool,
    },
    Resume {
        process: Process,
    },
    Restart {
        place: Place,
    },
    OperatorLooks,
    /// What is written into etcd by hand; none: it is withdrawn.
    OperatorWants {
        shard: ShardId,
        intent: Option<PromoteIntent>,
    },
    /// A node's disk is mounted again.
    PutBack {
        place: Place,
    },
}

/// See the module.
pub struct Core {
    pub now: u64,
    /// How far clocks have leapt beyond it.
    pub leapt: u64,
    /// Clients ask for nothing.
    pub at_rest: bool,
    pub step: u64,
    pub rng: Rng,
    pub plan: Plan,
    pub journal: Journal,
    pub net: Network,
    pub etcd: Etcd,
    pub pauses: Pauses,
    pub oracle: Oracle,
    /// What coordinators have told, by kind.
    pub stories: BTreeMap<&'static str, u64>,
    /// The nodes whose wall clocks were set.
    pub clocks_set: BTreeSet<usize>,
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    slab: Vec<Option<Happening>>,
    free: Vec<usize>,
    next: u64,
}

impl Core {
    pub fn new(plan: Plan, rng: Rng, journal: Journal) -> Self {
        Self {
            now: 0,
            leapt: 0,
            at_rest: false,
            step: 0,
            rng,
            journal,
            net: Network::default(),
            etcd: Etcd::default(),
            pauses: Pauses::default(),
            oracle: Oracle::new(&plan),
            stories: BTreeMap::new(),
            clocks_set: BTreeSet::new(),
            plan,
            heap: BinaryHeap::new(),
            slab: Vec::new(),
            free: Vec::new(),
            next: 0,
        }
    }

    pub fn at(&mut self, at: u64, happening: Happening) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            self.slab.len() - 1
        });
        self.slab[slot] = Some(happening);
        self.next += 1;
        self.heap.push(Reverse((at.max(self.now), self.next, slot)));
    }

    pub fn after(&mut self, micros: u64, happening: Happening) {
        self.at(self.now + micros, happening);
    }

    pub fn tell_after(&mut self, micros: u64, to: Process, told: Told) {
        self.after(micros, Happening::Tell(to, told));
    }

    /// The next happening, with the clock moved to it.
    pub fn pop(&mut self) -> Option<Happening> {
        let Reverse((at, number, slot)) = self.heap.pop()?;
        self.now = at;
        self.step += 1;
        self.journal.mix(at);
        self.journal.mix(number);
        self.free.push(slot);
        self.slab[slot].take()
    }

    /// When the next happening is due.
    pub fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at, ..))| *at)
    }

    /// Time a message takes on the way. Mostly short, now and then long: reordering between
    /// connections comes from the long ones.
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

/// A machine's clock starts with its driver.
pub fn since(started: u64, now: u64) -> Now {
    Now(now - started)
}
