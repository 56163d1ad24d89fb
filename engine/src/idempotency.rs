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
//! **Why a request never counts twice.** A request that says when it was issued (`Stated`) is judged
//! by that number and the shard's time alone: its record lies in the bucket of the later of the two,
//! a bucket lives until a window after its end, and a window after its issue time the request is too
//! old. So *record gone ⇒ too old*, for every shard time and whatever any clock says.
//!
//! A request without one gets the shard's time of its arrival (`Heard`), a later one at each attempt.
//! Clients are promised that an attempt within a window of the first counts once. It may be applied
//! [`Limits::undecided_ms`] later, and is too old after that; and shard time may pass 9/8 as fast as
//! real time. So records stay for 9/8 of the window and that much more. (`model-sessions`, idem.rs,
//! shows what goes wrong with less.) Shard time may also *leap*, to catch up with the wall clock after
//! the cluster was off: then a bucket's life is prolonged by the whole leap, and a request that was
//! heard before it is judged without it, so that both age by time that has really passed.
//!
//! **Who may take how much.** Records are limited by the bytes of their rows. A namespace may take
//! more while what it holds is at most [`SHARE`] times what is free, so a single one may hold four
//! fifths, two hold four ninths each, and something is always left for the others. Counts by
//! namespace are bounded: a bucket counts its first `namespaces_max` each by itself, and all others
//! as one.
//!
//! Invariants:
//!   - everything here is judged from the log alone, so replicas agree: the settings stand in `meta`
//!     and never change;
//!   - a bucket that was dropped never comes back: shard time does not go backwards, and a record's
//!     bucket is never before its entry's time.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::codec::{put_bytes, put_varint};
use crate::ids::{Slot, Slots, TimeMs};
use crate::key::CounterKey;
use crate::ops::{self, Op};
use crate::planted::Planted;

/// A namespace may hold this many times what is free.
pub const SHARE: u64 = 4;
/// Leaps that a shard remembers. Clocks would have to be set forward as often within
/// [`Limits::undecided_ms`] for a request to age by an earlier one.
const LEAPS_MAX: usize = 8;
/// All namespaces of a bucket that are not counted each by itself.
const REST: u64 = 0;
/// Fixed parts of a record's row, at most: the key; format, bucket, fingerprint, length of values.
const ROW_BYTES_MAX: u64 = 19 + 1 + 10 + 8 + 3;
/// A value of a record, at most.
const VALUE_BYTES_MAX: u64 = 19;

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
    /// A request of many: recorded under (namespace, token) in its *home*, the shard of
    /// [`Tag::home`], before it is sent to any other, and then in each that it touches. Each
    /// shard's part is applied or replayed as a whole.
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

/// When a request was issued.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IssueTime {
    /// As the client says in each of its attempts, by its own clock.
    Stated(TimeMs),
    /// This attempt came to its gateway then, in the shard's time or before.
    Heard(TimeMs),
}

