//! The readiness of this gateway, computed from the task that follows etcd and from the workers.
//!
//! There are two answers. `/readyz` is about the gateway itself: it has started (it had the shard
//! map and its sessions, and was connected to some primary), and is not stopping. Load balancers
//! use it, and all gateways see the same shards: if one shard without a primary made every gateway
//! unready, a partial failure would cut off everything. `/readyz?all` is strict, for programs that
//! wait until every shard can be written to: it returns the first thing that is missing at present.

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use engine::batcher::{Batcher, NotReady};
use telemetry::Health;
use telemetry::prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;

use crate::directory::Directory;

/// The readiness that all parts of the process report to.
#[derive(Clone)]
pub(crate) struct GatewayReadiness {
    /// The answer of `/readyz`.
    health: Health,
    /// The answer of `/readyz?all`.
    all: Health,
    directory: watch::Receiver<Directory>,
    without_primary: Gauge<i64>,
    state: Arc<Mutex<ReadinessState>>,
}

struct ReadinessState {
    /// The reason why the process as a whole is not ready.
    process: Option<&'static str>,
    workers: Vec<WorkerReadiness>,
    /// There was a moment at which the process waited for nothing and every worker could serve a
    /// shard.
    started: bool,
    stopping: bool,
}

/// The readiness of one worker.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct WorkerReadiness {
    /// The first thing that the worker needs to serve all shards and does not have.
    missing: Option<NotReady>,
    /// The number of shards whose primary the worker has no connection to.
    without_primary: usize,
    /// The worker can serve at least one shard.
    serves: bool,
}

impl Default for WorkerReadiness {
    fn default() -> Self {
        Self { missing: Some(NotReady::Map), without_primary: 0, serves: false }
    }
}

impl WorkerReadiness {
    pub(crate) fn of(batcher: &Batcher) -> Self {
        let (missing, unconnected) = (batcher.not_ready(), batcher.unconnected());
        let is_unconnected = |primary| unconnected.contains(primary);
        let without = batcher.map().iter().filter(|shard| is_unconnected(&shard.primary)).count();
        let serves = match missing {
            None => true,
            Some(NotReady::Primary(_)) => without < batcher.map().iter().len(),
            Some(NotReady::Map | NotReady::Session | NotReady::Stopping) => false,
        };
        Self { missing, without_primary: without, serves }
    }
}

impl GatewayReadiness {
    pub(crate) fn new(
        health: Health,
        all: Health,
        directory: watch::Receiver<Directory>,
        without_primary: Gauge<i64>,
        workers: usize,
    ) -> Self {
        let workers = vec![WorkerReadiness::default(); workers];
        let state =
            ReadinessState { process: Some("etcd"), workers, started: false, stopping: false };
        let state = Arc::new(Mutex::new(state));
        Self { health, all, directory, without_primary, state }
    }

    /// Sets the reason why the process as a whole is not ready, or `None`.
    pub(crate) fn waits_for(&self, reason: Option<&'static str>) {
        self.change(|state| state.process = reason);
    }

    pub(crate) fn set_worker(&self, worker: usize, readiness: WorkerReadiness) {
        self.change(|state| state.workers[worker] = readiness);
    }

    /// Makes the gateway unready for good: clients must go elsewhere.
    pub(crate) fn set_stopping(&self) {
        self.change(|state| state.stopping = true);
    }

    /// Recomputes the reason, since its text depends on the directory.
    pub(crate) fn refresh(&self) {
        self.change(|_| {});
    }

    fn change(&self, change: impl FnOnce(&mut ReadinessState)) {
        // The lock is held until the health is set, so that the newest state wins.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        state.started |= state.process.is_none() && state.workers.iter().all(|it| it.serves);
        let missing = self.missing(&state);
        let own = if state.started && !state.stopping { None } else { missing.clone() };
        for (health, reason) in [(&self.all, missing), (&self.health, own)] {
            match reason {
                None => health.ready(),
                Some(reason) => health.not_ready(reason),
            }
        }
        let without = state.workers.iter().map(|it| it.without_primary).max().unwrap_or_default();
        self.without_primary.set(without as i64);
    }

    /// The first reason why not every shard can be served.
    fn missing(&self, state: &ReadinessState) -> Option<String> {
        if state.stopping {
            return Some("stopping".to_owned());
        }
        if let Some(process) = state.process {
            return Some(process.to_owned());
        }
        let missing = || state.workers.iter().filter_map(|worker| worker.missing);
        let first = missing().next()?;
        let directory = self.directory.borrow();
        let mut reason = match first {
            NotReady::Map => match directory.waiting_for() {
                Some(what) => format!("map: {what}"),
                None => "map".to_owned(),
            },
            NotReady::Session => "session".to_owned(),
            NotReady::Primary(node) => format!("connection to {}", directory.name(node.store)),
            NotReady::Stopping => "stopping".to_owned(),
        };
        let (waiting, all) = (missing().count(), state.workers.len());
        if waiting < all {
            write!(reason, " ({waiting} of {all} workers)").expect("a String takes every text");
        }
        Some(reason)
    }
}

#[cfg(test)]
mod tests {
    use engine::ids::{Boot, StoreBoot, StoreId};

    use super::*;

    const SERVES: WorkerReadiness =
        WorkerReadiness { missing: None, without_primary: 0, serves: true };

    fn lacks(missing: NotReady, serves: bool) -> WorkerReadiness {
        WorkerReadiness { missing: Some(missing), without_primary: 3, serves }
    }

    /// A shard without a primary does not make a started gateway unready; a gateway that has not
    /// started is unready.
    #[test]
    fn once_started_it_is_ready_until_it_stops() {
        let (own, all) = (Health::new("?"), Health::new("?"));
        let (_kept, directory) = watch::channel(Directory::default());
        let gauge = Gauge::default();
        let readiness =
            GatewayReadiness::new(own.clone(), all.clone(), directory, gauge.clone(), 2);
        let check = |want: Option<&str>, want_all: Option<&str>| {
            assert_eq!(own.reason().as_deref(), want);
            assert_eq!(all.reason().as_deref(), want_all);
        };
        let both = |reason| check(reason, reason);
        readiness.refresh();
        both(Some("etcd"));
        readiness.waits_for(None);
        both(Some("map: etcd, and a coordinator that makes the cluster"));
        readiness.set_worker(0, SERVES);
        let node = StoreBoot { store: StoreId(7), boot: Boot(1) };
        let unconnected = NotReady::Primary(node);
        readiness.set_worker(1, lacks(unconnected, false));
        let reason = format!("connection to {} (1 of 2 workers)", node.store);
        both(Some(&reason));
        // A connection to one of several primaries is enough to start.
        readiness.set_worker(1, lacks(unconnected, true));
        check(None, Some(&reason));
        assert_eq!(gauge.get(), 3);
        readiness.set_worker(1, SERVES);
        both(None);
        assert_eq!(gauge.get(), 0);
        readiness.set_worker(0, lacks(NotReady::Session, false));
        check(None, Some("session (1 of 2 workers)"));
        readiness.waits_for(Some("etcd-went-back"));
        check(None, Some("etcd-went-back"));
        readiness.set_stopping();
        both(Some("stopping"));
    }
}
