//! One batch on its way to being decided: what is known of its items so far. No I/O: answers in, the next step out.
//!
//! **Every send is the same request under the same token**, so the service applies each item once, however often it is
//! sent and to however many gateways; a part of the batch would be another request. An item is *open* until an answer
//! says what became of it. `not-applied` speaks of one send only: an item that an earlier send may have applied stays in
//! doubt until a later one says that it is applied.
//!
//! When sending stops early, what is open is not applied, or unknown if it is in doubt.

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
    /// Send it again, after a pause.
    Again { after: Duration, elsewhere: bool },
}

/// A batch and where its items stand.
pub(crate) struct Pending {
    batch: Batch,
    states: Vec<State>,
    reasons: Vec<String>,
    /// Sends in a row without an answer.
    unanswered: u32,
    /// Nothing of the whole batch could be taken for a reason that will not go away.
    pub(crate) hopeless: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Open { in_doubt: bool },
    Applied,
    Unknown,
    Failed,
}

/// What became of a batch's lines.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) first_line: u64,
    pub(crate) lines: u64,
    pub(crate) skipped: u64,
    pub(crate) applied: u64,
    pub(crate) unknown: Lines,
    pub(crate) not_applied: Lines,
    pub(crate) failed: Lines,
    /// Nothing that is sent now or later could change it.
    pub(crate) is_final: bool,
    /// An earlier run of this count has seen to it.
    pub(crate) is_resumed: bool,
    /// Why something was not applied or is unknown, each reason once.
    pub(crate) reasons: Vec<String>,
}

impl Pending {
    /// `in_doubt`: an earlier run of this count may have sent it.
    pub(crate) fn new(batch: Batch, in_doubt: bool) -> Self {
        let states = vec![State::Open { in_doubt }; batch.items()];
        Self { batch, states, reasons: Vec::new(), unanswered: 0, hopeless: false }
    }

    /// Whether anything is not decided yet.
    pub(crate) fn is_open(&self) -> bool {
        self.states.iter().any(|state| matches!(state, State::Open { .. }))
    }

    /// The body of the request, always the same.
    pub(crate) fn body(&self) -> Vec<u8> {
        self.batch.body()
    }

    /// Takes the answer to the request.
    pub(crate) fn on_answer(&mut self, answer: Result<Response, CallError>) -> Next {
        let response = match answer {
            Ok(response) => response,
            Err(error) => {
                if let CallError::Unanswered(_) = error {
                    self.all_open(|_| State::Open { in_doubt: true });
                }
                self.note(error.to_string());
                self.unanswered += 1;
                let after = RECONNECT_AFTER * 2u32.saturating_pow(self.unanswered - 1);
                return Next::Again { after: after.min(RECONNECT_AFTER_MAX), elsewhere: true };
            }
        };
        self.unanswered = 0;
        match failed_items(&response, self.states.len()) {
            Ok(failed) => self.on_items(&failed),
            Err(refusal) => self.on_refusal(&refusal),
        }
    }

    fn on_items(&mut self, failed: &[(usize, Refusal)]) -> Next {
        let mut is_failed = vec![false; self.states.len()];
        for (index, refusal) in failed {
            is_failed[*index] = true;
            if let State::Open { in_doubt } = self.states[*index] {
                self.states[*index] = after(in_doubt, refusal);
                self.note(refusal.why().to_owned());
            }
        }
        for (state, _) in self.states.iter_mut().zip(is_failed).filter(|(_, failed)| !failed) {
            *state = State::Applied;
        }
        if self.is_open() {
            Next::Again { after: RETRY_AFTER, elsewhere: false }
        } else {
            Next::Done
        }
    }

    fn on_refusal(&mut self, refusal: &Refusal) -> Next {
        self.note(refusal.why().to_owned());
        self.all_open(|in_doubt| after(in_doubt, refusal));
        if self.is_open() {
            let after = match refusal {
                Refusal::Later { after, .. } => after.unwrap_or(RETRY_AFTER).min(RETRY_AFTER_MAX),
                _ => RETRY_AFTER,
            };
            // Another gateway may know more: this one may have lost its session.
            return Next::Again { after, elsewhere: true };
        }
        // A resumed batch can be too old, and others are not.
        self.hopeless = self.states.contains(&State::Failed);
        Next::Done
    }