impl IssueTime {
    pub fn time(self) -> TimeMs {
        match self {
            Self::Stated(time) | Self::Heard(time) => time,
        }
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
    /// The counter whose shard decides which request has the token: of two requests of many under one token, the second
    /// one finds the first one's record there, whatever shards the two touch. Nothing is ever added to the counter.
    pub fn home(&self, namespace: &[u8]) -> Option<CounterKey> {
        CounterKey::new(namespace, &self.hash.to_le_bytes()).ok()
    }

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
    pub fingerprint: u64,
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
pub struct Settings {
    /// For how long a token counts at least.
    pub window_ms: u64,
    /// Buckets to a window: how exactly records are dropped in time.
    pub buckets: u32,
    /// What the rows of all records of the cluster may take in one copy. A shard has its part of it
    /// by its slots.
    pub bytes_max: u64,
    /// Namespaces that a bucket counts each by itself.
    pub namespaces_max: u32,
}

impl Default for Settings {
    /// Good for 42,000 requests a second of one namespace, spread over all shards.
    fn default() -> Self {
        Self { window_ms: 3_600_000, buckets: 16, bytes_max: 8 << 30, namespaces_max: 64 }
    }
}

impl Settings {
    /// How many requests a second of one namespace, spread over all counters, find room for a record.
    pub fn requests_per_s(&self) -> u64 {
        const ROW_BYTES: u64 = 33;
        let limits = Limits { settings: *self, planted: None };
        // The bucket itself, and as long again until a primary looks.
        let life_ms = limits.kept_ms() + 2 * limits.bucket_ms();
        let bytes_per_s = u128::from(self.bytes_max) * 1_000 / u128::from(life_ms.max(1));
        (bytes_per_s * u128::from(SHARE) / u128::from(SHARE + 1)) as u64 / ROW_BYTES
    }

    /// What the records of these slots may take, in bytes.
    pub fn bytes_max_of(&self, slots: Slots) -> u64 {
        let count = u128::from(slots.hi - slots.lo) + 1;
        ((u128::from(self.bytes_max) * count) >> 16) as u64
    }
}

/// The rules by which a shard judges.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    pub settings: Settings,
    pub planted: Option<Planted>,
}

impl Limits {
    /// How long a bucket is, and so how often a primary looks whether one is to be dropped.
    pub fn bucket_ms(&self) -> u64 {
        (self.settings.window_ms / u64::from(self.settings.buckets.max(1))).max(1)
    }

    /// A step of shard time that is larger is a leap: no record ages by it. So a primary that slews
    /// makes smaller ones, as long as it orders an entry once in a bucket's length: 9/8 of that.
    pub fn leap_ms(&self) -> u64 {
        let bucket = self.bucket_ms();
        bucket.saturating_add(bucket.div_ceil(2))
    }

    /// How long after it came to a gateway a request without a stated issue time may be applied. The first entry of a shard
    /// that was idle moves its time by up to a leap, by which a request ages that has just come; a quarter of that is for
    /// how old the gateway's reading of the shard's time is.
    pub fn undecided_ms(&self) -> u64 {
        let (window, leap) = (self.settings.window_ms, self.leap_ms());
        (window / 8).max(window.min(120_000)).max(leap.saturating_add(leap / 4))
    }

    /// How long a bucket lives after its end, leaps not counted.
    pub fn kept_ms(&self) -> u64 {
        let window = self.settings.window_ms;
        let kept = window.saturating_add(window.div_ceil(8)).saturating_add(self.undecided_ms());
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

    /// An entry of this time may drop a bucket whose life was prolonged by so much.
    fn may_expire(&self, bucket: u64, prolonged_ms: u64, time: TimeMs) -> bool {
        let end = bucket.saturating_add(1).saturating_mul(self.bucket_ms());
        time.0 >= end.saturating_add(self.kept_ms()).saturating_add(prolonged_ms)
    }
}

/// What is asked of a shard under a token.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    pub tag: Tag,
    pub issued: IssueTime,
    pub namespace: &'a [u8],
    /// How many values.
    pub values: usize,
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
    live: BTreeMap<u64, Bucket>,
    /// Leaps of shard time, oldest first: those that a request may have been heard before that is
    /// not too old yet, [`LEAPS_MAX`] at most.
    leaps: Vec<Leap>,
    /// Bytes by namespace, over all buckets. What follows is derived from `live`.
    used: BTreeMap<u64, u64>,
    bytes: u64,
    records: u64,
}

/// A step of shard time by which nothing ages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Leap {
    pub from: TimeMs,
    pub step_ms: u64,
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Bucket {
    pub records: u64,
    /// Of their rows.
    pub bytes: u64,
    /// Σ of the hashes of its rows, mod 2^128.
    pub digest: u128,
    /// By how much leaps of shard time have prolonged its life.
    pub prolonged_ms: u64,
    /// Bytes by the hash of the namespace; at [`REST`] those of all namespaces that have no place.
    pub namespaces: BTreeMap<u64, u64>,
}

impl Bucket {
    /// Under which key it counts a namespace.
    fn key_of(&self, namespace: u64, settings: &Settings) -> u64 {
        let own = self.namespaces.len() - usize::from(self.namespaces.contains_key(&REST));
        let has_place = own < settings.namespaces_max as usize;
        if has_place || self.namespaces.contains_key(&namespace) { namespace } else { REST }
    }
}

/// What stands for a namespace.
fn hash_of(namespace: &[u8]) -> u64 {
    xxh3_64(namespace).max(REST + 1)
}

impl Buckets {
    /// As they stand in the state.
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

