//! Which lines are said too often. They are counted instead, and the count is told at the end of the period.
//!
//! Two limits per period: one for the same line (its time aside), and a larger one for all lines of one place in the code,
//! whose fields may differ each time. So a fault that lasts, or hits everything at once, can't fill a disk with its log.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::mem;
use std::time::{Duration, Instant};

use tracing::Level;
use tracing::callsite::Identifier;

/// How often a line may be said.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Often {
    pub(crate) period: Duration,
    /// The same line.
    pub(crate) same_max: u32,
    /// Lines of one place in the code.
    pub(crate) place_max: u32,
}

impl Default for Often {
    /// A failover of the largest cluster that we run tells less than 200 lines of a kind per node.
    fn default() -> Self {
        Self { period: Duration::from_secs(60), same_max: 5, place_max: 200 }
    }
}

/// Lines of which some were not said.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Repeated {
    pub(crate) level: Level,
    /// The first of those that were not said, without its time.
    pub(crate) line: String,
    pub(crate) times: u64,
}

#[derive(Debug)]
pub(crate) struct Repeats {
    often: Often,
    hasher: RandomState,
    /// When the present period ends. None: nothing was said since the last.
    ends: Option<Instant>,
    lines: HashMap<u64, u32>,
    places: HashMap<Identifier, u32>,
    unsaid: HashMap<u64, Repeated>,
}

impl Repeats {
    pub(crate) fn new(often: Often) -> Self {
        let (hasher, lines, places, unsaid) = Default::default();
        Self { often, hasher, ends: None, lines, places, unsaid }
    }

    /// Whether a line is to be said now.
    pub(crate) fn admits(
        &mut self,
        now: Instant,
        level: Level,
        place: Identifier,
        line: &[u8],
    ) -> bool {
        self.ends.get_or_insert(now + self.often.period);
        let text = without_time(line);
        let same = self.hasher.hash_one(text);
        // A place that has said enough has its lines looked at no more: else all that it could say would be kept.
        let said = self.places.entry(place.clone()).or_default();
        let key = if *said >= self.often.place_max {
            self.hasher.hash_one(&place)
        } else {
            let said_same = self.lines.entry(same).or_default();
            if *said_same < self.often.same_max {
                (*said, *said_same) = (*said + 1, *said_same + 1);
                return true;
            }
            same
        };
        let line = || String::from_utf8_lossy(text).trim().to_owned();
        let unsaid = self.unsaid.entry(key);
        unsaid.or_insert_with(|| Repeated { level, line: line(), times: 0 }).times += 1;
        false
    }

    /// When there is something to tell of lines that were not said.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.ends.filter(|_| !self.unsaid.is_empty())
    }

    /// What was not said in the period that has ended by now; and the next one begins.
    pub(crate) fn take(&mut self, now: Instant) -> Vec<Repeated> {
        if self.ends.is_none_or(|ends| now < ends) {
            return Vec::new();
        }
        self.take_all()
    }

    /// The same, however far the period is.
    pub(crate) fn take_all(&mut self) -> Vec<Repeated> {
        self.ends = None;
        self.lines.clear();
        self.places.clear();
        mem::take(&mut self.unsaid).into_values().collect()
    }
}

/// A line without its time, which ends with the first `Z` in either form.
fn without_time(line: &[u8]) -> &[u8] {
    line.splitn(2, |&byte| byte == b'Z').nth(1).unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use tracing::callsite::Callsite;

    use super::*;

    /// A place in the code.
    fn place(number: usize) -> Identifier {
        struct Place(#[expect(dead_code, reason = "two of no size could have one address")] u8);
        static PLACES: [Place; 2] = [Place(0), Place(1)];
        impl Callsite for Place {
            fn set_interest(&self, _: tracing::subscriber::Interest) {}
            fn metadata(&self) -> &tracing::Metadata<'_> {
                unreachable!("nobody asks")
            }
        }
        Identifier(&PLACES[number])
    }

    const OFTEN: Often = Often { period: Duration::from_secs(10), same_max: 2, place_max: 4 };

    fn say(repeats: &mut Repeats, at: Instant, from: usize, line: &str) -> bool {
        repeats.admits(at, Level::WARN, place(from), format!("{at:?}Z {line}\n").as_bytes())
    }

    #[test]
    fn the_same_line_is_said_a_few_times_and_then_counted() {
        let (mut repeats, at) = (Repeats::new(OFTEN), Instant::now());
        let later = |ms| at + Duration::from_millis(ms);
        let said: Vec<_> = (0..5).map(|ms| say(&mut repeats, later(ms), 0, "lost")).collect();
        assert_eq!(said, [true, true, false, false, false]);
        assert!(say(&mut repeats, at, 0, "found"), "another line of the same place");
        assert!(repeats.take(later(9_999)).is_empty(), "the period has not ended");
        let want = Repeated { level: Level::WARN, line: "lost".to_owned(), times: 3 };
        assert_eq!(repeats.take(later(10_000)), [want]);
        assert!(say(&mut repeats, later(10_001), 0, "lost"), "a new period");
        assert_eq!(repeats.due(), None);
    }

    #[test]
    fn a_place_that_says_something_else_each_time_is_bounded_too() {
        let (mut repeats, at) = (Repeats::new(OFTEN), Instant::now());
        let said = (0..1_000).filter(|n| say(&mut repeats, at, 0, &format!("shard {n}"))).count();
        assert_eq!(said, 4);
        assert!(say(&mut repeats, at, 1, "shard 5"), "another place");
        let unsaid = repeats.take_all();
        assert_eq!(unsaid.len(), 1, "{unsaid:?}");
        assert_eq!((unsaid[0].line.as_str(), unsaid[0].times), ("shard 4", 996));
        assert!(repeats.lines.is_empty() && repeats.places.is_empty());
    }

    #[test]
    fn the_time_of_a_line_does_not_count() {
        assert_eq!(without_time(b"2026-01-01T00:00:00.1Z  WARN Zero"), b"  WARN Zero");
        assert_eq!(without_time(br#"{"timestamp":"2026Z","a":1}"#), br#"","a":1}"#);
        assert_eq!(without_time(b"no time"), b"no time");
    }
}
