//! The driver of `engine::node`: log files, RocksDB, peers, gateways, etcd.
//!
//! It decides nothing. Events go into the machine, its effects are performed; the one rule kept
//! here is "writing effects in the order given" (see `engine::node`).
//!
//! ```text
//!   rpc, peers ──▶ inbox ──▶ node_loop ──▶ outbox ──▶ rpc, peers
//!   etcd       ──▶   "    (machine, disk) ──▶ etcd, reports, snapshot_transfer
//!   disk       ──▶   "                    ──▶ disk
//! ```
//!
//! [`run`] is the process: [`boot`] makes sure of who it is, then the loop has the word until the end.

mod ask;
pub mod boot;
pub mod chronicle;
pub mod disk;
mod disk_open;
pub mod error;
pub mod etcd;
pub mod exit;
mod expired;
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
mod patience;
pub mod peers;
pub mod readiness;
pub mod reports;
pub mod rpc;
mod scrub;
mod service;
pub mod snapshot_files;
pub mod snapshot_transfer;
mod space;
pub mod state;
mod workers;

pub use ask::ask;
pub use options::Options;
pub use service::run;
