//! Exactly once, the client's half: what was done under a client's token, and for how long it is
//! remembered (DESIGN §7, "Idempotency keys").
//!
//! ```text
//!   gateway  Token ─▶ Tag{scope, hash, fingerprint} + issue time ─▶ the batch ─▶ the log
//!   apply    no record: effect + record, in one step · same tag: its result · other: reused
//!            no record and too long after the issue time: no effect
//!   shard    live buckets; `expire` in the log drops one; a record of no live bucket is none
//! ```
//!
//! What a newcomer would get wrong: that a record may go once its window is over. An undecided
//! batch of a first attempt may be applied at any later time, after the record of the client's
//! second attempt has gone. So each operation carries the time at which it was asked for, and apply
//! refuses one that comes a window after it; records are kept for two windows, so one of the two
//! always stands in the way. (`model-sessions`, idem.rs, shows the counterexamples.)
//!
//! Invariants:
//!   - everything here is judged from the log alone, so replicas agree: the window and the quota
//!     stand in `meta` and never change;
//!   - a bucket that was dropped never comes back: shard time does not go backwards, and a record's
//!     bucket is never before its entry's time.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_128;

use crate::codec::{put_bytes, put_varint};
use crate::ids::{Slot, TimeMs};
use crate::key::CounterKey;
use crate::ops::{self, Op};
use crate::planted::Planted;

/// An issue time further ahead of the shard's time than this counts as just so far ahead.
const AHEAD_MS_MAX: u64 = 24 * 3_600_000;
/// Buckets to a window.
const BUCKETS: u64 = 6;

/// A client's `Idempotency-Key`, as it came with a write request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Token {
    pub scope: Scope,
    /// What stands between the quotes.
    pub token: Bytes,
    /// The client's `Idempotency-Issued-At`; without one the shard's own time is taken.
    pub issued: Option<TimeMs>,
    /// A hash of whatever the request says that none of its operations tells, as of items that were
    /// refused as bad input; 0 for nothing. It goes into the fingerprint.
    pub also: u64,
}

/// What a record belongs to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    /// One operation: recorded under (namespace, counter, token).
    Counter = 0,
    /// A request of many: recorded in each shard that it touches under (namespace, token), and
    /// each shard's part is applied or replayed as a whole.
    Batch = 1,
}

/// What the log says of a token: where its record is, and which request it was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tag {
    pub scope: Scope,
    pub hash: u128,
    /// Of the whole request, in every shard's part alike.
    pub fingerprint: u128,
}

impl Token {
    /// `ops`: the whole request as the client gave it, nothing summed. None: it has no operation.
    pub fn tag(&self, ops: &[Op]) -> Option<Tag> {
        let first = &ops.first()?.counter;
        let whose = match self.scope {
            Scope::Counter => first.name(),
            Scope::Batch => first.namespace(),
        };
        let mut bytes = vec![self.scope as u8];
        put_bytes(&mut bytes, whose);
        put_bytes(&mut bytes, &self.token);
        let hash = xxh3_128(&bytes);
        let mut bytes = self.also.to_le_bytes().to_vec();
        ops.iter().for_each(|op| ops::put(&mut bytes, op));
        Some(Tag { scope: self.scope, hash, fingerprint: xxh3_128(&bytes) })
    }
}

/// Where a record stands.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct RecordId {
    /// Of the counter; of a batch's part its shard's first.
    pub slot: Slot,
    pub hash: u128,
}

impl Tag {
    /// `counter`: one of those that the operations are on. `first`: the shard's first slot.
    pub fn record(&self, counter: &CounterKey, first: Slot) -> RecordId {
        let slot = match self.scope {
            Scope::Counter => counter.slot(),
            Scope::Batch => first,
        };
        RecordId { slot, hash: self.hash }
    }
}

/// What was done under a token: a row of the state.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    pub bucket: u64,
    pub fingerprint: u128,
    /// One for each of its operations that asks for a value.
    pub values: Vec<i128>,
}

