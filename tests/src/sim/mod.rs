//! The deterministic simulator: a whole cluster in one thread, under one seed, in virtual time.
//!
//! The simulator drives the same state machines as production, by the same events and effects, over
//! models of the network, the disks and etcd that do the worst those are allowed to. Everything in
//! a run follows from its seed; the hash of its [`trace`] proves it.
//!
//! The modules are layers: each uses those above it in this list, and none below it.
//!
//! ```text
//!   kernel    rng ── chance             queue ── future events     trace ── the log and its hash
//!             draws ── the size of every limit
//!   plan      plan ── what the seed decides before the run: sizes, speeds, kinds of faults
//!   checkers  history, token_history ── requests and answers       coverage ── rare paths
//!             checker ── one file per promise                      oracle ── checks during a run
//!   models    place ── who runs where   rows, wire, request ── what is stored and sent
//!             network, etcd, pauses ── their states                event ── what can happen
//!             struck ── what undoes each fault             late ── another order, and later
//!             core ── what all processes share                     codec, log, disk
//!             transport, etcd_calls ── how messages and calls travel
//!   hosts     nodes, gateways, coordinators ── drivers             chaos ── acts at random
//!             node_freedom ── what a driver of a node may reorder
//!             clients, token_clients ── the workload               cluster ── all of these
//!   faults    faults, disk_faults, operator ── what strikes        leaps ── days in one step
//!             splitter ── splits shards
//!   world     world ── the loop that takes the next event          run ── one seed
//!             failover ── measures a gap                           hunt ── finds planted bugs
//!             scale ── the size of large clusters
//! ```
//!
//! A run without violation proves little unless it was busy. A seed counts only with enough
//! acknowledged operations, and if some were in flight at every fault; and the planted bugs show
//! that the checkers would notice.

// The kernel.
pub mod draws;
pub mod queue;
pub mod rng;
pub mod trace;

// The plan of a seed.
pub mod plan;

// The checkers.
pub mod checker;
pub mod coverage;
pub mod history;
pub mod oracle;
pub mod token_history;

// The models.
pub mod codec;
pub mod core;
pub mod disk;
pub mod etcd;
pub mod etcd_calls;
pub mod event;
pub mod late;
pub mod log;
pub mod network;
pub mod pauses;
pub mod place;
pub mod request;
pub mod rows;
pub mod struck;
pub mod transport;
pub mod wire;

// The hosts.
pub mod chaos;
pub mod clients;
pub mod cluster;
pub mod coordinators;
pub mod gateways;
pub mod node_freedom;
pub mod nodes;
pub mod token_clients;

// The faults.
pub mod disk_faults;
pub mod etcd_loss;
pub mod faults;
pub mod leaps;
pub mod operator;
pub mod splitter;

// The world.
pub mod failover;
pub mod hunt;
pub mod run;
pub mod scale;
pub mod world;

pub use run::{Report, run};
