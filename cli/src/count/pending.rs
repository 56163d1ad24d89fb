//! The state of one batch until the outcome of all its items is known. There is no I/O here: the
//! input is an answer, and the output is the next step.
//!
//! **Every send is the same request under the same token**, so the service applies each item once,
//! however often it is sent and to however many gateways; a part of the batch would be another
//! request. An item is *open* until an answer decides it. `not-applied` concerns one send only: an
//! item that an earlier send may have applied stays in doubt until an answer reports it as applied.
//!
//! If sending stops early, open items are not applied, or unknown if they are in doubt.

use std::sync::Arc;
use std::time::Duration;

use client::{CallError, CallFailure, HttpResponse, Url, failed_items, unanswered};

use super::batch::{LineBatch, LineKind};
use super::lines::LineSet;
use super::reasons::Reasons;

/// The pause before a retry if the answer has no Retry-After, or if only some items failed.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// The maximum pause: a longer Retry-After is shortened to it.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
/// The pause after a first send without an answer; it doubles with each further one.
const RECONNECT_AFTER: Duration = Duration::from_millis(20);
/// The maximum of that pause.
const RECONNECT_AFTER_MAX: Duration = Duration::from_millis(500);

/// The next step after an answer.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum NextStep {
    /// Every item is decided.
    Done,
    /// Send it again after a pause, to the next gateway if `elsewhere`.
    Again { after: Duration, elsewhere: bool },
    /// The server that answered is not a gateway: try the next URL.
    Elsewhere,
    /// The batch is too large for the gateway, or for a proxy before it, and nothing was applied.
    Split,
}

/// A batch with the states of its items.
pub(crate) struct Pending {
    batch: LineBatch,
    items: Vec<PendingItem>,
    /// The last reason why it had to be sent again.
    last_reason: Arc<str>,
    /// The number of consecutive sends without an answer.
    unanswered: u32,
    sends: u32,
    /// True if the answer to the first send was a replay: the service had applied it before.
    is_replayed: bool,
    /// True if the whole batch was rejected for a permanent reason.
    pub(crate) hopeless: bool,
}

/// An item of the batch.
#[derive(Clone)]
struct PendingItem {
    state: ItemState,
    /// The reason why it is not applied.
    why: Arc<str>,
}

/// The state of an item.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum ItemState {
    /// The item is not decided. `in_doubt`: an earlier send may have applied it.
    Open { in_doubt: bool },
    /// Applied.
    Applied,
    /// Possibly applied, and no further send can find out.
    Unknown,
    /// Rejected for a permanent reason.
    Failed,
}

/// The outcome of a batch's lines.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct BatchOutcome {
    pub(crate) first_line: u64,
    pub(crate) lines: u64,
    /// The number of lines without a key.
    pub(crate) skipped: u64,
    /// The number of counted lines.
    pub(crate) applied: u64,
    /// Lines that may have been counted.
    pub(crate) unknown: LineSet,
    /// Lines that were not counted, and could be.
    pub(crate) not_applied: LineSet,
    /// Lines that cannot be counted.
    pub(crate) failed: LineSet,
    /// True if no further send could change the outcome.
    pub(crate) is_final: bool,
    /// True if the outcome was taken from the journal of an earlier run.
    pub(crate) is_resumed: bool,
    /// True if the service had applied the batch before this count sent it for the first time.
    pub(crate) is_replayed: bool,
    /// The reasons why lines are not applied or unknown.
    pub(crate) reasons: Reasons,
}

