//! A follower takes what the primary of its promised epoch sends (DESIGN §6, rules 8, 11 and 12).
//!
//! Picture a primary that was paused for a minute: it wakes up, still believes that it leads, and
//! sends its backups a batch. By then they have promised a higher epoch and refuse, so it can't
//! collect the acknowledgements it needs. No clock is involved.
//!
//! A follower cuts its log only where an entry of that primary contradicts its own, never on a
//! bare number, and in the same group as what replaces it. It acknowledges what the messages of
//! this epoch have shown to match, not its whole log: an old tail beyond that may be anybody's.

use crate::entry::{Body, Entry, Position};
use crate::ids::{CopyNo, Seq};
use crate::message::{Reject, Slice};
use crate::node::turn::Turn;
use crate::planted::Planted;
use crate::replica::Replica;

/// Why a slice was not taken.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NotTaken {
    /// Say so to the primary.
    Reject(Reject),
    /// The bytes were damaged on the way: the connection is not to be trusted.
    Damaged,
}

impl From<Reject> for NotTaken {
    fn from(reject: Reject) -> Self {
        Self::Reject(reject)
    }
}

impl Replica {
    /// Takes a slice: checks its epoch, copy and place, and writes what is new of it. `in_sync`: this store is
    /// a member of the in-sync set, as far as it knows.
    pub fn accept(
        &mut self,
        turn: &mut Turn<'_>,
        slice: &Slice,
        in_sync: bool,
    ) -> Result<(), NotTaken> {
        let obeys_any = turn.planted(Planted::ObeyOldEpoch) && self.primary().is_none();
        if slice.epoch < self.promised && !obeys_any {
            return Err(Reject::StaleEpoch { promised: self.promised }.into());
        }
        if !self.trust.exists() {
            return Err(Reject::WrongCopy { copy: CopyNo(0) }.into());
        }
        if slice.copy != self.copy {
            return Err(Reject::WrongCopy { copy: self.copy }.into());
        }
        if slice.epoch > self.promised {
            self.promise(turn, slice.epoch);
        } else if self.primary().is_some() {
            // Two primaries of one epoch: the other one can't be what it says.
            return Err(Reject::StaleEpoch { promised: self.promised }.into());
        }
        if !self.trust.is_working() {
            return Err(Reject::Stopped.into());
        }
        let joined = self.join(turn, slice, in_sync)?;
        // Of what is known to be committed nothing has to stay in the log: so a follower whose log is
        // too long learns it, although it takes nothing new.
        self.matched = self.matched.max(joined.seq);
        self.hear_commit(slice.commit);
        if !joined.is_whole {
            return Err(Reject::NoSpace.into());
        }
        // This will be acknowledged: the primary may count on the copy, whatever etcd said before.
        self.leaving = None;
        Ok(())
    }

    /// The primary has announced a commit.
    pub fn hear_commit(&mut self, announced: Seq) {
        self.commit = self.commit.max(announced.min(self.matched));
    }

    /// Writes what is new of the slice, as far as a disk that is full takes it.
    fn join(
        &mut self,
        turn: &mut Turn<'_>,
        slice: &Slice,
        in_sync: bool,
    ) -> Result<Joined, NotTaken> {
        let takes = |turn: &Turn<'_>, entry: &Entry| {
            !turn.disk_full || fits_reserve(turn, entry, slice, in_sync)
        };
        let mut at = self.starting_point(turn, slice)?;
        for entry in &slice.entries {
            if entry.seq <= at.seq {
                continue;
            }
            match self.log.position(entry.seq) {
                Some(own) if own.chain == entry.chain => {}
                Some(_) if entry.seq <= self.state.applied.seq => {
                    return Err(self.contradicted(turn));
                }
                _ if !takes(turn, entry) => return Ok(Joined { seq: at.seq, is_whole: false }),
                Some(_) => {
                    check(entry, at)?;
                    self.truncate(turn, entry.seq.prev());
                    self.append(turn, entry.clone());
                }
                None => {
                    check(entry, at)?;
                    self.append(turn, entry.clone());
                }
            }
            at = entry.position();
        }
        if turn.planted(Planted::TruncateToMessageEnd) && at.seq >= self.state.applied.seq {
            self.truncate(turn, at.seq);
        }
        Ok(Joined { seq: at.seq, is_whole: true })
    }

    /// Where both logs are known to agree: at `prev`, or at the oldest position in memory if the
    /// slice begins below it and holds the entry there. A slice that ends below it shows nothing: after an
    /// accepted loss a primary may never have had what is applied here.
    fn starting_point(&mut self, turn: &mut Turn<'_>, slice: &Slice) -> Result<Position, NotTaken> {
        let by_number = turn.planted(Planted::MatchByNumber);
        let base = self.log.base();
        if slice.prev.seq < base.seq {
            return match slice.entries.iter().find(|entry| entry.seq == base.seq) {
                Some(entry) if entry.chain == base.chain => Ok(base),
                Some(_) => Err(self.contradicted(turn)),
                None if turn.planted(Planted::JoinBelowBase) => {
                    Ok(slice.entries.last().map_or(slice.prev, Entry::position))
                }
                None => Err(self.mismatch().into()),
            };
        }
        match self.log.position(slice.prev.seq) {
            Some(own) if own.chain == slice.prev.chain || by_number => Ok(own),
            Some(_) if slice.prev.seq <= self.state.applied.seq => Err(self.contradicted(turn)),
            _ => Err(self.mismatch().into()),
        }
    }

    fn mismatch(&self) -> Reject {
        let applied = self.state.applied;
        Reject::Mismatch { ends: self.log.ends_above(applied.seq), applied }
    }

    /// What is applied here is not in the log of a primary: one of the two disks lost or changed
    /// what was committed. This copy stops; nothing of it is cut.
    fn contradicted(&mut self, turn: &mut Turn<'_>) -> NotTaken {
        self.stop(turn, "the primary's log contradicts an applied entry");
        Reject::Stopped.into()
    }
}

/// How far a slice and the log are known to agree.
struct Joined {
    seq: Seq,
    /// All of the slice is in the log.
    is_whole: bool,
}

/// A disk that is full still takes this. The reserve has room for it, and without it a new primary never commits its
/// barrier: a cluster that is full everywhere would answer no read after a restart. Below a barrier a member of the
/// in-sync set lacks at most what was in flight; others may lack any amount.
fn fits_reserve(turn: &Turn<'_>, entry: &Entry, slice: &Slice, in_sync: bool) -> bool {
    let is_small = matches!(entry.body, Body::Barrier | Body::Expire { .. });
    let opens_epoch = in_sync && entry.epoch < slice.epoch;
    (is_small || opens_epoch) && !turn.planted(Planted::FullRefusesBarrier)
}

/// The entry really follows `at`, and its bytes are the ones that were sealed.
fn check(entry: &Entry, at: Position) -> Result<(), NotTaken> {
    let intact = match &entry.body {
        Body::Ops(batch) => batch.is_intact(),
        _ => true,
    };
    if intact && entry.follows(at) { Ok(()) } else { Err(NotTaken::Damaged) }
}
