//! One batch on its way to being decided: what of it is still to be sent, and what became of the
//! rest. No I/O: answers in, the next step out.
//!
//! Every item ends in exactly one of four heaps: applied, unknown, failed (nothing would make it
//! work) and, when sending stops early, not applied. **An item leaves `open` at its first answer
//! that is not a plain "not applied", and only what is open is ever sent**: this is what makes
//! counting twice impossible here.

use std::time::Duration;

use bench::http::{CallError, Response};

use super::batch::{Batch, Line};
use super::lines::Lines;
use crate::answer::{Refusal, failed_items};

/// How long to wait when a refusal names no time, or names none as a whole answer would.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// The longest wait a server may ask for; it is asked again in any case.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
const RECONNECT_AFTER: Duration = Duration::from_millis(20);
const RECONNECT_AFTER_MAX: Duration = Duration::from_millis(500);
const REASONS_MAX: usize = 8;

/// What to do after an answer.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Next {
    /// Every item is decided.
    Done,
    /// Send what is open again, after a pause.
    Again { after: Duration, elsewhere: bool },
}

/// A batch and where its items stand.
pub(crate) struct Pending {
    batch: Batch,
    /// Items to be sent, in the order of the request that is out.
    open: Vec<u32>,
    states: Vec<State>,
    reasons: Vec<String>,
    unreachable: u32,
    /// Nothing of the whole batch could be taken for a reason that will not go away.
    pub(crate) hopeless: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Open,
    Applied,
    Unknown,
    Failed,
}

/// What became of a batch's lines.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) lines: u64,
    pub(crate) skipped: u64,
    pub(crate) applied: u64,
    pub(crate) unknown: Lines,
    pub(crate) not_applied: Lines,
    pub(crate) failed: Lines,
    /// Why something was not applied or is unknown, each reason once.
    pub(crate) reasons: Vec<String>,
}

impl Pending {
    pub(crate) fn new(batch: Batch) -> Self {
        let items = batch.items();
        let states = vec![State::Open; items];
        let open = (0..items as u32).collect();
        Self { batch, open, states, reasons: Vec::new(), unreachable: 0, hopeless: false }
    }

    /// Whether anything is left to send.
    pub(crate) fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// The body of the request to send now.
    pub(crate) fn body(&self) -> Vec<u8> {
        self.batch.body(&self.open)
    }

    /// Takes the answer to the request that was made from [`Self::body`].
    pub(crate) fn on_answer(&mut self, answer: Result<Response, CallError>) -> Next {
        let response = match answer {
            Ok(response) => response,
            Err(error @ CallError::NotSent(_)) => {
                self.note(error.to_string());
                self.unreachable += 1;
                let after = RECONNECT_AFTER * 2u32.saturating_pow(self.unreachable - 1);
                return Next::Again { after: after.min(RECONNECT_AFTER_MAX), elsewhere: true };
            }
            Err(error @ CallError::Unanswered(_)) => {
                self.note(error.to_string());
                self.decide_all(State::Unknown);
                return Next::Done;
            }
        };
        self.unreachable = 0;
        match failed_items(&response, self.open.len()) {
            Ok(failed) => self.on_items(&failed),
            Err(refusal) => self.on_refusal(refusal),
        }
    }

    fn on_items(&mut self, failed: &[(usize, Refusal)]) -> Next {
        let open = std::mem::take(&mut self.open);
        for &item in &open {
            self.states[item as usize] = State::Applied;
        }
        for (index, refusal) in failed {
            let item = open[*index];
            self.states[item as usize] = match refusal {
                Refusal::Later { .. } => {
                    self.open.push(item);
                    State::Open
                }
                Refusal::Never(_) => State::Failed,
                Refusal::Unknown(_) => State::Unknown,
            };
            self.note(refusal.why().to_owned());
        }
        if self.open.is_empty() {
            Next::Done
        } else {
            Next::Again { after: RETRY_AFTER, elsewhere: false }
        }
    }

    fn on_refusal(&mut self, refusal: Refusal) -> Next {
        self.note(refusal.why().to_owned());
        match refusal {
            Refusal::Later { after, .. } => {
                let after = after.unwrap_or(RETRY_AFTER).min(RETRY_AFTER_MAX);
                // Another gateway may know more: this one may have lost its session.
                return Next::Again { after, elsewhere: true };
            }
            Refusal::Never(_) => {
                self.hopeless = true;
                self.decide_all(State::Failed);
            }
            Refusal::Unknown(_) => self.decide_all(State::Unknown),
        }
        Next::Done
    }

    fn decide_all(&mut self, state: State) {
        for item in std::mem::take(&mut self.open) {
            self.states[item as usize] = state;
        }
    }

    fn note(&mut self, reason: String) {
        // Few, however many items and tries: reasons of one outage look alike. The newest is last.
        if let Some(at) = self.reasons.iter().position(|other| *other == reason) {
            self.reasons.remove(at);
        } else if self.reasons.len() == REASONS_MAX {
            self.reasons.remove(0);
        }
        self.reasons.push(reason);
    }

    /// Why something had to be sent again, most lately.
    pub(crate) fn last_reason(&self) -> &str {
        self.reasons.last().map_or("", String::as_str)
    }

