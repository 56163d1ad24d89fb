//! One batch on its way to being decided: what is known of its items so far. No I/O: answers in, the next step out.
//!
//! **Every send is the same request under the same token**, so the service applies each item once, however often it is
//! sent and to however many gateways; a part of the batch would be another request. An item is *open* until an answer
//! says what became of it. `not-applied` speaks of one send only: an item that an earlier send may have applied stays in
//! doubt until a later one says that it is applied.
//!
//! When sending stops early, what is open is not applied, or unknown if it is in doubt.

use std::sync::Arc;
use std::time::Duration;

use bench::http::{CallError, Response, Url};

use super::batch::{Batch, Line};
use super::lines::Lines;
use super::reasons::Reasons;
use crate::answer::{Refusal, failed_items};
use crate::client::unanswered;

/// How long to wait when a refusal names no time, or names none as a whole answer would.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// The longest wait a server may ask for; it is asked again in any case.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
const RECONNECT_AFTER: Duration = Duration::from_millis(20);
const RECONNECT_AFTER_MAX: Duration = Duration::from_millis(500);

/// What to do after an answer.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Next {
    /// Every item is decided.
    Done,
    /// Send it again, after a pause.
    Again { after: Duration, elsewhere: bool },
    /// What answered is no gateway: another one may be.
    Elsewhere,
    /// It is too large for a gateway, or for a proxy before it, and nothing of it was applied.
    Split,
}

/// A batch and where its items stand.
pub(crate) struct Pending {
    batch: Batch,
    items: Vec<Item>,
    /// Why it was not decided at once, most lately.
    last_reason: Arc<str>,
    /// Sends without an answer, in a row.
    unanswered: u32,
    sends: u32,
    /// The first send was answered as one that had been applied before.
    is_replayed: bool,
    /// Nothing of the whole batch could be taken for a reason that will not go away.
    pub(crate) hopeless: bool,
}

#[derive(Clone)]
struct Item {
    state: State,
    /// Why it is not applied.
    why: Arc<str>,
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
    /// The service had applied it before this count sent it first.
    pub(crate) is_replayed: bool,
    /// Why something was not applied or is unknown.
    pub(crate) reasons: Reasons,
}

impl Pending {
    /// `in_doubt`: an earlier run of this count may have sent it.
    pub(crate) fn new(batch: Batch, in_doubt: bool) -> Self {
        let why = if in_doubt { "an earlier run may have sent it" } else { "it was not sent" };
        let last_reason: Arc<str> = why.into();
        let item = Item { state: State::Open { in_doubt }, why: last_reason.clone() };
        let items = vec![item; batch.items()];
        Self {
            batch,
            items,
            last_reason,
            unanswered: 0,
            sends: 0,
            is_replayed: false,
            hopeless: false,
        }
    }

    pub(crate) fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Whether anything is not decided yet.
    pub(crate) fn is_open(&self) -> bool {
        self.items.iter().any(|item| matches!(item.state, State::Open { .. }))
    }

    /// Whether an open item may have been applied.
    fn is_in_doubt(&self) -> bool {
        self.items.iter().any(|item| item.state == State::Open { in_doubt: true })
    }

    /// The body of the request, always the same.
    pub(crate) fn body(&self) -> Vec<u8> {
        self.batch.body()
    }

    /// Takes the answer to the request that was sent to `url`.
    pub(crate) fn on_answer(&mut self, url: &Url, answer: Result<Response, CallError>) -> Next {
        self.sends += 1;
        let response = match answer {
            Ok(response) => response,
            Err(error) => match unanswered(url, &error) {
                refusal @ Refusal::NoGateway(_) => return self.on_refusal(&refusal),
                refusal => return self.on_silence(&refusal),
            },
        };
        self.unanswered = 0;
        match failed_items(&response, self.items.len()) {
            Ok(failed) => {
                let is_first = self.sends == 1 && !self.is_in_doubt();
                self.is_replayed |= is_first && response.replayed;
                self.on_items(&failed)
            }
            Err(refusal) => self.on_refusal(&refusal),
        }
    }

    /// It can't be gone on with.
    pub(crate) fn fail(&mut self, why: &str) {
        self.last_reason = why.into();
        self.all_open(|in_doubt| State::Open { in_doubt });
        self.hopeless = true;
    }

