//! Sets of line numbers, kept as ranges.
//!
//! Lines are added one by one or in ranges, in any order; the resulting ranges are in order,
//! disjoint, and joined where they touch, so the list is as short as possible. The list is also
//! joined from time to time while it grows, so its memory grows with the result, not with the
//! input.

use serde::{Deserialize, Serialize};

/// The lines `first_line` to `last_line`, both included, numbered from 1.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) struct LineRange {
    pub(crate) first_line: u64,
    pub(crate) last_line: u64,
}

impl LineRange {
    /// The number of lines.
    pub(crate) fn count(&self) -> u64 {
        self.last_line - self.first_line + 1
    }
}

/// The list is not joined while it has fewer ranges than this.
const RUNS_BEFORE_JOIN: usize = 1024;

/// A set of line numbers. A line may be added only once.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct LineSet {
    runs: Vec<LineRange>,
    /// The number of ranges after they were last joined.
    joined: usize,
}

impl LineSet {
    /// A set of these ranges.
    pub(crate) fn of(runs: Vec<LineRange>) -> Self {
        Self { runs, joined: 0 }
    }

    /// Adds one line.
    pub(crate) fn add(&mut self, line: u64) {
        match self.runs.last_mut() {
            Some(run) if run.last_line + 1 == line => run.last_line = line,
            _ => self.runs.push(LineRange { first_line: line, last_line: line }),
        }
    }

    /// Adds all lines of another set.
    pub(crate) fn append(&mut self, other: &Self) {
        self.runs.extend_from_slice(&other.runs);
        if self.runs.len() > 2 * self.joined + RUNS_BEFORE_JOIN {
            self.join();
        }
    }

    /// The shortest list of ranges, in order.
    pub(crate) fn ranges(mut self) -> Vec<LineRange> {
        self.join();
        self.runs
    }

    fn join(&mut self) {
        self.runs.sort_unstable();
        self.runs.dedup_by(|next, run| {
            let touches = run.last_line + 1 == next.first_line;
            if touches {
                run.last_line = next.last_line;
            }
            touches
        });
        self.joined = self.runs.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(adds: &[&[u64]], want: &[(u64, u64)]) {
        let mut all = LineSet::default();
        for adds in adds {
            let mut lines = LineSet::default();
            adds.iter().for_each(|&line| lines.add(line));
            all.append(&lines);
        }
        let ranges = all.ranges();
        let count: u64 = ranges.iter().map(LineRange::count).sum();
        assert_eq!(count, adds.iter().map(|adds| adds.len() as u64).sum::<u64>());
        let got: Vec<_> = ranges.iter().map(|range| (range.first_line, range.last_line)).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn ranges_are_joined_where_they_touch() {
        check(&[], &[]);
        check(&[&[1]], &[(1, 1)]);
        check(&[&[1, 2, 3]], &[(1, 3)]);
        check(&[&[1, 2, 4]], &[(1, 2), (4, 4)]);
        check(&[&[5, 6], &[1], &[2, 3, 4]], &[(1, 6)]);
        check(&[&[9], &[7], &[1]], &[(1, 1), (7, 7), (9, 9)]);
    }

    #[test]
    fn a_long_list_of_touching_runs_stays_short() {
        let mut all = LineSet::default();
        // Backwards, so that no line joins the previous range when it is added.
        for line in (1..=100_000).rev() {
            let mut one = LineSet::default();
            one.add(line);
            all.append(&one);
            assert!(all.runs.len() <= RUNS_BEFORE_JOIN + 3);
        }
        assert_eq!(all.ranges(), [LineRange { first_line: 1, last_line: 100_000 }]);
    }
}
