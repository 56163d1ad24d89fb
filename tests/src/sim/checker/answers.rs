//! A gateway answers each request once and in full: every operation failed, or was applied with a
//! value if it asks for one. And it never receives a reply that no correct cluster sends: "out of
//! order", "malformed", "answered before" for a batch that is still in flight, "expired" for a
//! session whose key exists.

use engine::batcher::{Failure, WriteResult};
use engine::ops::Op;

use super::Violation;

/// The result of each operation: its value, if it was applied and has one.
pub type Outcomes = Vec<Result<Option<i128>, Failure>>;

/// Reads the answer to a request of these operations.
pub fn outcomes(
    ops: &[Op],
    result: &WriteResult,
    violations: &mut Vec<Violation>,
) -> Option<Outcomes> {
    let mut outcomes: Vec<Option<Result<Option<i128>, Failure>>> = vec![None; ops.len()];
    let values = result.values.iter().map(|&(index, value)| (index, Ok(Some(value))));
    let failed = result.failed.iter().map(|&(index, failure)| (index, Err(failure)));
    let mut sound = true;
    for (index, outcome) in values.chain(failed) {
        sound &= match outcomes.get_mut(index as usize) {
            Some(place) => place.replace(outcome).is_none(),
            None => false,
        };
    }
    // An operation that asks for a value has one, and no other does.
    for (op, outcome) in ops.iter().zip(&mut outcomes) {
        let outcome = outcome.get_or_insert(Ok(None));
        sound &= outcome.is_err() || (*outcome != Ok(None)) == op.kind.returns_value();
    }
    if !sound {
        let detail = format!("{ops:?} were answered by {result:?}");
        violations.push(Violation { promise: "answers", detail });
        return None;
    }
    for &(_, failure) in &result.failed {
        strange(failure, violations);
    }
    Some(outcomes.into_iter().flatten().collect())
}

fn strange(failure: Failure, violations: &mut Vec<Violation>) {
    let strange = matches!(
        failure,
        Failure::Malformed | Failure::ResultGone | Failure::SessionAbandoned | Failure::TooLarge
    );
    if strange {
        let detail = format!("a gateway received {failure:?}");
        violations.push(Violation { promise: "answers", detail });
    }
}
