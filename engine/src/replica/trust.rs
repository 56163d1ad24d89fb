//! Is a copy to be trusted? One answer; from it follows whether the copy takes entries, whether it may
//! be promoted, and what is said of it.
//!
//! ```text
//!   Absent ──▶ Filling ──▶ Good ──▶ Wrong ──▶ Replacing ──▶ Good
//!      └──────(new shard)───▲         └─(named primary: there is no better one)─▶ Filling
//! ```

/// What a store has of a shard, and how good it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Trust {
    /// There is no copy. `clean`: nor does the state hold rows of a former one.
    Absent {
        clean: bool,
    },
    /// It takes entries and may lack some: it was made empty at an epoch above 1, or it is damaged and
    /// its store was named primary all the same. Good once it holds what it was to hold: a barrier of
    /// the epoch that it follows, or one that was committed.
    Filling,
    Good,
    /// Damaged: nothing more is taken, applied or told until it is made anew.
    Wrong(&'static str),
    /// Not damaged, but an entry of a newer build is in its log: nothing more is taken or applied.
    Unknown(&'static str),
    /// A staged copy is about to take its place. `wrong`: what was the matter with it, if anything.
    Replacing {
        wrong: Option<&'static str>,
    },
}

impl Trust {
    pub fn exists(self) -> bool {
        !matches!(self, Self::Absent { .. })
    }

    /// It takes entries, and they are applied.
    pub fn is_working(self) -> bool {
        matches!(self, Self::Filling | Self::Good)
    }

    /// Why it takes nothing more, until it is made anew.
    pub fn stopped(self) -> Option<&'static str> {
        match self {
            Self::Wrong(why) | Self::Unknown(why) => Some(why),
            Self::Replacing { wrong } => wrong,
            Self::Absent { .. } | Self::Filling | Self::Good => None,
        }
    }

    /// It may lack what it was to hold, or hold something else.
    pub fn is_unfit(self) -> bool {
        matches!(self, Self::Filling | Self::Wrong(_) | Self::Replacing { .. })
    }

    /// Something is the matter with it. A copy that is being replaced still is.
    pub(super) fn stop(&mut self, why: &'static str) {
        *self = match *self {
            Self::Replacing { .. } => Self::Replacing { wrong: Some(why) },
            _ => Self::Wrong(why),
        };
    }

    /// An entry cannot be read by this build.
    pub(super) fn not_understood(&mut self, why: &'static str) {
        if self.is_working() {
            *self = Self::Unknown(why);
        }
    }

    /// A staged copy will take its place.
    pub fn replace(&mut self) {
        *self = Self::Replacing { wrong: self.stopped() };
    }

    /// It is named primary: the best there is, and so it works.
    pub fn name(&mut self) {
        if matches!(self, Self::Wrong(_)) {
            *self = Self::Filling;
        }
    }

    /// It holds what it was to hold.
    pub(super) fn fill(&mut self) {
        if *self == Self::Filling {
            *self = Self::Good;
        }
    }

    /// The rows of a former copy are gone.
    pub fn clean(&mut self) {
        if !self.exists() {
            *self = Self::Absent { clean: true };
        }
    }
}
