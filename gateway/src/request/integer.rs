//! Whole numbers as people write them: `[+-]?[0-9]+`, within i64.

/// Why some bytes are no delta.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NotInteger {
    /// Not of that form at all.
    Form,
    /// Of that form, and too large or too small.
    Range,
}

impl NotInteger {
    pub(crate) fn detail(self) -> &'static str {
        match self {
            Self::Form => "is no whole number",
            Self::Range => {
                "is not between -9,223,372,036,854,775,808 and 9,223,372,036,854,775,807"
            }
        }
    }
}

/// Reads one. Rust's own parser takes the same form.
pub(crate) fn integer(bytes: &[u8]) -> Result<i64, NotInteger> {
    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
    let text = str::from_utf8(bytes).map_err(|_| NotInteger::Form)?;
    text.parse::<i64>().map_err(|error| match error.kind() {
        PosOverflow | NegOverflow => NotInteger::Range,
        _ => NotInteger::Form,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(given: &str, want: Result<i64, NotInteger>) {
        assert_eq!(integer(given.as_bytes()), want, "{given:?}");
    }

    #[test]
    fn integers() {
        check("5", Ok(5));
        check("+5", Ok(5));
        check("-5", Ok(-5));
        check("-0", Ok(0));
        check("007", Ok(7));
        check("9223372036854775807", Ok(i64::MAX));
        check("-9223372036854775808", Ok(i64::MIN));
        check("9223372036854775808", Err(NotInteger::Range));
        check("-9223372036854775809", Err(NotInteger::Range));
        check("99999999999999999999999999999999", Err(NotInteger::Range));
        for form in
            ["", "+", "-", "--5", "+-5", "5.0", "1e3", " 5", "5 ", "0x5", "1_000", "\u{665}"]
        {
            check(form, Err(NotInteger::Form));
        }
    }
}
