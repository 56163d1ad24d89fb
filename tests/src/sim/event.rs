//! The events of a run, and the inputs of processes that they lead to.
//!
//! Processes never call each other. Each schedules a [`SimEvent`] for later, and the world takes
//! them one by one in the order of (time, number): there is no other order, hence no other run.

use engine::ids::{Conn, ShardId, StoreBoot};
use engine::message::{HealthReport, NodeQuery, NodeQueryReply};
use engine::records::PromoteIntent;
use engine::shard::division::RowCounts;
use engine::shard::idempotency::TokenRecord;
use engine::store::log::catch_up::LogPart;
use engine::store::log::scan::LogLocation;

use super::etcd::{EtcdWatchEvent, PendingCall, Reply};
use super::network::Side;
use super::place::{Place, ProcessId};
use super::request::{ClientReply, ClientRequest, TokenReply, TokenSend};
use super::wire::WireMessage;

/// The disk reports to its process that something is done.
#[derive(Debug)]
pub enum DiskDone {
    Recovered,
    Synced {
        group: u64,
    },
    Loaded {
        load: u64,
        values: Vec<Option<i128>>,
        records: Vec<Option<TokenRecord>>,
    },
    RowsCounted {
        count: u64,
        counts: Box<RowCounts>,
    },
    LogRead {
        at: LogLocation,
        parts: Vec<LogPart>,
    },
    /// A flush has written a part of its table.
    FlushAdvanced {
        flush: u64,
        counters: usize,
    },
    /// An ingest is to be performed now.
    Ingest {
        id: u64,
    },
    Full(bool),
    /// The number of bytes that may be written before the disk is full.
    Room(u64),
    Measured {
        transfer: u64,
        bytes: u64,
    },
    /// The log is too long, or no longer is.
    LogFull(bool),
    /// A written row or entry can't be read any more: nothing can be relied upon.
    Damaged,
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
    /// The driver performs an effect, or reports an answer, later than it could.
    Late {
        number: u64,
    },
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
    TokenRequest(Box<TokenSend>),
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
    /// All of etcd is lost, with everything that is in it.
    EtcdLost,
    /// The operator asks all nodes, and rebuilds etcd if all have answered.
    EtcdRebuild,
    /// The operator restarts a process that has run since before the loss.
    LeavesOldEtcd {
        process: ProcessId,
    },
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
        send: Box<TokenSend>,
    },
    TokenAnswered(TokenReply),
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
    /// An operator splits a shard.
    OperatorSplits,
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
