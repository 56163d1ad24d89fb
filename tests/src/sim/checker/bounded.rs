//! A bounded-stale value is never older than its answer states: it contains every increment that
//! was acknowledged by the moment of the answer less the age that it names.
//!
//! The only defect of such a value is its age: it is a value that the counter has had. So it fits
//! into the chain of the others, no digit is above 1, and it contains nothing that was refused or
//! not yet requested.

use super::super::history::{Ask, ClientHistory, OpOutcome};
use super::Violation;
use super::digits;

const PROMISE: &str = "bounded";

pub fn check(history: &ClientHistory, violations: &mut Vec<Violation>) {
    for counter in digits::counters(history) {
        let seen = digits::seen(history, counter);
        for op in history.of(counter) {
            let Some((answered, OpOutcome::Stale { value, as_of })) = op.answer else { continue };
            let Some(set) = digits::set(value) else {
                violations.push(wrong(history, counter, value, "is no sum of its adds"));
                continue;
            };
            let bits = |adds: &mut dyn Iterator<Item = Ask>| adds.map(digits::bit).sum::<u64>();
            let ops = || history.of(counter);
            let due = |add: &&super::super::history::ClientOp| {
                add.applied().is_some() && add.answered_at < as_of
            };
            let due = bits(&mut ops().filter(due).map(|add| add.ask));
            let possible = ops().filter(|add| add.asked < answered && !add.is_refused());
            let possible = bits(&mut possible.map(|add| add.ask));
            if due & !set != 0 {
                let late = format!("lacks {:#x}, acknowledged before {as_of}", due & !set);
                violations.push(wrong(history, counter, value, &late));
            }
            if set & !possible != 0 {
                let odd = format!("holds {:#x}: refused, or not asked for", set & !possible);
                violations.push(wrong(history, counter, value, &odd));
            }
            let apart = |other: u64| other & !set != 0 && set & !other != 0;
            if let Some(other) = seen.iter().find(|other| apart(other.set)) {
                let both = format!("and {:#x} can't both have been its value", other.value);
                violations.push(wrong(history, counter, value, &both));
            }
        }
    }
}

fn wrong(history: &ClientHistory, counter: usize, value: i128, why: &str) -> Violation {
    let detail = format!("{:?}: {value:#x} {why}", history.counters[counter].key);
    Violation { promise: PROMISE, detail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::history::CounterUse;

    /// Three adds, acknowledged at 10, 20 and never; then a read with this answer.
    #[track_caller]
    fn check(value: i128, as_of: u64, want: Option<&str>) {
        let mut history = ClientHistory::default();
        let counter = history.new_counter(CounterUse::Digits);
        for (step, delta, answer) in [
            (1, 1, Some((10, OpOutcome::Applied(None)))),
            (2, 4, Some((20, OpOutcome::Applied(None)))),
            (3, 16, None),
            (4, 64, Some((30, OpOutcome::NotApplied))),
        ] {
            let add = history.ask(step, counter, Ask::Add { delta });
            if let Some((at, outcome)) = answer {
                history.answer(step + 10, at, add, outcome);
            }
        }
        let read = history.ask(30, counter, Ask::Read);
        history.answer(40, 50, read, OpOutcome::Stale { value, as_of });
        history.ask(50, counter, Ask::Add { delta: 256 });
        let mut violations = Vec::new();
        super::check(&history, &mut violations);
        let found = violations.first().map(|violation| violation.detail.as_str());
        match want {
            None => assert_eq!(found, None),
            Some(want) => assert!(found.is_some_and(|found| found.contains(want)), "{found:?}"),
        }
    }

    #[test]
    fn what_an_old_value_may_hold() {
        check(0, 10, None);
        check(0, 11, Some("lacks 0x1"));
        check(1, 20, None);
        check(1, 21, Some("lacks 0x2"));
        check(5, 50, None);
        check(1 + 4 + 16, 50, None);
        check(1 + 4 + 64, 50, Some("holds 0x8"));
        check(1 + 4 + 256, 50, Some("holds 0x10"));
        check(2, 0, Some("is no sum"));
    }
}
