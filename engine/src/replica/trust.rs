//! The trust in a copy. One value decides whether the copy accepts entries, whether it may be
//! promoted, and what is reported about it.
//!
//! ```text
//!   Absent ──▶ Filling ──▶ Good ──▶ Wrong ──▶ Replacing ──▶ Good
//!      └──────(new shard)───▲         └─(named primary: there is no better one)─▶ Filling
//! ```

/// The quality of a store's copy of a shard.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Trust {
    /// There is no copy.
    Absent {
        /// The state on disk has no rows of a former copy either.
        clean: bool,
    },
    /// The copy accepts entries and may lack some: it was made empty at an epoch above 1, or it is
    /// damaged and its store was named primary all the same. It becomes good once it is complete:
    /// when it has a barrier of the epoch that it follows, or one that was committed.
    Filling,
    /// The copy is complete.
    Good,
    /// The copy is damaged, for this reason: it accepts, applies and sends nothing more until it is
    /// replaced.
    Wrong(&'static str),
    /// The copy is not damaged, but an entry of a newer build is in its log: it accepts and applies
    /// nothing more.
    Unknown(&'static str),
    /// A staged snapshot is about to replace the copy.
    Replacing {
        /// The reason why the old copy is stopped, if it is.
        wrong: Option<&'static str>,
    },
}

impl Trust {
    /// Returns whether there is a copy.
    pub fn exists(self) -> bool {
        !matches!(self, Self::Absent { .. })
    }

    /// Returns whether the copy accepts entries and applies them.
    pub fn is_working(self) -> bool {
        matches!(self, Self::Filling | Self::Good)
    }

    /// The reason why the copy accepts nothing more until it is replaced, if so.
    pub fn stopped(self) -> Option<&'static str> {
        match self {
            Self::Wrong(why) | Self::Unknown(why) => Some(why),
            Self::Replacing { wrong } => wrong,
            Self::Absent { .. } | Self::Filling | Self::Good => None,
        }
    }

    /// Returns whether the copy may lack data, or contain wrong data.
    pub fn is_unfit(self) -> bool {
        matches!(self, Self::Filling | Self::Wrong(_) | Self::Replacing { .. })
    }

    /// Marks the copy as damaged. A copy that is being replaced stays so.
    pub(super) fn stop(&mut self, why: &'static str) {
        *self = match *self {
            Self::Replacing { .. } => Self::Replacing { wrong: Some(why) },
            _ => Self::Wrong(why),
        };
    }

    /// Notes that this build can't read an entry.
    pub(super) fn mark_unreadable(&mut self, why: &'static str) {
        if self.is_working() {
            *self = Self::Unknown(why);
        }
    }

    /// Notes that a staged snapshot will replace the copy.
    pub fn replace(&mut self) {
        *self = Self::Replacing { wrong: self.stopped() };
    }

    /// Notes that the store is named primary: there is no better copy, so a damaged one works
    /// again.
    pub fn on_named_primary(&mut self) {
        if matches!(self, Self::Wrong(_)) {
            *self = Self::Filling;
        }
    }

    /// Notes that the copy is complete.
    pub(super) fn mark_filled(&mut self) {
        if *self == Self::Filling {
            *self = Self::Good;
        }
    }

    /// Notes that the rows of a former copy are removed.
    pub fn mark_clean(&mut self) {
        if !self.exists() {
            *self = Self::Absent { clean: true };
        }
    }
}
