//! Exactly once, the client's half: what was done under a client's token (its `Idempotency-Key`),
//! and for how long that is remembered.
//!
//! ```text
//!   gateway  ClientToken ─▶ Tag{scope, hash, fingerprint} + issue time ─▶ the batch ─▶ the log
//!   apply    no record: effect + record, in one step · same tag: its result · other: reused
//!            no record and too long after the issue time: no effect
//!   shard    live buckets; `ExpireTokens` in the log drops one; a record outside of the live
//!            buckets does not exist
//! ```
//!
//! **Why a request never counts twice.** A request that states when it was issued (`Stated`) is
//! judged by that number and the shard's time alone: its record lies in the bucket of the later of
//! the two, a bucket lives until a window after its end, and a window after its issue time the
//! request is too old. So *record gone ⇒ too old*, for every shard time and for every value of any
//! clock.
//!
//! A request without an issue time gets the shard's time of its arrival (`Arrived`), which is a
//! later one at each attempt. Clients are promised that an attempt within a window of the first
//! counts once. It may be applied [`TokenLimits::in_flight_ms`] later, and is too old after that;
//! and shard time may pass 9/8 as fast as real time. So records stay for 9/8 of the window and that
//! much more. (With less, a late attempt finds its record gone and is applied again.) Shard time
//! may also *leap*, to catch up with the wall clock after the cluster was off: then a bucket's life
//! is prolonged by the whole leap, and a request that arrived before the leap is judged without it,
//! so that both age by time that has really passed.
//!
//! **Which namespace may use how much.** Records are limited by the bytes of their rows. A
//! namespace may add records while its records take at most [`SHARE`] times what is free, so a
//! single one may use four fifths, two may use four ninths each, and something is always left for
//! the others. Counts by namespace are bounded: a bucket counts its first `namespaces_max`
//! namespaces separately, and all others as one.
//!
//! Invariants:
//!   - everything here is judged from the log alone, so replicas agree: the settings are in
//!     `meta` and never change;
//!   - a bucket that was dropped never comes back: shard time does not go backwards, and a
//!     record's bucket is never before its entry's time.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::codec::{put_bytes, put_varint};
use crate::ids::{Slots, TimeMs};
use crate::ops::{self, Op};
use crate::planted::Planted;

pub use crate::token::{IssueTime, RecordId, Scope, Tag};

/// The records of a namespace may take this many times what is free.
pub const SHARE: u64 = 4;
/// The number of leaps that a shard remembers. Clocks would have to be set forward as often within
/// [`TokenLimits::in_flight_ms`] for a request to age by an earlier one.
const LEAPS_MAX: usize = 8;
/// The key of all namespaces that a bucket does not count separately.
const REST: u64 = 0;
/// The fixed parts of a record's row, at most: the key; format, bucket, fingerprint, length of
/// values.
const ROW_BYTES_MAX: u64 = 19 + 1 + 10 + 8 + 3;
/// The size of one value of a record, at most.
const VALUE_BYTES_MAX: u64 = 19;

/// A client's `Idempotency-Key`, as it came with a write request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClientToken {
    /// The kind of request: one operation, or a request of many.
    pub scope: Scope,
    /// The text between the quotes of the header.
    pub token: Bytes,
    /// The client's `Idempotency-Issued-At`; without one the shard's own time is taken.
    pub issued: Option<TimeMs>,
    /// A hash of the parts of the request that are in none of its operations, such as items that
    /// were refused as bad input; 0 without such parts. It goes into the fingerprint.
    pub extra: u64,
}

impl ClientToken {
    /// The tag of a request. `ops` is the whole request as the client gave it, nothing summed.
    /// `None` if it has no operation.
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
        let mut bytes = self.extra.to_le_bytes().to_vec();
        ops.iter().for_each(|op| ops::put(&mut bytes, op));
        Some(Tag { scope: self.scope, hash, fingerprint: xxh3_128(&bytes) })
    }
}

/// The record of what was done under a token: a row of the state.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TokenRecord {
    /// The bucket that the record lies in.
    pub bucket: u64,
    /// The lower half of [`Tag::fingerprint`].
    pub fingerprint: u64,
    /// One value for each of its operations that asks for one.
    pub values: Vec<i128>,
}

/// The outcome of operations with a token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TokenOutcome {
    /// Applied now, for the first time.
    Applied = 0,
    /// Applied before; the values are the ones of then.
    Replayed = 1,
    /// No effect: another request was done under this token.
    Reused = 2,
    /// This attempt has no effect. Whether an earlier one had is no longer known.
    TooOld = 3,
    /// No effect: the shard holds as many records as it may.
    Quota = 4,
}

