//! Digit-coded counters: the i-th add has delta 4^i, so a value names the set of adds in it.
//!
//! Base 4, so that a digit 2 or 3 shows a double count instead of carrying into the next add.

use super::super::history::{Ask, History, Op, Use};

/// A value that some operation saw, with the adds it contains as a bit set.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub op: &'a Op,
    pub answered: u64,
    pub value: i128,
    pub set: u64,
}

/// The add's own bit.
pub fn bit(ask: Ask) -> u64 {
    match ask {
        Ask::Add { delta } | Ask::AddReturning { delta } => 1 << (delta.trailing_zeros() / 2),
        Ask::Delete | Ask::Read => 0,
    }
}

/// The set, if every digit is 0 or 1 and no more than all digits are there.
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

pub fn counters(history: &History) -> impl Iterator<Item = usize> {
    (0..history.counters.len()).filter(|&at| history.counters[at].used == Use::Digits)
}

/// What was seen of a counter, as far as it can be read.
pub fn seen(history: &History, counter: usize) -> Vec<Seen<'_>> {
    let read = |op: &'_ Op| -> Option<(u64, i128)> {
        let (answered, value) = op.applied()?;
        Some((answered, value?))
    };
    history
        .of(counter)
        .filter_map(|op| {
            let (answered, value) = read(op)?;
            Some(Seen { op, answered, value, set: set(value)? })
        })
        .collect()
}
