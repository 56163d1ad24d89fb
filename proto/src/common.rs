//! The two forms of the fields of messages: in the engine, and on the wire.

use bytes::Bytes;
use engine::entry::Position;
use engine::ids::{
    BatchSeq, Boot, Chain, CopyNo, Epoch, Revision, Seq, SessionId, ShardId, Slots, StoreBoot,
    StoreId, TimeMs,
};
use engine::message::{DigestPoint, ReplicaHealth};

use crate::Invalid;
use crate::wire;

/// A field of a message: `Self` is its type in the engine, `W` its type on the wire.
pub(crate) trait WireField<W>: Sized {
    /// Converts the field to send it.
    fn into_wire(self) -> W;
    /// Converts the received field. `name` is for the error.
    fn from_wire(name: &'static str, from: W) -> Result<Self, Invalid>;
}

/// Makes a message from the variables that have the names of its fields.
macro_rules! into_wire {
    ($($message:ident)::+ { $($field:ident),* }) => {
        $($message)::+ { $($field: WireField::into_wire($field)),* }
    };
}
pub(crate) use into_wire;

/// Makes an engine value from a message. Its fields are written as in a struct: those without a
/// value are converted from the fields of the message, and an error names `message.field` as it is
/// written here: in `from_wire!(end => Position { seq, chain: chain })` `seq` comes from `end.seq`,
/// which is also its name in an error, and `chain` is a variable.
macro_rules! from_wire {
    ($message:ident => $($type:ident)::+ { $($field:ident $(: $value:expr)?),* $(,)? }) => {
        $($type)::+ { $($field: $crate::common::from_wire!(@field $message $field $($value)?)),* }
    };
    (@field $message:ident $field:ident) => {{
        let name = concat!(stringify!($message), ".", stringify!($field));
        WireField::from_wire(name, $message.$field)?
    }};
    (@field $message:ident $field:ident $value:expr) => { $value };
}
pub(crate) use from_wire;

/// Implements [`WireField`] for a `oneof`. Its kinds have the names of the engine's variants: a
/// `message` has the fields of its variant, and those that are `empty` have none. The kinds that
/// are neither have arms of their own, in which `Kind` is the `oneof`. In `message Ack(ack:
/// wire::Ack) { n }` the variable `ack` names the message in errors (`ack.n`).
macro_rules! oneof {
    (
        $value:ident = $($kind:ident)::+;
        $(message $name:ident($variable:ident: $($message:ident)::+) { $($field:ident),* };)*
        $(empty $($empty:ident),+;)?
        $(into_wire { $($into_wire:tt)* })?
        $(from_wire { $($from_wire:tt)* })?
    ) => {
        impl WireField<$($kind)::+> for $value {
            fn into_wire(self) -> $($kind)::+ {
                type Kind = $($kind)::+;
                match self {
                    $($($into_wire)*)?
                    $($(Self::$empty => Kind::$empty(wire::Empty {}),)+)?
                    $(Self::$name { $($field),* } => {
                        Kind::$name($crate::common::into_wire!($($message)::+ { $($field),* }))
                    })*
                }
            }

            fn from_wire(_: &'static str, from: $($kind)::+) -> Result<Self, Invalid> {
                type Kind = $($kind)::+;
                Ok(match from {
                    $($($from_wire)*)?
                    $($(Kind::$empty(_) => Self::$empty,)+)?
                    $(Kind::$name($variable) => {
                        $crate::common::from_wire!($variable => Self::$name { $($field),* })
                    })*
                })
            }
        }
    };
}
pub(crate) use oneof;

/// Implements both conversions of a message that is a `oneof`, which has this name in errors.
macro_rules! message_of_kind {
    ($value:ident = $message:ty, $name:literal) => {
        impl From<$value> for $message {
            fn from(from: $value) -> Self {
                Self { kind: from.into_wire() }
            }
        }

        impl TryFrom<$message> for $value {
            type Error = Invalid;

            fn try_from(from: $message) -> Result<Self, Invalid> {
                WireField::from_wire($name, from.kind)
            }
        }
    };
}
pub(crate) use message_of_kind;

/// A list, up to the first element that is invalid.
impl<T: WireField<W>, W> WireField<Vec<W>> for Vec<T> {
    fn into_wire(self) -> Vec<W> {
        self.into_iter().map(T::into_wire).collect()
    }

