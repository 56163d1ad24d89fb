//! Byte order marks, which some programs write before a text.
//!
//! The mark of UTF-8 adds no information. It is not allowed in JSON (RFC 8259 §8.1), and skipped
//! before lines of text, since it is not part of the first key. The marks of UTF-16 and UTF-32 mean
//! that the body has another encoding.

use crate::problem::Problem;

/// The mark of UTF-8.
pub(super) const UTF_8: &[u8] = b"\xef\xbb\xbf";
/// The detail of the problem of a mark in JSON.
pub(super) const IN_JSON: &str = "begins with a byte order mark: send it without one";

/// The marks of UTF-16 and UTF-32, little and big endian. The little-endian mark of UTF-32 begins
/// with that of UTF-16.
const WIDE: [&[u8]; 3] = [b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"];

/// Refuses a body whose mark shows that it is not UTF-8.
pub(super) fn refuse_wide(body: &[u8]) -> Result<(), Problem> {
    if WIDE.iter().any(|mark| body.starts_with(mark)) {
        let detail =
            "begins with the byte order mark of UTF-16 or UTF-32: send UTF-8 (iconv -t UTF-8)";
        return Err(Problem::bad_input("body", detail));
    }
    Ok(())
}