impl TokenOutcome {
    /// The outcome with this number in messages and rows; `None` for an unknown number.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Applied, Self::Replayed, Self::Reused, Self::TooOld, Self::Quota]
            .into_iter()
            .find(|&outcome| outcome as u8 == byte)
    }

    /// Returns whether the operations have been applied, now or before.
    pub fn is_applied(self) -> bool {
        matches!(self, Self::Applied | Self::Replayed)
    }
}

/// The idempotency settings of a cluster, fixed when it is made and the same on every replica
/// (`meta`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TokenSettings {
    /// The time for which a token counts at least.
    pub window_ms: u64,
    /// The number of buckets in a window, which is how exactly records are dropped in time.
    pub buckets: u32,
    /// The bytes that the rows of all records of the cluster may take in one copy. A shard has its
    /// part of it by its slots.
    pub bytes_max: u64,
    /// The number of namespaces that a bucket counts separately.
    pub namespaces_max: u32,
}

impl Default for TokenSettings {
    /// Good for 42,000 requests a second of one namespace, spread over all shards.
    fn default() -> Self {
        Self { window_ms: 3_600_000, buckets: 16, bytes_max: 8 << 30, namespaces_max: 64 }
    }
}

impl TokenSettings {
    /// The number of requests a second of one namespace, spread over all counters, that find room
    /// for a record.
    pub fn requests_per_s(&self) -> u64 {
        const ROW_BYTES: u64 = 33;
        let limits = TokenLimits { settings: *self, planted: None };
        // The bucket itself, and as long again until the primary checks for old buckets.
        let life_ms = limits.retention_ms() + 2 * limits.bucket_ms();
        let bytes_per_s = u128::from(self.bytes_max) * 1_000 / u128::from(life_ms.max(1));
        (bytes_per_s * u128::from(SHARE) / u128::from(SHARE + 1)) as u64 / ROW_BYTES
    }

    /// The bytes that the records of these slots may take.
    pub fn bytes_max_of(&self, slots: Slots) -> u64 {
        let count = u128::from(slots.hi - slots.lo) + 1;
        ((u128::from(self.bytes_max) * count) >> 16) as u64
    }
}

/// The rules by which a shard judges tokens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TokenLimits {
    /// The cluster's settings.
    pub settings: TokenSettings,
    /// The planted bug, if any.
    pub planted: Option<Planted>,
}

impl TokenLimits {
    /// The length of a bucket, and so the interval at which a primary checks whether one is to be
    /// dropped.
    pub fn bucket_ms(&self) -> u64 {
        (self.settings.window_ms / u64::from(self.settings.buckets.max(1))).max(1)
    }

    /// A step of shard time that is larger than this is a leap: no record ages by it. A primary
    /// that slews makes smaller steps, as long as it orders an entry once in a bucket's length: 9/8
    /// of that.
    pub fn leap_ms(&self) -> u64 {
        let bucket = self.bucket_ms();
        bucket.saturating_add(bucket.div_ceil(2))
    }

    /// The time after its arrival at a gateway within which a request without a stated issue time
    /// may be applied. The first entry of a shard that was idle moves its time by up to a leap, by
    /// which a request ages that has just arrived; a quarter of that is for the age of the
    /// gateway's reading of the shard's time.
    pub fn in_flight_ms(&self) -> u64 {
        let (window, leap) = (self.settings.window_ms, self.leap_ms());
        (window / 8).max(window.min(120_000)).max(leap.saturating_add(leap / 4))
    }

    /// The time that a bucket lives after its end, leaps not counted.
    pub fn retention_ms(&self) -> u64 {
        let window = self.settings.window_ms;
        let kept = window.saturating_add(window.div_ceil(8)).saturating_add(self.in_flight_ms());
        if Planted::ExpireTooEarly.is_in(self.planted) { 0 } else { kept }
    }

    fn bucket(&self, time: TimeMs, issued: TimeMs) -> u64 {
        let mut issued = issued.0;
        if Planted::BucketIgnoresIssueTime.is_in(self.planted) {
            issued = 0;
        } else if Planted::IssueTimeClamped.is_in(self.planted) {
            issued = issued.min(time.0.saturating_add(24 * 3_600_000));
        }
        time.0.max(issued) / self.bucket_ms()
    }

    /// Returns whether an entry of this time may drop a bucket whose life was prolonged by so much.
    fn may_expire(&self, bucket: u64, prolonged_ms: u64, time: TimeMs) -> bool {
        let end = bucket.saturating_add(1).saturating_mul(self.bucket_ms());
        time.0 >= end.saturating_add(self.retention_ms()).saturating_add(prolonged_ms)
    }
}