    fn from_wire(name: &'static str, from: Vec<W>) -> Result<Self, Invalid> {
        from.into_iter().map(|element| T::from_wire(name, element)).collect()
    }
}

/// A message within a message, which has to be there.
impl<T: WireField<W>, W> WireField<Option<W>> for T {
    fn into_wire(self) -> Option<W> {
        Some(self.into_wire())
    }

    fn from_wire(name: &'static str, from: Option<W>) -> Result<Self, Invalid> {
        T::from_wire(name, from.ok_or(Invalid::Missing(name))?)
    }
}

/// The fields of which every value is valid: both types, and the conversions to the wire and back.
macro_rules! always_valid {
    ($($value:ty = $wire:ty, $out:expr, $back:expr;)*) => {
        $(impl WireField<$wire> for $value {
            fn into_wire(self) -> $wire {
                let out: fn($value) -> $wire = $out;
                out(self)
            }

            fn from_wire(_: &'static str, from: $wire) -> Result<Self, Invalid> {
                let back: fn($wire) -> $value = $back;
                Ok(back(from))
            }
        })*
    };
}

always_valid! {
    bool = bool, |flag| flag, |flag| flag;
    Bytes = Bytes, |bytes| bytes, |bytes| bytes;
    u32 = u32, |number| number, |number| number;
    u64 = u64, |number| number, |number| number;
    BatchSeq = u64, |seq| seq.0, BatchSeq;
    Chain = u64, |chain| chain.0, Chain;
    CopyNo = u64, |copy| copy.0, CopyNo;
    Epoch = u64, |epoch| epoch.0, Epoch;
    Seq = u64, |seq| seq.0, Seq;
    TimeMs = u64, |time| time.0, TimeMs;
    StoreBoot = wire::StoreBoot, wire::StoreBoot::from, Self::from;
    StoreId = wire::StoreId, wire::StoreId::from, Self::from;
    SessionId = wire::SessionId,
        |SessionId(Revision { incarnation, revision })| wire::SessionId { incarnation, revision },
        |wire::SessionId { incarnation, revision }| Self(Revision { incarnation, revision });
}

fn joined(high: u64, low: u64) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

fn high(number: u128) -> u64 {
    (number >> 64) as u64
}

impl From<StoreId> for wire::StoreId {
    fn from(store: StoreId) -> Self {
        Self { high: high(store.0), low: store.0 as u64 }
    }
}

impl From<wire::StoreId> for StoreId {
    fn from(from: wire::StoreId) -> Self {
        Self(joined(from.high, from.low))
    }
}

impl From<StoreBoot> for wire::StoreBoot {
    fn from(from: StoreBoot) -> Self {
        let (store_high, store_low) = (high(from.store.0), from.store.0 as u64);
        Self { store_high, store_low, boot: from.boot.0 }
    }
}

impl From<wire::StoreBoot> for StoreBoot {
    fn from(from: wire::StoreBoot) -> Self {
        Self { store: StoreId(joined(from.store_high, from.store_low)), boot: Boot(from.boot) }
    }
}

impl From<Slots> for wire::Slots {
    fn from(from: Slots) -> Self {
        Self { lo: u32::from(from.lo), hi: u32::from(from.hi) }
    }
}

impl WireField<wire::Slots> for Slots {
    fn into_wire(self) -> wire::Slots {
        self.into()
    }

    fn from_wire(_: &'static str, from: wire::Slots) -> Result<Self, Invalid> {
        let narrow = |end: u32| u16::try_from(end).map_err(|_| Invalid::Range("slots"));
        let slots = Self { lo: narrow(from.lo)?, hi: narrow(from.hi)? };
        if slots.lo > slots.hi {
            return Err(Invalid::Range("slots"));
        }
        Ok(slots)
    }
}

/// A shard's name: 16 bits in a 32-bit field.
impl WireField<u32> for ShardId {
    fn into_wire(self) -> u32 {
        u32::from(self.0)
    }

