//! What was answered "not applied" is in no value, ever; and no value holds what was never asked.

use super::super::history::History;
use super::Violation;
use super::digits;

pub fn check(history: &History, violations: &mut Vec<Violation>) {
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
                let detail = format!("{key:?}: {:#x} holds what nobody asked for", value.value);
                violations.push(Violation { promise: "not-applied", detail });
            }
        }
    }
}