/// Operations that a shard is asked to apply under a token.
#[derive(Clone, Copy, Debug)]
pub struct TokenedRequest<'a> {
    /// The token and the request.
    pub tag: Tag,
    /// When the request was issued.
    pub issued: IssueTime,
    /// The namespace of its counters.
    pub namespace: &'a [u8],
    /// The number of values that it asks for.
    pub values: usize,
}

/// The decision about operations of a tag.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TokenVerdict<'a> {
    /// Apply them, and record them in this bucket.
    Apply {
        /// The number of the bucket.
        bucket: u64,
    },
    /// The operations were applied before; these were the values.
    Replay(&'a [i128]),
    /// The operations have no effect, with this outcome.
    Refuse(TokenOutcome),
}

/// The existing records of one shard, by age. Replicated state: it changes only at apply.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Buckets {
    live: BTreeMap<u64, Bucket>,
    /// Leaps of shard time, oldest first: those after the arrival of a request that is not too old
    /// yet, [`LEAPS_MAX`] at most.
    leaps: Vec<Leap>,
    /// Bytes by namespace, over all buckets. This and the fields below are derived from `live`.
    used: BTreeMap<u64, u64>,
    bytes: u64,
    records: u64,
}

/// A step of shard time by which nothing ages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Leap {
    /// The shard's time before the step.
    pub from: TimeMs,
    /// The size of the step.
    pub step_ms: u64,
}

/// The sums over the records of one bucket.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Bucket {
    /// The number of records.
    pub records: u64,
    /// The bytes of their rows.
    pub bytes: u64,
    /// Σ of the hashes of its rows, mod 2^128.
    pub digest: u128,
    /// The time by which leaps of shard time have prolonged its life.
    pub prolonged_ms: u64,
    /// Bytes by the hash of the namespace; at [`REST`] those of all namespaces that are not counted
    /// separately.
    pub namespaces: BTreeMap<u64, u64>,
}

impl Bucket {
    /// The key under which the bucket counts a namespace.
    fn key_of(&self, namespace: u64, settings: &TokenSettings) -> u64 {
        let own = self.namespaces.len() - usize::from(self.namespaces.contains_key(&REST));
        let has_place = own < settings.namespaces_max as usize;
        if has_place || self.namespaces.contains_key(&namespace) { namespace } else { REST }
    }
}

/// The hash that stands for a namespace.
fn hash_of(namespace: &[u8]) -> u64 {
    xxh3_64(namespace).max(REST + 1)
}

impl Buckets {
    /// The buckets and leaps of a shard record.
    pub fn new(live: BTreeMap<u64, Bucket>, leaps: Vec<Leap>) -> Self {
        let mut buckets = Self::default();
        for bucket in live.values() {
            buckets.bytes = buckets.bytes.saturating_add(bucket.bytes);
            buckets.records = buckets.records.saturating_add(bucket.records);
            for (&namespace, &bytes) in &bucket.namespaces {
                let used = buckets.used.entry(namespace).or_default();
                *used = used.saturating_add(bytes);
            }
        }
        Self { live, leaps, ..buckets }
    }

    /// The live buckets by number.
    pub fn live(&self) -> &BTreeMap<u64, Bucket> {
        &self.live
    }

    /// Returns whether the records of this bucket exist. A row of a bucket that is not live does
    /// not count as a record.
    pub fn is_live(&self, bucket: u64) -> bool {
        self.live.contains_key(&bucket)
    }

