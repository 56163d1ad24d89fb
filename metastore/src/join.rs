//! The start of a process: it waits for etcd, and for the cluster in it.

use std::time::Duration;

use engine::records::Meta;
use tokio::time::{Instant, sleep};
use tracing::warn;

use crate::{Error, Metastore, RetryBackoff, Settings};

/// The first pause between two attempts.
const TRY_EVERY: Duration = Duration::from_millis(100);
/// The longest pause between two attempts to reach etcd.
const TRY_AGAIN_LONGEST: Duration = Duration::from_secs(1);
/// The delay of the first log line about what a start waits for, and the interval of the next ones.
const LOG_AFTER: Duration = Duration::from_secs(1);
const LOG_EVERY: Duration = Duration::from_secs(60);

impl Metastore {
    /// Connects to etcd, and waits for as long as it can't be reached. Meanwhile `waits` is called
    /// with the reason, a word for `/readyz`. An error is one that waiting can't resolve.
    pub async fn join(settings: &Settings, waits: impl Fn(&'static str)) -> Result<Self, Error> {
        wait("etcd", waits, || async { Self::connect(settings).await.map(Some) }).await
    }

    /// Returns the settings of the cluster, and waits until the leading coordinator has made it.
    /// `waits` and the error are those of [`join`](Self::join).
    pub async fn cluster(&self, waits: impl Fn(&'static str)) -> Result<Meta, Error> {
        let read = || async { Ok(self.get::<Meta>(&()).await?.map(|kept| kept.record)) };
        wait("meta", waits, read).await
    }

    /// Lets every transaction from now on, of all clones, compare the settings with these: an etcd
    /// that was rebuilt under another incarnation refuses them.
    pub fn stay_with(&self, meta: &Meta) {
        // A process joins one cluster, once.
        let _joined_before = self.joined.set(meta.encode());
    }
}

/// Retries until `attempt` returns a value. Transient errors are retried.
async fn wait<T, F: Future<Output = Result<Option<T>, Error>>>(
    what: &'static str,
    waits: impl Fn(&'static str),
    attempt: impl Fn() -> F,
) -> Result<T, Error> {
    let mut pause = RetryBackoff::new(TRY_EVERY, TRY_AGAIN_LONGEST);
    let mut log_at = Instant::now() + LOG_AFTER;
    waits(what);
    loop {
        let error = match attempt().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) if error.is_transient() => Some(error),
            Err(error) => return Err(error),
        };
        let reason = error.as_ref().map_or(what, Error::reason);
        waits(reason);
        if Instant::now() >= log_at {
            log_at = Instant::now() + LOG_EVERY;
            match &error {
                Some(error) => warn!(reason, %error, "waiting for etcd"),
                None => warn!(reason, "waiting for the cluster's settings in etcd"),
            }
        }
        match error {
            Some(_) => pause.wait().await,
            // A coordinator may create it at any moment.
            None => sleep(TRY_EVERY).await,
        }
    }
}
