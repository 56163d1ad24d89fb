//! Exactly once, the shard's half: which batch of which session has been applied.
//!
//! Rows and the newest expiry are replicated state: they change only at apply, so every replica
//! judges a batch alike, and a duplicate is answered only once its original is committed.
//!
//! Invariants:
//!   - an expired session stays expired: [`SessionTable::expire`] never takes an id back that an
//!     earlier expiry has dropped, and ids are never reused;
//!   - a row holds results only for numbers in `answered_below ..= last`.

use std::collections::{BTreeMap, BTreeSet};

use xxhash_rust::xxh3::xxh3_128;

use crate::batch::{put_revision, put_session};
use crate::codec::{put_varint, put_varint_i128};
use crate::ids::{BatchSeq, Revision, SessionId};
use crate::planted::Planted;
use crate::shard::idempotency::TokenOutcome;

/// The sessions that a shard knows.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SessionTable {
    /// The newest expiry.
    pub expiry: SessionExpiry,
    /// One row for each session with an applied batch that has not expired.
    pub rows: BTreeMap<SessionId, SessionRow>,
}

/// An expiry: sessions ≤ `up_to` that are not in `survivors` are expired for ever, since ids are
/// never reused.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SessionExpiry {
    /// The highest session id that the expiry is about.
    pub up_to: Revision,
    /// Sessions at or below `up_to` that stay.
    pub survivors: BTreeSet<SessionId>,
}

/// The state of one session in a shard.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SessionRow {
    /// The last batch applied.
    pub last: BatchSeq,
    /// Results below this number have been dropped, since the worker knows them.
    pub answered_below: BatchSeq,
    /// Results at or above that number, in the order of the numbers. One batch is in flight at a
    /// time, so there is at most one.
    pub results: Vec<(BatchSeq, BatchResult)>,
}

/// The result of a decided batch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BatchResult {
    /// The batch was applied. Operations that ask for nothing take no space in the row.
    Applied {
        /// `values[i]` is the result of the i-th operation that asks for one.
        values: Vec<i128>,
        /// `tokens[i]` is the outcome of the i-th group of operations with a token.
        tokens: Vec<TokenOutcome>,
    },
    /// The batch could not be decoded and has no effect.
    Malformed,
}

/// The decision about a batch, by its session and number alone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Judgement {
    /// The batch is the next one: it is to be applied.
    Next,
    /// The batch was applied before, with this result; `None` if the worker has stated that it
    /// knows the result.
    Decided(Option<BatchResult>),
    /// The session has expired: this send has no effect.
    Expired,
    /// The batch does not follow the last one, or there is no row: this send has no effect.
    NoEffect,
}

impl SessionExpiry {
    /// Returns whether the session has expired: its row is gone and will not come back.
    pub fn has_expired(&self, session: SessionId) -> bool {
        session.0 <= self.up_to && !self.survivors.contains(&session)
    }
}

impl SessionTable {
    /// Judges a batch, in this order: an expired session, then the row, then no row.
    pub fn judge(&self, session: SessionId, batch_seq: BatchSeq) -> Judgement {
        if self.expiry.has_expired(session) {
            return Judgement::Expired;
        }
        let last = self.rows.get(&session).map_or(BatchSeq(0), |row| row.last);
        if batch_seq == last.next() {
            return Judgement::Next;
        }
        match self.rows.get(&session) {
            Some(row) if batch_seq <= row.last => {
                let at = row.results.binary_search_by_key(&batch_seq, |&(number, _)| number);
                Judgement::Decided(at.ok().map(|at| row.results[at].1.clone()))
            }
            _ => Judgement::NoEffect,
        }
    }

    /// Notes the result of a batch that was judged [`Judgement::Next`].
    pub fn record(&mut self, session: SessionId, batch_seq: BatchSeq, result: BatchResult) {
        let row = self.rows.entry(session).or_default();
        row.last = batch_seq;
        row.results.push((batch_seq, result));
    }

    /// Drops the results below `below`, since the worker knows them. Without a row there is nothing
    /// to drop.
    pub fn forget_below(&mut self, session: SessionId, below: BatchSeq) {
        let Some(row) = self.rows.get_mut(&session) else { return };
        row.answered_below = row.answered_below.max(below);
        let below = row.answered_below;
        let dropped = row.results.partition_point(|&(number, _)| number < below);
        row.results.drain(..dropped);
    }

