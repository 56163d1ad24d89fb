//! The progress of a shard's commit, from which its primary judges whether the shard is frozen.

use crate::ids::{Now, Seq};

/// The progress of a shard's commit, updated at each review.
#[derive(Clone, Debug)]
pub struct CommitProgress {
    commit: Seq,
    /// When the commit last moved, or nothing waited for it.
    pub moved: Now,
    /// Since when, without a break, a member of M can't acknowledge or M is too small.
    pub blocked: Option<Now>,
    /// The commit at two earlier moments, the older first.
    pub before: [(Now, Seq); 2],
}

impl CommitProgress {
    /// The progress of a shard that this node begins to lead.
    pub fn new(now: Now) -> Self {
        Self { commit: Seq(0), moved: now, blocked: None, before: [(now, Seq(0)); 2] }
    }

    /// Updates the progress at a review.
    pub fn update(&mut self, now: Now, commit: Seq, last: Seq, blocked: bool, near_ms: u64) {
        if commit > self.commit || last <= commit {
            (self.commit, self.moved) = (commit, now);
        }
        self.blocked = blocked.then(|| self.blocked.unwrap_or(now));
        let [_, (at, _)] = self.before;
        if now.ms_since(at) >= near_ms {
            self.before = [self.before[1], (now, commit)];
        }
    }

    /// Restarts the waits after a pause of this process, which is no delay of a member.
    pub fn reset_after_pause(&mut self, now: Now) {
        self.moved = now;
        self.blocked = self.blocked.map(|_| now);
    }
}
