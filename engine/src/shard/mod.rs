//! The state of a shard: what every replica builds from the same log, in the same way.
//!
//! [`apply`] is the function over the committed log; [`state`] is what it changes beside the
//! counters: [`sessions`] against repeated batches, [`idempotency`] records against repeated
//! requests. [`digest`] makes copies comparable, [`division`] makes two states of one.

pub mod apply;
pub mod digest;
pub mod division;
pub mod idempotency;
pub mod sessions;
pub mod state;