    fn all_open(&mut self, becomes: impl Fn(bool) -> State) {
        for state in &mut self.states {
            if let State::Open { in_doubt } = *state {
                *state = becomes(in_doubt);
            }
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

    /// What became of every line.
    pub(crate) fn outcome(self) -> Outcome {
        let mut outcome = Outcome {
            first_line: self.batch.first_line(),
            is_final: !self.is_open() && !self.hopeless,
            ..Outcome::default()
        };
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
                    State::Unknown | State::Open { in_doubt: true } => outcome.unknown.add(number),
                    State::Failed => outcome.failed.add(number),
                    State::Open { in_doubt: false } => outcome.not_applied.add(number),
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

/// Where an open item stands after a send that did not apply it for sure.
fn after(in_doubt: bool, refusal: &Refusal) -> State {
    match refusal {
        Refusal::Later { .. } => State::Open { in_doubt },
        Refusal::Unknown(_) => State::Open { in_doubt: true },
        Refusal::Never(_) => State::Failed,
        // Only an earlier send can have applied it.
        Refusal::TooOld(_) if in_doubt => State::Unknown,
        Refusal::TooOld(_) => State::Failed,
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

    /// Plays answers to a batch of "a b a c" and compares what comes of it.
    #[track_caller]
    fn check_resumed(in_doubt: bool, answers: Vec<Answer>, want: &str) {
        let batch = Batches::new(&b"a\nb\na\nc\n"[..], 10).next().unwrap().unwrap();
        let mut pending = Pending::new(batch, in_doubt);
        for answer in answers {
            assert!(pending.is_open(), "an answer nobody waits for");
            assert_eq!(pending.body(), b"a\t2\nb\t1\nc\t1\n");
            let next = pending.on_answer(answer);
            assert_eq!(next == Next::Done, !pending.is_open());
        }
        let (open, hopeless) = (pending.is_open(), pending.hopeless);
        let outcome = pending.outcome();
        assert_eq!(outcome.is_final, !open && !hopeless);
        let mut got = format!("applied {}", outcome.applied);
        for (name, lines) in [
            ("unknown", outcome.unknown),
            ("open", outcome.not_applied),
            ("failed", outcome.failed),
        ] {
            for range in lines.ranges() {
                got += &format!(" {name} {}-{}", range.first_line, range.last_line);
            }
        }
        if hopeless {
            got += " hopeless";
        }
        assert_eq!(got, want);
    }

    #[track_caller]
    fn check(answers: Vec<Answer>, want: &str) {
        check_resumed(false, answers, want);
    }

    /// Items that failed, by index, of three.
    fn items(failed: &[(usize, &str, &str)]) -> Answer {
        let applied = 3 - failed.len();
        let item = |(index, kind, outcome): &(usize, &str, &str)| {
            format!(r#"{{"index":{index},"type":"x/{kind}","outcome":"{outcome}"}}"#)
        };
        let failed: Vec<_> = failed.iter().map(item).collect();
        response(200, &format!(r#"{{"applied":{applied},"failed":[{}]}}"#, failed.join(",")))
    }

    const NOT: &str = "not-applied";

    #[test]
    fn applied_at_once() {
        check(vec![applied(3)], "applied 4");
    }

    #[test]
    fn what_was_not_applied_is_sent_again() {
        check(vec![not_sent(), applied(3)], "applied 4");
        check(vec![problem(503, "frozen", NOT), applied(3)], "applied 4");
        check(vec![problem(429, "quota", NOT), applied(3)], "applied 4");
        let part = || items(&[(2, "frozen", NOT), (0, "frozen", NOT)]);
        check(vec![part(), applied(3)], "applied 4");
        check(vec![part()], "applied 1 open 1-1 open 3-4");
        check(vec![not_sent()], "applied 0 open 1-4");
    }

    #[test]
    fn what_is_unknown_is_sent_again_and_stays_in_doubt_until_it_is_applied() {
        for unknown in [
            lost,
            || problem(504, "deadline", "unknown"),
            || response(502, "<html>"),
            || applied(2),
        ] {
            check(vec![unknown(), applied(3)], "applied 4");
            check(vec![unknown()], "applied 0 unknown 1-4");
            let refused = problem(503, "frozen", NOT);
            check(vec![unknown(), refused, not_sent()], "applied 0 unknown 1-4");
        }
        let part = || items(&[(0, "deadline", "unknown"), (1, "frozen", NOT)]);
        check(vec![part(), applied(3)], "applied 4");
        check(vec![part()], "applied 1 unknown 1-1 unknown 3-3 open 2-2");
        // Applied once is applied, whatever a later answer says.
        check(
            vec![part(), problem(503, "frozen", NOT)],
            "applied 1 unknown 1-1 unknown 3-3 open 2-2",
        );
        check(vec![part(), items(&[(2, "deadline", "unknown")])], "applied 4");
    }

    #[test]
    fn what_can_never_work_is_not_sent_again() {
        check(vec![items(&[(0, "bad-input", NOT)])], "applied 2 failed 1-1 failed 3-3");
        check(vec![problem(400, "bad-input", NOT)], "applied 0 failed 1-4 hopeless");
        check(vec![items(&[(1, "token-reused", NOT)])], "applied 3 failed 2-2");
    }

    #[test]
    fn a_token_too_old_leaves_only_what_was_in_doubt_unknown() {
        let old = || problem(410, "token-too-old", "unknown");
        check(vec![lost(), old()], "applied 0 unknown 1-4");
        let item = (0, "token-too-old", "unknown");
        check(vec![lost(), items(&[item])], "applied 2 unknown 1-1 unknown 3-3");
        check_resumed(true, vec![old()], "applied 0 unknown 1-4");
        // Nobody has sent it before: this machine's clock is wrong.
        check(vec![old()], "applied 0 failed 1-4 hopeless");
        check_resumed(true, vec![problem(503, "frozen", NOT)], "applied 0 unknown 1-4");
    }

    #[test]
    fn the_server_names_the_pause_within_reason() {
        #[track_caller]
        fn check(retry_after: Option<u64>, want_ms: u64) {
            let batch = Batches::new(&b"a\n"[..], 10).next().unwrap().unwrap();
            let mut response = problem(503, "frozen", "not-applied").unwrap();
            response.retry_after = retry_after.map(Duration::from_secs);
            let after = Duration::from_millis(want_ms);
            let next = Pending::new(batch, false).on_answer(Ok(response));
            assert_eq!(next, Next::Again { after, elsewhere: true });
        }
        check(None, 100);
        check(Some(1), 1000);
        check(Some(3600), 5000);
    }
}
