//! Reading and writing bytes: varints, fixed integers and lengths, checked.
//!
//! Everything that is read came from a disk or a socket, so nothing here panics on any input: a
//! short or overlong value is [`Malformed`]. Varints are LEB128 and must be minimal, so that equal
//! values have equal bytes (checksums and golden files rely on it).

use bytes::Bytes;

/// The bytes do not follow the format. The text names the field, for the log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Malformed(pub &'static str);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "malformed {}", self.0)
    }
}

impl std::error::Error for Malformed {}

/// Appends a varint.
pub fn put_varint(out: &mut Vec<u8>, value: u64) {
    put_varint_u128(out, u128::from(value));
}

/// Appends a varint of up to 128 bits.
pub fn put_varint_u128(out: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a signed varint: zigzag, so that small negative numbers are short too.
pub fn put_varint_i128(out: &mut Vec<u8>, value: i128) {
    put_varint_u128(out, ((value << 1) ^ (value >> 127)) as u128);
}

/// The number of bytes that [`put_varint_i128`] appends.
pub fn varint_i128_len(value: i128) -> usize {
    let bits = 128 - ((value << 1) ^ (value >> 127)).leading_zeros() as usize;
    bits.div_ceil(7).max(1)
}

/// Appends a length and the bytes.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Splits a signed varint off the front of the bytes.
pub fn split_varint_i128(bytes: &[u8]) -> Option<(i128, &[u8])> {
    let (raw, rest) = split_varint_u128(bytes)?;
    Some((from_zigzag(raw), rest))
}

fn from_zigzag(raw: u128) -> i128 {
    (raw >> 1) as i128 ^ -((raw & 1) as i128)
}

/// Splits a varint of up to 128 bits off the front of the bytes.
fn split_varint_u128(bytes: &[u8]) -> Option<(u128, &[u8])> {
    // Nearly all have one byte.
    if let Some((&byte, rest)) = bytes.split_first()
        && byte < 0x80
    {
        return Some((u128::from(byte), rest));
    }
    let mut value = 0u128;
    for (at, &byte) in bytes.iter().enumerate().take(19) {
        let overflows = at == 18 && byte > 0x03;
        let overlong = at > 0 && byte == 0;
        if overflows || overlong {
            return None;
        }
        value |= u128::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[at + 1..]));
        }
    }
    None
}

/// A byte string that a [`Reader`] reads: shared, or borrowed.
pub trait ByteString: bytes::Buf + AsRef<[u8]> {
    /// Splits off the first `len` bytes, of which there are enough. They share its memory.
    fn split_front(&mut self, len: usize) -> Self;
}

impl ByteString for Bytes {
    fn split_front(&mut self, len: usize) -> Self {
        self.split_to(len)
    }
}

impl ByteString for &[u8] {
    fn split_front(&mut self, len: usize) -> Self {
        let (front, rest) = self.split_at(len);
        *self = rest;
        front
    }
}

/// Takes values off the front of a byte string. Byte strings that it returns share memory with the
/// input. Each method returns [`Malformed`] with the name `what` if the input is too short or not a
/// value of that kind.
#[derive(Clone, Debug)]
pub struct Reader<B = Bytes> {
    rest: B,
}

impl<B: ByteString> Reader<B> {
    /// A reader of these bytes.
    pub fn new(bytes: B) -> Self {
        Self { rest: bytes }
    }

    /// Returns whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.remaining() == 0
    }

    /// The number of bytes left.
    pub fn remaining(&self) -> usize {
        self.rest.remaining()
    }

    /// Takes the next `len` bytes.
    pub fn take(&mut self, len: usize, what: &'static str) -> Result<B, Malformed> {
        if self.remaining() < len {
            return Err(Malformed(what));
        }
        Ok(self.rest.split_front(len))
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let array = *self.rest.as_ref().first_chunk().ok_or(Malformed(what))?;
        self.rest.advance(N);
        Ok(array)
    }

    /// Takes one byte.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        Ok(self.array::<1>(what)?[0])
    }

    /// Takes a big-endian u16.
    pub fn u16_be(&mut self, what: &'static str) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array(what)?))
    }

    /// Takes a little-endian u32.
    pub fn u32_le(&mut self, what: &'static str) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    /// Takes a little-endian u64.
    pub fn u64_le(&mut self, what: &'static str) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Takes a little-endian u128.
    pub fn u128_le(&mut self, what: &'static str) -> Result<u128, Malformed> {
        Ok(u128::from_le_bytes(self.array(what)?))
    }

    /// Takes a varint of up to 64 bits.
    pub fn varint(&mut self, what: &'static str) -> Result<u64, Malformed> {
        u64::try_from(self.varint_u128(what)?).map_err(|_| Malformed(what))
    }

    /// Takes a varint of up to 32 bits.
    pub fn varint_u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        u32::try_from(self.varint_u128(what)?).map_err(|_| Malformed(what))
    }

    /// Takes a varint of up to 128 bits.
    pub fn varint_u128(&mut self, what: &'static str) -> Result<u128, Malformed> {
        let (value, rest) = split_varint_u128(self.rest.as_ref()).ok_or(Malformed(what))?;
        let len = self.remaining() - rest.len();
        self.rest.advance(len);
        Ok(value)
    }

    /// Takes a signed varint.
    pub fn varint_i128(&mut self, what: &'static str) -> Result<i128, Malformed> {
        Ok(from_zigzag(self.varint_u128(what)?))
    }

    /// Takes a length and that many bytes.
    pub fn bytes(&mut self, what: &'static str) -> Result<B, Malformed> {
        let len = usize::try_from(self.varint(what)?).map_err(|_| Malformed(what))?;
        self.take(len, what)
    }

    /// Takes a count of things that take at least one byte each: never more than there are bytes,
    /// so a damaged count can't make the caller reserve memory for it.
    pub fn count(&mut self, what: &'static str) -> Result<usize, Malformed> {
        let count = usize::try_from(self.varint(what)?).map_err(|_| Malformed(what))?;
        if count > self.remaining() {
            return Err(Malformed(what));
        }
        Ok(count)
    }

    /// Ends the reading. Bytes that are left are an error.
    pub fn finish(self, what: &'static str) -> Result<(), Malformed> {
        if self.is_empty() { Ok(()) } else { Err(Malformed(what)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn round_trip(value: i128) {
        let mut out = Vec::new();
        put_varint_i128(&mut out, value);
        let mut reader = Reader::new(&out[..]);
        assert_eq!(reader.varint_i128("value"), Ok(value));
        assert_eq!(reader.finish("end"), Ok(()));
    }

    #[test]
    fn signed_varints_round_trip() {
        for value in [0, 1, -1, 63, 64, -64, -65, i128::MAX, i128::MIN, i128::from(i64::MIN)] {
            round_trip(value);
        }
    }

    #[track_caller]
    fn refused(bytes: &'static [u8]) {
        assert_eq!(Reader::new(Bytes::from_static(bytes)).varint_u128("x"), Err(Malformed("x")));
    }

    #[test]
    fn a_cut_varint_is_refused() {
        refused(&[]);
        refused(&[0x80]);
    }

    #[test]
    fn an_overlong_varint_is_refused() {
        refused(&[0x80, 0x00]);
        refused(&[0xff; 19]);
    }

    #[test]
    fn a_count_beyond_the_bytes_is_refused() {
        let mut reader = Reader::new(Bytes::from_static(&[200, 1, 0]));
        assert_eq!(reader.count("rows"), Err(Malformed("rows")));
    }
}
