//! The coordinator process: the driver of the state machine in `engine::coordinator`.
//!
//! The driver makes no decisions about shards. It feeds events to the state machine, performs its
//! effects, and feeds their results back:
//!
//! ```text
//!   election ── Elected, Deposed ──▶ ┌────────┐ ── List, Propose ─────────▶ etcd ──┐
//!   nodes    ── Reported ──────────▶ │ driver │ ── Probe, Gather, StepDown ▶ nodes ─┤
//!                                    └────────┘ ◀── Listed, Proposed, Probed, … ────┘
//! ```
//!
//! The coordinator is not on the path of a read or a write, and no data depends on it: without any
//! coordinator, or while etcd is down, nodes and gateways continue. Two processes that both believe
//! they lead do no harm, since each transaction compares the term of its sender.

mod decision_log;
mod driver;
mod etcd;
mod events;
mod metrics;
mod node_directory;
mod nodes;
mod operators;
mod options;
mod reports;
mod service;

pub use options::Options;
pub use service::{run, serve};