impl Pending {
    /// `in_doubt`: an earlier run of this count may have sent it.
    pub(crate) fn new(batch: LineBatch, in_doubt: bool) -> Self {
        let why = if in_doubt { "an earlier run may have sent it" } else { "it was not sent" };
        let last_reason: Arc<str> = why.into();
        let item = PendingItem { state: ItemState::Open { in_doubt }, why: last_reason.clone() };
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

    /// The batch itself.
    pub(crate) fn batch(&self) -> &LineBatch {
        &self.batch
    }

    /// Returns whether an item is not decided yet.
    pub(crate) fn is_open(&self) -> bool {
        self.items.iter().any(|item| matches!(item.state, ItemState::Open { .. }))
    }

    /// Returns whether an open item may have been applied.
    fn is_in_doubt(&self) -> bool {
        self.items.iter().any(|item| item.state == ItemState::Open { in_doubt: true })
    }

    /// The body of the request, which never changes.
    pub(crate) fn body(&self) -> Vec<u8> {
        self.batch.body()
    }

    /// Handles the answer to the request that was sent to `url`.
    pub(crate) fn on_answer(
        &mut self,
        url: &Url,
        answer: Result<HttpResponse, CallError>,
    ) -> NextStep {
        self.sends += 1;
        let response = match answer {
            Ok(response) => response,
            Err(error) => match unanswered(url, &error) {
                failure @ CallFailure::NotAGateway(_) => return self.on_failure(&failure),
                failure => return self.on_no_answer(&failure),
            },
        };
        self.unanswered = 0;
        match failed_items(&response, self.items.len()) {
            Ok(failed) => {
                let is_first = self.sends == 1 && !self.is_in_doubt();
                self.is_replayed |= is_first && response.replayed;
                self.on_items(&failed)
            }
            Err(failure) => self.on_failure(&failure),
        }
    }

    /// Gives the batch up because of a local error.
    pub(crate) fn fail(&mut self, why: &str) {
        self.last_reason = why.into();
        self.all_open(|in_doubt| ItemState::Open { in_doubt });
        self.hopeless = true;
    }

    /// Gives the batch up although the request may have been sent.
    pub(crate) fn abandon(&mut self) {
        self.last_reason = "stopped before the answer arrived".into();
        self.all_open(|_| ItemState::Open { in_doubt: true });
    }

    fn on_no_answer(&mut self, failure: &CallFailure) -> NextStep {
        self.last_reason = failure.why().into();
        self.all_open(|in_doubt| after(in_doubt, failure));
        self.unanswered += 1;
        let after = RECONNECT_AFTER * 2u32.saturating_pow(self.unanswered - 1);
        NextStep::Again { after: after.min(RECONNECT_AFTER_MAX), elsewhere: true }
    }

    fn on_items(&mut self, failed: &[(usize, CallFailure)]) -> NextStep {
        let mut is_failed = vec![false; self.items.len()];
        for (index, failure) in failed {
            is_failed[*index] = true;
            let item = &mut self.items[*index];
            if let ItemState::Open { in_doubt } = item.state {
                // Many items fail for the same reason, whose text is shared.
                if *self.last_reason != *failure.why() {
                    self.last_reason = failure.why().into();
                }
                *item =
                    PendingItem { state: after(in_doubt, failure), why: self.last_reason.clone() };
            }
        }
        for (item, _) in self.items.iter_mut().zip(is_failed).filter(|(_, failed)| !failed) {
            item.state = ItemState::Applied;
        }
        if self.is_open() {
            NextStep::Again { after: RETRY_AFTER, elsewhere: false }
        } else {
            NextStep::Done
        }
    }

    fn on_failure(&mut self, failure: &CallFailure) -> NextStep {
        self.last_reason = failure.why().into();
        let can_split = !self.is_in_doubt() && self.batch.line_count() > 1;
        self.all_open(|in_doubt| after(in_doubt, failure));
        match failure {
            CallFailure::NotAGateway(_) => return NextStep::Elsewhere,
            CallFailure::TooLarge(_) if can_split => return NextStep::Split,
            _ => {}
        }
        if self.is_open() && !matches!(failure, CallFailure::TooLarge(_)) {
            let after = match failure {
                CallFailure::Retryable { after, .. } => {
                    after.unwrap_or(RETRY_AFTER).min(RETRY_AFTER_MAX)
                }
                _ => RETRY_AFTER,
            };
            // The next gateway may succeed: this one may have lost its session.
            return NextStep::Again { after, elsewhere: true };
        }
        // A resumed batch may be too old without being hopeless: other batches are newer.
        self.hopeless =
            self.is_open() || self.items.iter().any(|item| item.state == ItemState::Failed);
        NextStep::Done
    }

    fn all_open(&mut self, becomes: impl Fn(bool) -> ItemState) {
        for item in &mut self.items {
            if let ItemState::Open { in_doubt } = item.state {
                *item = PendingItem { state: becomes(in_doubt), why: self.last_reason.clone() };
            }
        }
    }

    /// The last reason why the batch had to be sent again.
    pub(crate) fn last_reason(&self) -> &str {
        &self.last_reason
    }

    /// The outcome of every line.
    pub(crate) fn outcome(self) -> BatchOutcome {
        let mut outcome = BatchOutcome {
            first_line: self.batch.first_line(),
            is_final: !self.is_open() && !self.hopeless,
            is_replayed: self.is_replayed,
            ..BatchOutcome::default()
        };
        for (number, line) in self.batch.lines() {
            outcome.lines += 1;
            match line {
                LineKind::Skipped => outcome.skipped += 1,
                LineKind::Faulty(fault) => {
                    outcome.failed.add(number);
                    outcome.reasons.add(fault.why(), number, None);
                }
                LineKind::Item(item) => {
                    let PendingItem { state, why } = &self.items[item as usize];
                    let lines = match state {
                        ItemState::Applied => {
                            outcome.applied += 1;
                            continue;
                        }
                        ItemState::Unknown | ItemState::Open { in_doubt: true } => {
                            &mut outcome.unknown
                        }
                        ItemState::Failed => &mut outcome.failed,
                        ItemState::Open { in_doubt: false } => &mut outcome.not_applied,
                    };
                    lines.add(number);
                    outcome.reasons.add(why, number, Some(self.batch.key(item)));
                }
            }
        }
        outcome
    }
}

/// Returns the state of an open item after a send that failed.
fn after(in_doubt: bool, failure: &CallFailure) -> ItemState {
    match failure {
        CallFailure::Retryable { .. } => ItemState::Open { in_doubt },
        CallFailure::Unknown(_) => ItemState::Open { in_doubt: true },
        CallFailure::Permanent(_) => ItemState::Failed,
        // This send was not applied, but an earlier one may have been.
        CallFailure::TokenTooOld(_) if in_doubt => ItemState::Unknown,
        CallFailure::TokenTooOld(_) => ItemState::Failed,
        // This send was not applied; the outcome of earlier ones stays as it was.
        CallFailure::TooLarge(_) | CallFailure::NotAGateway(_) => ItemState::Open { in_doubt },
    }
}

#[cfg(test)]
mod tests {
    use super::super::batches::Batches;
    use super::*;
    use std::io;

