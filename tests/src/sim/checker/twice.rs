//! No increment is applied twice: no digit of any value is above 1.

use super::super::history::ClientHistory;
use super::Violation;
use super::digits;

pub fn check(history: &ClientHistory, violations: &mut Vec<Violation>) {
    for counter in digits::counters(history) {
        for op in history.of(counter) {
            let Some((_, Some(value))) = op.applied() else { continue };
            if digits::set(value).is_none() {
                let key = &history.counters[counter].key;
                let detail = format!("{:?} of {key:?} saw {value:#x}", op.ask);
                violations.push(Violation { promise: "twice", detail });
                break;
            }
        }
    }
}