    /// The number of records that exist.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// The bytes of their rows.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Judges operations with a token, in this order: the record first, then the issue time, then
    /// the quota. `time` is the time of the entry; `found` is the row of that record, if there is
    /// one.
    pub fn judge<'a>(
        &self,
        limits: &TokenLimits,
        (slots, time): (Slots, TimeMs),
        request: TokenedRequest<'_>,
        found: Option<&'a TokenRecord>,
    ) -> TokenVerdict<'a> {
        if let Some(record) = found.filter(|record| self.is_live(record.bucket)) {
            let same = record.fingerprint == request.tag.fingerprint as u64
                || Planted::FingerprintIgnored.is_in(limits.planted);
            // Equal requests ask for equally many values; anything else is a chance collision.
            return match same && record.values.len() == request.values {
                true => TokenVerdict::Replay(&record.values),
                false => TokenVerdict::Refuse(TokenOutcome::Reused),
            };
        }
        if self.is_too_old(limits, time, request.issued) {
            return TokenVerdict::Refuse(TokenOutcome::TooOld);
        }
        let bucket = limits.bucket(time, request.issued.time());
        let free = limits.settings.bytes_max_of(slots).saturating_sub(self.bytes);
        let needed = ROW_BYTES_MAX + VALUE_BYTES_MAX * request.values as u64;
        let held = self.held_by(limits, hash_of(request.namespace), bucket);
        let fair = Planted::ShareIgnored.is_in(limits.planted) || held / SHARE <= free;
        if needed > free || !fair {
            return TokenVerdict::Refuse(TokenOutcome::Quota);
        }
        TokenVerdict::Apply { bucket }
    }

    fn is_too_old(&self, limits: &TokenLimits, time: TimeMs, issued: IssueTime) -> bool {
        let too_old = match issued {
            IssueTime::Stated(issued) => {
                time.0 > issued.0.saturating_add(limits.settings.window_ms)
            }
            IssueTime::Arrived(arrived) => self.age_ms(arrived, time) > limits.in_flight_ms(),
        };
        too_old && !Planted::IssueTimeNotJudged.is_in(limits.planted)
    }

    /// The time that has passed between the two, leaps not counted.
    fn age_ms(&self, since: TimeMs, now: TimeMs) -> u64 {
        let leaps = self.leaps.iter().filter(|leap| leap.from >= since);
        let leapt = leaps.fold(0, |sum: u64, leap| sum.saturating_add(leap.step_ms));
        now.0.saturating_sub(since.0).saturating_sub(leapt)
    }

    /// The bytes of a namespace's records that would count in this bucket.
    fn held_by(&self, limits: &TokenLimits, namespace: u64, bucket: u64) -> u64 {
        let used = |key| self.used.get(&key).copied().unwrap_or(0);
        let key = self
            .live
            .get(&bucket)
            .map_or(namespace, |bucket| bucket.key_of(namespace, &limits.settings));
        used(namespace) + if key == REST { used(REST) } else { 0 }
    }

    /// Notes a record that was written. `share`: the hash of its row. `bytes`: the size of its row.
    pub fn add(
        &mut self,
        limits: &TokenLimits,
        namespace: &[u8],
        bucket: u64,
        (share, bytes): (u128, u64),
    ) {
        let bucket = self.live.entry(bucket).or_default();
        let key = bucket.key_of(hash_of(namespace), &limits.settings);
        bucket.count(share, bytes);
        *bucket.namespaces.entry(key).or_default() += bytes;
        *self.used.entry(key).or_default() += bytes;
        self.bytes += bytes;
        self.records += 1;
    }

    /// Notes that an entry moves shard time from `from` to `to`.
    pub fn advance_time(&mut self, limits: &TokenLimits, from: TimeMs, to: TimeMs) {
        let step = to.0.saturating_sub(from.0);
        if step <= limits.leap_ms() || Planted::LeapAgesRecords.is_in(limits.planted) {
            return;
        }
        // Later buckets hold only requests with a stated issue time, which the leap does not
        // concern.
        let now = from.0 / limits.bucket_ms();
        for bucket in self.live.range_mut(..=now).map(|(_, bucket)| bucket) {
            bucket.prolonged_ms = bucket.prolonged_ms.saturating_add(step);
        }
        self.leaps.push(Leap { from, step_ms: step });
        let remembered = |leap: &Leap| self.age_ms(leap.from, to) <= limits.in_flight_ms();
        let forgotten = self.leaps.iter().take_while(|leap| !remembered(leap)).count();
        self.leaps.drain(..forgotten.max(self.leaps.len().saturating_sub(LEAPS_MAX)));
    }

    /// The leaps that still count, oldest first.
    pub fn leaps(&self) -> &[Leap] {
        &self.leaps
    }

    /// Applies an `ExpireTokens` entry of this time. A bucket that may not be dropped yet stays.
    pub fn expire(&mut self, limits: &TokenLimits, time: TimeMs, bucket: u64) {
        let Some(found) = self.live.get(&bucket) else { return };
        if !limits.may_expire(bucket, found.prolonged_ms, time) {
            return;
        }
        let gone = self.live.remove(&bucket).expect("it was just found");
        self.bytes = self.bytes.saturating_sub(gone.bytes);
        self.records = self.records.saturating_sub(gone.records);
        for (namespace, bytes) in gone.namespaces {
            let used = self.used.entry(namespace).or_default();
            *used = used.saturating_sub(bytes);
            if *used == 0 {
                self.used.remove(&namespace);
            }
        }
    }

    /// The buckets for which a primary is to order an expiry, a bucket's length after it last did:
    /// each bucket that may be dropped, or else the oldest, which drops nothing but moves the
    /// shard's time. Empty while there are no records.
    pub fn to_expire(&self, limits: &TokenLimits, time: TimeMs) -> Vec<u64> {
        let due = |(number, bucket): &(&u64, &Bucket)| {
            limits.may_expire(**number, bucket.prolonged_ms, time)
        };
        let due: Vec<u64> = self.live.iter().filter(due).map(|(&number, _)| number).collect();
        if due.is_empty() { self.live.keys().next().copied().into_iter().collect() } else { due }
    }

    /// The buckets that are gone for good, in a state of this time.
    pub fn dropped(&self, limits: &TokenLimits, time: TimeMs) -> DroppedBuckets {
        DroppedBuckets {
            before: time.0 / limits.bucket_ms(),
            live: self.live.keys().copied().collect(),
        }
    }

    /// Returns whether the rows that were counted are those that should exist.
    pub fn matches(&self, counted: &BucketCounts) -> bool {
        self.live.len() == counted.0.len()
            && self.live.iter().zip(&counted.0).all(|((number, own), (theirs, rows))| {
                number == theirs
                    && (own.records, own.bytes, own.digest)
                        == (rows.records, rows.bytes, rows.digest)
                    && own.namespaces.values().sum::<u64>() == own.bytes
            })
    }

    /// A hash of all buckets and leaps: equal on all replicas at equal seq.
    pub fn digest(&self) -> u128 {
        let mut bytes = Vec::new();
        // The counts are hashed too; without them the fields of one kind could be read as those of
        // the other.
        put_varint(&mut bytes, self.leaps.len() as u64);
        for leap in &self.leaps {
            put_varint(&mut bytes, leap.from.0);
            put_varint(&mut bytes, leap.step_ms);
        }
        for (&number, bucket) in &self.live {
            put_varint(&mut bytes, number);
            put_varint(&mut bytes, bucket.records);
            put_varint(&mut bytes, bucket.bytes);
            put_varint(&mut bytes, bucket.prolonged_ms);
            bytes.extend_from_slice(&bucket.digest.to_le_bytes());
            put_varint(&mut bytes, bucket.namespaces.len() as u64);
            for (&namespace, &used) in &bucket.namespaces {
                bytes.extend_from_slice(&namespace.to_le_bytes());
                put_varint(&mut bytes, used);
            }
        }
        xxh3_128(&bytes)
    }
}

