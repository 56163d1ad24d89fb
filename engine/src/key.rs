//! The name of a counter: a namespace and a key, their hash, and the slot that follows from it.
//!
//! Inside the engine a counter's name is one byte string, `namespace ‖ 0 ‖ key`, which is also what
//! is hashed, sent, kept in the table and written to disk. A namespace holds no zero byte, so the
//! first zero separates the two.

use bytes::{Bytes, BytesMut};
use xxhash_rust::xxh3::xxh3_128;

use crate::ids::Slot;

/// The longest namespace, in bytes.
pub const NAMESPACE_BYTES_MAX: usize = 64;
/// The longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 1024;

/// The name of a counter, checked: `namespace ‖ 0 ‖ key`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CounterKey(Bytes);

/// The reason why a name is invalid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KeyError {
    /// The namespace is not 1 to 64 of `a-z 0-9 _ . -`.
    Namespace,
    /// The key is not 1 to 1,024 bytes.
    Key,
}

impl CounterKey {
    /// Makes a checked name.
    pub fn new(namespace: &[u8], key: &[u8]) -> Result<Self, KeyError> {
        check_namespace(namespace)?;
        check_key(key)?;
        let mut name = Vec::with_capacity(namespace.len() + 1 + key.len());
        name.extend_from_slice(namespace);
        name.push(0);
        name.extend_from_slice(key);
        Ok(Self(name.into()))
    }

    /// Checks a name in the form `namespace ‖ 0 ‖ key`.
    pub fn from_name(name: Bytes) -> Result<Self, KeyError> {
        NameChecker::default().check(&name)?;
        Ok(Self(name))
    }

    /// `namespace ‖ 0 ‖ key`
    pub fn name(&self) -> &[u8] {
        &self.0
    }

    /// The name as `namespace ‖ 0 ‖ key`, without a copy.
    pub fn into_name(self) -> Bytes {
        self.0
    }

    /// The namespace.
    pub fn namespace(&self) -> &[u8] {
        namespace_of(&self.0)
    }

    /// The key.
    pub fn key(&self) -> &[u8] {
        &self.0[self.namespace().len() + 1..]
    }

    /// The slot that the counter lies in.
    pub fn slot(&self) -> Slot {
        slot_of(hash(&self.0))
    }
}

impl std::borrow::Borrow<[u8]> for CounterKey {
    fn borrow(&self) -> &[u8] {
        self.name()
    }
}

/// Checks names in the form `namespace ‖ 0 ‖ key`, faster those of the same namespace as the one
/// before.
#[derive(Debug, Default)]
pub struct NameChecker<'a> {
    /// `namespace ‖ 0` of the last name.
    prefix: &'a [u8],
}

impl<'a> NameChecker<'a> {
    /// Checks the next name.
    pub fn check(&mut self, name: &'a [u8]) -> Result<(), KeyError> {
        if let Some(key) = name.strip_prefix(self.prefix).filter(|_| !self.prefix.is_empty()) {
            return check_key(key);
        }
        let zero = name.iter().position(|&byte| byte == 0).ok_or(KeyError::Namespace)?;
        check_namespace(&name[..zero])?;
        self.prefix = &name[..=zero];
        check_key(&name[zero + 1..])
    }
}

/// Makes names in one namespace, which is checked once.
///
/// The names share buffers of a fixed size, since an allocation for each would cost more than the
/// rest of its making. The buffers are small: one is freed when the last of its names is dropped,
/// so a name that is kept for long keeps few others alive.
#[derive(Debug)]
pub struct NameMaker {
    /// `namespace ‖ 0`
    prefix: Vec<u8>,
    buffer: BytesMut,
    buffer_bytes: usize,
}

impl NameMaker {
    /// Checks the namespace. Names will share buffers of so many bytes; a longer name has its own.
    pub fn new(namespace: &[u8], buffer_bytes: usize) -> Result<Self, KeyError> {
        check_namespace(namespace)?;
        let prefix = [namespace, &[0]].concat();
        Ok(Self { prefix, buffer: BytesMut::new(), buffer_bytes })
    }

    /// Makes a checked name.
    pub fn name(&mut self, key: &[u8]) -> Result<CounterKey, KeyError> {
        check_key(key)?;
        let bytes = self.prefix.len() + key.len();
        if self.buffer.capacity() < bytes {
            self.buffer = BytesMut::with_capacity(self.buffer_bytes.max(bytes));
        }
        self.buffer.extend_from_slice(&self.prefix);
        self.buffer.extend_from_slice(key);
        Ok(CounterKey(self.buffer.split().freeze()))
    }
}

fn check_namespace(namespace: &[u8]) -> Result<(), KeyError> {
    let allowed = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-');
    let fits = (1..=NAMESPACE_BYTES_MAX).contains(&namespace.len());
    if fits && namespace.iter().all(allowed) { Ok(()) } else { Err(KeyError::Namespace) }
}

fn check_key(key: &[u8]) -> Result<(), KeyError> {
    if (1..=KEY_BYTES_MAX).contains(&key.len()) { Ok(()) } else { Err(KeyError::Key) }
}

/// The namespace of a checked name.
pub fn namespace_of(name: &[u8]) -> &[u8] {
    name.split(|&byte| byte == 0).next().expect("a name has a namespace")
}

/// The xxh3-128 of a name. Never changes, since data on disk is placed by it.
pub fn hash(name: &[u8]) -> u128 {
    xxh3_128(name)
}

/// The slot of a hash: its top 16 bits.
pub fn slot_of(hash: u128) -> Slot {
    Slot((hash >> 112) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(namespace: &[u8], key: &[u8], want: Result<(), KeyError>) {
        assert_eq!(CounterKey::new(namespace, key).map(|_| ()), want);
    }

    #[test]
    fn names_are_checked() {
        check(b"likes", b"video-1", Ok(()));
        check(b"a_b.c-9", &[0, 255], Ok(()));
        check(b"", b"k", Err(KeyError::Namespace));
        check(b"Likes", b"k", Err(KeyError::Namespace));
        check(&[b'a'; 65], b"k", Err(KeyError::Namespace));
        check(b"likes", b"", Err(KeyError::Key));
        check(b"likes", &[1; 1025], Err(KeyError::Key));
    }

    #[test]
    fn names_that_share_a_buffer_are_like_any_others() {
        assert_eq!(NameMaker::new(b"Likes", 64).err(), Some(KeyError::Namespace));
        let mut maker = NameMaker::new(b"ns", 64).unwrap();
        let keys: Vec<String> = (0..200).map(|number| "k".repeat(number % 90 + 1)).collect();
        let made: Vec<_> = keys.iter().map(|key| maker.name(key.as_bytes())).collect();
        assert_eq!(maker.name(b""), Err(KeyError::Key));
        let alone = keys.iter().map(|key| CounterKey::new(b"ns", key.as_bytes()));
        assert!(made.into_iter().eq(alone));
    }

    #[test]
    fn a_key_may_hold_zero_bytes() {
        let counter = CounterKey::new(b"ns", b"\0a\0").unwrap();
        assert_eq!(counter.namespace(), b"ns");
        assert_eq!(counter.key(), b"\0a\0");
        assert_eq!(CounterKey::from_name(counter.clone().into_name()), Ok(counter));
    }

    /// Golden test: the placement of data on disk depends on it.
    #[test]
    fn the_slot_of_a_counter_never_changes() {
        let counter = CounterKey::new(b"likes", b"video-1").unwrap();
        assert_eq!(counter.slot(), slot_of(hash(b"likes\0video-1")));
    }
}