    /// The request may have left, and its answer is not waited for.
    pub(crate) fn abandon(&mut self) {
        self.last_reason = "stopped before its answer came".into();
        self.all_open(|_| State::Open { in_doubt: true });
    }

    fn on_silence(&mut self, refusal: &Refusal) -> Next {
        self.last_reason = refusal.why().into();
        self.all_open(|in_doubt| after(in_doubt, refusal));
        self.unanswered += 1;
        let after = RECONNECT_AFTER * 2u32.saturating_pow(self.unanswered - 1);
        Next::Again { after: after.min(RECONNECT_AFTER_MAX), elsewhere: true }
    }

    fn on_items(&mut self, failed: &[(usize, Refusal)]) -> Next {
        let mut is_failed = vec![false; self.items.len()];
        for (index, refusal) in failed {
            is_failed[*index] = true;
            let item = &mut self.items[*index];
            if let State::Open { in_doubt } = item.state {
                // Many items fail alike.
                if *self.last_reason != *refusal.why() {
                    self.last_reason = refusal.why().into();
                }
                *item = Item { state: after(in_doubt, refusal), why: self.last_reason.clone() };
            }
        }
        for (item, _) in self.items.iter_mut().zip(is_failed).filter(|(_, failed)| !failed) {
            item.state = State::Applied;
        }
        if self.is_open() {
            Next::Again { after: RETRY_AFTER, elsewhere: false }
        } else {
            Next::Done
        }
    }

    fn on_refusal(&mut self, refusal: &Refusal) -> Next {
        self.last_reason = refusal.why().into();
        let can_split = !self.is_in_doubt() && self.batch.line_count() > 1;
        self.all_open(|in_doubt| after(in_doubt, refusal));
        match refusal {
            Refusal::NoGateway(_) => return Next::Elsewhere,
            Refusal::TooLarge(_) if can_split => return Next::Split,
            _ => {}
        }
        if self.is_open() && !matches!(refusal, Refusal::TooLarge(_)) {
            let after = match refusal {
                Refusal::Later { after, .. } => after.unwrap_or(RETRY_AFTER).min(RETRY_AFTER_MAX),
                _ => RETRY_AFTER,
            };
            // Another gateway may know more: this one may have lost its session.
            return Next::Again { after, elsewhere: true };
        }
        // A resumed batch can be too old, and others are not.
        self.hopeless = self.is_open() || self.items.iter().any(|item| item.state == State::Failed);
        Next::Done
    }

    fn all_open(&mut self, becomes: impl Fn(bool) -> State) {
        for item in &mut self.items {
            if let State::Open { in_doubt } = item.state {
                *item = Item { state: becomes(in_doubt), why: self.last_reason.clone() };
            }
        }
    }

    /// Why something had to be sent again, most lately.
    pub(crate) fn last_reason(&self) -> &str {
        &self.last_reason
    }

    /// What became of every line.
    pub(crate) fn outcome(self) -> Outcome {
        let mut outcome = Outcome {
            first_line: self.batch.first_line(),
            is_final: !self.is_open() && !self.hopeless,
            is_replayed: self.is_replayed,
            ..Outcome::default()
        };
        for (number, line) in self.batch.lines() {
            outcome.lines += 1;
            match line {
                Line::Skipped => outcome.skipped += 1,
                Line::Faulty(fault) => {
                    outcome.failed.add(number);
                    outcome.reasons.add(fault.why(), number, None);
                }
                Line::Item(item) => {
                    let Item { state, why } = &self.items[item as usize];
                    let lines = match state {
                        State::Applied => {
                            outcome.applied += 1;
                            continue;
                        }
                        State::Unknown | State::Open { in_doubt: true } => &mut outcome.unknown,
                        State::Failed => &mut outcome.failed,
                        State::Open { in_doubt: false } => &mut outcome.not_applied,
                    };
                    lines.add(number);
                    outcome.reasons.add(why, number, Some(self.batch.key(item)));
                }
            }
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
        // This send had no effect, and what an earlier one had is not known by that.
        Refusal::TooLarge(_) | Refusal::NoGateway(_) => State::Open { in_doubt },
    }
}

#[cfg(test)]
mod tests {
    use super::super::batches::Batches;
    use super::*;
    use std::io;

