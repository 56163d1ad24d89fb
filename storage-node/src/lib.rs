//! The driver of `engine::node`: log files, RocksDB, peers, gateways, etcd.
//!
//! It decides nothing. Events go into the machine, its effects are performed; the one rule kept
//! here is "writing effects in the order given" (see `engine::node`).

pub mod disk;
mod disk_open;
pub mod error;
pub mod kill;
pub mod log_files;
mod log_thread;
pub mod snapshot_files;
mod space;
pub mod state;
mod workers;
