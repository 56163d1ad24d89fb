//! What must hold in every state of the world of sessions.

use super::gateway::Told;
use super::{Request, digit, leader};

/// What a client was told, in words.
pub(super) fn said(told: Told) -> &'static str {
    match told {
        Told::Applied { replayed: false, .. } => "an op is acknowledged",
        Told::Applied { replayed: true, .. } => "a client is told what was done before",
        Told::NotApplied => "a client is told that it was not applied",
        Told::Unknown => "a client is told that nothing is known",
        Told::TooOld => "a client is told that its token is too old",
        Told::Never(_) => "a client is told what no correct run shows",
    }
}

/// Whatever anybody knows committed is one log: the world sees to it, so it had better be.
pub(super) fn commits_one_log(committed: &mut Vec<u64>, face: &leader::Face) -> Result<(), String> {
    if let Some(why) = face.stopped {
        return Err(format!("a primary stops: {why}"));
    }
    let own = &face.log[..face.commit];
    let both = own.len().min(committed.len());
    if own[..both] != committed[..both] {
        return Err("two primaries commit different logs".into());
    }
    if own.len() > both {
        *committed = own.to_vec();
    }
    Ok(())
}

/// The rule that all others lean on: ids are never reused, and none comes back.
pub(super) fn stays_expired(old: &leader::Face, new: &leader::Face) -> Result<(), String> {
    let back = old.expired & !new.expired;
    if back > 0 {
        return Err(format!("session {} was expired and is so no more", back.trailing_zeros()));
    }
    Ok(())
}

/// What a client has just been told goes with all that any was told before.
pub(super) fn told(requests: &[Request], just: u8) -> Result<(), String> {
    let Request { op, told, .. } = &requests[usize::from(just) - 1];
    let value = match told {
        Some(Told::Never(why)) => {
            return Err(format!("op {op} fails as no correct run shows: {why}"));
        }
        Some(Told::Applied { value, .. }) => *value,
        _ => return Ok(()),
    };
    if digit(value, *op) != 1 {
        return Err(format!("op {op} is answered with a value that it is not in once: {value:x}"));
    }
    for other in requests {
        let Some(Told::Applied { value: also, .. }) = other.told else { continue };
        if other.op == *op && also != value {
            return Err(format!("op {op} is answered with {also:x}, and with {value:x}"));
        }
        // Of two ops one was first: the other's value has both.
        let common = value & also;
        if common != value && common != also {
            return Err(format!("ops are answered with {also:x} and {value:x}: neither was first"));
        }
    }
    Ok(())
}

/// The first promise that the counter breaks.
pub(super) fn broken(ops: u8, requests: &[Request], value: i128) -> Option<String> {
    for op in 0..ops {
        let times = digit(value, op);
        let mut asked = requests.iter().filter(|request| request.op == op).peekable();
        if times > 1 {
            return Some(format!("op {op} is applied {times} times"));
        }
        let acknowledged = |request: &Request| matches!(request.told, Some(Told::Applied { .. }));
        if times == 0 && asked.clone().any(acknowledged) {
            return Some(format!("op {op} is acknowledged and not applied"));
        }
        let denied =
            asked.peek().is_some() && asked.all(|request| request.told == Some(Told::NotApplied));
        if times == 1 && denied {
            return Some(format!("op {op} is applied although every request was told not"));
        }
    }
    None
}
