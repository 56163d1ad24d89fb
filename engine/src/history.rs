//! How far etcd's history has come, as far as one process has heard.
//!
//! Etcd's revision never falls, unless it was restored from a backup or is another etcd: then epochs, versions and sessions
//! that processes have acted on are no longer there, and whoever follows it may lead twice in one epoch (trap T10). So a
//! process compares: an answer from before what it had heard when it asked is none, and neither is any answer after that.
//!
//! Only answers that are linearizable are compared, and only with what was known before they were asked for: a watch may
//! come from a member that lags behind, and answers to calls side by side may overtake each other.
//!
//! What it can't see: a history that went back and has overtaken again before anything was asked, and a process that has
//! heard of nothing newer than what was restored. So nobody restores etcd under running processes, nor starts one after it
//! (`docs/operations.md`, "Back up etcd").

use std::fmt;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct History {
    newest: u64,
    went_back: Option<WentBack>,
}

/// Etcd answered from a history that is not the one before.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct WentBack {
    /// A revision that was heard of.
    pub was: u64,
    /// The lower one of a later answer.
    pub now: u64,
}

impl fmt::Display for WentBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its history went back from revision {} to {}", self.was, self.now)
    }
}

impl History {
    /// A call is about to be made: the highest revision that was heard of, to be kept for [`answered`](Self::answered). An
    /// error: nothing is asked any more.
    pub fn asks(&self) -> Result<u64, WentBack> {
        self.went_back.map_or(Ok(self.newest), Err)
    }

    /// A watch has told of this revision.
    pub fn heard(&mut self, revision: u64) {
        self.newest = self.newest.max(revision);
    }

    /// A linearizable answer as of `revision`, to a call that was made when `asked` was the newest. Once one is from before,
    /// this and all later ones are errors.
    pub fn answered(&mut self, asked: u64, revision: u64) -> Result<(), WentBack> {
        if revision < asked {
            self.went_back.get_or_insert(WentBack { was: asked, now: revision });
        }
        self.went_back.map_or(Ok(()), Err)?;
        self.heard(revision);
        Ok(())
    }

    /// The same, of a transaction that took effect and so made this revision: it is a new one.
    pub fn written(&mut self, asked: u64, revision: u64) -> Result<(), WentBack> {
        self.answered(asked + 1, revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_side_by_side_may_overtake_each_other() {
        let mut history = History::default();
        let (first, second) = (history.asks().unwrap(), history.asks().unwrap());
        assert_eq!(history.answered(second, 12), Ok(()));
        assert_eq!(history.answered(first, 11), Ok(()));
        assert_eq!(history.asks(), Ok(12));
    }

    /// Restored to the revision before the newest, it had come as far again by this very write (simulator, seed 657).
    #[test]
    fn what_is_written_is_new() {
        let mut history = History::default();
        history.heard(12);
        let asked = history.asks().unwrap();
        assert_eq!(history.written(asked, 13), Ok(()));
        let asked = history.asks().unwrap();
        assert!(history.written(asked, 13).is_err());
    }

    #[test]
    fn what_went_back_stays_so() {
        let mut history = History::default();
        history.heard(12);
        let asked = history.asks().unwrap();
        let went_back = WentBack { was: 12, now: 11 };
        assert_eq!(history.answered(asked, 11), Err(went_back));
        assert_eq!(history.asks(), Err(went_back));
        // It has grown again, by the works of others.
        assert_eq!(history.answered(asked, 13), Err(went_back));
    }
}
