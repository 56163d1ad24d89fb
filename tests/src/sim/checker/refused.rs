//! No value ever contains an operation that was answered "not applied", or one that was never
//! requested.

use super::super::history::ClientHistory;
use super::Violation;
use super::digits;

pub fn check(history: &ClientHistory, violations: &mut Vec<Violation>) {
    for counter in digits::counters(history) {
        let refused = history.of(counter).filter(|op| op.is_refused());
        let refused: u64 = refused.map(|op| digits::bit(op.ask)).sum();
        for value in digits::seen(history, counter) {
            let key = &history.counters[counter].key;
            if value.set & refused != 0 {
                let detail = format!("{key:?}: {:#x} holds refused {refused:#x}", value.value);
                violations.push(Violation { promise: "not-applied", detail });
            }
            let asked = history.of(counter).filter(|op| op.asked < value.answered);
            let asked: u64 = asked.map(|op| digits::bit(op.ask)).sum();
            if value.set & !asked != 0 {
                let detail =
                    format!("{key:?}: {:#x} contains what was never requested", value.value);
                violations.push(Violation { promise: "not-applied", detail });
            }
        }
    }
}
