//! What an etcd is like, for people: before a process is started, or when something is slow.

use std::time::{Duration, Instant};

use crate::client::{OLD, Verdict, judge_version};
use crate::{Error, Metastore, Settings};

/// How often an answer is waited for, to tell the usual from the first.
const ROUNDS: usize = 10;

/// What asking an etcd brought.
#[derive(Clone, Debug)]
pub struct Probe {
    pub version: String,
    /// What is wrong with the version, though it works.
    pub warning: Option<&'static str>,
    /// The usual time (the median) of a linearizable read.
    pub round_trip: Duration,
    /// The lease that was granted when `ttl_s` was asked for. etcd grants none shorter than 1.5 times its election timeout.
    pub granted_s: u32,
}

/// After how long the shards of a process that stopped without a word have another primary, at most. Its lease has to end;
/// etcd looks for ended leases twice a second, and the rest takes milliseconds.
pub fn failover_bound(ttl_s: u32) -> Duration {
    Duration::from_secs(u64::from(ttl_s) + 1)
}

impl Metastore {
    /// Asks etcd what it is, how fast it answers and how long its leases are: it grants one without keys and gives it back.
    /// An etcd that is none for dkc is an error.
    pub async fn probe(settings: &Settings, ttl_s: u32) -> Result<Probe, Error> {
        let store = Self::open(settings).await?;
        let version = store.find_member(&settings.endpoints).await?;
        let warning = (judge_version(&version) == Verdict::Old).then_some(OLD);
        let mut took = Vec::new();
        for _ in 0..ROUNDS {
            let began = Instant::now();
            store.get::<crate::Candidate>(&()).await?;
            took.push(began.elapsed());
        }
        took.sort();
        let mut leases = store.client().lease_client();
        let granted = store.call("lease grant", leases.grant(i64::from(ttl_s), None)).await?;
        // If this fails it runs out by itself.
        let _revoked = store.call("lease revoke", leases.revoke(granted.id())).await;
        let granted_s = u32::try_from(granted.ttl()).unwrap_or(ttl_s);
        Ok(Probe { version, warning, round_trip: took[ROUNDS / 2], granted_s })
    }
}
