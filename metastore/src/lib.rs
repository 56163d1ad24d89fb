//! What stands in etcd, and how to read and change it without being fooled.
//!
//! etcd holds the cluster's records (DESIGN §5): settings, stores, running processes, who leads each shard.
//! This crate is the only one that speaks to it. What a newcomer would get wrong:
//!
//! - **A lease proves nothing and neither does a watch.** They are hints that something may have changed. Act only after
//!   a linearizable read or by compare-and-set ([`Txn`]).
//! - **A transaction has three outcomes** ([`Outcome`]). One whose answer was lost may take effect later, so it is never
//!   sent again; the next version of the record decides it.
//! - **Any lease can vanish though its process is well** (an etcd that was stopped for longer than the time to live
//!   does that to all of them when it goes on). [`Lease`] makes it and its keys again.
//!
//! Nothing here writes without a comparison: the public interface has no blind put.

mod address;
mod client;
mod election;
mod error;
mod lease;
mod pause;
mod probe;
mod record;
mod task;
mod tls;
mod txn;
mod watch;

pub use address::{advertised, endpoint, listened, loopback_beside};
pub use client::{Kept, Listed, Metastore, Settings, cluster_name};
pub use election::{Election, Leadership};
pub use error::Error;
pub use lease::{BootGuard, HeldKey, Lease, LeaseEvent, LeaseLeft, LeaseSettings};
pub use pause::Pause;
pub use probe::{Probe, failover_bound};
pub use record::{Candidate, DrainIntent, Record};
pub use txn::{Outcome, Txn};
pub use watch::{Broken, Change, Changes, Watch, WatchEvent, WatchSettings};