/// What became of operations with a token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TokenOutcome {
    /// Now, for the first time.
    Applied = 0,
    /// Before; the values are the ones of then.
    Replayed = 1,
    /// No effect: another request was done under this token.
    Reused = 2,
    /// No effect of this one. Whether there was one before is no longer known.
    TooOld = 3,
    /// No effect: the shard holds as many records as it may.
    Quota = 4,
}

impl TokenOutcome {
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Applied, Self::Replayed, Self::Reused, Self::TooOld, Self::Quota]
            .into_iter()
            .find(|&outcome| outcome as u8 == byte)
    }

    /// The operations have been applied, now or before.
    pub fn is_applied(self) -> bool {
        matches!(self, Self::Applied | Self::Replayed)
    }
}

/// What the cluster was made with, the same on every replica for ever (`meta`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    pub window_ms: u64,
    /// Records of one shard.
    pub records_max: u64,
    pub planted: Option<Planted>,
}

impl Limits {
    /// How long a bucket is, and so how often a primary looks whether one is to be dropped.
    pub fn bucket_ms(&self) -> u64 {
        (self.window_ms / BUCKETS).max(1)
    }

    fn bucket(&self, time: TimeMs, issued: TimeMs) -> u64 {
        let issued = issued.0.min(time.0.saturating_add(AHEAD_MS_MAX));
        time.0.max(issued) / self.bucket_ms()
    }

    fn is_too_old(&self, time: TimeMs, issued: TimeMs) -> bool {
        let judged = !Planted::IssueTimeNotJudged.is_in(self.planted);
        judged && time.0 > issued.0.saturating_add(self.window_ms)
    }

    /// An entry of this time may drop the bucket.
    pub fn may_expire(&self, bucket: u64, time: TimeMs) -> bool {
        let end = bucket.saturating_add(1).saturating_mul(self.bucket_ms());
        let mut kept = self.window_ms.saturating_mul(2);
        if Planted::ExpireTooEarly.is_in(self.planted) {
            kept = 0;
        }
        time.0 >= end.saturating_add(kept)
    }
}

/// What is to be done with operations of a tag.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict<'a> {
    /// Apply them, and record them in this bucket.
    Apply { bucket: u64 },
    /// They were applied: these were the values.
    Replay(&'a [i128]),
    /// They have no effect.
    Refuse(TokenOutcome),
}

/// The records of one shard that exist, by age. Replicated state: it changes only at apply.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Buckets {
    pub live: BTreeMap<u64, Bucket>,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Bucket {
    pub records: u64,
    /// Σ of the hashes of its rows, mod 2^128.
    pub digest: u128,
}

impl Buckets {
    /// Whatever is found of a record of no live bucket, it does not exist.
    pub fn is_live(&self, bucket: u64) -> bool {
        self.live.contains_key(&bucket)
    }

    /// Records that exist.
    pub fn records(&self) -> u64 {
        self.live.values().map(|bucket| bucket.records).sum()
    }

