//! The properties that must hold in every state of the world of sessions.

use super::gateway::ClientAnswer;
use super::leader::LeaderSummary;
use super::{SessionRequest, digit};

/// Returns the text under which the search counts an answer to a client.
pub(super) fn label(answer: ClientAnswer) -> &'static str {
    match answer {
        ClientAnswer::Applied { replayed: false, .. } => "an op is acknowledged",
        ClientAnswer::Applied { replayed: true, .. } => "a client receives the earlier result",
        ClientAnswer::NotApplied => "a client receives not-applied",
        ClientAnswer::Unknown => "a client receives unknown",
        ClientAnswer::TooOld => "a client receives token-too-old",
        ClientAnswer::Never(_) => "a client receives an impossible answer",
    }
}

/// Checks that all entries known to be committed form one log, which the world itself ensures.
pub(super) fn commits_one_log(
    committed: &mut Vec<u64>,
    summary: &LeaderSummary,
) -> Result<(), String> {
    if let Some(why) = summary.stopped {
        return Err(format!("a primary stops: {why}"));
    }
    let own = &summary.log[..summary.commit];
    let both = own.len().min(committed.len());
    if own[..both] != committed[..both] {
        return Err("two primaries commit different logs".into());
    }
    if own.len() > both {
        *committed = own.to_vec();
    }
    Ok(())
}

/// Checks that an expired session never becomes valid again. All other rules depend on this, since
/// ids are never reused.
pub(super) fn stays_expired(old: &LeaderSummary, new: &LeaderSummary) -> Result<(), String> {
    let back = old.expired & !new.expired;
    if back > 0 {
        return Err(format!("session {} was expired and is valid again", back.trailing_zeros()));
    }
    Ok(())
}

/// Checks that an answer is consistent with all earlier answers to clients.
pub(super) fn check_answer(requests: &[SessionRequest], just: u8) -> Result<(), String> {
    let SessionRequest { op, answer, .. } = &requests[usize::from(just) - 1];
    let value = match answer {
        Some(ClientAnswer::Never(why)) => {
            return Err(format!("op {op} fails in an impossible way: {why}"));
        }
        Some(ClientAnswer::Applied { value, .. }) => *value,
        _ => return Ok(()),
    };
    if digit(value, *op) != 1 {
        return Err(format!(
            "op {op} is answered with a value that does not contain it once: {value:x}"
        ));
    }
    for other in requests {
        let Some(ClientAnswer::Applied { value: also, .. }) = other.answer else { continue };
        if other.op == *op && also != value {
            return Err(format!("op {op} is answered with {also:x}, and with {value:x}"));
        }
        // One of two ops was first, so the value of the other contains both.
        let common = value & also;
        if common != value && common != also {
            return Err(format!("ops are answered with {also:x} and {value:x}: neither was first"));
        }
    }
    Ok(())
}

/// Returns the first promise that the counter breaks.
pub(super) fn broken(ops: u8, requests: &[SessionRequest], value: i128) -> Option<String> {
    for op in 0..ops {
        let times = digit(value, op);
        let mut asked = requests.iter().filter(|request| request.op == op).peekable();
        if times > 1 {
            return Some(format!("op {op} is applied {times} times"));
        }
        let acknowledged =
            |request: &SessionRequest| matches!(request.answer, Some(ClientAnswer::Applied { .. }));
        if times == 0 && asked.clone().any(acknowledged) {
            return Some(format!("op {op} is acknowledged and not applied"));
        }
        let denied = asked.peek().is_some()
            && asked.all(|request| request.answer == Some(ClientAnswer::NotApplied));
        if times == 1 && denied {
            return Some(format!(
                "op {op} is applied although every request was answered not-applied"
            ));
        }
    }
    None
}
