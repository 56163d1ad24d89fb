//! Measures an etcd for an operator: before a process is started, or when something is slow.

use std::time::{Duration, Instant};

use crate::client::{OLD, VersionSupport, judge_version};
use crate::{Error, Metastore, Settings};

/// The number of reads that are timed: the first one is slower than the usual one.
const ROUNDS: usize = 10;

/// The properties of an etcd that matter to dkc.
#[derive(Clone, Debug)]
pub struct EtcdInspection {
    /// The version that etcd reports.
    pub version: String,
    /// The known problem of a version that is old but works.
    pub warning: Option<&'static str>,
    /// The median time of a linearizable read.
    pub round_trip: Duration,
    /// The time to live, in seconds, of the lease that was granted when `ttl_s` was requested. etcd
    /// grants no lease shorter than 1.5 times its election timeout.
    pub granted_s: u32,
}

/// Returns the time within which the shards of a process that stopped silently have another
/// primary.
///
/// The lease of the process has to expire first; etcd checks for expired leases twice a second, and
/// the rest takes milliseconds.
pub fn failover_bound(ttl_s: u32) -> Duration {
    Duration::from_secs(u64::from(ttl_s) + 1)
}

impl Metastore {
    /// Reads etcd's version, times its reads, and requests a lease of `ttl_s` seconds, which it
    /// revokes. Returns an error if dkc can't use this etcd.
    pub async fn inspect(settings: &Settings, ttl_s: u32) -> Result<EtcdInspection, Error> {
        let store = Self::open(settings).await?;
        let version = store.find_member(&settings.endpoints).await?;
        let warning = (judge_version(&version) == VersionSupport::Old).then_some(OLD);
        let mut took = Vec::new();
        for _ in 0..ROUNDS {
            let began = Instant::now();
            store.get::<crate::CoordinatorRecord>(&()).await?;
            took.push(began.elapsed());
        }
        took.sort();
        let mut leases = store.client().lease_client();
        let granted = store.call("lease grant", leases.grant(i64::from(ttl_s), None)).await?;
        // If this fails, the lease expires by itself.
        let _revoked = store.call("lease revoke", leases.revoke(granted.id())).await;
        let granted_s = u32::try_from(granted.ttl()).unwrap_or(ttl_s);
        Ok(EtcdInspection { version, warning, round_trip: took[ROUNDS / 2], granted_s })
    }
}