    pub fn live(&self) -> &BTreeMap<u64, Bucket> {
        &self.live
    }

    /// Whatever is found of a record of no live bucket, it does not exist.
    pub fn is_live(&self, bucket: u64) -> bool {
        self.live.contains_key(&bucket)
    }

    /// Records that exist.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// What their rows take.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Judges operations with a token, in the order that DESIGN §7 gives: the record first, then the
    /// issue time, then the quota.
    pub fn judge<'a>(
        &self,
        limits: &Limits,
        (slots, time): (Slots, TimeMs),
        asked: Asked<'_>,
        found: Option<&'a Record>,
    ) -> Verdict<'a> {
        if let Some(record) = found.filter(|record| self.is_live(record.bucket)) {
            let same = record.fingerprint == asked.tag.fingerprint as u64
                || Planted::FingerprintIgnored.is_in(limits.planted);
            // Equal requests ask for equally many values: else it is a chance collision.
            return match same && record.values.len() == asked.values {
                true => Verdict::Replay(&record.values),
                false => Verdict::Refuse(TokenOutcome::Reused),
            };
        }
        if self.is_too_old(limits, time, asked.issued) {
            return Verdict::Refuse(TokenOutcome::TooOld);
        }
        let bucket = limits.bucket(time, asked.issued.time());
        let free = limits.settings.bytes_max_of(slots).saturating_sub(self.bytes);
        let needed = ROW_BYTES_MAX + VALUE_BYTES_MAX * asked.values as u64;
        let held = self.held_by(limits, hash_of(asked.namespace), bucket);
        let fair = Planted::ShareIgnored.is_in(limits.planted) || held / SHARE <= free;
        if needed > free || !fair {
            return Verdict::Refuse(TokenOutcome::Quota);
        }
        Verdict::Apply { bucket }
    }

    fn is_too_old(&self, limits: &Limits, time: TimeMs, issued: IssueTime) -> bool {
        let too_old = match issued {
            IssueTime::Stated(issued) => {
                time.0 > issued.0.saturating_add(limits.settings.window_ms)
            }
            IssueTime::Heard(heard) => self.age_ms(heard, time) > limits.undecided_ms(),
        };
        too_old && !Planted::IssueTimeNotJudged.is_in(limits.planted)
    }

    /// How much time has passed between the two, leaps not counted.
    fn age_ms(&self, since: TimeMs, now: TimeMs) -> u64 {
        let leaps = self.leaps.iter().filter(|leap| leap.from >= since);
        let leapt = leaps.fold(0, |sum: u64, leap| sum.saturating_add(leap.step_ms));
        now.0.saturating_sub(since.0).saturating_sub(leapt)
    }

    /// What a namespace holds that would count in this bucket.
    fn held_by(&self, limits: &Limits, namespace: u64, bucket: u64) -> u64 {
        let used = |key| self.used.get(&key).copied().unwrap_or(0);
        let key = self
            .live
            .get(&bucket)
            .map_or(namespace, |bucket| bucket.key_of(namespace, &limits.settings));
        used(namespace) + if key == REST { used(REST) } else { 0 }
    }

    /// A record was written. `share`: the hash of its row. `bytes`: what the row takes.
    pub fn add(
        &mut self,
        limits: &Limits,
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

    /// An entry moves shard time from here to there.
    pub fn pass(&mut self, limits: &Limits, from: TimeMs, to: TimeMs) {
        let step = to.0.saturating_sub(from.0);
        if step <= limits.leap_ms() || Planted::LeapAgesRecords.is_in(limits.planted) {
            return;
        }
        // Later buckets hold requests with a stated issue time alone: to them the leap is nothing.
        let now = from.0 / limits.bucket_ms();
        for bucket in self.live.range_mut(..=now).map(|(_, bucket)| bucket) {
            bucket.prolonged_ms = bucket.prolonged_ms.saturating_add(step);
        }
        self.leaps.push(Leap { from, step_ms: step });
        let remembered = |leap: &Leap| self.age_ms(leap.from, to) <= limits.undecided_ms();
        let forgotten = self.leaps.iter().take_while(|leap| !remembered(leap)).count();
        self.leaps.drain(..forgotten.max(self.leaps.len().saturating_sub(LEAPS_MAX)));
    }

    /// The leaps that still count, oldest first.
    pub fn leaps(&self) -> &[Leap] {
        &self.leaps
    }

    /// Applies an `expire` of this time.
    pub fn expire(&mut self, limits: &Limits, time: TimeMs, bucket: u64) {
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

    /// What a primary is to order, a bucket's length after it last did: each bucket that may be
    /// dropped, or else the oldest, which drops nothing but moves the shard's time. Nothing while
    /// there are no records.
    pub fn to_expire(&self, limits: &Limits, time: TimeMs) -> Vec<u64> {
        let due = |(number, bucket): &(&u64, &Bucket)| {
            limits.may_expire(**number, bucket.prolonged_ms, time)
        };
        let due: Vec<u64> = self.live.iter().filter(due).map(|(&number, _)| number).collect();
        if due.is_empty() { self.live.keys().next().copied().into_iter().collect() } else { due }
    }

    /// Which buckets are over for good, in a state of this time.
    pub fn over(&self, limits: &Limits, time: TimeMs) -> Over {
        Over { before: time.0 / limits.bucket_ms(), live: self.live.keys().copied().collect() }
    }

    /// Whether rows that were counted (see [`Counted`]) are those that should exist.
    pub fn agrees(&self, counted: &Counted) -> bool {
        self.live.len() == counted.0.len()
            && self.live.iter().zip(&counted.0).all(|((number, own), (theirs, rows))| {
                number == theirs
                    && (own.records, own.bytes, own.digest)
                        == (rows.records, rows.bytes, rows.digest)
                    && own.namespaces.values().sum::<u64>() == own.bytes
            })
    }

    /// A hash of all this: equal on all replicas at equal seq.
    pub fn digest(&self) -> u128 {
        let mut bytes = Vec::new();
        // How many there are, too: else the fields of one kind could be read as those of the other.
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

/// Rows of records, counted by bucket: all that rows tell of a shard's [`Buckets`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Counted(BTreeMap<u64, Bucket>);

impl Counted {
    /// A row of this bucket. `share`: its hash. `bytes`: what it takes.
    pub fn add(&mut self, bucket: u64, share: u128, bytes: u64) {
        self.0.entry(bucket).or_default().count(share, bytes);
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

    /// A bucket is a second, an attempt may be undecided for 6 s, a bucket is kept for 12,750 ms.
    const LIMITS: Limits = Limits { settings: SETTINGS, planted: None };
    const SETTINGS: Settings =
        Settings { window_ms: 6_000, buckets: 6, bytes_max: 1_000, namespaces_max: 2 };

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
        let hour = Limits { settings: Settings::default(), planted: None };
        assert_eq!(hour.undecided_ms(), 450_000);
        assert_eq!(hour.kept_ms(), 3_600_000 + 450_000 + 450_000);
        // README and "Size" in docs/operations.md say so.
        assert!((42_000..42_100).contains(&hour.settings.requests_per_s()));
    }

    /// Story: after a shard had been idle for just less than a leap, a request that had just come was too old.
    #[test]
    fn no_step_but_a_leap_makes_a_request_too_old_that_has_just_come() {
        for window_ms in [10_000, 120_000, 600_000, 3_600_000, 604_800_000] {
            for buckets in [1, 2, 6, 16, 32, 1_000] {
                let settings = Settings { window_ms, buckets, ..Settings::default() };
                let limits = Limits { settings, planted: None };
                let heard_before = (window_ms / 8).min(1_000).min(limits.leap_ms() / 4);
                let time = TimeMs(1_800_000_000_000);
                let heard = IssueTime::Heard(TimeMs(time.0 - limits.leap_ms() - heard_before));
                assert!(!Buckets::default().is_too_old(&limits, time, heard), "{settings:?}");
            }
        }
    }

    /// Records of no namespace in particular.
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
        let over = of([5, 9]).over(&LIMITS, TimeMs(7_999));
        let all: Vec<_> = (0..12).filter(|&bucket| over.has(bucket)).collect();
        assert_eq!(all, [0, 1, 2, 3, 4, 6]);
        assert!(!Over::default().has(0));
    }

    #[test]
    fn what_may_go_is_ordered_or_else_the_oldest_to_move_the_time() {
        assert_eq!(Buckets::default().to_expire(&LIMITS, TimeMs(99_000)), []);
        let buckets = of([5, 6, 9]);
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(0)), [5]);
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(19_750)), [5, 6]);
    }

    /// Records made before the leap live on as long as if there had been none; those of a later issue
    /// time need no more.
    #[test]
    fn no_record_ages_by_a_leap() {
        let mut buckets = of([4, 5, 6]);
        buckets.pass(&LIMITS, TimeMs(5_000), TimeMs(6_500));
        assert_eq!(buckets, of([4, 5, 6]));
        buckets.pass(&LIMITS, TimeMs(5_900), TimeMs(105_900));
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(105_900)), [6]);
        assert_eq!(buckets.to_expire(&LIMITS, TimeMs(118_749)), [4, 6]);
        buckets.expire(&LIMITS, TimeMs(118_749), 5);
        assert!(buckets.is_live(5));
        buckets.expire(&LIMITS, TimeMs(118_750), 5);
        assert!(!buckets.is_live(5));
    }

    /// Operations that ask for one value, issued at 10 s, at this time and with this found.
    fn asked(issued: IssueTime, fingerprint: u128) -> Asked<'static> {
        let tag = Tag { scope: Scope::Counter, hash: 1, fingerprint };
        Asked { tag, issued, namespace: b"n", values: 1 }
    }

    #[track_caller]
    fn check(buckets: &Buckets, time: u64, found: Option<&Record>, want: Verdict<'_>) {
        let asked = asked(IssueTime::Stated(TimeMs(10_000)), 7);
        assert_eq!(buckets.judge(&LIMITS, (Slots::ALL, TimeMs(time)), asked, found), want);
    }

    #[test]
    fn the_record_is_judged_before_the_issue_time_and_that_before_the_quota() {
        check(&Buckets::default(), 16_000, None, Verdict::Apply { bucket: 16 });
        check(&Buckets::default(), 16_001, None, Verdict::Refuse(TokenOutcome::TooOld));
        let buckets = of([10]);
        let record = |bucket, fingerprint, values| Record { bucket, fingerprint, values };
        let first = record(10, 7, vec![5]);
        check(&buckets, 99_000, Some(&first), Verdict::Replay(&[5]));
        let reused = Verdict::Refuse(TokenOutcome::Reused);
        check(&buckets, 16_000, Some(&record(10, 8, vec![5])), reused.clone());
        check(&buckets, 16_000, Some(&record(10, 7, vec![])), reused);
        // A record of a dropped bucket is none.
        check(&buckets, 16_000, Some(&record(9, 8, vec![])), Verdict::Apply { bucket: 16 });
        let buckets = of([10; 24]);
        check(&buckets, 16_000, None, Verdict::Refuse(TokenOutcome::Quota));
        check(&buckets, 16_001, None, Verdict::Refuse(TokenOutcome::TooOld));
        check(&buckets, 16_000, Some(&first), Verdict::Replay(&[5]));
    }

    /// Shard time catches up by a day while the request is on its way: it did not take that long.
    #[test]
    fn a_request_does_not_age_by_leaps_of_shard_time() {
        let mut buckets = Buckets::default();
        let (undecided, day) = (LIMITS.undecided_ms(), 86_400_000);
        let too_old = |buckets: &Buckets, heard, now| {
            buckets.is_too_old(&LIMITS, TimeMs(now), IssueTime::Heard(TimeMs(heard)))
        };
        for n in 0..2 {
            let from = n * (day + 1_000) + 1_000;
            buckets.pass(&LIMITS, TimeMs(from), TimeMs(from + day));
        }
        let now = 2 * day + 2_000;
        assert!(!too_old(&buckets, 1_000, now + undecided - 1_000));
        assert!(too_old(&buckets, 1_000, now + undecided - 999));
        // Heard between the two, and after both.
        assert!(!too_old(&buckets, day + 1_500, now + undecided - 500));
        assert!(too_old(&buckets, day + 1_500, now + undecided - 499));
        assert!(too_old(&buckets, now, now + undecided + 1));
        // No request that was heard before them can still be in time.
        let from = now + undecided + 1;
        buckets.pass(&LIMITS, TimeMs(from), TimeMs(from + day));
        assert_eq!(buckets.leaps(), [Leap { from: TimeMs(from), step_ms: day }]);
    }

    /// Whether a request is too old depends on them: replicas that differ in them would decide differently.
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
            buckets.pass(&LIMITS, TimeMs(n * 1_000_000), TimeMs((n + 1) * 1_000_000));
        }
        let first = buckets.leaps().first().map(|leap| leap.from);
        assert_eq!(buckets.leaps().len(), LEAPS_MAX);
        assert_eq!(first, Some(TimeMs(LEAPS_MAX as u64 * 1_000_000)));
    }

    #[test]
    fn without_a_stated_issue_time_a_request_is_too_old_when_it_was_undecided_for_long() {
        let hour = Limits { settings: Settings::default(), planted: None };
        let judge = |issued, time| {
            let buckets = Buckets::default();
            buckets.judge(&hour, (Slots::ALL, TimeMs(time)), asked(issued, 7), None)
        };
        let too_old = Verdict::Refuse(TokenOutcome::TooOld);
        assert_ne!(judge(IssueTime::Heard(TimeMs(10)), 450_010), too_old);
        assert_eq!(judge(IssueTime::Heard(TimeMs(10)), 450_011), too_old);
        assert_ne!(judge(IssueTime::Stated(TimeMs(10)), 3_600_010), too_old);
        assert_eq!(judge(IssueTime::Stated(TimeMs(10)), 3_600_011), too_old);
    }

    /// A record of the namespace, if it is taken.
    fn take(buckets: &mut Buckets, limits: &Limits, slots: Slots, namespace: &str) -> bool {
        let namespace = namespace.as_bytes();
        let asked = Asked { namespace, ..asked(IssueTime::Heard(TimeMs(0)), 7) };
        let verdict = buckets.judge(limits, (slots, TimeMs(0)), asked, None);
        let Verdict::Apply { bucket } = verdict else { return false };
        buckets.add(limits, namespace, bucket, (1, 50));
        true
    }

    /// Fills up with records of these namespaces in turn until none is taken: the bytes of each.
    fn fill(limits: &Limits, slots: Slots, namespaces: &[&str]) -> Vec<u64> {
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
        let settings = Settings { bytes_max: 100_000, namespaces_max: 9, ..SETTINGS };
        let limits = Limits { settings, planted: None };
        let near = |got: u64, want: u64| assert!(got.abs_diff(want) <= 200, "{got}, not {want}");
        near(fill(&limits, Slots::ALL, &["a"])[0], 80_000);
        fill(&limits, Slots::ALL, &["a", "b"]).into_iter().for_each(|held| near(held, 44_444));
        let held = fill(&limits, Slots::ALL, &["a", "b", "c", "d"]);
        near(held.iter().sum(), 100_000 - 100_000 / 17);
        // A quarter of the slots has a quarter of it all.
        near(fill(&limits, Slots { lo: 0, hi: 0x3fff }, &["a"])[0], 20_000);
    }

    /// What is kept of namespaces has a bound, and the sums stay right.
    #[test]
    fn namespaces_without_a_place_of_their_own_are_counted_together() {
        let settings = Settings { bytes_max: 100_000, ..SETTINGS };
        let limits = Limits { settings, planted: None };
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
