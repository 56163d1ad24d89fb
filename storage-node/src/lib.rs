//! The driver of `engine::node`: log files, RocksDB, peers, gateways, etcd.
//!
//! The driver decides nothing. It hands events to the state machine and performs its effects; the
//! one rule kept here is their order (docs/design.md#order-of-effects).
//!
//! ```text
//!   rpc, peers ──▶ inbox ──▶ node_loop ──▶ outbox ──▶ rpc, peers
//!   etcd       ──▶   "    (state machine, disk) ──▶ etcd, reports, snapshot_transfer
//!   disk       ──▶   "                    ──▶ disk
//! ```
//!
//! [`run`] is the process: `start` settles its identity, then [`node_loop`] runs until the end.

mod ask;
pub mod disk;
pub mod disk_event;
mod disk_open;
pub mod disk_settings;
pub mod error;
pub mod etcd;
mod expiry_filter;
mod files;
pub mod folders;
pub mod inbox;
pub mod inspect;
pub mod kill;
pub mod log_files;
mod log_thread;
pub mod metrics;
pub mod names;
pub mod node_loop;
mod options;
pub mod outbox;
pub mod peers;
pub mod readiness;
pub mod replica_logger;
pub mod reports;
pub mod rpc;
mod scrub;
mod service;
mod shortage_retry;
pub mod snapshot_files;
mod space;
mod start;
pub mod state;
mod workers;

pub use ask::ask;
pub use options::Options;
pub use service::run;
