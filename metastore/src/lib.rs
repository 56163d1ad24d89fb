//! The cluster's records in etcd, with linearizable reads and compare-and-set writes.
//!
//! etcd holds the records of the cluster: its settings, stores, running processes and the primary
//! of each shard. This crate is the only one that uses etcd's client. Three facts are easy to miss:
//!
//! - **Neither a lease nor a watch proves anything.** Both are hints that something may have
//!   changed. Act only after a linearizable read, or by compare-and-set ([`Txn`]).
//! - **A transaction has three outcomes** ([`CasOutcome`]). A transaction whose reply was lost may
//!   take effect later, so it is never sent again; the next version of the record decides it.
//! - **A lease can vanish although its process is healthy**: if etcd is stopped for longer than the
//!   time to live, all leases expire when it resumes. [`Lease`] then creates the lease and its keys
//!   again.
//!
//! No write is without a comparison: the public interface has no unconditional put.

mod address;
mod backoff;
mod client;
mod election;
mod error;
mod followed;
mod inspection;
mod join;
mod lease;
mod record;
mod recovery;
mod snapshot;
mod task;
mod tls;
mod txn;
mod watch;

pub use engine::node::CasOutcome;

pub use address::{advertised, endpoint, listened, loopback_beside};
pub use backoff::RetryBackoff;
pub use client::{Listed, Metastore, Revisioned, Settings, cluster_name};
pub use election::{Election, LeadershipChange};
pub use error::Error;
pub use followed::Followed;
pub use inspection::{EtcdInspection, failover_bound};
pub use lease::{BootGuard, HeldKey, Lease, LeaseEvent, LeaseLeft, LeaseSettings};
pub use record::{CoordinatorRecord, DrainIntent, EtcdRecord};
pub use snapshot::SnapshotError;
pub use txn::Txn;
pub use watch::{ChangeStream, Watch, WatchChange, WatchEvent, WatchFailure, WatchSettings};
