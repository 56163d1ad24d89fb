//! Bytes from outside: any at all, or valid ones that were damaged.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// The ways in which bytes are damaged.
#[derive(Clone, Debug)]
enum Harm {
    Flip(Index, u8),
    Set(Index, u8),
    Cut(Index),
    /// A range is lost.
    Lose(Index, u8),
    /// A range is repeated.
    Repeat(Index, u8),
    Insert(Index, Vec<u8>),
    /// A length or count that is far larger than the data.
    Huge(Index),
}

fn harm() -> impl Strategy<Value = Harm> {
    let at = any::<Index>;
    prop_oneof![
        (at(), 0..8u8).prop_map(|(at, bit)| Harm::Flip(at, bit)),
        (at(), any::<u8>()).prop_map(|(at, byte)| Harm::Set(at, byte)),
        at().prop_map(Harm::Cut),
        (at(), 1..20u8).prop_map(|(at, len)| Harm::Lose(at, len)),
        (at(), 1..20u8).prop_map(|(at, len)| Harm::Repeat(at, len)),
        (at(), vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Harm::Insert(at, bytes)),
        at().prop_map(Harm::Huge),
    ]
}

impl Harm {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match self {
            Self::Flip(at, bit) => bytes[at.index(len)] ^= 1 << bit,
            Self::Set(at, byte) => bytes[at.index(len)] = *byte,
            Self::Cut(at) => bytes.truncate(at.index(len)),
            Self::Lose(at, size) => drop(bytes.drain(stretch(at, *size, len))),
            Self::Repeat(at, size) => {
                let stretch = stretch(at, *size, len);
                let again = bytes[stretch.clone()].to_vec();
                bytes.splice(stretch.start..stretch.start, again);
            }
            Self::Insert(at, more) => {
                let at = at.index(len);
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Huge(at) => {
                let at = at.index(len);
                bytes.splice(at..=at, [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
            }
        }
    }
}

fn stretch(at: &Index, len: u8, total: usize) -> std::ops::Range<usize> {
    let start = at.index(total);
    start..total.min(start + usize::from(len))
}

/// Any bytes, or the output of `good` after one to three kinds of damage.
pub(crate) fn outside(good: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let harmed = (good, vec(harm(), 1..4)).prop_map(|(mut bytes, harms)| {
        harms.iter().for_each(|harm| harm.apply(&mut bytes));
        bytes
    });
    prop_oneof![1 => vec(any::<u8>(), 0..200), 4 => harmed]
}