    fn from_wire(_: &'static str, from: u32) -> Result<Self, Invalid> {
        u16::try_from(from).map(Self).map_err(|_| Invalid::Range("shard"))
    }
}

impl WireField<wire::Position> for Position {
    fn into_wire(self) -> wire::Position {
        let Self { epoch, seq, chain, time: time_ms } = self;
        into_wire!(wire::Position { epoch, seq, chain, time_ms })
    }

    fn from_wire(_: &'static str, from: wire::Position) -> Result<Self, Invalid> {
        Ok(from_wire!(from => Self { epoch, seq, chain, time: TimeMs(from.time_ms) }))
    }
}

impl WireField<wire::DigestPoint> for DigestPoint {
    fn into_wire(self) -> wire::DigestPoint {
        wire::DigestPoint {
            shard: self.shard.into_wire(),
            seq: self.seq.0,
            counters_high: high(self.counters),
            counters_low: self.counters as u64,
            sessions_high: high(self.sessions),
            sessions_low: self.sessions as u64,
            tokens_high: high(self.tokens),
            tokens_low: self.tokens as u64,
        }
    }

    fn from_wire(_: &'static str, point: wire::DigestPoint) -> Result<Self, Invalid> {
        Ok(from_wire!(point => Self {
            shard,
            seq,
            counters: joined(point.counters_high, point.counters_low),
            sessions: joined(point.sessions_high, point.sessions_low),
            tokens: joined(point.tokens_high, point.tokens_low),
        }))
    }
}

/// The messages that the engine has as tuples: the type, and the field for each element.
macro_rules! tuples {
    ($($tuple:ty = $($message:ident)::+ { $($field:ident),* };)*) => {
        $(impl WireField<$($message)::+> for $tuple {
            fn into_wire(self) -> $($message)::+ {
                let ($($field),*) = self;
                into_wire!($($message)::+ { $($field),* })
            }

            fn from_wire(name: &'static str, from: $($message)::+) -> Result<Self, Invalid> {
                Ok(($(WireField::from_wire(name, from.$field)?),*))
            }
        })*
    };
}

tuples! {
    (ShardId, Epoch) = wire::ShardEpoch { shard, epoch };
    (ShardId, Epoch, Seq) = wire::Commit { shard, epoch, seq };
    (ShardId, CopyNo) = wire::ShardCopy { shard, copy };
    (Epoch, Seq) = wire::step_down_reply::End { epoch, seq };
    (ShardId, Vec<(StoreId, ReplicaHealth)>) = wire::FrozenShard { shard, hindered_by };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(lo: u32, hi: u32, want: Result<Slots, Invalid>) {
        assert_eq!(Slots::from_wire("slots", Some(wire::Slots { lo, hi })), want);
    }

    #[test]
    fn a_slot_range_is_checked() {
        check(0, 65_535, Ok(Slots::ALL));
        check(7, 7, Ok(Slots { lo: 7, hi: 7 }));
        check(8, 7, Err(Invalid::Range("slots")));
        check(0, 65_536, Err(Invalid::Range("slots")));
        check(u32::MAX, u32::MAX, Err(Invalid::Range("slots")));
        let absent = None::<wire::Slots>;
        assert_eq!(Slots::from_wire("slots", absent), Err(Invalid::Missing("slots")));
    }

    #[test]
    fn a_shard_is_sixteen_bits() {
        assert_eq!(ShardId::from_wire("shard", 65_535), Ok(ShardId(65_535)));
        assert_eq!(ShardId::from_wire("shard", 65_536), Err(Invalid::Range("shard")));
    }

    #[test]
    fn both_halves_of_a_store_id_cross() {
        let id = StoreId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        let crossing: wire::StoreId = id.into_wire();
        assert_eq!(StoreId::from_wire("id", crossing), Ok(id));
        let boot = StoreBoot { store: id, boot: Boot(3) };
        assert_eq!(StoreBoot::from(wire::StoreBoot::from(boot)), boot);
    }
}
