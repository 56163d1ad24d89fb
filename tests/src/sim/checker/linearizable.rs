//! Every answer fits one order of all operations, in which each takes effect between its request
//! and its answer.
//!
//! For digit-coded counters that is linear work, and with the checks of [`super::lost`] and
//! [`super::refused`] sufficient: the returned sets form a chain; a later value contains an earlier
//! one's; a value that contains an add contains all adds that were acknowledged before that add was
//! requested. The few operations on a mixed counter are searched exhaustively.

use std::collections::BTreeSet;

use super::super::history::{Ask, ClientHistory, CounterUse, OpOutcome};
use super::Violation;
use super::digits::{self, SeenValue};

const PROMISE: &str = "linearizable";

pub fn check(history: &ClientHistory, violations: &mut Vec<Violation>) {
    for counter in 0..history.counters.len() {
        let wrong = match history.counters[counter].used {
            CounterUse::Digits => digit_coded(history, counter),
            CounterUse::Mixed => search(history, counter),
            // The adds of these counters are not in this history.
            CounterUse::Tokens => None,
        };
        if let Some(wrong) = wrong {
            let detail = format!("{:?}: {wrong}", history.counters[counter].key);
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}

fn digit_coded(history: &ClientHistory, counter: usize) -> Option<String> {
    let mut seen = digits::seen(history, counter);
    seen.sort_by_key(|value| (value.set.count_ones(), value.op.asked));
    chain(&seen)
        .or_else(|| in_time(&seen))
        .or_else(|| before_its_adds(history, counter, &seen))
        .or_else(|| returning(&seen))
}

/// Checks that of any two sets one contains the other.
fn chain(seen: &[SeenValue<'_>]) -> Option<String> {
    let pair = seen.windows(2).find(|pair| pair[0].set & !pair[1].set != 0)?;
    Some(format!("{:#x} and {:#x} can't both have been its value", pair[0].value, pair[1].value))
}

/// A value requested after another was answered contains at least as much.
fn in_time(seen: &[SeenValue<'_>]) -> Option<String> {
    let mut by_asked: Vec<&SeenValue<'_>> = seen.iter().collect();
    by_asked.sort_by_key(|value| value.op.asked);
    let mut by_answered: Vec<&SeenValue<'_>> = seen.iter().collect();
    by_answered.sort_by_key(|value| value.answered);
    let (mut before, mut held) = (0, 0u64);
    for value in by_asked {
        while let Some(earlier) = by_answered.get(before)
            && earlier.answered < value.op.asked
        {
            held |= earlier.set;
            before += 1;
        }
        if held & !value.set != 0 {
            return Some(format!(
                "{:#x}, asked for at step {}, is older than what was answered before it",
                value.value, value.op.asked,
            ));
        }
    }
    None
}

/// A set with an add contains every add that was acknowledged before that add was requested.
fn before_its_adds(
    history: &ClientHistory,
    counter: usize,
    seen: &[SeenValue<'_>],
) -> Option<String> {
    // Sets only grow along the chain, so the first that holds an add decides.
    for add in history.of(counter) {
        let bit = digits::bit(add.ask);
        let Some(first) = seen.iter().find(|value| bit != 0 && value.set & bit == bit) else {
            continue;
        };
        let needed = history
            .of(counter)
            .filter(|other| other.applied().is_some_and(|(answered, _)| answered < add.asked));
        let needed: u64 = needed.map(|other| digits::bit(other.ask)).sum();
        if needed & !first.set != 0 {
            return Some(format!(
                "{:#x} holds {:?} but not all that was acknowledged before it",
                first.value, add.ask,
            ));
        }
    }
    None
}

/// An add that returns the value is the last of its own set.
fn returning(seen: &[SeenValue<'_>]) -> Option<String> {
    let own = |value: &&SeenValue<'_>| matches!(value.op.ask, Ask::AddReturning { .. });
    for value in seen.iter().filter(own) {
        let bit = digits::bit(value.op.ask);
        if value.set & bit == 0 {
            return Some(format!("{:?} returned {:#x}, without itself", value.op.ask, value.value));
        }
        let early = |other: &&SeenValue<'_>| other.set & bit != 0 && value.set & !other.set != 0;
        if let Some(other) = seen.iter().find(early) {
            return Some(format!(
                "{:?} returned {:#x}, yet {:#x} holds it",
                value.op.ask, value.value, other.value,
            ));
        }
    }
    None
}

/// Wing and Gong's search, remembering (which operations are done, value).
fn search(history: &ClientHistory, counter: usize) -> Option<String> {
    let ops: Vec<_> = history
        .of(counter)
        .filter(|op| !op.is_refused())
        // A read without an answer constrains nothing.
        .filter(|op| op.ask != Ask::Read || op.applied().is_some())
        .collect();
    let answered = |at: usize| ops[at].applied().map_or(u64::MAX, |(answered, _)| answered);
    let must: u64 = (0..ops.len()).filter(|&at| answered(at) != u64::MAX).map(|at| 1 << at).sum();
    let mut visited = BTreeSet::new();
    let mut open = vec![(0u64, 0i128)];
    while let Some((done, value)) = open.pop() {
        if done & must == must {
            return None;
        }
        if !visited.insert((done, value)) {
            continue;
        }
        let left = |at: &usize| done & (1 << at) == 0;
        let first_answer = (0..ops.len()).filter(left).map(answered).min().unwrap_or(u64::MAX);
        for at in (0..ops.len()).filter(left) {
            if ops[at].asked > first_answer {
                continue;
            }
            let (next, result) = effect(ops[at].ask, value);
            let fits = match ops[at].answer {
                Some((_, OpOutcome::Applied(Some(answer)))) => result == Some(answer),
                _ => true,
            };
            if fits {
                open.push((done | 1 << at, next));
            }
        }
    }
    let operation = |op: &&super::super::history::ClientOp| {
        format!("{:?} [{}..{:?}]", op.ask, op.asked, op.answer)
    };
    Some(format!("no order explains {}", ops.iter().map(operation).collect::<Vec<_>>().join(", ")))
}

/// The value after an operation, and the value that it returns.
fn effect(ask: Ask, value: i128) -> (i128, Option<i128>) {
    match ask {
        Ask::Add { delta } => (value + i128::from(delta), None),
        Ask::AddReturning { delta } => {
            let after = value + i128::from(delta);
            (after, Some(after))
        }
        Ask::Delete => (0, Some(value)),
        Ask::Read => (value, Some(value)),
    }
}
