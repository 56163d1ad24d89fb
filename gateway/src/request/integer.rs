//! Whole numbers in text: `[+-]?[0-9]+`, within i64.

/// The reason why a text is not a delta.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NotInteger {
    /// The text does not have that form.
    Form,
    /// The number is too large or too small.
    Range,
}

impl NotInteger {
    pub(crate) fn detail(self) -> &'static str {
        match self {
            Self::Form => "is not a whole number",
            Self::Range => {
                "is not between -9,223,372,036,854,775,808 and 9,223,372,036,854,775,807"
            }
        }
    }
}

/// Parses a number. Rust's own parser accepts the same form.
pub(crate) fn integer(bytes: &[u8]) -> Result<i64, NotInteger> {
    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
    let text = str::from_utf8(bytes).map_err(|_| NotInteger::Form)?;
    text.parse::<i64>().map_err(|error| match error.kind() {
        PosOverflow | NegOverflow => NotInteger::Range,
        _ => NotInteger::Form,
    })
}

/// Returns whether a text looks like a number to people: digits of any script with signs and
/// separators around them, `0x1f`, `NaN`.
pub(crate) fn looks_numeric(bytes: &[u8]) -> bool {
    const AROUND: &str = "+-.,_'eExX%\u{2212}";
    let Ok(text) = str::from_utf8(bytes) else { return false };
    let bare = text.trim().trim_start_matches(['+', '-', '\u{2212}']);
    let is_word = ["nan", "inf", "infinity"].iter().any(|word| bare.eq_ignore_ascii_case(word));
    let hex = bare.strip_prefix("0x").or(bare.strip_prefix("0X"));
    let is_hex = hex.is_some_and(|hex| hex.chars().all(|digit| digit.is_ascii_hexdigit()));
    let around = |char: char| char.is_numeric() || char.is_whitespace() || AROUND.contains(char);
    is_word || is_hex || text.contains(char::is_numeric) && text.chars().all(around)
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

    #[test]
    fn what_people_would_take_for_a_number() {
        for like in [
            "1.5",
            "5.0",
            "1e3",
            "1e400",
            " 5",
            "5 ",
            "--5",
            "+-5",
            "0x5",
            "0xff",
            "1_000",
            "1,000",
            "1'000",
            ".5",
            "5.",
            "5%",
            "\u{665}",
            "\u{2212}5",
            "\u{bd}",
            "NaN",
            "-Infinity",
            "+inf",
            "5\u{a0}",
        ] {
            assert!(looks_numeric(like.as_bytes()), "{like:?}");
        }
        for unlike in [
            "", "+", "-", " ", "x", "b", "e", "5 apples", "5x5=25", "3f-a", "0xyz", "12:30", "v1.5",
        ] {
            assert!(!looks_numeric(unlike.as_bytes()), "{unlike:?}");
        }
        assert!(!looks_numeric(b"\xff5"));
    }
}
