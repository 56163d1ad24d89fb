//! A request with a token counts once, however often it was sent, as long as its client obeyed its
//! part of the contract (see `token_clients`):
//!
//! - no digit of any value is above 1: nothing was counted twice;
//! - of the two requests under one token at most one was ever applied, whatever shards they
//!   touched;
//! - if any answer reported it as applied, its digit is there; and all such answers return the same
//!   value, with its own digit in it;
//! - a namespace that holds next to nothing is not refused for want of room (`share`);
//! - "too old" is never the answer to a request that was just issued, as long as only one clock is
//!   wrong;
//! - "reused" is the answer only to a request whose digit is not there; and if every answer was
//!   "not applied", its digit is not there either.
//!
//! The last value of the counter, read at the end of the run, shows whether a digit is there.
//!
//! A false alarm would come from a client that sends long after its window without stating when it
//! issued its token: the clients here never do.

use engine::batcher::Failure;

use super::super::history::{ClientHistory, CounterUse, OpOutcome};
use super::super::token_history::{Attempt, TokenCase, TokenOpOutcome};
use super::{RunFacts, Violation, digits};

const PROMISE: &str = "tokens";

pub fn check(run: &RunFacts<'_>, violations: &mut Vec<Violation>) {
    let history = run.history;
    if let Some(detail) = shut_out(run).or_else(|| aged_at_once(run)) {
        violations.push(Violation { promise: PROMISE, detail });
    }
    let mut last = Vec::new();
    for (at, counter) in history.counters.iter().enumerate() {
        let value = if counter.used == CounterUse::Tokens { last_value(history, at) } else { None };
        let set = value.and_then(digits::set);
        if let (Some(value), None) = (value, set) {
            let detail = format!("{:?} holds something twice: {value:#x}", counter.key);
            violations.push(Violation { promise: PROMISE, detail });
        }
        last.push(set);
    }
    for (token, case) in run.tokens.iter().enumerate() {
        if let Some(wrong) = wrong(case, &last, run.plan.tokens.is_short()) {
            let detail = format!("token-{token}: {wrong}: {case:?}");
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}

/// An upper limit of the size of a row in a record of these clients.
const ROW_BYTES: u64 = 60;

/// The other namespace may fill four fifths of a shard, and the rest has room for this many of the
/// first requests of the modest namespace.
fn shut_out(run: &RunFacts<'_>) -> Option<String> {
    let settings = &run.plan.tokens.settings;
    // The share of a shard that is split is unknown here.
    if settings.namespaces_max < 2 || run.plan.splits.every.is_some() {
        return None;
    }
    let of_shard = settings.bytes_max / u64::from(run.plan.shards);
    let left = (of_shard / 5).saturating_sub(2 * ROW_BYTES);
    let many = (left / 2 / ROW_BYTES) as usize;
    let modest = run.tokens.iter().filter(|case| case.modest);
    let attempts: Vec<_> = modest.flat_map(|case| &case.attempts).collect();
    let refused = |attempt: &Attempt| {
        let outcomes = attempt.answer.as_ref().map(|(_, outcomes)| &outcomes[..]);
        matches!(outcomes, Some([TokenOpOutcome::NotApplied(Some(Failure::TokenQuota)), ..]))
    };
    // A request that is sent first may arrive last: it waits in its gateway, while others come
    // through another one (seed 521216).
    let is_among_first = |attempt: &Attempt| {
        let answered = attempt.answer.as_ref().map_or(0, |&(step, _)| step);
        let may_be_before = |other: &&&Attempt| other.asked < answered && !refused(other);
        attempts.iter().filter(may_be_before).count() < many
    };
    let first = attempts.iter().take(many);
    let found = first.into_iter().find(|attempt| refused(attempt) && is_among_first(attempt))?;
    Some(format!("{of_shard} bytes a shard, and no room for {found:?}"))
}

/// While a single clock is wrong, a shard's time is not ahead: so no request is too old that was
/// just issued.
fn aged_at_once(run: &RunFacts<'_>) -> Option<String> {
    let off = |node: &usize| {
        let clock = run.plan.clocks[*node];
        run.clocks_set.contains(node) || clock.skew_ms > 2_000 || clock.drift_ppm != 0
    };
    let wrong = (0..run.plan.clocks.len()).filter(off).count();
    // With `min_in_sync` of one a primary may be alone with its clock.
    let outvoted = wrong == 0 || wrong == 1 && run.plan.min_in_sync > 1;
    if run.plan.tokens.is_short() || !outvoted || run.leapt {
        return None;
    }
    let too_old = |case: &&TokenCase| {
        let answers = case.attempts.iter().filter_map(|attempt| attempt.answer.as_ref());
        answers
            .flat_map(|(_, outcomes)| outcomes)
            .any(|outcome| matches!(outcome, TokenOpOutcome::Unknown(Some(Failure::TokenTooOld))))
    };
    run.tokens.iter().find(too_old).map(|case| format!("too old at once: {case:?}"))
}

/// The value that the final read returned.
fn last_value(history: &ClientHistory, counter: usize) -> Option<i128> {
    let value = |op: &super::super::history::ClientOp| match op.answer {
        Some((_, OpOutcome::Applied(value))) => value,
        _ => None,
    };
    history.of(counter).filter_map(value).last()
}

fn wrong(case: &TokenCase, last: &[Option<u64>], forgets: bool) -> Option<String> {
    let mut done_somewhere = [false, false];
    for (item, &counter) in case.counters.iter().enumerate() {
        let Some(set) = last[counter] else { continue };
        let bit = |other: usize| 1u64 << (case.deltas[other][item].trailing_zeros() / 2);
        let done = [set & bit(0) != 0, set & bit(1) != 0];
        for other in [0, 1] {
            done_somewhere[other] |= done[other];
        }
        if done_somewhere == [true, true] {
            return Some(format!(
                "both requests were done, the second one of them in counter {counter}"
            ));
        }
        for other in [0, 1] {
            let done = done[other];
            let outcomes = answers(case, other).map(|outcomes| outcomes[item]).collect::<Vec<_>>();
            let sends = case.attempts.iter().filter(|attempt| usize::from(attempt.other) == other);
            let all_refused = outcomes.len() == sends.count()
                && outcomes.iter().all(|outcome| matches!(outcome, TokenOpOutcome::NotApplied(_)));
            if all_refused && done {
                return Some(format!("counter {counter} holds a request that was always refused"));
            }
            for outcome in outcomes {
                let fits = match outcome {
                    TokenOpOutcome::Applied(_) => done,
                    TokenOpOutcome::NotApplied(Some(Failure::TokenReused)) => !done,
                    // A record lasts longer than any run, and so does a window.
                    TokenOpOutcome::Unknown(Some(Failure::TokenTooOld)) => {
                        forgets || case.issued.is_some()
                    }
                    _ => true,
                };
                if !fits {
                    return Some(format!(
                        "counter {counter}, done {done}, was answered {outcome:?}"
                    ));
                }
            }
        }
    }
    values(case)
}

/// The outcomes of each answered send of one of the two requests.
fn answers(case: &TokenCase, other: usize) -> impl Iterator<Item = &Vec<TokenOpOutcome>> {
    let of_it = move |attempt: &&Attempt| usize::from(attempt.other) == other;
    case.attempts.iter().filter(of_it).filter_map(|attempt| Some(&attempt.answer.as_ref()?.1))
}

/// A request that asks for a value gets the same one every time, and it contains the request.
fn values(case: &TokenCase) -> Option<String> {
    if !case.returning {
        return None;
    }
    for other in [0, 1] {
        let value = |outcomes: &Vec<TokenOpOutcome>| match outcomes[0] {
            TokenOpOutcome::Applied(value) => value,
            _ => None,
        };
        let values: Vec<i128> = answers(case, other).filter_map(value).collect();
        if values.windows(2).any(|pair| pair[0] != pair[1]) {
            return Some(format!("a replay differs: {values:?}"));
        }
        let delta = i128::from(case.deltas[other][0]);
        if values.iter().any(|value| value & delta == 0) {
            return Some(format!("{values:?} lack the request itself"));
        }
    }
    None
}
