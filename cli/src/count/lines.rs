//! Sets of line numbers, kept as ranges.
//!
//! Lines are added one by one or in runs, in any order and from any batch; the ranges that come out
//! are in order, disjoint, and joined where they touch, so the list is as short as it can be.

use serde::Serialize;

/// Lines `first_line` to `last_line`, both included, numbered from 1.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) struct LineRange {
    pub(crate) first_line: u64,
    pub(crate) last_line: u64,
}

/// A set of lines. What goes in may not be in it already.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Lines {
    runs: Vec<LineRange>,
    count: u64,
}

impl Lines {
    pub(crate) fn add(&mut self, line: u64) {
        self.count += 1;
        match self.runs.last_mut() {
            Some(run) if run.last_line + 1 == line => run.last_line = line,
            _ => self.runs.push(LineRange { first_line: line, last_line: line }),
        }
    }

    pub(crate) fn append(&mut self, other: &Self) {
        self.runs.extend_from_slice(&other.runs);
        self.count += other.count;
    }

    /// How many lines are in it.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn ranges(mut self) -> Vec<LineRange> {
        self.runs.sort_unstable();
        let mut ranges: Vec<LineRange> = Vec::new();
        for run in self.runs {
            match ranges.last_mut() {
                Some(last) if last.last_line + 1 == run.first_line => {
                    last.last_line = run.last_line
                }
                _ => ranges.push(run),
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(adds: &[&[u64]], want: &[(u64, u64)]) {
        let mut all = Lines::default();
        for adds in adds {
            let mut lines = Lines::default();
            adds.iter().for_each(|&line| lines.add(line));
            all.append(&lines);
        }
        assert_eq!(all.count(), adds.iter().map(|adds| adds.len() as u64).sum::<u64>());
        let got: Vec<_> =
            all.ranges().iter().map(|range| (range.first_line, range.last_line)).collect();
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
}
