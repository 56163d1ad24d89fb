//! What goes over the wire, and what an answer says of each operation in a request.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Caller, NAMESPACE, number};
use crate::cluster::http::{self, Answer, Error};
use crate::sim::history::{Ask, Outcome};

/// As long as it stays equal it is the same request, whatever form it is sent in.
pub(super) enum Request {
    One {
        counter: usize,
        ask: Ask,
    },
    /// A batch: each item adds to a counter. Some counters are in it twice.
    Many {
        items: Vec<(usize, i64)>,
    },
}

impl Request {
    /// The operations in it, in order.
    pub(super) fn asks(&self) -> Vec<(usize, Ask)> {
        match self {
            Self::One { counter, ask } => vec![(*counter, *ask)],
            Self::Many { items } => {
                items.iter().map(|&(counter, delta)| (counter, Ask::Add { delta })).collect()
            }
        }
    }
}

/// What one send of a request came to.
pub(super) struct Sent {
    /// Of each of its operations, in order.
    pub(super) outcomes: Vec<Outcome>,
    /// The answer says that nothing was applied now.
    pub(super) is_replay: bool,
    /// Operations refused because their token belongs to another request.
    pub(super) reused: usize,
    /// For whoever reads the history's file.
    pub(super) told: Value,
}

/// One item of a batch that was not applied.
struct Failed {
    index: usize,
    outcome: http::Outcome,
}

