//! The driver of `engine::node`: log files, RocksDB, peers, gateways, etcd.
//!
//! It decides nothing. Events go into the machine, its effects are performed; the one rule kept
//! here is "writing effects in the order given" (see `engine::node`).

pub mod error;
pub mod log_files;
pub mod state;
