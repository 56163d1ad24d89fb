//! The reasons why lines were not counted: each reason once, with the number of its lines and the
//! first of them.

use client::KeyField;
use serde::Serialize;

use super::lines::LineRange;
use crate::args::shown;
use crate::output::grouped;

/// The maximum number of distinct reasons: the reasons of an outage repeat.
const REASONS_MAX: usize = 20;
/// The number of lines that are listed for each reason.
const FIRST_MAX: usize = 3;
/// The reason of all lines beyond [`REASONS_MAX`].
const OTHERS: &str = "other reasons";

/// A line with its key, if that is known.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct KeyedLine {
    line: u64,
    #[serde(flatten)]
    key: Option<KeyField>,
    #[serde(skip)]
    shown: Option<String>,
}

/// A reason with its lines.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct Reason {
    reason: String,
    /// The number of lines with this reason; 0 if it concerns the whole count.
    lines: u64,
    /// The first of these lines.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    first: Vec<KeyedLine>,
}

/// Reasons in the order of their first occurrence.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub(crate) struct Reasons(Vec<Reason>);

impl Reasons {
    /// Adds a reason that concerns the whole count.
    pub(super) fn note(&mut self, why: &str) {
        self.entry(why);
    }

    /// Adds a line with its reason.
    pub(super) fn add(&mut self, why: &str, line: u64, key: Option<&[u8]>) {
        let reason = self.entry(why);
        reason.lines += 1;
        if reason.takes(line) {
            reason.put(KeyedLine { line, key: key.map(KeyField::new), shown: key.map(shown) });
        }
    }

    /// Adds ranges of lines, whose keys are not known.
    pub(super) fn add_ranges(&mut self, why: &str, ranges: &[LineRange]) {
        for range in ranges {
            let reason = self.entry(why);
            reason.lines += range.count();
            for line in (range.first_line..=range.last_line).take(FIRST_MAX) {
                reason.put(KeyedLine { line, key: None, shown: None });
            }
        }
    }

    /// Adds all reasons of another batch.
    pub(super) fn append(&mut self, other: Self) {
        for Reason { reason, lines, first } in other.0 {
            let entry = self.entry(&reason);
            entry.lines += lines;
            first.into_iter().for_each(|line| entry.put(line));
        }
    }

    fn entry(&mut self, why: &str) -> &mut Reason {
        let find = |reasons: &[Reason], why: &str| reasons.iter().position(|one| one.reason == why);
        let is_full = self.0.len() >= REASONS_MAX;
        let found = find(&self.0, why).or_else(|| find(&self.0, OTHERS).filter(|_| is_full));
        let at = found.unwrap_or_else(|| {
            let reason = if is_full { OTHERS } else { why }.to_owned();
            self.0.push(Reason { reason, lines: 0, first: Vec::new() });
            self.0.len() - 1
        });
        &mut self.0[at]
    }

    /// Formats each reason as one line of text.
    pub(super) fn texts(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(Reason::text)
    }
}

impl Reason {
    /// Returns whether the line belongs to the first lines of this reason.
    fn takes(&self, line: u64) -> bool {
        self.first.len() < FIRST_MAX || self.first.last().is_some_and(|last| line < last.line)
    }

    fn put(&mut self, line: KeyedLine) {
        let at = self.first.partition_point(|other| other.line < line.line);
        self.first.insert(at, line);
        self.first.truncate(FIRST_MAX);
    }

    fn text(&self) -> String {
        let first = self.first.iter().map(|line| match &line.shown {
            Some(key) => format!("{} ({key})", line.line),
            None => line.line.to_string(),
        });
        let first: Vec<_> = first.collect();
        match self.lines {
            0 => self.reason.clone(),
            1 => format!("{}: line {}", self.reason, first.join("")),
            lines => {
                format!("{}: {} lines, first {}", self.reason, grouped(lines), first.join(", "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(reasons: &Reasons) -> Vec<String> {
        reasons.texts().collect()
    }

    #[test]
    fn each_reason_is_listed_once_with_its_first_lines() {
        let mut reasons = Reasons::default();
        reasons.add("too long", 7, None);
        reasons.add("bad", 5, Some(b"caf\xe9"));
        for line in [9, 1, 8] {
            reasons.add("too long", line, None);
        }
        reasons.note("no answer");
        let want = ["too long: 4 lines, first 1, 7, 8", "bad: line 5 (caf%E9)", "no answer"];
        assert_eq!(texts(&reasons), want);
        let mut others = Reasons::default();
        others.add_ranges("too long", &[LineRange { first_line: 2, last_line: 2_000 }]);
        reasons.append(others);
        assert_eq!(texts(&reasons)[0], "too long: 2,003 lines, first 1, 2, 3");
        let json = serde_json::to_string(&reasons).unwrap();
        assert!(
            json.contains(
                r#"{"reason":"bad","lines":1,"first":[{"line":5,"key_base64":"Y2Fm6Q=="}]}"#
            ),
            "{json}"
        );
        assert!(json.ends_with(r#"{"reason":"no answer","lines":0}]"#), "{json}");
    }

    #[test]
    fn the_number_of_reasons_is_limited() {
        let mut reasons = Reasons::default();
        (1..=100).for_each(|line| reasons.add(&format!("reason {line}"), line, None));
        assert_eq!(reasons.0.len(), REASONS_MAX + 1);
        assert_eq!(texts(&reasons)[REASONS_MAX], "other reasons: 80 lines, first 21, 22, 23");
    }
}
