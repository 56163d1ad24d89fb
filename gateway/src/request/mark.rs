//! Byte order marks, which some programs write before a text.
//!
//! The one of UTF-8 says nothing that is not known; in JSON it has no place (RFC 8259 §8.1), before lines of text it is
//! skipped, for it is no part of the first key. Those of UTF-16 and UTF-32 say that every byte means something else.

use crate::problem::Problem;

/// The mark of UTF-8.
pub(super) const UTF_8: &[u8] = b"\xef\xbb\xbf";
/// What is said of it in JSON.
pub(super) const IN_JSON: &str = "begins with a byte order mark: send it without one";

/// UTF-16 and UTF-32, little and big endian. The little one of UTF-32 begins as that of UTF-16 does.
const WIDE: [&[u8]; 3] = [b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"];

/// Refuses a body that says it is not UTF-8.
pub(super) fn refuse_wide(body: &[u8]) -> Result<(), Problem> {
    if WIDE.iter().any(|mark| body.starts_with(mark)) {
        let detail =
            "begins with the byte order mark of UTF-16 or UTF-32: send UTF-8 (iconv -t UTF-8)";
        return Err(Problem::bad_input("body", detail));
    }
    Ok(())
}