    /// Judges operations that ask for so many values, in the order that DESIGN §7 gives: the record
    /// first, then the issue time, then the quota.
    pub fn judge<'a>(
        &self,
        limits: &Limits,
        time: TimeMs,
        (tag, issued, values): (Tag, TimeMs, usize),
        found: Option<&'a Record>,
    ) -> Verdict<'a> {
        if let Some(record) = found.filter(|record| self.is_live(record.bucket)) {
            let same = record.fingerprint == tag.fingerprint
                || Planted::FingerprintIgnored.is_in(limits.planted);
            // Equal requests ask for equally many values: else it is a chance collision.
            return match same && record.values.len() == values {
                true => Verdict::Replay(&record.values),
                false => Verdict::Refuse(TokenOutcome::Reused),
            };
        }
        if limits.is_too_old(time, issued) {
            return Verdict::Refuse(TokenOutcome::TooOld);
        }
        if self.records() >= limits.records_max {
            return Verdict::Refuse(TokenOutcome::Quota);
        }
        Verdict::Apply { bucket: limits.bucket(time, issued) }
    }

    /// A record was written. `share`: the hash of its row.
    pub fn add(&mut self, bucket: u64, share: u128) {
        let bucket = self.live.entry(bucket).or_default();
        bucket.records += 1;
        bucket.digest = bucket.digest.wrapping_add(share);
    }

    /// Applies an `expire` of this time.
    pub fn expire(&mut self, limits: &Limits, time: TimeMs, bucket: u64) {
        if limits.may_expire(bucket, time) {
            self.live.remove(&bucket);
        }
    }

    /// What a primary is to order, a bucket's length after it last did: each bucket that may be
    /// dropped, or else the oldest, which drops nothing but moves the shard's time. Nothing while
    /// there are no records.
    pub fn to_expire(&self, limits: &Limits, time: TimeMs) -> Vec<u64> {
        let due = |bucket: &&u64| limits.may_expire(**bucket, time);
        let due: Vec<u64> = self.live.keys().take_while(due).copied().collect();
        if due.is_empty() { self.live.keys().next().copied().into_iter().collect() } else { due }
    }

    /// Which buckets are over for good, in a state of this time.
    pub fn over(&self, limits: &Limits, time: TimeMs) -> Over {
        Over { before: limits.bucket(time, TimeMs(0)), live: self.live.keys().copied().collect() }
    }

    /// A hash of buckets, counts and digests: equal on all replicas at equal seq.
    pub fn digest(&self) -> u128 {
        let mut bytes = Vec::new();
        for (&bucket, Bucket { records, digest }) in &self.live {
            put_varint(&mut bytes, bucket);
            put_varint(&mut bytes, *records);
            bytes.extend_from_slice(&digest.to_le_bytes());
        }
        xxh3_128(&bytes)
    }
}

/// Buckets that no record of a shard will be in any more: rows of theirs may be removed from the disk.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Over {
    /// New records go into this bucket or later ones.
    before: u64,
    live: BTreeSet<u64>,
}

impl Over {
    /// No record of this bucket exists, nor ever will again. That the bucket is not live would not be enough: it may be
    /// one of a later state, whose rows are on the disk already.
    pub fn has(&self, bucket: u64) -> bool {
        bucket < self.before && !self.live.contains(&bucket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::OpKind;

    /// A bucket is a second.
    const LIMITS: Limits = Limits { window_ms: 6_000, records_max: 2, planted: None };

    #[track_caller]
    fn check_bucket(time: u64, issued: u64, want: u64) {
        assert_eq!(LIMITS.bucket(TimeMs(time), TimeMs(issued)), want);
    }

    #[test]
    fn a_record_is_as_old_as_the_later_of_entry_and_issue() {
        check_bucket(5_999, 0, 5);
        check_bucket(5_999, 9_000, 9);
        // A clock that is days ahead keeps a record for a day, no longer.
        check_bucket(1_000, u64::MAX, 86_401);
    }

    #[test]
    fn a_bucket_may_go_two_windows_after_its_end() {
        assert!(!LIMITS.may_expire(5, TimeMs(17_999)));
        assert!(LIMITS.may_expire(5, TimeMs(18_000)));
        assert!(!LIMITS.may_expire(u64::MAX, TimeMs(18_000)));
    }

    #[test]
    fn an_ineffective_expire_drops_nothing() {
        let mut buckets = Buckets::default();
        buckets.add(5, 1);
        buckets.expire(&LIMITS, TimeMs(17_999), 5);
        assert!(buckets.is_live(5));
        buckets.expire(&LIMITS, TimeMs(18_000), 4);
        assert!(buckets.is_live(5));
        buckets.expire(&LIMITS, TimeMs(18_000), 5);
        assert_eq!(buckets, Buckets::default());
    }

    #[test]
    fn a_bucket_is_over_if_it_is_not_live_and_can_get_no_record_any_more() {
        let mut buckets = Buckets::default();
        [5, 9].into_iter().for_each(|bucket| buckets.add(bucket, 1));
        let over = buckets.over(&LIMITS, TimeMs(7_999));
        let all: Vec<_> = (0..12).filter(|&bucket| over.has(bucket)).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, 6]);
        assert!(!Over::default().has(0));
    }