impl Bucket {
    fn count(&mut self, share: u128, bytes: u64) {
        self.records += 1;
        self.bytes += bytes;
        self.digest = self.digest.wrapping_add(share);
    }
}

/// The sums over rows of records, by bucket, to be compared with a shard's [`Buckets`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct BucketCounts(BTreeMap<u64, Bucket>);

impl BucketCounts {
    /// Counts a row of this bucket. `share`: its hash. `bytes`: its size.
    pub fn add(&mut self, bucket: u64, share: u128, bytes: u64) {
        self.0.entry(bucket).or_default().count(share, bytes);
    }
}

/// Buckets that no record of a shard will be in any more: their rows may be removed from the disk.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct DroppedBuckets {
    /// New records go into this bucket or later ones.
    before: u64,
    live: BTreeSet<u64>,
}

impl DroppedBuckets {
    /// Returns whether no record of this bucket exists, nor ever will again. That the bucket is not
    /// live would not be enough: it may be one of a later state, whose rows are on the disk
    /// already.
    pub fn contains(&self, bucket: u64) -> bool {
        bucket < self.before && !self.live.contains(&bucket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::CounterKey;
    use crate::ops::OpKind;

    /// A bucket is a second, an attempt may be in flight for 6 s, a bucket is kept for 12,750 ms.
    const LIMITS: TokenLimits = TokenLimits { settings: SETTINGS, planted: None };
    const SETTINGS: TokenSettings =
        TokenSettings { window_ms: 6_000, buckets: 6, bytes_max: 1_000, namespaces_max: 2 };

    #[track_caller]
    fn check_bucket(time: u64, issued: u64, want: u64) {
        assert_eq!(LIMITS.bucket(TimeMs(time), TimeMs(issued)), want);
    }

    #[test]
    fn a_record_is_as_old_as_the_later_of_entry_and_issue() {
        check_bucket(5_999, 0, 5);
        check_bucket(5_999, 9_000, 9);
        check_bucket(1_000, 216_000_000, 216_000);
    }

    #[test]
    fn a_bucket_may_go_when_no_attempt_within_the_window_can_come_any_more() {
        assert!(!LIMITS.may_expire(5, 0, TimeMs(18_749)));
        assert!(LIMITS.may_expire(5, 0, TimeMs(18_750)));
        assert!(!LIMITS.may_expire(5, 1, TimeMs(18_750)));
        assert!(!LIMITS.may_expire(u64::MAX, 0, TimeMs(18_750)));
        let hour = TokenLimits { settings: TokenSettings::default(), planted: None };
        assert_eq!(hour.in_flight_ms(), 450_000);
        assert_eq!(hour.retention_ms(), 3_600_000 + 450_000 + 450_000);
        // "Room for idempotency keys" in docs/operations.md states the same number.
        assert!((42_000..42_100).contains(&hour.settings.requests_per_s()));
    }

    /// Found in a story: after a shard had been idle for just less than a leap, a request that had
    /// just arrived was too old.
    #[test]
    fn no_step_but_a_leap_makes_a_request_too_old_that_has_just_come() {
        for window_ms in [10_000, 120_000, 600_000, 3_600_000, 604_800_000] {
            for buckets in [1, 2, 6, 16, 32, 1_000] {
                let settings = TokenSettings { window_ms, buckets, ..TokenSettings::default() };
                let limits = TokenLimits { settings, planted: None };
                let arrived_before = (window_ms / 8).min(1_000).min(limits.leap_ms() / 4);
                let time = TimeMs(1_800_000_000_000);
                let arrived =
                    IssueTime::Arrived(TimeMs(time.0 - limits.leap_ms() - arrived_before));
                assert!(!Buckets::default().is_too_old(&limits, time, arrived), "{settings:?}");
            }
        }
    }

    /// Records of one arbitrary namespace.
    fn of(buckets: impl IntoIterator<Item = u64>) -> Buckets {
        let mut all = Buckets::default();
        buckets.into_iter().for_each(|bucket| all.add(&LIMITS, b"n", bucket, (1, 40)));
        all
    }

    #[test]
    fn an_ineffective_expire_drops_nothing() {
        let mut buckets = of([5]);
        buckets.expire(&LIMITS, TimeMs(18_749), 5);
        assert!(buckets.is_live(5));
        buckets.expire(&LIMITS, TimeMs(18_750), 4);
        assert!(buckets.is_live(5));
        buckets.expire(&LIMITS, TimeMs(18_750), 5);
        assert_eq!(buckets, Buckets::default());
    }

    #[test]
    fn a_bucket_is_over_if_it_is_not_live_and_can_get_no_record_any_more() {
        let dropped = of([5, 9]).dropped(&LIMITS, TimeMs(7_999));
        let all: Vec<_> = (0..12).filter(|&bucket| dropped.contains(bucket)).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, 6]);
        assert!(!DroppedBuckets::default().contains(0));
    }

