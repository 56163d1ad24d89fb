//! The encoding of a request, and the outcome of each of its operations from the answer.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Caller, NAMESPACE, number};
use crate::cluster::http::{Answer, HttpError, HttpOutcome};
use crate::sim::history::{Ask, OpOutcome};

/// A request of a client. Equal requests are the same request, in whatever form they are sent.
pub(super) enum WorkloadRequest {
    One {
        counter: usize,
        ask: Ask,
    },
    /// A batch: each item adds to a counter. A counter may occur twice.
    Many {
        items: Vec<(usize, i64)>,
    },
}

impl WorkloadRequest {
    /// Returns its operations in order.
    pub(super) fn asks(&self) -> Vec<(usize, Ask)> {
        match self {
            Self::One { counter, ask } => vec![(*counter, *ask)],
            Self::Many { items } => {
                items.iter().map(|&(counter, delta)| (counter, Ask::Add { delta })).collect()
            }
        }
    }
}

/// The result of one send of a request.
pub(super) struct SendOutcome {
    /// The outcome of each of its operations, in order.
    pub(super) outcomes: Vec<OpOutcome>,
    /// True if the answer is marked as a replay, so that nothing was applied now.
    pub(super) is_replay: bool,
    /// The number of operations refused because their token belongs to another request.
    pub(super) reused: usize,
    /// The record of this send for readers of the history file.
    pub(super) record: Value,
}

/// An item of a batch that was not applied.
struct FailedBatchItem {
    index: usize,
    outcome: HttpOutcome,
}

impl Caller {
    pub(super) fn send(
        &mut self,
        gateway: usize,
        request: &WorkloadRequest,
        token: Option<&str>,
        deadline: Duration,
    ) -> SendOutcome {
        let mut headers: Vec<_> =
            token.map(|token| ("Idempotency-Key", token)).into_iter().collect();
        let (outcome, answer) = match request {
            WorkloadRequest::One { counter, ask } => {
                let path = format!("/v1/counters/{NAMESPACE}/c{counter}");
                let (method, path, body) = match ask {
                    Ask::Add { delta } => {
                        ("POST", format!("{path}/increment?delta={delta}"), String::new())
                    }
                    Ask::AddReturning { delta } => {
                        let body = json!({"delta": delta, "return": "value"});
                        ("POST", format!("{path}/increment"), body.to_string())
                    }
                    Ask::Delete => ("DELETE", path, String::new()),
                    Ask::Read => ("GET", path, String::new()),
                };
                self.call(gateway, method, &path, &headers, body.as_bytes(), deadline)
            }
            WorkloadRequest::Many { items } => {
                let (form, body) = self.write_batch(items);
                headers.push(("Content-Type", form));
                let path = format!("/v1/counters/{NAMESPACE}/increment");
                self.call(gateway, "POST", &path, &headers, body.as_bytes(), deadline)
            }
        };
        let outcomes = match request {
            WorkloadRequest::One { ask, .. } => {
                vec![self.outcome_of(*ask, &outcome, answer.as_ref())]
            }
            WorkloadRequest::Many { items } => {
                self.outcomes_of(items.len(), &outcome, answer.as_ref())
            }
        };
        let head = answer.as_ref().map(|answer| answer.head.as_str()).unwrap_or_default();
        SendOutcome {
            is_replay: head.contains("\r\nidempotent-replayed: true"),
            reused: answer.as_ref().map_or(0, |answer| reused(answer, outcomes.len())),
            record: send_record(gateway, &outcome, &outcomes),
            outcomes,
        }
    }

    /// Encodes a batch in one of the equivalent forms. Returns media type and body.
    fn write_batch(&mut self, items: &[(usize, i64)]) -> (&'static str, String) {
        let item = |&(counter, delta): &(usize, i64)| {
            let key = format!("c{counter}");
            json!({"key": key, "delta": delta})
        };
        match self.rng.below(3) {
            0 => {
                let items: Vec<_> = items.iter().map(item).collect();
                ("application/json", json!({"increments": items}).to_string())
            }
            1 => {
                let lines = items.iter().map(|one| format!("{}\n", item(one)));
                ("application/x-ndjson", lines.collect())
            }
            _ => {
                let lines = items.iter().map(|(counter, delta)| format!("c{counter}\t{delta}\n"));
                ("text/plain", lines.collect())
            }
        }
    }

    pub(super) fn call(
        &mut self,
        gateway: usize,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        deadline: Duration,
    ) -> (HttpOutcome, Option<Answer>) {
        self.shared.counts.requests.fetch_add(1, Ordering::Relaxed);
        match self.clients[gateway].call(method, path, headers, body, deadline) {
            Ok(answer) => {
                let outcome = answer.outcome_or_surprise().unwrap_or_else(|surprise| {
                    self.shared.surprise(format!("{method} {path} {headers:?}: {surprise}"));
                    HttpOutcome::Unknown(surprise)
                });
                (outcome, Some(answer))
            }
            Err(HttpError::NotSent(why)) => (HttpOutcome::NotApplied(why.to_string()), None),
            Err(HttpError::Unanswered(why)) => (HttpOutcome::Unknown(why.to_string()), None),
        }
    }

