//! Suppression of repeated lines. A line that repeats too often is counted, and the count is logged
//! at the end of the period.
//!
//! There are two limits per period: one for the same line (without its time), and a larger one for
//! all lines of one call site, whose fields may differ each time. So a fault that lasts, or that
//! hits everything at once, can't fill a disk with its log.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::mem;
use std::time::{Duration, Instant};

use tracing::Level;
use tracing::callsite::Identifier;

/// The limits of repeated lines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RepeatLimits {
    pub(crate) period: Duration,
    /// The most times that the same line is logged in a period.
    pub(crate) same_max: u32,
    /// The most lines of one call site in a period.
    pub(crate) place_max: u32,
}

impl Default for RepeatLimits {
    /// In a failover of the largest cluster that we run, a node logs fewer than 200 lines of one
    /// kind.
    fn default() -> Self {
        Self { period: Duration::from_secs(60), same_max: 5, place_max: 200 }
    }
}

/// Lines that were suppressed in one period.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct SuppressedLines {
    pub(crate) level: Level,
    /// The first suppressed line, without its time.
    pub(crate) line: String,
    pub(crate) times: u64,
}

#[derive(Debug)]
pub(crate) struct RepeatFilter {
    limits: RepeatLimits,
    hasher: RandomState,
    /// The end of the present period. `None` if nothing was logged since the last one.
    ends: Option<Instant>,
    lines: HashMap<u64, u32>,
    places: HashMap<Identifier, u32>,
    suppressed: HashMap<u64, SuppressedLines>,
}

impl RepeatFilter {
    pub(crate) fn new(limits: RepeatLimits) -> Self {
        let (hasher, lines, places, suppressed) = Default::default();
        Self { limits, hasher, ends: None, lines, places, suppressed }
    }

    /// Returns whether a line is to be logged now.
    pub(crate) fn admits(
        &mut self,
        now: Instant,
        level: Level,
        place: Identifier,
        line: &[u8],
    ) -> bool {
        self.ends.get_or_insert(now + self.limits.period);
        let text = without_time(line);
        let same = self.hasher.hash_one(text);
        // Lines of a call site above its limit are counted under one key: the map would grow
        // without bound.
        let written = self.places.entry(place.clone()).or_default();
        let key = if *written >= self.limits.place_max {
            self.hasher.hash_one(&place)
        } else {
            let written_same = self.lines.entry(same).or_default();
            if *written_same < self.limits.same_max {
                (*written, *written_same) = (*written + 1, *written_same + 1);
                return true;
            }
            same
        };
        let line = || String::from_utf8_lossy(text).trim().to_owned();
        let suppressed = self.suppressed.entry(key);
        suppressed.or_insert_with(|| SuppressedLines { level, line: line(), times: 0 }).times += 1;
        false
    }

    /// Returns when suppressed lines are to be reported, if there are any.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.ends.filter(|_| !self.suppressed.is_empty())
    }

    /// Takes the suppressed lines of a period that has ended by `now` and begins the next period.
    pub(crate) fn take(&mut self, now: Instant) -> Vec<SuppressedLines> {
        if self.ends.is_none_or(|ends| now < ends) {
            return Vec::new();
        }
        self.take_all()
    }

    /// Takes the suppressed lines, wherever the period stands.
    pub(crate) fn take_all(&mut self) -> Vec<SuppressedLines> {
        self.ends = None;
        self.lines.clear();
        self.places.clear();
        mem::take(&mut self.suppressed).into_values().collect()
    }
}

/// Returns a line without its time, which ends with the first `Z` in both formats.
fn without_time(line: &[u8]) -> &[u8] {
    line.splitn(2, |&byte| byte == b'Z').nth(1).unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use tracing::callsite::Callsite;

    use super::*;

    /// A call site.
    fn place(number: usize) -> Identifier {
        struct Place(#[expect(dead_code, reason = "two of no size could have one address")] u8);
        static PLACES: [Place; 2] = [Place(0), Place(1)];
        impl Callsite for Place {
            fn set_interest(&self, _: tracing::subscriber::Interest) {}
            fn metadata(&self) -> &tracing::Metadata<'_> {
                unreachable!("not called")
            }
        }
        Identifier(&PLACES[number])
    }

    const OFTEN: RepeatLimits =
        RepeatLimits { period: Duration::from_secs(10), same_max: 2, place_max: 4 };

    fn log(repeats: &mut RepeatFilter, at: Instant, from: usize, line: &str) -> bool {
        repeats.admits(at, Level::WARN, place(from), format!("{at:?}Z {line}\n").as_bytes())
    }

    #[test]
    fn the_same_line_is_logged_a_few_times_and_then_counted() {
        let (mut repeats, at) = (RepeatFilter::new(OFTEN), Instant::now());
        let later = |ms| at + Duration::from_millis(ms);
        let written: Vec<_> = (0..5).map(|ms| log(&mut repeats, later(ms), 0, "lost")).collect();
        assert_eq!(written, [true, true, false, false, false]);
        assert!(log(&mut repeats, at, 0, "found"), "another line of the same place");
        assert!(repeats.take(later(9_999)).is_empty(), "the period has not ended");
        let want = SuppressedLines { level: Level::WARN, line: "lost".to_owned(), times: 3 };
        assert_eq!(repeats.take(later(10_000)), [want]);
        assert!(log(&mut repeats, later(10_001), 0, "lost"), "a new period");
        assert_eq!(repeats.due(), None);
    }

    #[test]
    fn a_call_site_with_changing_lines_is_bounded_too() {
        let (mut repeats, at) = (RepeatFilter::new(OFTEN), Instant::now());
        let written =
            (0..1_000).filter(|n| log(&mut repeats, at, 0, &format!("shard {n}"))).count();
        assert_eq!(written, 4);
        assert!(log(&mut repeats, at, 1, "shard 5"), "another place");
        let suppressed = repeats.take_all();
        assert_eq!(suppressed.len(), 1, "{suppressed:?}");
        assert_eq!((suppressed[0].line.as_str(), suppressed[0].times), ("shard 4", 996));
        assert!(repeats.lines.is_empty() && repeats.places.is_empty());
    }

    #[test]
    fn the_time_of_a_line_does_not_count() {
        assert_eq!(without_time(b"2026-01-01T00:00:00.1Z  WARN Zero"), b"  WARN Zero");
        assert_eq!(without_time(br#"{"timestamp":"2026Z","a":1}"#), br#"","a":1}"#);
        assert_eq!(without_time(b"no time"), b"no time");
    }
}
