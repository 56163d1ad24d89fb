//! The position of etcd's history, as far as one process has observed it.
//!
//! Etcd's revision never falls, unless etcd was restored from a backup or is another etcd: then
//! epochs, versions and sessions that processes have acted on no longer exist, and a process that
//! follows it may lead twice in one epoch. So a process compares revisions: an answer with a
//! revision lower than the newest one observed when the call was made is invalid, and so is every
//! answer after it.
//!
//! The comparison covers linearizable answers alone, and uses what was known before the call: a
//! watch may come from a member that lags behind, and answers to concurrent calls may overtake each
//! other.
//!
//! Two cases can't be detected: a history that went back and overtook the newest revision again
//! before the next call, and a process that has observed nothing newer than what was restored. So
//! etcd must not be restored under running processes, and none may be started on a restored etcd
//! (docs/runbooks.md, "etcd has lost its majority or its data").

use std::fmt;

/// The newest revision that one process has observed; see the module.
#[derive(Clone, Debug, Default)]
pub struct History {
    newest: u64,
    went_back: Option<WentBack>,
}

/// Etcd answered from a history that is not the one before.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct WentBack {
    /// A revision that was observed.
    pub was: u64,
    /// The lower revision of a later answer.
    pub now: u64,
}

impl fmt::Display for WentBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its history went back from revision {} to {}", self.was, self.now)
    }
}

impl History {
    /// Must be called before a call to etcd is made. Returns the highest revision observed so far,
    /// to be kept for [`check_answer`](Self::check_answer). Fails once any answer was invalid: no
    /// call may be made any more.
    pub fn before_call(&self) -> Result<u64, WentBack> {
        self.went_back.map_or(Ok(self.newest), Err)
    }

    /// Notes a revision that a watch has reported.
    pub fn observe(&mut self, revision: u64) {
        self.newest = self.newest.max(revision);
    }

    /// Checks a linearizable answer as of `revision` to a call that was made when `asked` was the
    /// newest revision. Fails if `revision` is lower than `asked`, and for all later answers.
    pub fn check_answer(&mut self, asked: u64, revision: u64) -> Result<(), WentBack> {
        if revision < asked {
            self.went_back.get_or_insert(WentBack { was: asked, now: revision });
        }
        self.went_back.map_or(Ok(()), Err)?;
        self.observe(revision);
        Ok(())
    }

    /// Like [`check_answer`](Self::check_answer), for a transaction that took effect and so made
    /// this revision: the revision must be a new one.
    pub fn check_write(&mut self, asked: u64, revision: u64) -> Result<(), WentBack> {
        self.check_answer(asked + 1, revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_side_by_side_may_overtake_each_other() {
        let mut history = History::default();
        let (first, second) = (history.before_call().unwrap(), history.before_call().unwrap());
        assert_eq!(history.check_answer(second, 12), Ok(()));
        assert_eq!(history.check_answer(first, 11), Ok(()));
        assert_eq!(history.before_call(), Ok(12));
    }

    /// The history was restored to the revision before the newest, and this very write brought it
    /// back to the same number.
    #[test]
    fn what_is_written_is_new() {
        let mut history = History::default();
        history.observe(12);
        let asked = history.before_call().unwrap();
        assert_eq!(history.check_write(asked, 13), Ok(()));
        let asked = history.before_call().unwrap();
        assert!(history.check_write(asked, 13).is_err());
    }

    #[test]
    fn what_went_back_stays_so() {
        let mut history = History::default();
        history.observe(12);
        let asked = history.before_call().unwrap();
        let went_back = WentBack { was: 12, now: 11 };
        assert_eq!(history.check_answer(asked, 11), Err(went_back));
        assert_eq!(history.before_call(), Err(went_back));
        // It has grown again, by writes of others.
        assert_eq!(history.check_answer(asked, 13), Err(went_back));
    }
}
