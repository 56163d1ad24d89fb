//! The counter table: committed changes between two flushes.

/// What the table knows of one counter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cell {
    /// To be added to what lies below.
    Delta(i128),
    /// Hides everything below.
    Absolute(i128),
}

/// A table that no longer changes: what a flush writes.
#[derive(Debug)]
pub struct Frozen;