    #[test]
    fn what_may_go_is_ordered_or_else_the_oldest_to_move_the_time() {
        assert_eq!(Buckets::default().to_expire(&LIMITS, TimeMs(99_000)), []);
        let buckets = of([5, 6, 9]);
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(0)), [5]);
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(19_750)), [5, 6]);
    }

    /// Records made before the leap live on as long as without it; those of a later issue time need
    /// no more.
    #[test]
    fn no_record_ages_by_a_leap() {
        let mut buckets = of([4, 5, 6]);
        buckets.advance_time(&LIMITS, TimeMs(5_000), TimeMs(6_500));
        assert_eq!(buckets, of([4, 5, 6]));
        buckets.advance_time(&LIMITS, TimeMs(5_900), TimeMs(105_900));
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(105_900)), [6]);
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(118_749)), [4, 6]);
        buckets.expire(&LIMITS, TimeMs(118_749), 5);
        assert!(buckets.is_live(5));
        buckets.expire(&LIMITS, TimeMs(118_750), 5);
        assert!(!buckets.is_live(5));
    }

    /// Judges operations that ask for one value, issued at 10 s, at this time and with this record
    /// found.
    fn asked(issued: IssueTime, fingerprint: u128) -> TokenedRequest<'static> {
        let tag = Tag { scope: Scope::Counter, hash: 1, fingerprint };
        TokenedRequest { tag, issued, namespace: b"n", values: 1 }
    }

    #[track_caller]
    fn check(buckets: &Buckets, time: u64, found: Option<&TokenRecord>, want: TokenVerdict<'_>) {
        let asked = asked(IssueTime::Stated(TimeMs(10_000)), 7);
        assert_eq!(buckets.judge(&LIMITS, (Slots::ALL, TimeMs(time)), asked, found), want);
    }

    #[test]
    fn the_record_is_judged_before_the_issue_time_and_that_before_the_quota() {
        check(&Buckets::default(), 16_000, None, TokenVerdict::Apply { bucket: 16 });
        check(&Buckets::default(), 16_001, None, TokenVerdict::Refuse(TokenOutcome::TooOld));
        let buckets = of([10]);
        let record = |bucket, fingerprint, values| TokenRecord { bucket, fingerprint, values };
        let first = record(10, 7, vec![5]);
        check(&buckets, 99_000, Some(&first), TokenVerdict::Replay(&[5]));
        let reused = TokenVerdict::Refuse(TokenOutcome::Reused);
        check(&buckets, 16_000, Some(&record(10, 8, vec![5])), reused.clone());
        check(&buckets, 16_000, Some(&record(10, 7, vec![])), reused);
        // A record of a dropped bucket does not exist.
        check(&buckets, 16_000, Some(&record(9, 8, vec![])), TokenVerdict::Apply { bucket: 16 });
        let buckets = of([10; 24]);
        check(&buckets, 16_000, None, TokenVerdict::Refuse(TokenOutcome::Quota));
        check(&buckets, 16_001, None, TokenVerdict::Refuse(TokenOutcome::TooOld));
        check(&buckets, 16_000, Some(&first), TokenVerdict::Replay(&[5]));
    }

    /// Shard time catches up by a day while the request is in flight: the request did not take that
    /// long.
    #[test]
    fn a_request_does_not_age_by_leaps_of_shard_time() {
        let mut buckets = Buckets::default();
        let (undecided, day) = (LIMITS.in_flight_ms(), 86_400_000);
        let too_old = |buckets: &Buckets, arrived, now| {
            buckets.is_too_old(&LIMITS, TimeMs(now), IssueTime::Arrived(TimeMs(arrived)))
        };
        for n in 0..2 {
            let from = n * (day + 1_000) + 1_000;
            buckets.advance_time(&LIMITS, TimeMs(from), TimeMs(from + day));
        }
        let now = 2 * day + 2_000;
        assert!(!too_old(&buckets, 1_000, now + undecided - 1_000));
        assert!(too_old(&buckets, 1_000, now + undecided - 999));
        // Arrived between the two, and after both.
        assert!(!too_old(&buckets, day + 1_500, now + undecided - 500));
        assert!(too_old(&buckets, day + 1_500, now + undecided - 499));
        assert!(too_old(&buckets, now, now + undecided + 1));
        // No request that arrived before them can still be in time.
        let from = now + undecided + 1;
        buckets.advance_time(&LIMITS, TimeMs(from), TimeMs(from + day));
        assert_eq!(buckets.leaps(), [Leap { from: TimeMs(from), step_ms: day }]);
    }

    /// The judgement of a request depends on the leaps: replicas that differ in them would decide
    /// differently.
    #[test]
    fn the_digest_covers_leaps() {
        let leaps = [vec![], vec![(5, 7)], vec![(5, 8)], vec![(6, 7)], vec![(5, 7), (6, 7)]];
        let leap = |(from, step_ms)| Leap { from: TimeMs(from), step_ms };
        let of = |leaps: Vec<(u64, u64)>| {
            Buckets::new(BTreeMap::new(), leaps.into_iter().map(leap).collect()).digest()
        };
        let digests = BTreeSet::from(leaps.clone().map(of));
        assert_eq!(digests.len(), leaps.len());
    }

    #[test]
    fn the_newest_leaps_are_remembered_up_to_a_limit() {
        let mut buckets = Buckets::default();
        for n in 0..2 * LEAPS_MAX as u64 {
            buckets.advance_time(&LIMITS, TimeMs(n * 1_000_000), TimeMs((n + 1) * 1_000_000));
        }
        let first = buckets.leaps().first().map(|leap| leap.from);
        assert_eq!(buckets.leaps().len(), LEAPS_MAX);
        assert_eq!(first, Some(TimeMs(LEAPS_MAX as u64 * 1_000_000)));
    }

    #[test]
    fn without_a_stated_issue_time_a_request_is_too_old_when_it_was_undecided_for_long() {
        let hour = TokenLimits { settings: TokenSettings::default(), planted: None };
        let judge = |issued, time| {
            let buckets = Buckets::default();
            buckets.judge(&hour, (Slots::ALL, TimeMs(time)), asked(issued, 7), None)
        };
        let too_old = TokenVerdict::Refuse(TokenOutcome::TooOld);
        assert_ne!(judge(IssueTime::Arrived(TimeMs(10)), 450_010), too_old);
        assert_eq!(judge(IssueTime::Arrived(TimeMs(10)), 450_011), too_old);
        assert_ne!(judge(IssueTime::Stated(TimeMs(10)), 3_600_010), too_old);
        assert_eq!(judge(IssueTime::Stated(TimeMs(10)), 3_600_011), too_old);
    }

    /// Adds a record of the namespace, if it is accepted.
    fn take(buckets: &mut Buckets, limits: &TokenLimits, slots: Slots, namespace: &str) -> bool {
        let namespace = namespace.as_bytes();
        let asked = TokenedRequest { namespace, ..asked(IssueTime::Arrived(TimeMs(0)), 7) };
        let verdict = buckets.judge(limits, (slots, TimeMs(0)), asked, None);
        let TokenVerdict::Apply { bucket } = verdict else { return false };
        buckets.add(limits, namespace, bucket, (1, 50));
        true
    }

    /// Adds records of these namespaces in turn until none is accepted; returns the bytes of each.
    fn fill(limits: &TokenLimits, slots: Slots, namespaces: &[&str]) -> Vec<u64> {
        let mut buckets = Buckets::default();
        let mut held = vec![0; namespaces.len()];
        while namespaces.iter().zip(&mut held).fold(false, |any, (namespace, held)| {
            let taken = take(&mut buckets, limits, slots, namespace);
            *held += if taken { 50 } else { 0 };
            any | taken
        }) {}
        assert_eq!(buckets.bytes(), held.iter().sum::<u64>());
        held
    }

    #[test]
    fn something_is_left_for_another_namespace_however_many_there_are() {
        let settings = TokenSettings { bytes_max: 100_000, namespaces_max: 9, ..SETTINGS };
        let limits = TokenLimits { settings, planted: None };
        let near = |got: u64, want: u64| assert!(got.abs_diff(want) <= 200, "{got}, not {want}");
        near(fill(&limits, Slots::ALL, &["a"])[0], 80_000);
        fill(&limits, Slots::ALL, &["a", "b"]).into_iter().for_each(|held| near(held, 44_444));
        let held = fill(&limits, Slots::ALL, &["a", "b", "c", "d"]);
        near(held.iter().sum(), 100_000 - 100_000 / 17);
        // A quarter of the slots gets a quarter of the bytes.
        near(fill(&limits, Slots { lo: 0, hi: 0x3fff }, &["a"])[0], 20_000);
    }

    /// The counts by namespace have a bound, and the sums stay right.
    #[test]
    fn namespaces_without_a_place_of_their_own_are_counted_together() {
        let settings = TokenSettings { bytes_max: 100_000, ..SETTINGS };
        let limits = TokenLimits { settings, planted: None };
        let mut buckets = Buckets::default();
        let mut one = |namespace| take(&mut buckets, &limits, Slots::ALL, namespace);
        assert!(one("a") && one("b"));
        while one("c") {}
        assert!(!one("d") && !one("e"), "they share what \"c\" has filled");
        assert!(one("a") && one("b"));
        assert_eq!(buckets.live()[&0].namespaces.len(), 3);
        assert_eq!(Buckets::new(buckets.live().clone(), vec![]), buckets);
        let long_after = TimeMs(u64::MAX);
        buckets.expire(&limits, long_after, 0);
        assert_eq!(buckets, Buckets::default());
    }

    fn op(namespace: &str, key: &str, kind: OpKind) -> Op {
        let counter = CounterKey::new(namespace.as_bytes(), key.as_bytes());
        Op { counter: counter.expect("a short plain name"), kind }
    }

    #[test]
    fn a_record_is_per_counter_or_namespace_and_a_fingerprint_of_all_that_was_asked() {
        let token = |scope, token: &'static str, extra| ClientToken {
            scope,
            token: token.into(),
            issued: None,
            extra,
        };
        let (one, many) = (Scope::Counter, Scope::Batch);
        let add = OpKind::Add { delta: 1 };
        let base = token(one, "t", 0).tag(&[op("n", "a", add)]).unwrap();
        let same_record =
            |other: Tag| (other.hash == base.hash, other.fingerprint == base.fingerprint);
        let tag = |token: ClientToken, ops: &[Op]| same_record(token.tag(ops).unwrap());
        assert_eq!(tag(token(one, "t", 0), &[op("n", "a", add)]), (true, true));
        assert_eq!(tag(token(one, "u", 0), &[op("n", "a", add)]), (false, true));
        assert_eq!(tag(token(many, "t", 0), &[op("n", "a", add)]), (false, true));
        assert_eq!(tag(token(one, "t", 0), &[op("n", "b", add)]), (false, false));
        assert_eq!(tag(token(one, "t", 9), &[op("n", "a", add)]), (true, false));
        for kind in [OpKind::Add { delta: 2 }, OpKind::AddReturning { delta: 1 }, OpKind::Delete] {
            assert_eq!(tag(token(one, "t", 0), &[op("n", "a", kind)]), (true, false));
        }
        // For a batch the namespace decides, and the order counts.
        let of = |ops: &[Op]| token(many, "t", 0).tag(ops).unwrap();
        let (a, b) = (op("n", "a", add), op("n", "b", add));
        assert_eq!(of(&[a.clone(), b.clone()]).hash, of(std::slice::from_ref(&b)).hash);
        assert_ne!(of(&[a.clone(), b.clone()]).fingerprint, of(&[b, a.clone()]).fingerprint);
        assert_ne!(of(&[a]).hash, of(&[op("m", "a", add)]).hash);
        assert_eq!(token(many, "t", 0).tag(&[]), None);
    }
}