    type Answer = Result<HttpResponse, CallError>;

    fn url() -> Url {
        Url::parse("http://gw").unwrap()
    }

    fn response(status: u16, body: &str) -> Answer {
        let from = "gw:80".to_owned();
        Ok(HttpResponse { status, from, body: body.as_bytes().to_vec(), ..HttpResponse::default() })
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

    /// Feeds answers to a batch of "a b a c" and compares the outcome.
    #[track_caller]
    fn check_resumed(in_doubt: bool, answers: Vec<Answer>, want: &str) {
        let batch = Batches::new(&b"a\nb\na\nc\n"[..], 10).next().unwrap().unwrap();
        let mut pending = Pending::new(batch, in_doubt);
        for answer in answers {
            assert!(pending.is_open(), "an answer to a decided batch");
            assert_eq!(pending.body(), b"a\t2\nb\t1\nc\t1\n");
            let next = pending.on_answer(&url(), answer);
            assert_eq!(next == NextStep::Done, !pending.is_open() || pending.hopeless);
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

    /// An answer to three items, with the failed ones by index.
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
    fn items_that_were_not_applied_are_sent_again() {
        check(vec![not_sent(), applied(3)], "applied 4");
        check(vec![problem(503, "frozen", NOT), applied(3)], "applied 4");
        check(vec![problem(429, "quota", NOT), applied(3)], "applied 4");
        let part = || items(&[(2, "frozen", NOT), (0, "frozen", NOT)]);
        check(vec![part(), applied(3)], "applied 4");
        check(vec![part()], "applied 1 open 1-1 open 3-4");
        check(vec![not_sent()], "applied 0 open 1-4");
    }

    #[test]
    fn unknown_items_are_sent_again_and_stay_in_doubt_until_they_are_applied() {
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
        // An applied item stays applied, whatever a later answer contains.
        check(
            vec![part(), problem(503, "frozen", NOT)],
            "applied 1 unknown 1-1 unknown 3-3 open 2-2",
        );
        check(vec![part(), items(&[(2, "deadline", "unknown")])], "applied 4");
    }

    #[test]
    fn permanent_failures_are_not_sent_again() {
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
        // The batch was never sent before: this machine's clock is wrong.
        check(vec![old()], "applied 0 failed 1-4 hopeless");
        check_resumed(true, vec![problem(503, "frozen", NOT)], "applied 0 unknown 1-4");
    }

    /// Checks the next step after each of these answers to a batch of "a b a c".
    #[track_caller]
    fn check_next(in_doubt: bool, answers: Vec<Answer>, want: &[NextStep]) {
        let batch = Batches::new(&b"a\nb\na\nc\n"[..], 10).next().unwrap().unwrap();
        let mut pending = Pending::new(batch, in_doubt);
        let got: Vec<_> =
            answers.into_iter().map(|answer| pending.on_answer(&url(), answer)).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn a_large_batch_is_split_while_nothing_is_in_doubt() {
        let again = || NextStep::Again { after: RETRY_AFTER, elsewhere: true };
        for large in [|| response(413, "<html>"), || problem(413, "too-large", NOT)] {
            check_next(false, vec![large()], &[NextStep::Split]);
            check_next(
                false,
                vec![problem(503, "frozen", NOT), large()],
                &[again(), NextStep::Split],
            );
            // The halves would be other requests, and could count a second time.
            check_next(true, vec![large()], &[NextStep::Done]);
            check_next(false, vec![response(502, ""), large()], &[again(), NextStep::Done]);
            check(vec![lost(), large()], "applied 0 unknown 1-4 hopeless");
        }
    }

    #[test]
    fn answers_of_other_servers_applied_nothing() {
        for other in [|| response(404, "<html>"), || Err(CallError::NoHttp)] {
            check_next(false, vec![other()], &[NextStep::Elsewhere]);
            check(vec![other()], "applied 0 open 1-4");
            check(vec![lost(), other()], "applied 0 unknown 1-4");
            check(vec![other(), applied(3)], "applied 4");
        }
    }

    #[test]
    fn only_a_replayed_first_send_is_reported() {
        #[track_caller]
        fn check(in_doubt: bool, answers: Vec<Answer>, want: bool) {
            let batch = Batches::new(&b"a\nb\na\nc\n"[..], 10).next().unwrap().unwrap();
            let mut pending = Pending::new(batch, in_doubt);
            for answer in answers {
                pending.on_answer(&url(), answer);
            }
            assert_eq!(pending.outcome().is_replayed, want);
        }
        let replayed = || applied(3).map(|response| HttpResponse { replayed: true, ..response });
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
            assert_eq!(next, NextStep::Again { after, elsewhere: true });
        }
        check(None, 100);
        check(Some(1), 1000);
        check(Some(3600), 5000);
    }
}
