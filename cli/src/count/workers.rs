//! Sends batches, each until all of its items are decided. A worker has one request in flight.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use client::{GRACE, HttpConnection, HttpRequest};
use tokio::sync::{Mutex, mpsc};

use super::journal::SendJob;
use super::pending::{BatchOutcome, NextStep, Pending};
use super::shared::{CountContext, Stop};

/// The deadline of a request, which is the maximum that the service allows: an earlier "unknown"
/// would be of no use.
const DEADLINE: Duration = Duration::from_secs(60);
/// A request is awaited for at least this long, however soon the count gives up.
const CALL_WITHIN_MIN: Duration = Duration::from_secs(1);

/// Takes batches until there are no more, and sends each until it is decided.
pub(super) async fn work(
    number: usize,
    shared: Arc<CountContext>,
    jobs: Arc<Mutex<mpsc::Receiver<SendJob>>>,
    to_totals: mpsc::Sender<BatchOutcome>,
) {
    let connections: Vec<_> = shared.urls.iter().cloned().map(HttpConnection::new).collect();
    // Workers begin at different gateways, so that the load is spread over all of them.
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
            shared.stall.lock().expect("no panic holds it").begin();
            let ended = worker.send_until_decided(job).await;
            shared.stall.lock().expect("no panic holds it").end();
            match ended {
                SendResult::Decided(outcome) => {
                    if to_totals.send(outcome).await.is_err() {
                        return;
                    }
                }
                SendResult::Split([one, other]) => open.extend([other, one]),
            }
        }
    }
}

/// One worker with its connections.
struct Worker {
    shared: Arc<CountContext>,
    connections: Vec<HttpConnection>,
    /// The index of the gateway that gets the next request.
    at: usize,
}

/// The result of sending a batch.
enum SendResult {
    /// The outcome of all its lines.
    Decided(BatchOutcome),
    /// The batch was too large: these two replace it.
    Split([SendJob; 2]),
}

impl Worker {
    /// Sends a batch until all of its items are decided, or the count stops.
    async fn send_until_decided(&mut self, job: SendJob) -> SendResult {
        let shared = self.shared.clone();
        let begun = Instant::now();
        let SendJob { batch, token, in_doubt } = job;
        let mut pending = Pending::new(batch, in_doubt);
        let (media, body) = (pending.batch().media(), pending.body());
        let mut other_servers = 0;
        while pending.is_open() && !pending.hopeless && !shared.is_stopped() {
            let connection = &mut self.connections[self.at];
            let url = connection.url().clone();
            let request =
                HttpRequest::post(&url, &shared.path, DEADLINE, Some(&token), media, &body);
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
            other_servers = if next == NextStep::Elsewhere { other_servers + 1 } else { 0 };
            match next {
                NextStep::Done => {}
                NextStep::Elsewhere if other_servers == self.connections.len() => {
                    pending.hopeless = true
                }
                NextStep::Elsewhere => self.use_next_gateway(),
                NextStep::Split => match self.split(&pending) {
                    Ok(halves) => return SendResult::Split(halves),
                    Err(why) => pending.fail(&why),
                },
                NextStep::Again { after, elsewhere } => {
                    if elsewhere {
                        self.use_next_gateway();
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
        SendResult::Decided(pending.outcome())
    }

    /// Directs the next request to the next gateway.
    fn use_next_gateway(&mut self) {
        self.at = (self.at + 1) % self.connections.len();
    }

    /// Splits a batch that was too large, and limits the size of later batches.
    fn split(&self, pending: &Pending) -> Result<[SendJob; 2], String> {
        let CountContext { series, splits, lines_max, .. } = &*self.shared;
        let halves = pending.batch().halves().expect("one line is never to be split");
        let halves = halves.map(|half| SendJob::new(series, half));
        lines_max.fetch_min(halves[1].batch.line_count() as usize, Ordering::Relaxed);
        if let Some(splits) = splits {
            let mut notes = splits.lock().expect("no panic holds it");
            notes.split(&halves).map_err(|error| format!("{error:#}"))?;
        }
        Ok(halves)
    }
}

/// Waits before a request is sent again.
async fn pause(shared: &CountContext, why: &str, after: Duration) {
    shared.retries.fetch_add(1, Ordering::Relaxed);
    why.clone_into(&mut shared.reason.lock().expect("no panic holds it"));
    shared.waiting.fetch_add(1, Ordering::Relaxed);
    tokio::select! {
        () = shared.stopped(Stop::Sending) => {}
        () = tokio::time::sleep(after) => {}
    }
    shared.waiting.fetch_sub(1, Ordering::Relaxed);
}