    /// Applies an expiry. One that is older than the newest is ignored.
    pub fn expire(&mut self, up_to: Revision, survivors: &[SessionId], planted: Option<Planted>) {
        let old = &self.expiry;
        if up_to < old.up_to && !Planted::CollectBackwards.is_in(planted) {
            return;
        }
        let revive = Planted::ReviveExpired.is_in(planted);
        let stays = |&&id: &&SessionId| id.0 > old.up_to || old.survivors.contains(&id) || revive;
        let survivors = survivors.iter().filter(stays).copied().collect();
        self.expiry = SessionExpiry { up_to, survivors };
        let expiry = &self.expiry;
        self.rows.retain(|&id, _| !expiry.has_expired(id));
    }

    /// A hash of rows and expiry: equal on all replicas at equal seq.
    pub fn digest(&self) -> u128 {
        let mut bytes = Vec::new();
        put_revision(&mut bytes, self.expiry.up_to);
        put_varint(&mut bytes, self.expiry.survivors.len() as u64);
        for &id in &self.expiry.survivors {
            put_session(&mut bytes, id);
        }
        for (&id, row) in &self.rows {
            put_session(&mut bytes, id);
            put_varint(&mut bytes, row.last.0);
            put_varint(&mut bytes, row.answered_below.0);
            for (batch_seq, result) in &row.results {
                put_varint(&mut bytes, batch_seq.0);
                let BatchResult::Applied { values, tokens } = result else { continue };
                put_varint(&mut bytes, values.len() as u64 + 1);
                values.iter().for_each(|&value| put_varint_i128(&mut bytes, value));
                bytes.extend(tokens.iter().map(|&outcome| outcome as u8));
            }
        }
        xxh3_128(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(revision: u64) -> SessionId {
        SessionId(Revision { incarnation: 1, revision })
    }

    fn applied(value: i128) -> BatchResult {
        BatchResult::Applied { values: vec![value], tokens: vec![] }
    }

    /// Session 5 has had batches 1 and 2 applied and knows the result of 1.
    fn sessions() -> SessionTable {
        let mut sessions = SessionTable::default();
        sessions.record(id(5), BatchSeq(1), applied(10));
        sessions.record(id(5), BatchSeq(2), applied(20));
        sessions.forget_below(id(5), BatchSeq(2));
        sessions
    }

    #[track_caller]
    fn check(session: u64, batch_seq: u64, want: Judgement) {
        assert_eq!(sessions().judge(id(session), BatchSeq(batch_seq)), want);
    }

    #[test]
    fn numbers_are_judged() {
        check(5, 3, Judgement::Next);
        check(5, 2, Judgement::Decided(Some(applied(20))));
        check(5, 1, Judgement::Decided(None));
        check(5, 4, Judgement::NoEffect);
        check(6, 1, Judgement::Next);
        check(6, 2, Judgement::NoEffect);
    }

    #[test]
    fn a_collected_session_is_expired_and_its_row_gone() {
        let mut sessions = sessions();
        sessions.expire(id(9).0, &[id(7)], None);
        assert_eq!(sessions.judge(id(5), BatchSeq(3)), Judgement::Expired);
        assert_eq!(sessions.judge(id(7), BatchSeq(1)), Judgement::Next);
        // The session began after the list was made: it is not in the list, but alive.
        assert_eq!(sessions.judge(id(10), BatchSeq(1)), Judgement::Next);
        assert!(sessions.rows.is_empty());
    }

    #[test]
    fn an_older_collection_is_ignored() {
        let mut sessions = sessions();
        sessions.expire(id(9).0, &[id(5)], None);
        sessions.expire(id(8).0, &[], None);
        assert_eq!(sessions.judge(id(5), BatchSeq(3)), Judgement::Next);
    }

    /// A primary whose list still shows the session must not bring it back: its row is gone, so its
    /// first batch could be applied a second time.
    #[test]
    fn a_session_once_expired_stays_expired() {
        let mut sessions = sessions();
        sessions.expire(id(9).0, &[], None);
        sessions.expire(id(12).0, &[id(5), id(11)], None);
        assert_eq!(sessions.judge(id(5), BatchSeq(1)), Judgement::Expired);
        assert_eq!(sessions.judge(id(11), BatchSeq(1)), Judgement::Next);
    }

    #[test]
    fn the_digest_sees_rows_results_and_collections() {
        let mut other = sessions();
        assert_eq!(other.digest(), sessions().digest());
        other.forget_below(id(5), BatchSeq(3));
        assert_ne!(other.digest(), sessions().digest());
        let mut other = sessions();
        other.expire(id(4).0, &[], None);
        assert_ne!(other.digest(), sessions().digest());
    }
}
