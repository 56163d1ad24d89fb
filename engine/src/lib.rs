//! The decisions of the counter service, without I/O.
//!
//! This crate contains no networking, no files, no threads, no clock and no randomness. A driver
//! passes events to a state machine and performs the effects that come back:
//!
//! ```text
//!   driver ── Event ──▶ machine.handle(now, event, &mut effects) ── Effect ──▶ driver
//!   driver ◀── when to call again ── machine.next_deadline()
//! ```
//!
//! The history of a process is therefore a list of events and effects: it can be printed, replayed
//! and compared, and the simulator in `tests` runs the very code that production runs. There are
//! three state machines: [`node`] (all replicas of one storage node), [`batcher`] (one gateway
//! worker) and [`coordinator`]. The other modules are parts of them, and the formats of their data
//! and messages.

// Identifiers and formats, used by everything below.
pub mod batch;
pub mod codec;
pub mod entry;
pub mod etcd_memory;
pub mod history;
pub mod ids;
pub mod key;
pub mod memory;
pub mod message;
pub mod ops;
pub mod planted;
pub mod records;
pub mod shard_record;
pub mod token;

// The state that a shard's log builds, and where it is stored.
pub mod shard;
pub mod store;

// The storage node.
pub mod node;
pub mod replica;

// The gateway.
pub mod batcher;

// The coordinator.
pub mod coordinator;

// The recovery of a lost etcd.
pub mod recovery_plan;