impl Caller {
    pub(super) fn send(
        &mut self,
        gateway: usize,
        request: &Request,
        token: Option<&str>,
        deadline: Duration,
    ) -> Sent {
        let mut headers: Vec<_> =
            token.map(|token| ("Idempotency-Key", token)).into_iter().collect();
        let (outcome, answer) = match request {
            Request::One { counter, ask } => {
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
            Request::Many { items } => {
                let (form, body) = self.write_batch(items);
                headers.push(("Content-Type", form));
                let path = format!("/v1/counters/{NAMESPACE}/increment");
                self.call(gateway, "POST", &path, &headers, body.as_bytes(), deadline)
            }
        };
        let outcomes = match request {
            Request::One { ask, .. } => vec![self.outcome_of(*ask, &outcome, answer.as_ref())],
            Request::Many { items } => self.outcomes_of(items.len(), &outcome, answer.as_ref()),
        };
        let head = answer.as_ref().map(|answer| answer.head.as_str()).unwrap_or_default();
        Sent {
            is_replay: head.contains("\r\nidempotent-replayed: true"),
            reused: answer.as_ref().map_or(0, |answer| reused(answer, outcomes.len())),
            told: told(gateway, &outcome, &outcomes),
            outcomes,
        }
    }

    /// In any of the forms that mean the same: media type and body.
    fn write_batch(&mut self, items: &[(usize, i64)]) -> (&'static str, String) {
        let item = |&(counter, delta): &(usize, i64)| json!({"key": format!("c{counter}"), "delta": delta});
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
    ) -> (http::Outcome, Option<Answer>) {
        self.shared.counts.requests.fetch_add(1, Ordering::Relaxed);
        match self.clients[gateway].call(method, path, headers, body, deadline) {
            Ok(answer) => {
                let outcome = answer.outcome_or_surprise().unwrap_or_else(|surprise| {
                    self.shared.surprise(format!("{method} {path} {headers:?}: {surprise}"));
                    http::Outcome::Unknown(surprise)
                });
                (outcome, Some(answer))
            }
            Err(Error::NotSent(why)) => (http::Outcome::NotApplied(why.to_string()), None),
            Err(Error::Unanswered(why)) => (http::Outcome::Unknown(why.to_string()), None),
        }
    }

    /// As the history has it.
    fn outcome_of(&self, ask: Ask, outcome: &http::Outcome, answer: Option<&Answer>) -> Outcome {
        match outcome {
            http::Outcome::NotApplied(_) => Outcome::NotApplied,
            // A read changes nothing.
            http::Outcome::Unknown(_) if ask == Ask::Read => Outcome::NotApplied,
            http::Outcome::Unknown(_) => Outcome::Unknown,
            http::Outcome::Applied => {
                let value = answer.and_then(|answer| number(&answer.body["value"]));
                let wants_value = !matches!(ask, Ask::Add { .. });
                if wants_value != value.is_some() {
                    self.shared.surprise(format!("{ask:?} was answered {answer:?}"));
                }
                Outcome::Applied(value.filter(|_| wants_value))
            }
        }
    }

    /// Of each item of a batch.
    fn outcomes_of(
        &self,
        items: usize,
        outcome: &http::Outcome,
        answer: Option<&Answer>,
    ) -> Vec<Outcome> {
        let all = match outcome {
            http::Outcome::NotApplied(_) => Outcome::NotApplied,
            http::Outcome::Unknown(_) => Outcome::Unknown,
            http::Outcome::Applied => Outcome::Applied(None),
        };
        let mut outcomes = vec![all; items];
        if let (http::Outcome::Applied, Some(answer)) = (outcome, answer) {
            match failed_items(&answer.body, items) {
                Ok(failed) => {
                    for one in failed {
                        outcomes[one.index] = match one.outcome {
                            http::Outcome::NotApplied(_) => Outcome::NotApplied,
                            _ => Outcome::Unknown,
                        };
                    }
                }
                Err(why) => {
                    self.shared.surprise(format!("a batch of {items}: {why}: {answer:?}"));
                    outcomes.fill(Outcome::Unknown);
                }
            }
        }
        outcomes
    }
}

/// What a batch's answer names as failed; every item is either that or applied.
fn failed_items(body: &Value, items: usize) -> Result<Vec<Failed>, String> {
    let listed = body["failed"].as_array().ok_or("no list of what failed")?;
    let mut failed = Vec::new();
    for item in listed {
        let index = item["index"].as_u64().and_then(|index| usize::try_from(index).ok());
        let index =
            index.filter(|&index| index < items).ok_or("a failed item that was not there")?;
        let kind = kind_of(item).to_owned();
        let outcome = match item["outcome"].as_str() {
            Some("not-applied") => http::Outcome::NotApplied(kind),
            Some("unknown") => http::Outcome::Unknown(kind),
            _ => return Err("a failed item without an outcome".to_owned()),
        };
        failed.push(Failed { index, outcome });
    }
    failed.sort_by_key(|one| one.index);
    failed.dedup_by_key(|one| one.index);
    let adds_up = failed.len() == listed.len()
        && body["accepted"].as_u64() == Some(items as u64)
        && body["applied"].as_u64() == Some((items - failed.len()) as u64);
    if adds_up { Ok(failed) } else { Err("its numbers don't add up".to_owned()) }
}

/// How many operations were refused because their token belongs to another request.
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

pub(super) fn told(gateway: usize, outcome: &http::Outcome, outcomes: &[Outcome]) -> Value {
    let outcome = match outcome {
        http::Outcome::Applied => "applied".to_owned(),
        http::Outcome::NotApplied(why) => format!("not-applied: {why}"),
        http::Outcome::Unknown(why) => format!("unknown: {why}"),
    };
    let applied = outcomes.iter().filter(|one| matches!(one, Outcome::Applied(_))).count();
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
    fn a_batch_says_of_every_item_what_became_of_it() {
        let failed = |index| json!({"index": index, "outcome": "not-applied", "type": "x/frozen"});
        check(json!({"accepted": 3, "applied": 3, "failed": []}), Some(&[]));
        check(
            json!({"accepted": 3, "applied": 1, "failed": [failed(2), failed(0)]}),
            Some(&[0, 2]),
        );
        // Neither applied nor failed; both; one that was not asked for; no word on the outcome.
        check(json!({"accepted": 3, "applied": 2, "failed": []}), None);
        check(json!({"accepted": 2, "applied": 2, "failed": []}), None);
        check(json!({"accepted": 3, "applied": 3, "failed": [failed(1)]}), None);
        check(json!({"accepted": 3, "applied": 1, "failed": [failed(1), failed(1)]}), None);
        check(json!({"accepted": 3, "applied": 2, "failed": [failed(3)]}), None);
        check(json!({"accepted": 3, "applied": 2, "failed": [{"index": 1}]}), None);
        check(json!({"accepted": 3, "applied": 3}), None);
    }
}
