//! A follower accepts what the primary of its promised epoch sends.
//!
//! Example: a primary was paused for a minute, wakes up, still believes that it leads, and sends
//! its followers a batch. By then they have promised a higher epoch and refuse, so it can't collect
//! the acknowledgements that it needs. No clock is involved.
//!
//! A follower truncates its log only where an entry of that primary contradicts its own, never
//! because of a bare number, and in the same group as what replaces it. It acknowledges what the
//! messages of this epoch have shown to match, not its whole log: an old tail beyond that may come
//! from any former primary.

use crate::entry::{Body, Entry, Position};
use crate::ids::{CopyNo, Seq};
use crate::message::{Reject, Slice};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::group_commit::ReplicaTurn;

/// The reason why a slice was not accepted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SliceRefusal {
    /// The primary is to be informed.
    Reject(Reject),
    /// The bytes were damaged on the way: the connection can't be trusted.
    Damaged,
}

impl From<Reject> for SliceRefusal {
    fn from(reject: Reject) -> Self {
        Self::Reject(reject)
    }
}

impl Replica {
    /// Accepts a slice: checks its epoch, copy and position, and writes what is new of it.
    /// `in_sync`: the disk is full, and this store is a member of the in-sync set, as far as it
    /// knows. Entries before the first one that can't be accepted are written all the same.
    pub fn accept(
        &mut self,
        turn: &mut ReplicaTurn<'_>,
        slice: &Slice,
        in_sync: bool,
    ) -> Result<(), SliceRefusal> {
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
            // There can't be two primaries of one epoch, so the sender is not what it claims to be.
            return Err(Reject::StaleEpoch { promised: self.promised }.into());
        }
        if !self.trust.is_working() {
            return Err(Reject::Stopped.into());
        }
        // The primary has not divided the shard yet: its first entries are of other slots.
        let is_of_other_slots = slice.slots != self.slots && self.log.last().seq == Seq(0);
        if is_of_other_slots && !slice.entries.is_empty() {
            return Err(Reject::Stopped.into());
        }
        let joined = self.join(turn, slice, in_sync)?;
        // The commit counts even if the slice is rejected: committed entries need not stay in the
        // log, so a follower whose log is too long must learn the commit although it accepts
        // nothing new.
        self.matched = self.matched.max(joined.seq);
        self.learn_commit(slice.commit);
        if !joined.is_whole {
            return Err(Reject::NoSpace.into());
        }
        // The slice will be acknowledged: the primary may count on the copy, whatever etcd's record
        // was before.
        self.removal_read = None;
        Ok(())
    }

    /// Notes a commit that the primary has announced, as far as the logs are known to match.
    pub fn learn_commit(&mut self, announced: Seq) {
        self.commit = self.commit.max(announced.min(self.matched));
    }

    /// Writes what is new of the slice, as far as a full disk permits.
    fn join(
        &mut self,
        turn: &mut ReplicaTurn<'_>,
        slice: &Slice,
        in_sync: bool,
    ) -> Result<Joined, SliceRefusal> {
        let takes = |turn: &ReplicaTurn<'_>, entry: &Entry| {
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

    /// The position at which both logs are known to agree: at `prev`, or at the oldest position in
    /// memory if the slice begins below it and contains the entry there. A slice that ends below it
    /// proves nothing: after an accepted loss a primary may never have had what is applied here.
    fn starting_point(
        &mut self,
        turn: &mut ReplicaTurn<'_>,
        slice: &Slice,
    ) -> Result<Position, SliceRefusal> {
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

    /// An applied entry is not in the log of a primary: one of the two disks lost or changed
    /// committed data. This copy stops; nothing of it is truncated.
    fn contradicted(&mut self, turn: &mut ReplicaTurn<'_>) -> SliceRefusal {
        self.stop(turn, "the primary's log contradicts an applied entry");
        Reject::Stopped.into()
    }
}

/// The position up to which a slice and the log are known to agree.
struct Joined {
    seq: Seq,
    /// The whole slice is in the log.
    is_whole: bool,
}

/// Returns whether a full disk still accepts the entry. The reserve has room for it, and without it
/// a new primary never commits its barrier: a cluster that is full everywhere would answer no read
/// after a restart. Below a barrier a member of the in-sync set lacks at most what was in flight;
/// other followers may lack any amount.
fn fits_reserve(turn: &ReplicaTurn<'_>, entry: &Entry, slice: &Slice, in_sync: bool) -> bool {
    let is_small = matches!(entry.body, Body::Barrier | Body::ExpireTokens { .. });
    let opens_epoch = in_sync && entry.epoch < slice.epoch;
    (is_small || opens_epoch) && !turn.planted(Planted::FullRefusesBarrier)
}

/// Checks that the entry follows `at`, and that its bytes are the ones that were sealed.
fn check(entry: &Entry, at: Position) -> Result<(), SliceRefusal> {
    let intact = match &entry.body {
        Body::Ops(batch) => batch.is_intact(),
        _ => true,
    };
    if intact && entry.follows(at) { Ok(()) } else { Err(SliceRefusal::Damaged) }
}