    #[test]
    fn what_may_go_is_ordered_or_else_the_oldest_to_move_the_time() {
        let mut buckets = Buckets::default();
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(99_000)), []);
        [5, 6, 9].into_iter().for_each(|bucket| buckets.add(bucket, 1));
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(0)), [5]);
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(19_000)), [5, 6]);
    }

    fn tag(fingerprint: u128) -> Tag {
        Tag { scope: Scope::Counter, hash: 1, fingerprint }
    }

    /// Operations that ask for one value, issued at 10 s, at this time and with this found.
    #[track_caller]
    fn check(buckets: &Buckets, time: u64, found: Option<&Record>, want: Verdict<'_>) {
        let asks = (tag(7), TimeMs(10_000), 1);
        assert_eq!(buckets.judge(&LIMITS, TimeMs(time), asks, found), want);
    }

    #[test]
    fn the_record_is_judged_before_the_issue_time_and_that_before_the_quota() {
        let mut buckets = Buckets::default();
        check(&buckets, 16_000, None, Verdict::Apply { bucket: 16 });
        check(&buckets, 16_001, None, Verdict::Refuse(TokenOutcome::TooOld));
        buckets.add(10, 1);
        let record = |bucket, fingerprint, values| Record { bucket, fingerprint, values };
        let first = record(10, 7, vec![5]);
        check(&buckets, 99_000, Some(&first), Verdict::Replay(&[5]));
        let reused = Verdict::Refuse(TokenOutcome::Reused);
        check(&buckets, 16_000, Some(&record(10, 8, vec![5])), reused.clone());
        check(&buckets, 16_000, Some(&record(10, 7, vec![])), reused);
        // A record of a dropped bucket is none.
        check(&buckets, 16_000, Some(&record(9, 8, vec![])), Verdict::Apply { bucket: 16 });
        buckets.add(11, 1);
        check(&buckets, 16_000, None, Verdict::Refuse(TokenOutcome::Quota));
        check(&buckets, 16_001, None, Verdict::Refuse(TokenOutcome::TooOld));
        check(&buckets, 16_000, Some(&first), Verdict::Replay(&[5]));
    }

    fn op(namespace: &str, key: &str, kind: OpKind) -> Op {
        let counter = CounterKey::new(namespace.as_bytes(), key.as_bytes());
        Op { counter: counter.expect("a short plain name"), kind }
    }

    #[test]
    fn a_record_is_per_counter_or_namespace_and_a_fingerprint_of_all_that_was_asked() {
        let token = |scope, token: &'static str, also| Token {
            scope,
            token: token.into(),
            issued: None,
            also,
        };
        let (one, many) = (Scope::Counter, Scope::Batch);
        let add = OpKind::Add { delta: 1 };
        let base = token(one, "t", 0).tag(&[op("n", "a", add)]).unwrap();
        let same_record =
            |other: Tag| (other.hash == base.hash, other.fingerprint == base.fingerprint);
        let tag = |token: Token, ops: &[Op]| same_record(token.tag(ops).unwrap());
        assert_eq!(tag(token(one, "t", 0), &[op("n", "a", add)]), (true, true));
        assert_eq!(tag(token(one, "u", 0), &[op("n", "a", add)]), (false, true));
        assert_eq!(tag(token(many, "t", 0), &[op("n", "a", add)]), (false, true));
        assert_eq!(tag(token(one, "t", 0), &[op("n", "b", add)]), (false, false));
        assert_eq!(tag(token(one, "t", 9), &[op("n", "a", add)]), (true, false));
        for kind in [OpKind::Add { delta: 2 }, OpKind::AddReturning { delta: 1 }, OpKind::Delete] {
            assert_eq!(tag(token(one, "t", 0), &[op("n", "a", kind)]), (true, false));
        }
        // Of a batch the namespace decides, and the order counts.
        let of = |ops: &[Op]| token(many, "t", 0).tag(ops).unwrap();
        let (a, b) = (op("n", "a", add), op("n", "b", add));
        assert_eq!(of(&[a.clone(), b.clone()]).hash, of(std::slice::from_ref(&b)).hash);
        assert_ne!(of(&[a.clone(), b.clone()]).fingerprint, of(&[b, a.clone()]).fingerprint);
        assert_ne!(of(&[a]).hash, of(&[op("m", "a", add)]).hash);
        assert_eq!(token(many, "t", 0).tag(&[]), None);
    }
}
