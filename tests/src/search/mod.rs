//! Exhaustive search over the machines that run in production.
//!
//! The simulator runs large clusters through long, random trouble. A search takes a small one through
//! *everything* that can happen to it, within stated bounds: each order of messages, fsyncs, crashes,
//! proposals and failovers. The models beside the design did so for the rules; here it is the code that
//! is searched, which is possible since the engine's machines are pure and so can be cloned, compared and
//! stepped.
//!
//! ```text
//!   frontier    breadth first over states, by fingerprint
//!      │
//!      ├── replication ── properties     one shard: its stores, lines, record in etcd
//!      └── sessions ── promises          gateways, a shard's successive primaries, keys in etcd
//!      │
//!   machines ── store, leader, gateway   what a machine is in, and does, worked out once
//! ```
//!
//! What a newcomer would get wrong: a search without a violation says something only if its bounds let the
//! interesting things happen. So each says how often it came by them (`sometimes`), and each rule dropped
//! from the engine ([`mutations`]) must be noticed within bounds of the same kind.

pub mod frontier;
pub mod machines;
pub mod mutations;
pub mod properties;
pub mod replication;
pub mod sessions;
pub mod store;
