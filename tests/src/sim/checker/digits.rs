//! Digit-coded counters: the i-th add has delta 4^i, so a value names the set of adds in it.
//!
//! Base 4, so that a digit 2 or 3 shows a double count instead of carrying into the next add.

use super::super::history::{Ask, ClientHistory, ClientOp, CounterUse};

/// A value that some operation returned, with the adds it contains as a bit set.
#[derive(Clone, Copy, Debug)]
pub struct SeenValue<'a> {
    pub op: &'a ClientOp,
    pub answered: u64,
    pub value: i128,
    pub set: u64,
}

/// The bit of one add.
pub fn bit(ask: Ask) -> u64 {
    match ask {
        Ask::Add { delta } | Ask::AddReturning { delta } => 1 << (delta.trailing_zeros() / 2),
        Ask::Delete | Ask::Read => 0,
    }
}

/// The set, if every digit is 0 or 1 and there are no more digits than adds can have.
pub fn set(value: i128) -> Option<u64> {
    let mut set = 0u64;
    let mut rest = u128::try_from(value).ok()?;
    for at in 0..64 {
        match rest & 3 {
            0 => {}
            1 => set |= 1 << at,
            _ => return None,
        }
        rest >>= 2;
    }
    Some(set)
}

pub fn counters(history: &ClientHistory) -> impl Iterator<Item = usize> {
    (0..history.counters.len()).filter(|&at| history.counters[at].used == CounterUse::Digits)
}

/// The values of a counter that operations returned, as far as they can be decoded.
pub fn seen(history: &ClientHistory, counter: usize) -> Vec<SeenValue<'_>> {
    let read = |op: &'_ ClientOp| -> Option<(u64, i128)> {
        let (answered, value) = op.applied()?;
        Some((answered, value?))
    };
    history
        .of(counter)
        .filter_map(|op| {
            let (answered, value) = read(op)?;
            Some(SeenValue { op, answered, value, set: set(value)? })
        })
        .collect()
}