    /// Returns the outcome of a single operation for the history.
    fn outcome_of(&self, ask: Ask, outcome: &HttpOutcome, answer: Option<&Answer>) -> OpOutcome {
        match outcome {
            HttpOutcome::NotApplied(_) => OpOutcome::NotApplied,
            // A read changes nothing.
            HttpOutcome::Unknown(_) if ask == Ask::Read => OpOutcome::NotApplied,
            HttpOutcome::Unknown(_) => OpOutcome::Unknown,
            HttpOutcome::Applied => {
                let value = answer.and_then(|answer| number(&answer.body["value"]));
                let wants_value = !matches!(ask, Ask::Add { .. });
                if wants_value != value.is_some() {
                    self.shared.surprise(format!("{ask:?} was answered {answer:?}"));
                }
                OpOutcome::Applied(value.filter(|_| wants_value))
            }
        }
    }

    /// Returns the outcome of each item of a batch for the history.
    fn outcomes_of(
        &self,
        items: usize,
        outcome: &HttpOutcome,
        answer: Option<&Answer>,
    ) -> Vec<OpOutcome> {
        let all = match outcome {
            HttpOutcome::NotApplied(_) => OpOutcome::NotApplied,
            HttpOutcome::Unknown(_) => OpOutcome::Unknown,
            HttpOutcome::Applied => OpOutcome::Applied(None),
        };
        let mut outcomes = vec![all; items];
        if let (HttpOutcome::Applied, Some(answer)) = (outcome, answer) {
            match failed_items(&answer.body, items) {
                Ok(failed) => {
                    for one in failed {
                        outcomes[one.index] = match one.outcome {
                            HttpOutcome::NotApplied(_) => OpOutcome::NotApplied,
                            _ => OpOutcome::Unknown,
                        };
                    }
                }
                Err(why) => {
                    self.shared.surprise(format!("a batch of {items}: {why}: {answer:?}"));
                    outcomes.fill(OpOutcome::Unknown);
                }
            }
        }
        outcomes
    }
}

/// Returns the failed items of the answer to a batch. Every other item must be applied.
fn failed_items(body: &Value, items: usize) -> Result<Vec<FailedBatchItem>, String> {
    let listed = body["failed"].as_array().ok_or("no list of failed items")?;
    let mut failed = Vec::new();
    for item in listed {
        let index = item["index"].as_u64().and_then(|index| usize::try_from(index).ok());
        let index =
            index.filter(|&index| index < items).ok_or("a failed item with an unknown index")?;
        let kind = kind_of(item).to_owned();
        let outcome = match item["outcome"].as_str() {
            Some("not-applied") => HttpOutcome::NotApplied(kind),
            Some("unknown") => HttpOutcome::Unknown(kind),
            _ => return Err("a failed item without an outcome".to_owned()),
        };
        failed.push(FailedBatchItem { index, outcome });
    }
    failed.sort_by_key(|one| one.index);
    failed.dedup_by_key(|one| one.index);
    let adds_up = failed.len() == listed.len()
        && body["accepted"].as_u64() == Some(items as u64)
        && body["applied"].as_u64() == Some((items - failed.len()) as u64);
    if adds_up { Ok(failed) } else { Err("its counts do not add up".to_owned()) }
}

/// Returns the number of operations refused because their token belongs to another request.
fn reused(answer: &Answer, operations: usize) -> usize {
    if answer.status == 422 {
        return operations;
    }
    let failed = answer.body["failed"].as_array().into_iter().flatten();
    failed.filter(|item| kind_of(item) == "token-reused").count()
}

fn kind_of(problem: &Value) -> &str {
    let kind = problem["type"].as_str().unwrap_or_default();
    kind.rsplit('/').next().unwrap_or_default()
}

pub(super) fn send_record(gateway: usize, outcome: &HttpOutcome, outcomes: &[OpOutcome]) -> Value {
    let outcome = match outcome {
        HttpOutcome::Applied => "applied".to_owned(),
        HttpOutcome::NotApplied(why) => format!("not-applied: {why}"),
        HttpOutcome::Unknown(why) => format!("unknown: {why}"),
    };
    let applied = outcomes.iter().filter(|one| matches!(one, OpOutcome::Applied(_))).count();
    json!({"gateway": gateway + 1, "outcome": outcome, "applied": applied, "of": outcomes.len()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(body: Value, want: Option<&[usize]>) {
        let failed = failed_items(&body, 3);
        let indexes = failed.map(|failed| failed.iter().map(|one| one.index).collect::<Vec<_>>());
        assert_eq!(indexes.ok().as_deref(), want, "{body}");
    }

    #[test]
    fn the_answer_to_a_batch_accounts_for_every_item() {
        let failed = |index| json!({"index": index, "outcome": "not-applied", "type": "x/frozen"});
        check(json!({"accepted": 3, "applied": 3, "failed": []}), Some(&[]));
        check(
            json!({"accepted": 3, "applied": 1, "failed": [failed(2), failed(0)]}),
            Some(&[0, 2]),
        );
        // An item neither applied nor failed; both; an unknown index; no outcome.
        check(json!({"accepted": 3, "applied": 2, "failed": []}), None);
        check(json!({"accepted": 2, "applied": 2, "failed": []}), None);
        check(json!({"accepted": 3, "applied": 3, "failed": [failed(1)]}), None);
        check(json!({"accepted": 3, "applied": 1, "failed": [failed(1), failed(1)]}), None);
        check(json!({"accepted": 3, "applied": 2, "failed": [failed(3)]}), None);
        check(json!({"accepted": 3, "applied": 2, "failed": [{"index": 1}]}), None);
        check(json!({"accepted": 3, "applied": 3}), None);
    }
}
