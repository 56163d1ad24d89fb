//! No acknowledged increment is lost: it is in every value that was requested after its answer.

use super::super::history::ClientHistory;
use super::Violation;
use super::digits;

pub fn check(history: &ClientHistory, violations: &mut Vec<Violation>) {
    for counter in digits::counters(history) {
        let seen = digits::seen(history, counter);
        for add in history.of(counter) {
            let Some((answered, _)) = add.applied() else { continue };
            let bit = digits::bit(add.ask);
            for value in &seen {
                if value.op.asked > answered && value.set & bit != bit {
                    let detail = format!(
                        "{:?} of {:?}, acknowledged at step {answered}, is missing from {} \
                         asked for at step {}",
                        add.ask, history.counters[counter].key, value.value, value.op.asked,
                    );
                    violations.push(Violation { promise: "lost", detail });
                    break;
                }
            }
        }
    }
}