    type Answer = Result<Response, CallError>;

    fn url() -> Url {
        Url::parse("http://gw").unwrap()
    }

    fn response(status: u16, body: &str) -> Answer {
        let from = "gw:80".to_owned();
        Ok(Response { status, from, body: body.as_bytes().to_vec(), ..Response::default() })
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
            let next = pending.on_answer(&url(), answer);
            assert_eq!(next == Next::Done, !pending.is_open() || pending.hopeless);
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

    /// What comes next after each of these answers to a batch of "a b a c".
    #[track_caller]
    fn check_next(in_doubt: bool, answers: Vec<Answer>, want: &[Next]) {
        let batch = Batches::new(&b"a\nb\na\nc\n"[..], 10).next().unwrap().unwrap();
        let mut pending = Pending::new(batch, in_doubt);
        let got: Vec<_> =
            answers.into_iter().map(|answer| pending.on_answer(&url(), answer)).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn what_is_too_large_is_split_while_nothing_is_in_doubt() {
        let again = || Next::Again { after: RETRY_AFTER, elsewhere: true };
        for large in [|| response(413, "<html>"), || problem(413, "too-large", NOT)] {
            check_next(false, vec![large()], &[Next::Split]);
            check_next(false, vec![problem(503, "frozen", NOT), large()], &[again(), Next::Split]);
            // Its halves would be other requests, and could count a second time.
            check_next(true, vec![large()], &[Next::Done]);
            check_next(false, vec![response(502, ""), large()], &[again(), Next::Done]);
            check(vec![lost(), large()], "applied 0 unknown 1-4 hopeless");
        }
    }

    #[test]
    fn what_strangers_say_applied_nothing() {
        for stranger in [|| response(404, "<html>"), || Err(CallError::NoHttp)] {
            check_next(false, vec![stranger()], &[Next::Elsewhere]);
            check(vec![stranger()], "applied 0 open 1-4");
            check(vec![lost(), stranger()], "applied 0 unknown 1-4");
            check(vec![stranger(), applied(3)], "applied 4");
        }
    }

    #[test]
    fn only_a_first_send_is_a_surprise_when_it_is_replayed() {
        #[track_caller]
        fn check(in_doubt: bool, answers: Vec<Answer>, want: bool) {
            let batch = Batches::new(&b"a\nb\na\nc\n"[..], 10).next().unwrap().unwrap();
            let mut pending = Pending::new(batch, in_doubt);
            for answer in answers {
                pending.on_answer(&url(), answer);
            }
            assert_eq!(pending.outcome().is_replayed, want);
        }
        let replayed = || applied(3).map(|response| Response { replayed: true, ..response });
        check(false, vec![replayed()], true);
        check(false, vec![applied(3)], false);
        check(false, vec![lost(), replayed()], false);
        check(true, vec![replayed()], false);
    }

    #[test]
    fn each_line_has_its_own_reason() {
        let part = items(&[(0, "bad-input", NOT), (2, "too-large", NOT)]);
        let batch = Batches::new(&b"a\nb\na\nc\n"[..], 10).next().unwrap().unwrap();
        let mut pending = Pending::new(batch, false);
        pending.on_answer(&url(), part);
        let reasons: Vec<_> = pending.outcome().reasons.texts().collect();
        assert_eq!(reasons, ["bad-input: 2 lines, first 1 (a), 3 (a)", "too-large: line 4 (c)"]);
    }

    #[test]
    fn the_server_names_the_pause_within_reason() {
        #[track_caller]
        fn check(retry_after: Option<u64>, want_ms: u64) {
            let batch = Batches::new(&b"a\n"[..], 10).next().unwrap().unwrap();
            let mut response = problem(503, "frozen", "not-applied").unwrap();
            response.retry_after = retry_after.map(Duration::from_secs);
            let after = Duration::from_millis(want_ms);
            let next = Pending::new(batch, false).on_answer(&url(), Ok(response));
            assert_eq!(next, Next::Again { after, elsewhere: true });
        }
        check(None, 100);
        check(Some(1), 1000);
        check(Some(3600), 5000);
    }
}
