//! Exhaustive search (model checking) over the state machines that run in production.
//!
//! The simulator runs large clusters through long random faults. A search takes a small cluster
//! through *everything* that can happen to it within stated bounds: each order of messages, fsyncs,
//! crashes, proposals and failovers. The search covers the code, not a model of it. This is
//! possible because the state machines of the engine are pure, and so can be cloned, compared and
//! stepped.
//!
//! ```text
//!   frontier    breadth first over states, by fingerprint
//!      │
//!      ├── replication ── properties     one shard: its stores, connections, record in etcd
//!      └── sessions ── promises          gateways, successive primaries of a shard, keys in etcd
//!      │
//!   machines ── store, leader, gateway   states and transitions of a machine, each computed once
//! ```
//!
//! A search without a violation is meaningful only if its bounds let rare situations occur.
//! Therefore each search counts the situations that it reached (`sometimes`), and each rule dropped
//! from the engine ([`mutations`]) must be detected within bounds of the same kind.

pub mod frontier;
pub mod machines;
pub mod mutations;
pub mod properties;
pub mod replication;
pub mod sessions;
pub mod store;