    /// What became of every line. Items still open were not applied.
    pub(crate) fn outcome(self) -> Outcome {
        let mut outcome = Outcome::default();
        let mut too_long = false;
        for (number, line) in self.batch.lines() {
            outcome.lines += 1;
            match line {
                Line::Skipped => outcome.skipped += 1,
                Line::TooLong => {
                    too_long = true;
                    outcome.failed.add(number);
                }
                Line::Item(item) => match self.states[item as usize] {
                    State::Applied => outcome.applied += 1,
                    State::Unknown => outcome.unknown.add(number),
                    State::Failed => outcome.failed.add(number),
                    State::Open => outcome.not_applied.add(number),
                },
            }
        }
        // What was mended by a retry needs no words.
        if self.states.iter().any(|&state| state != State::Applied) {
            outcome.reasons = self.reasons;
        }
        if too_long {
            outcome.reasons.push("a key is longer than 1024 bytes".to_owned());
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::super::batch::Batches;
    use super::*;
    use std::io;

    type Answer = Result<Response, CallError>;

    fn response(status: u16, body: &str) -> Answer {
        Ok(Response { status, retry_after: None, body: body.as_bytes().to_vec() })
    }

    fn applied(count: u64) -> Answer {
        response(200, &format!(r#"{{"accepted":{count},"applied":{count},"failed":[]}}"#))
    }

    fn problem(status: u16, kind: &str, outcome: &str) -> Answer {
        response(status, &format!(r#"{{"type":"x/{kind}","outcome":"{outcome}"}}"#))
    }

    fn not_sent() -> Answer {
        Err(CallError::NotSent(io::ErrorKind::ConnectionRefused.into()))
    }

    fn lost() -> Answer {
        Err(CallError::Unanswered(io::ErrorKind::UnexpectedEof.into()))
    }

    /// Plays answers to a batch of "a b a c" and compares what is sent and what comes of it.
    #[track_caller]
    fn check(answers: Vec<Answer>, want_sent: &[&str], want: &str) {
        let batch = Batches::new(&b"a\nb\na\nc\n"[..], 10).next().unwrap().unwrap();
        let mut pending = Pending::new(batch);
        let mut sent = Vec::new();
        for answer in answers {
            assert!(pending.is_open(), "an answer nobody waits for");
            let body = String::from_utf8(pending.body()).unwrap();
            let keys = ["a", "b", "c"].into_iter();
            let keys = keys.filter(|key| body.contains(&format!("{key}\t")));
            sent.push(keys.collect::<String>());
            let next = pending.on_answer(answer);
            assert_eq!(next == Next::Done, !pending.is_open());
        }
        assert_eq!(sent, want_sent);
        let outcome = pending.outcome();
        let lines = |lines: Lines| {
            let text = |range: &super::super::lines::LineRange| {
                format!("{}-{}", range.first_line, range.last_line)
            };
            lines.ranges().iter().map(text).collect::<Vec<_>>().join(",")
        };
        let got = format!(
            "applied {} unknown [{}] open [{}] failed [{}]",
            outcome.applied,
            lines(outcome.unknown),
            lines(outcome.not_applied),
            lines(outcome.failed)
        );
        assert_eq!(got, want);
    }

    #[test]
    fn applied_at_once() {
        check(vec![applied(3)], &["abc"], "applied 4 unknown [] open [] failed []");
    }

    #[test]
    fn what_was_not_applied_is_sent_again() {
        let want = "applied 4 unknown [] open [] failed []";
        check(vec![not_sent(), applied(3)], &["abc", "abc"], want);
        let busy = problem(503, "frozen", "not-applied");
        check(vec![busy, applied(3)], &["abc", "abc"], want);
        let busy = problem(429, "overloaded", "not-applied");
        check(vec![busy, applied(3)], &["abc", "abc"], want);
        let part = r#"{"applied":1,"failed":[{"index":2,"outcome":"not-applied","type":"x/frozen"},
            {"index":0,"outcome":"not-applied","type":"x/frozen"}]}"#;
        check(vec![response(200, part), applied(2)], &["abc", "ac"], want);
    }

    #[test]
    fn what_is_unknown_is_never_sent_again() {
        let want = "applied 0 unknown [1-4] open [] failed []";
        check(vec![lost()], &["abc"], want);
        check(vec![problem(504, "deadline", "unknown")], &["abc"], want);
        check(vec![response(502, "<html>")], &["abc"], want);
        check(vec![applied(2)], &["abc"], want);
        let part = r#"{"applied":1,"failed":[{"index":0,"outcome":"unknown","type":"x/deadline"},
            {"index":1,"outcome":"not-applied","type":"x/frozen"}]}"#;
        check(
            vec![response(200, part), applied(1)],
            &["abc", "b"],
            "applied 2 unknown [1-1,3-3] open [] failed []",
        );
        check(
            vec![response(200, part), lost()],
            &["abc", "b"],
            "applied 1 unknown [1-3] open [] failed []",
        );
    }

    #[test]
    fn what_can_never_work_is_not_sent_again() {
        let part =
            r#"{"applied":2,"failed":[{"index":0,"outcome":"not-applied","type":"x/bad-input"}]}"#;
        check(vec![response(200, part)], &["abc"], "applied 2 unknown [] open [] failed [1-1,3-3]");
        let refused = problem(400, "bad-input", "not-applied");
        check(vec![refused], &["abc"], "applied 0 unknown [] open [] failed [1-4]");
    }

    #[test]
    fn what_is_open_at_the_end_was_not_applied() {
        check(vec![not_sent()], &["abc"], "applied 0 unknown [] open [1-4] failed []");
    }

    #[test]
    fn the_server_names_the_pause_within_reason() {
        #[track_caller]
        fn check(retry_after: Option<u64>, want_ms: u64) {
            let batch = Batches::new(&b"a\n"[..], 10).next().unwrap().unwrap();
            let mut response = problem(503, "frozen", "not-applied").unwrap();
            response.retry_after = retry_after.map(Duration::from_secs);
            let after = Duration::from_millis(want_ms);
            let next = Pending::new(batch).on_answer(Ok(response));
            assert_eq!(next, Next::Again { after, elsewhere: true });
        }
        check(None, 100);
        check(Some(1), 1000);
        check(Some(3600), 5000);
    }
}
