//! Sends batches, each until all of it is decided. A worker has one request at a time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bench::http::{Connection, Request};
use tokio::sync::{Mutex, mpsc};

use super::journal::Job;
use super::pending::{Next, Outcome, Pending};
use super::shared::{Shared, Stop};
use crate::client::GRACE;

/// The longest the service allows. Nothing is gained by hearing "unknown" sooner.
const DEADLINE: Duration = Duration::from_secs(60);
/// A request has at least this long, however soon the count gives up.
const CALL_WITHIN_MIN: Duration = Duration::from_secs(1);

/// Takes batches until there are no more, and sees each through before it takes the next.
pub(super) async fn work(
    number: usize,
    shared: Arc<Shared>,
    jobs: Arc<Mutex<mpsc::Receiver<Job>>>,
    to_totals: mpsc::Sender<Outcome>,
) {
    let connections: Vec<_> = shared.urls.iter().cloned().map(Connection::new).collect();
    // Workers begin at different gateways, so that all of them get their share.
    let at = number % connections.len();
    let mut worker = Worker { shared: shared.clone(), connections, at };
    loop {
        let job = tokio::select! {
            biased;
            () = shared.stopped(Stop::Sending) => return,
            job = async { jobs.lock().await.recv().await } => job,
        };
        let Some(job) = job else { return };
        // A batch that is too large becomes two.
        let mut open = vec![job];
        while let Some(job) = open.pop() {
            shared.busy.lock().expect("no panic holds it").begin();
            let ended = worker.see_through(job).await;
            shared.busy.lock().expect("no panic holds it").end();
            match ended {
                Ended::Decided(outcome) => {
                    if to_totals.send(outcome).await.is_err() {
                        return;
                    }
                }
                Ended::Split([one, other]) => open.extend([other, one]),
            }
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    connections: Vec<Connection>,
    /// The gateway that is asked next.
    at: usize,
}

enum Ended {
    Decided(Outcome),
    Split([Job; 2]),
}

impl Worker {
    /// Sends a batch until all of it is decided, or the count stops.
    async fn see_through(&mut self, job: Job) -> Ended {
        let shared = self.shared.clone();
        let begun = Instant::now();
        let Job { batch, token, in_doubt } = job;
        let mut pending = Pending::new(batch, in_doubt);
        let (media, body) = (pending.batch().media(), pending.body());
        let mut strangers = 0;
        while pending.is_open() && !pending.hopeless && !shared.is_stopped() {
            let connection = &mut self.connections[self.at];
            let url = connection.url().clone();
            let request = Request::post_once(&url, &shared.path, DEADLINE, media, &token, &body);
            let left = shared.give_up.saturating_sub(begun.elapsed());
            let within = (DEADLINE + GRACE).min(left.max(CALL_WITHIN_MIN));
            let answer = tokio::select! {
                biased;
                () = shared.stopped(Stop::Waiting) => None,
                answer = connection.call(&request, within) => Some(answer),
            };
            let Some(answer) = answer else {
                if connection.was_sent() {
                    pending.abandon();
                }
                break;
            };
            let next = pending.on_answer(&url, answer);
            strangers = if next == Next::Elsewhere { strangers + 1 } else { 0 };
            match next {
                Next::Done => {}
                Next::Elsewhere if strangers == self.connections.len() => pending.hopeless = true,
                Next::Elsewhere => self.turn(),
                Next::Split => match self.split(&pending) {
                    Ok(halves) => return Ended::Split(halves),
                    Err(why) => pending.fail(&why),
                },
                Next::Again { after, elsewhere } => {
                    if elsewhere {
                        self.turn();
                    }
                    if begun.elapsed() + after > shared.give_up {
                        shared.stop(Stop::Sending);
                        break;
                    }
                    pause(&shared, pending.last_reason(), after).await;
                }
            }
        }
        if pending.hopeless {
            shared.stop(Stop::Sending);
        }
        Ended::Decided(pending.outcome())
    }

    /// To the next gateway.
    fn turn(&mut self) {
        self.at = (self.at + 1) % self.connections.len();
    }

    /// Two requests for one that was too large, and smaller ones from here on.
    fn split(&self, pending: &Pending) -> Result<[Job; 2], String> {
        let Shared { series, splits, lines_max, .. } = &*self.shared;
        let halves = pending.batch().halves().expect("one line is never to be split");
        let halves = halves.map(|half| Job::new(series, half));
        lines_max.fetch_min(halves[1].batch.line_count() as usize, Ordering::Relaxed);
        if let Some(splits) = splits {
            let mut notes = splits.lock().expect("no panic holds it");
            notes.split(&halves).map_err(|error| format!("{error:#}"))?;
        }
        Ok(halves)
    }
}

/// Waits before a request is sent again.
async fn pause(shared: &Shared, why: &str, after: Duration) {
    shared.retries.fetch_add(1, Ordering::Relaxed);
    why.clone_into(&mut shared.reason.lock().expect("no panic holds it"));
    shared.waiting.fetch_add(1, Ordering::Relaxed);
    tokio::select! {
        () = shared.stopped(Stop::Sending) => {}
        () = tokio::time::sleep(after) => {}
    }
    shared.waiting.fetch_sub(1, Ordering::Relaxed);
}
