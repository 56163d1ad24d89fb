//! What this gateway waits for, put together from etcd's task and the workers.

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use engine::batcher::NotReady;
use telemetry::Health;
use tokio::sync::watch;

use crate::directory::Directory;

#[derive(Clone)]
pub(crate) struct Readiness {
    health: Health,
    directory: watch::Receiver<Directory>,
    state: Arc<Mutex<State>>,
}

struct State {
    /// What the process as a whole waits for.
    process: Option<&'static str>,
    /// What each worker waits for.
    workers: Vec<Option<NotReady>>,
}

impl Readiness {
    pub(crate) fn new(
        health: Health,
        directory: watch::Receiver<Directory>,
        workers: usize,
    ) -> Self {
        let state = State { process: Some("etcd"), workers: vec![Some(NotReady::Map); workers] };
        Self { health, directory, state: Arc::new(Mutex::new(state)) }
    }

    /// The process waits for this, or for nothing any more.
    pub(crate) fn waits_for(&self, reason: Option<&'static str>) {
        self.change(|state| state.process = reason);
    }

    pub(crate) fn worker_waits_for(&self, worker: usize, reason: Option<NotReady>) {
        self.change(|state| state.workers[worker] = reason);
    }

    /// What the directory says of the reason may have changed.
    pub(crate) fn refresh(&self) {
        self.change(|_| {});
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        // Held until the health is set, so that the newest state is what stays.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        match self.reason(&state) {
            None => self.health.ready(),
            Some(reason) => self.health.not_ready(reason),
        }
    }

    fn reason(&self, state: &State) -> Option<String> {
        if let Some(process) = state.process {
            return Some(process.to_owned());
        }
        let waiting = state.workers.iter().filter(|worker| worker.is_some()).count();
        let first = state.workers.iter().find_map(|worker| *worker)?;
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
        if waiting < state.workers.len() {
            let all = state.workers.len();
            write!(reason, " ({waiting} of {all} workers)").expect("a String takes every text");
        }
        Some(reason)
    }
}
