//! Every decision the counter service makes, and no I/O.
//!
//! This crate contains no networking, no files, no threads, no clock and no randomness. A driver
//! hands it events and performs the effects that come back:
//!
//! ```text
//!   driver ── Event ──▶ machine.handle(now, event, &mut effects) ── Effect ──▶ driver
//!   driver ◀── when to call again ── machine.next_deadline()
//! ```
//!
//! So a run is a list of events and effects: it prints, replays and diffs, and the simulator in
//! `tests` runs the very code that production runs. Three machines stand on their own: [`node`]
//! (all replicas of one storage node), [`batcher`] (one gateway worker) and [`coordinator`].
//! The rest is their parts, and the formats of what they keep and say.

// Words and formats, used by everything below.
pub mod batch;
pub mod codec;
pub mod config;
pub mod entry;
pub mod history;
pub mod idempotency;
pub mod ids;
pub mod key;
pub mod memory;
pub mod message;
pub mod ops;
pub mod planted;
pub mod records;

// The state a shard's log builds, and where it is kept.
pub mod apply;
pub mod digest;
pub mod sessions;
pub mod store;

// The storage node.
pub mod boot;
pub mod node;
pub mod replica;

// The gateway.
pub mod batcher;
pub mod router;
pub mod shard_map;

// The coordinator.
pub mod coordinator;
pub mod planner;
