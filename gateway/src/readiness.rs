//! Whether this gateway is ready, put together from etcd's task and the workers.
//!
//! Two answers. `/readyz` is about the gateway itself: it has started (it knew the map, had its sessions and reached some
//! primary), and is not being stopped. Balancers ask that, and all gateways see the same shards: if one without a primary
//! made them all unready, a part's trouble would cut off everything. `/readyz?all` is strict, for those who wait until all
//! can be written to: the first thing that is missing, now.

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use engine::batcher::{NotReady, Worker as Machine};
use telemetry::Health;
use telemetry::prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;

use crate::directory::Directory;

#[derive(Clone)]
pub(crate) struct Readiness {
    /// Of the gateway itself.
    health: Health,
    /// Of everything.
    all: Health,
    directory: watch::Receiver<Directory>,
    without_primary: Gauge<i64>,
    state: Arc<Mutex<State>>,
}

struct State {
    /// What the process as a whole waits for.
    process: Option<&'static str>,
    workers: Vec<Standing>,
    /// There was a moment when nothing was missing that a gateway needs to serve at all.
    started: bool,
    stopping: bool,
}

/// How a worker stands to the cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Standing {
    /// The first thing that is missing to serve all shards.
    lacks: Option<NotReady>,
    /// Shards whose primary it has no connection to.
    without_primary: usize,
    /// It could serve some shard.
    serves: bool,
}

impl Default for Standing {
    fn default() -> Self {
        Self { lacks: Some(NotReady::Map), without_primary: 0, serves: false }
    }
}

impl Standing {
    pub(crate) fn of(machine: &Machine) -> Self {
        let (lacks, away) = (machine.not_ready(), machine.unconnected());
        let is_away = |primary| away.contains(primary);
        let without = machine.map().iter().filter(|shard| is_away(&shard.primary)).count();
        let serves = match lacks {
            None => true,
            Some(NotReady::Primary(_)) => without < machine.map().iter().len(),
            Some(NotReady::Map | NotReady::Session | NotReady::Stopping) => false,
        };
        Self { lacks, without_primary: without, serves }
    }
}

impl Readiness {
    pub(crate) fn new(
        health: Health,
        all: Health,
        directory: watch::Receiver<Directory>,
        without_primary: Gauge<i64>,
        workers: usize,
    ) -> Self {
        let workers = vec![Standing::default(); workers];
        let state = State { process: Some("etcd"), workers, started: false, stopping: false };
        let state = Arc::new(Mutex::new(state));
        Self { health, all, directory, without_primary, state }
    }

    /// The process waits for this, or for nothing any more.
    pub(crate) fn waits_for(&self, reason: Option<&'static str>) {
        self.change(|state| state.process = reason);
    }

    pub(crate) fn worker_stands(&self, worker: usize, standing: Standing) {
        self.change(|state| state.workers[worker] = standing);
    }

    /// Nobody should come here any more.
    pub(crate) fn stops(&self) {
        self.change(|state| state.stopping = true);
    }

    /// What the directory says of the reason may have changed.
    pub(crate) fn refresh(&self) {
        self.change(|_| {});
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        // Held until the health is set, so that the newest state is what stays.
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

    /// The first thing that is missing for everything to be served.
    fn missing(&self, state: &State) -> Option<String> {
        if state.stopping {
            return Some("stopping".to_owned());
        }
        if let Some(process) = state.process {
            return Some(process.to_owned());
        }
        let lacking = || state.workers.iter().filter_map(|worker| worker.lacks);
        let first = lacking().next()?;
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
        let (waiting, all) = (lacking().count(), state.workers.len());
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

    const SERVES: Standing = Standing { lacks: None, without_primary: 0, serves: true };

    fn lacks(lacks: NotReady, serves: bool) -> Standing {
        Standing { lacks: Some(lacks), without_primary: 3, serves }
    }

    /// A part's trouble is no reason to send everybody away; that it could not even start is.
    #[test]
    fn once_started_it_is_ready_until_it_stops() {
        let (own, all) = (Health::new("?"), Health::new("?"));
        let (_kept, directory) = watch::channel(Directory::default());
        let gauge = Gauge::default();
        let readiness = Readiness::new(own.clone(), all.clone(), directory, gauge.clone(), 2);
        let check = |want: Option<&str>, want_all: Option<&str>| {
            assert_eq!(own.reason().as_deref(), want);
            assert_eq!(all.reason().as_deref(), want_all);
        };
        let both = |reason| check(reason, reason);
        readiness.refresh();
        both(Some("etcd"));
        readiness.waits_for(None);
        both(Some("map: etcd, and a coordinator that makes the cluster"));
        readiness.worker_stands(0, SERVES);
        let node = StoreBoot { store: StoreId(7), boot: Boot(1) };
        let away = NotReady::Primary(node);
        readiness.worker_stands(1, lacks(away, false));
        let reason = format!("connection to {} (1 of 2 workers)", node.store);
        both(Some(&reason));
        // One of several shards is enough to start with.
        readiness.worker_stands(1, lacks(away, true));
        check(None, Some(&reason));
        assert_eq!(gauge.get(), 3);
        readiness.worker_stands(1, SERVES);
        both(None);
        assert_eq!(gauge.get(), 0);
        readiness.worker_stands(0, lacks(NotReady::Session, false));
        check(None, Some("session (1 of 2 workers)"));
        readiness.waits_for(Some("etcd-went-back"));
        check(None, Some("etcd-went-back"));
        readiness.stops();
        both(Some("stopping"));
    }
}
