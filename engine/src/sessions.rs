//! Exactly once, shard side: which batch of which session has been applied (DESIGN §7).
//!
//! Rows and the newest collection are replicated state: they change only at apply, so every
//! replica judges a batch alike, and a duplicate is answered only once its original is committed.
//!
//! Invariants:
//!   - a session once expired stays expired: `collect` never takes an id back that an earlier
//!     collection has dropped, and ids are never reused;
//!   - a row holds results only for numbers in `answered_below ..= last`.

use std::collections::{BTreeMap, BTreeSet};

use xxhash_rust::xxh3::xxh3_128;

use crate::batch::{put_revision, put_session};
use crate::codec::{put_varint, put_varint_i128};
use crate::idempotency::TokenOutcome;
use crate::ids::{Bseq, Revision, SessionId};
use crate::planted::Planted;

/// The sessions that a shard knows.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Sessions {
    pub collection: Collection,
    pub rows: BTreeMap<SessionId, Row>,
}

/// Sessions ≤ `r` that are not in `l` are expired, for ever: ids are never reused.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Collection {
    pub r: Revision,
    pub l: BTreeSet<SessionId>,
}

/// What a shard remembers of one session.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Row {
    /// The last batch applied.
    pub last: Bseq,
    /// Results below it have been dropped: the worker knows them.
    pub answered_below: Bseq,
    /// Results at or above it. One batch is undecided at a time, so this is at most one.
    pub results: BTreeMap<Bseq, BatchResult>,
}

/// What a decided batch did.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BatchResult {
    /// `values[i]` answers the i-th op that asks for one, `tokens[i]` the i-th group of ops with a
    /// token: what nobody asks for costs no row space.
    Applied {
        values: Vec<i128>,
        tokens: Vec<TokenOutcome>,
    },
    Malformed,
}

/// What is to become of a batch, by its session and number alone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Judgement {
    /// It is the next one: apply it.
    Next,
    /// It was applied before, with this result; none if the worker said that it knows it.
    Decided(Option<BatchResult>),
    /// The session was collected: no effect of this send.
    Expired,
    /// It does not follow the last one, or there is no row: no effect of this send.
    NoEffect,
}

impl Collection {
    /// The session's rows are gone and will not come back.
    pub fn has_expired(&self, session: SessionId) -> bool {
        session.0 <= self.r && !self.l.contains(&session)
    }
}

impl Sessions {
    /// Judges a batch, in the order that DESIGN §7 gives: expired, then the row, then no row.
    pub fn judge(&self, session: SessionId, bseq: Bseq) -> Judgement {
        if self.collection.has_expired(session) {
            return Judgement::Expired;
        }
        let last = self.rows.get(&session).map_or(Bseq(0), |row| row.last);
        if bseq == last.next() {
            return Judgement::Next;
        }
        match self.rows.get(&session) {
            Some(row) if bseq <= row.last => Judgement::Decided(row.results.get(&bseq).cloned()),
            _ => Judgement::NoEffect,
        }
    }

    /// Notes what a batch did that was judged [`Judgement::Next`].
    pub fn record(&mut self, session: SessionId, bseq: Bseq, result: BatchResult) {
        let row = self.rows.entry(session).or_default();
        row.last = bseq;
        row.results.insert(bseq, result);
    }

    /// The worker knows all results below: they may go. Without a row there is nothing to drop.
    pub fn forget_below(&mut self, session: SessionId, below: Bseq) {
        let Some(row) = self.rows.get_mut(&session) else { return };
        row.answered_below = row.answered_below.max(below);
        row.results = row.results.split_off(&row.answered_below);
    }

    /// Applies a collection. One that is older than the newest is ignored.
    pub fn collect(&mut self, r: Revision, l: &[SessionId], planted: Option<Planted>) {
        let old = &self.collection;
        if r < old.r && !Planted::CollectBackwards.is_in(planted) {
            return;
        }
        let revive = Planted::ReviveExpired.is_in(planted);
        let stays = |&&id: &&SessionId| id.0 > old.r || old.l.contains(&id) || revive;
        let l = l.iter().filter(stays).copied().collect();
        self.collection = Collection { r, l };
        let collection = &self.collection;
        self.rows.retain(|&id, _| !collection.has_expired(id));
    }

    /// A hash of rows and collection: equal on all replicas at equal seq.
    pub fn digest(&self) -> u128 {
        let mut bytes = Vec::new();
        put_revision(&mut bytes, self.collection.r);
        put_varint(&mut bytes, self.collection.l.len() as u64);
        for &id in &self.collection.l {
            put_session(&mut bytes, id);
        }
        for (&id, row) in &self.rows {
            put_session(&mut bytes, id);
            put_varint(&mut bytes, row.last.0);
            put_varint(&mut bytes, row.answered_below.0);
            for (bseq, result) in &row.results {
                put_varint(&mut bytes, bseq.0);
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
    fn sessions() -> Sessions {
        let mut sessions = Sessions::default();
        sessions.record(id(5), Bseq(1), applied(10));
        sessions.record(id(5), Bseq(2), applied(20));
        sessions.forget_below(id(5), Bseq(2));
        sessions
    }

    #[track_caller]
    fn check(session: u64, bseq: u64, want: Judgement) {
        assert_eq!(sessions().judge(id(session), Bseq(bseq)), want);
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
        sessions.collect(id(9).0, &[id(7)], None);
        assert_eq!(sessions.judge(id(5), Bseq(3)), Judgement::Expired);
        assert_eq!(sessions.judge(id(7), Bseq(1)), Judgement::Next);
        // Born after the list was made: unknown to it, hence alive.
        assert_eq!(sessions.judge(id(10), Bseq(1)), Judgement::Next);
        assert!(sessions.rows.is_empty());
    }

    #[test]
    fn an_older_collection_is_ignored() {
        let mut sessions = sessions();
        sessions.collect(id(9).0, &[id(5)], None);
        sessions.collect(id(8).0, &[], None);
        assert_eq!(sessions.judge(id(5), Bseq(3)), Judgement::Next);
    }

    /// A primary whose list still shows the session must not bring it back: its row is gone, so
    /// its first batch could be applied a second time.
    #[test]
    fn a_session_once_expired_stays_expired() {
        let mut sessions = sessions();
        sessions.collect(id(9).0, &[], None);
        sessions.collect(id(12).0, &[id(5), id(11)], None);
        assert_eq!(sessions.judge(id(5), Bseq(1)), Judgement::Expired);
        assert_eq!(sessions.judge(id(11), Bseq(1)), Judgement::Next);
    }

    #[test]
    fn the_digest_sees_rows_results_and_collections() {
        let mut other = sessions();
        assert_eq!(other.digest(), sessions().digest());
        other.forget_below(id(5), Bseq(3));
        assert_ne!(other.digest(), sessions().digest());
        let mut other = sessions();
        other.collect(id(4).0, &[], None);
        assert_ne!(other.digest(), sessions().digest());
    }
}
