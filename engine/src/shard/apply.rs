//! Applying an entry: the pure function that every replica runs over the committed log.
//!
//! This module decides whether a batch is a duplicate or malformed, and which values its operations
//! return, in log order and from nothing but the log. So replicas can't disagree, and truncating
//! the log needs no undo.
//!
//! Applying has two steps, since some operations need a counter's value or a client's record, which
//! may be on disk: [`needs`] names what to load, [`apply`] takes what was loaded. The content of
//! the tables is added inside `apply`, so a loaded value stays right however long it waits, as long
//! as no ingest has moved table content below it.

use std::collections::BTreeMap;

use crate::entry::{Body, Entry};
use crate::ids::{Slot, Slots, TimeMs};
use crate::key::{self, CounterKey};
use crate::memory;
use crate::message::BatchReply;
use crate::ops::{self, OpKind, OpRef, Ops, OpsError, OpsIter, TokenedOps};
use crate::planted::Planted;
use crate::shard::digest;
use crate::shard::idempotency::{
    RecordId, Scope, TokenLimits, TokenOutcome, TokenRecord, TokenVerdict, TokenedRequest,
};
use crate::shard::sessions::{BatchResult, Judgement};
use crate::shard::state::ShardState;
use crate::store::layout;
use crate::store::table::{PREFETCHED, Tables};

/// Values of counters in the state on disk, below the tables.
pub type Values = BTreeMap<CounterKey, i128>;

/// The rows to load from the state before an entry can be applied, each once.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Needs {
    /// Counters whose value an operation needs.
    pub counters: Vec<CounterKey>,
    /// Idempotency records of the entry's tokens.
    pub records: Vec<RecordId>,
}

/// The rows that were loaded for an entry. A record of a dropped bucket may be among them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Loaded {
    /// Values of counters; a counter that is absent is 0.
    pub values: Values,
    /// Idempotency records; one that is absent was not in the state.
    pub records: BTreeMap<RecordId, TokenRecord>,
}

impl Needs {
    /// Bytes of memory in use, without the names, which belong to the entry.
    pub fn bytes(&self) -> usize {
        memory::allocated(self.counters.capacity() * size_of::<CounterKey>())
            + memory::allocated(self.records.capacity() * size_of::<RecordId>())
    }
}

impl Loaded {
    /// Bytes of memory in use, without the names, which belong to the entry.
    pub fn bytes(&self) -> usize {
        let values =
            |record: &TokenRecord| memory::allocated(size_of_val(record.values.as_slice()));
        memory::of_map::<CounterKey, i128>(self.values.len())
            + memory::of_map::<RecordId, TokenRecord>(self.records.len())
            + self.records.values().map(values).sum::<usize>()
    }
}

/// An entry's ops, decoded once.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Decoded {
    /// An entry without operations.
    #[default]
    NoOps,
    /// The operations of an `ops` entry.
    Ops(Ops),
    /// An intact batch that can't be decoded: applied as "no effect" on every replica alike.
    Malformed,
}

impl Decoded {
    /// Returns whether applying needs anything of the state: whether [`needs`] names anything.
    pub fn loads(&self) -> bool {
        matches!(self, Self::Ops(ops) if ops.loads())
    }
}

/// The entry was written by a newer build. Guessing at it would make this replica differ from the
/// others, so the shard must stop here. The text names what is unknown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Unknown(pub &'static str);

/// Decodes the operations of an entry. The error is that only a newer build can apply it.
pub fn decode(entry: &Entry) -> Result<Decoded, Unknown> {
    let batch = match &entry.body {
        Body::Ops(batch) => batch,
        Body::Barrier
        | Body::ExpireSessions { .. }
        | Body::ExpireTokens { .. }
        | Body::Split { .. } => return Ok(Decoded::NoOps),
        Body::Unknown { .. } => {
            return Err(Unknown("an entry of a kind that only a newer build knows"));
        }
    };
    match ops::decode_batch(batch) {
        Ok(ops) => Ok(Decoded::Ops(ops)),
        Err(OpsError::Malformed(_)) => Ok(Decoded::Malformed),
        Err(OpsError::Unknown(what)) => Err(Unknown(what)),
    }
}

/// Returns what to load before the entry can be applied to a shard of these slots.
pub fn needs(decoded: &Decoded, slots: Slots) -> Needs {
    let Decoded::Ops(ops) = decoded else { return Needs::default() };
    let asking = ops.iter().filter(|op| op.kind.loads_value());
    let mut counters: Vec<_> = asking.map(|op| ops.to_op(op).counter).collect();
    counters.sort();
    counters.dedup();
    let (mut at, mut next) = (ops.iter(), 0);
    let record_of = |group: &TokenedOps| {
        let first = at.nth(group.first - next).expect("a group is not empty");
        next = group.first + 1;
        group.tag.record(first.name, Slot(slots.lo))
    };
    let mut records: Vec<_> = ops.tokened.iter().map(record_of).collect();
    records.sort();
    records.dedup();
    Needs { counters, records }
}

/// Applies the next entry and returns the answer to its batch; `None` for an entry without one.
///
/// `decoded` comes from [`decode`]; `loaded` holds what [`needs`] asked for. Pure and total. A
/// split is applied by [`divide`](crate::shard::division::divide) instead, which needs all rows.
pub fn apply(
    state: &mut ShardState,
    tables: &mut Tables,
    entry: &Entry,
    decoded: &Decoded,
    loaded: &Loaded,
    limits: &TokenLimits,
) -> Option<BatchReply> {
    state.tokens.advance_time(limits, state.applied.time, entry.time);
    state.applied = entry.position();
    let batch = match &entry.body {
        Body::Ops(batch) => batch,
        Body::ExpireSessions { up_to, survivors } => {
            state.sessions.expire(*up_to, survivors, limits.planted);
            return None;
        }
        Body::ExpireTokens { bucket } => {
            state.tokens.expire(limits, entry.time, *bucket);
            return None;
        }
        Body::Barrier | Body::Split { .. } | Body::Unknown { .. } => return None,
    };
    let answer = match state.sessions.judge(batch.session, batch.batch_seq) {
        Judgement::Next => {
            let (slots, time) = (batch.slots, entry.time);
            let apply = Applying { state: &mut *state, tables, loaded, limits, slots, time };
            let result = apply.run(decoded);
            state.sessions.record(batch.session, batch.batch_seq, result.clone());
            answer_of(result, entry)
        }
        Judgement::Decided(Some(result)) => answer_of(result, entry),
        Judgement::Decided(None) => BatchReply::AnsweredBefore,
        Judgement::Expired => BatchReply::Expired,
        Judgement::NoEffect => BatchReply::NoEffect,
    };
    state.sessions.forget_below(batch.session, batch.answered_below);
    Some(answer)
}

fn answer_of(result: BatchResult, entry: &Entry) -> BatchReply {
    match result {
        BatchResult::Applied { values, tokens } => {
            BatchReply::Applied { values, tokens, time: entry.time }
        }
        BatchResult::Malformed => BatchReply::Malformed,
    }
}

/// A batch being applied.
struct Applying<'a> {
    state: &'a mut ShardState,
    tables: &'a mut Tables,
    loaded: &'a Loaded,
    limits: &'a TokenLimits,
    /// The slots that the batch was sealed for: those of the shard, or of one that was split since.
    slots: Slots,
    time: TimeMs,
}

impl Applying<'_> {
    fn run(mut self, decoded: &Decoded) -> BatchResult {
        let Decoded::Ops(ops) = decoded else { return BatchResult::Malformed };
        // An operation for another shard's slot can only come from a faulty gateway. It must have
        // no effect, since its counter's rows belong to another log.
        let hashes: Vec<_> = ops.iter().map(|op| key::hash(op.name)).collect();
        if hashes.iter().any(|&hash| !self.slots.contains(key::slot_of(hash))) {
            return BatchResult::Malformed;
        }
        if !ops.tokened.is_empty() {
            self.tables.active.prefetch(&hashes); // Each group may be a single operation.
        }
        let (mut values, mut tokens) = (Vec::new(), Vec::new());
        let (mut rest, mut next) = (ops.iter(), 0);
        for group in &ops.tokened {
            self.apply_ops(&mut rest, &hashes[next..group.first], &mut values);
            let of_group = rest.clone();
            rest.nth(group.count - 1);
            tokens.push(self.apply_tokened(group, of_group, group.of(&hashes), &mut values));
            next = group.first + group.count;
        }
        self.apply_ops(&mut rest, &hashes[next..], &mut values);
        BatchResult::Applied { values, tokens }
    }

    /// Applies operations with a token, the first ones of `ops`: both the effect and its record, or
    /// neither.
    fn apply_tokened(
        &mut self,
        group: &TokenedOps,
        mut ops: OpsIter<'_>,
        hashes: &[u128],
        values: &mut Vec<i128>,
    ) -> TokenOutcome {
        let first = ops.clone().next().expect("a group is not empty");
        if !hashes.iter().any(|&hash| self.is_own(hash)) {
            // All of it is the part of the other child.
            self.apply_ops(&mut ops, hashes, values);
            return TokenOutcome::Applied;
        }
        let id = group.tag.record(first.name, Slot(self.state.slots.lo));
        let namespace = key::namespace_of(first.name);
        let of_group = ops.clone().take(group.count);
        let value_count = of_group.filter(|op| op.kind.returns_value()).count();
        let planted = self.limits.planted;
        let mut found = self.tables.record(id, planted).or_else(|| self.loaded.records.get(&id));
        if group.tag.scope == Scope::Batch && Planted::PartAppliedAgain.is_in(planted) {
            found = None;
        }
        let asks = |&(op, &hash): &(OpRef<'_>, &u128)| op.kind.returns_value() && self.is_own(hash);
        let asked = ops.clone().zip(hashes).filter(asks).count();
        let request =
            TokenedRequest { tag: group.tag, issued: group.issued, namespace, values: asked };
        let at = (self.state.slots, self.time);
        match self.state.tokens.judge(self.limits, at, request, found) {
            TokenVerdict::Replay(recorded) => {
                let mut recorded = recorded.iter().copied();
                let asking = ops.zip(hashes).filter(|(op, _)| op.kind.returns_value());
                values.extend(asking.map(|(_, &hash)| match self.is_own(hash) {
                    true => recorded.next().unwrap_or_default(),
                    false => 0,
                }));
                TokenOutcome::Replayed
            }
            TokenVerdict::Refuse(outcome) => {
                values.resize(values.len() + value_count, 0);
                outcome
            }
            TokenVerdict::Apply { .. } if self.is_home_elsewhere(group, namespace) => {
                values.resize(values.len() + value_count, 0);
                TokenOutcome::Quota
            }
            TokenVerdict::Apply { bucket } => {
                let mut all = Vec::new();
                self.apply_ops(&mut ops.clone(), hashes, &mut all);
                values.extend(&all);
                let asking = ops.zip(hashes).filter(|(op, _)| op.kind.returns_value());
                let own = asking.zip(all).filter(|((_, hash), _)| self.is_own(**hash));
                let own = own.map(|(_, value)| value).collect();
                let fingerprint = group.tag.fingerprint as u64;
                let record = TokenRecord { bucket, fingerprint, values: own };
                let share = layout::record_share(id, &record);
                self.state.tokens.add(self.limits, namespace, bucket, share);
                self.tables.active.put_record(id, record);
                TokenOutcome::Applied
            }
        }
    }

    /// Applies the next operations, as many as there are hashes.
    fn apply_ops(&mut self, ops: &mut OpsIter<'_>, hashes: &[u128], values: &mut Vec<i128>) {
        for hashes in hashes.chunks(PREFETCHED) {
            self.tables.active.prefetch(hashes);
            // The hashes come first: where they end no operation is taken.
            for (&hash, op) in hashes.iter().zip(&mut *ops) {
                self.apply_op(op, hash, values);
            }
        }
    }

    /// Returns whether the shard was split since the batch was sealed, and the other child is the
    /// home of the token. Nothing of the request may be done before its home has recorded it.
    fn is_home_elsewhere(&self, group: &TokenedOps, namespace: &[u8]) -> bool {
        let home = match group.tag.scope {
            Scope::Batch => group.tag.home(namespace),
            _ => None,
        };
        home.is_some_and(|home| {
            let slot = home.slot();
            self.slots.contains(slot) && !self.state.slots.contains(slot)
        })
    }

    /// Returns whether the operation is one of this shard. After a split each child applies its
    /// part of a batch that was sealed before, and has 0 for the values of the other part.
    fn is_own(&self, hash: u128) -> bool {
        self.state.slots.contains(key::slot_of(hash))
    }

    fn apply_op(&mut self, op: OpRef<'_>, hash: u128, values: &mut Vec<i128>) {
        if !self.is_own(hash) {
            values.extend(op.kind.returns_value().then_some(0));
            return;
        }
        let before = || {
            let base = self.loaded.values.get(op.name).copied().unwrap_or(0);
            self.tables.value(Some(base), op.name, hash)
        };
        match op.kind {
            OpKind::Add { delta } => self.add(op.name, hash, delta),
            OpKind::AddReturning { delta } => {
                values.push(before().wrapping_add(delta));
                self.add(op.name, hash, delta);
            }
            OpKind::Delete => {
                let value = before();
                values.push(value);
                self.tables.active.set(op.name, hash, 0);
                self.change_digest(hash, value.wrapping_neg());
            }
        }
    }

    /// Adds to a counter. A delta of 0 leaves no row, since a counter without a row is 0 as well.
    fn add(&mut self, name: &[u8], hash: u128, delta: i128) {
        if delta == 0 {
            return;
        }
        self.tables.active.add(name, hash, delta);
        self.change_digest(hash, delta);
    }

    /// The digest is linear, so adding needs no old value.
    fn change_digest(&mut self, hash: u128, delta: i128) {
        let sum = &mut self.state.counter_digest;
        *sum = sum.wrapping_add(digest::share(digest::weight_of(hash), delta));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Codec};
    use crate::ids::{BatchSeq, Epoch, Revision, SessionId, TimeMs};
    use crate::ops::Op;
    use crate::shard::idempotency::{self, IssueTime, Tag};

    /// A bucket is a second; the limit has room for two records with a value and the most that a
    /// third may need.
    const LIMITS: TokenLimits = TokenLimits { settings: SETTINGS, planted: None };
    const SETTINGS: idempotency::TokenSettings = idempotency::TokenSettings {
        window_ms: 6_000,
        buckets: 6,
        bytes_max: 130,
        namespaces_max: 4,
    };

    struct Shard {
        state: ShardState,
        tables: Tables,
        loaded: Loaded,
    }

    fn shard() -> Shard {
        Shard {
            state: ShardState { slots: Slots::ALL, ..ShardState::default() },
            tables: Tables::default(),
            loaded: Loaded::default(),
        }
    }

    fn counter(key: &str) -> CounterKey {
        CounterKey::new(b"ns", key.as_bytes()).unwrap()
    }

    impl Shard {
        fn batch(&mut self, batch_seq: u64, ops: &[(&str, OpKind)]) -> BatchReply {
            let op = |&(key, kind): &(&str, OpKind)| Op { counter: counter(key), kind };
            let ops: Vec<_> = ops.iter().map(op).collect();
            self.payload(batch_seq, ops::encode(&ops))
        }

        fn payload(&mut self, batch_seq: u64, payload: bytes::Bytes) -> BatchReply {
            let session = SessionId(Revision { incarnation: 1, revision: 1 });
            let batch = Batch::seal(
                self.state.slots,
                session,
                BatchSeq(batch_seq),
                BatchSeq(batch_seq),
                Codec::Raw,
                payload,
            );
            let entry = Entry::after(self.state.applied, Epoch(1), TimeMs(0), Body::Ops(batch));
            let decoded = decode(&entry).unwrap();
            apply(&mut self.state, &mut self.tables, &entry, &decoded, &self.loaded, &LIMITS)
                .unwrap()
        }
    }

    fn applied(values: &[i128]) -> BatchReply {
        BatchReply::Applied { values: values.to_vec(), tokens: vec![], time: TimeMs(0) }
    }

    #[test]
    fn adds_build_on_what_was_loaded_and_on_each_other() {
        let mut shard = shard();
        shard.loaded.values.insert(counter("a"), 100);
        let add = OpKind::Add { delta: 1 };
        let returning = OpKind::AddReturning { delta: 10 };
        assert_eq!(shard.batch(1, &[("a", add), ("a", returning)]), applied(&[111]));
        assert_eq!(shard.batch(2, &[("a", OpKind::Delete)]), applied(&[111]));
        assert_eq!(shard.batch(3, &[("a", returning)]), applied(&[10]));
    }

    #[test]
    fn a_duplicate_is_answered_as_it_was_and_changes_nothing() {
        let mut shard = shard();
        let add = [("a", OpKind::AddReturning { delta: 1 })];
        assert_eq!(shard.batch(1, &add), applied(&[1]));
        assert_eq!(shard.batch(1, &add), applied(&[1]));
        assert_eq!(shard.batch(3, &add), BatchReply::NoEffect);
        assert_eq!(shard.batch(2, &add), applied(&[2]));
        assert_eq!(shard.batch(1, &add), BatchReply::AnsweredBefore);
    }

    #[test]
    fn a_malformed_batch_is_decided_and_takes_its_number() {
        let mut shard = shard();
        let nonsense = bytes::Bytes::from_static(&[1, 0, 99]);
        assert_eq!(shard.payload(1, nonsense), BatchReply::Malformed);
        assert_eq!(shard.batch(2, &[("a", OpKind::AddReturning { delta: 1 })]), applied(&[1]));
    }

    #[test]
    fn an_op_of_another_shard_makes_the_batch_malformed() {
        let mut shard = shard();
        let slot = counter("a").slot().0;
        shard.state.slots = Slots { lo: slot.wrapping_add(1), hi: slot.wrapping_add(1) };
        assert_eq!(shard.batch(1, &[("a", OpKind::Delete)]), BatchReply::Malformed);
    }

    /// A batch was sealed before its shard was split.
    #[test]
    fn a_child_applies_its_part_of_a_batch_of_its_parent() {
        let (a, b) = (counter("a").slot().0, counter("b").slot().0);
        let at = a.max(b);
        let halves = [Slots { lo: 0, hi: at - 1 }, Slots { lo: at, hi: u16::MAX }];
        let ops: Vec<_> = ["a", "b"]
            .map(|key| Op { counter: counter(key), kind: OpKind::AddReturning { delta: 5 } })
            .into();
        let mut values = Vec::new();
        for slots in halves {
            let mut shard = shard();
            let whole = shard.payload(1, ops::encode(&ops));
            assert_eq!(whole, applied(&[5, 5]));
            let mut child = self::shard();
            let payload = ops::encode(&ops);
            let session = SessionId(Revision { incarnation: 1, revision: 1 });
            let number = BatchSeq(1);
            let batch = Batch::seal(Slots::ALL, session, number, number, Codec::Raw, payload);
            let entry = Entry::after(child.state.applied, Epoch(1), TimeMs(0), Body::Ops(batch));
            child.state.slots = slots;
            let decoded = decode(&entry).unwrap();
            let Shard { state, tables, loaded } = &mut child;
            let answer = apply(state, tables, &entry, &decoded, loaded, &LIMITS).unwrap();
            let BatchReply::Applied { values: part, .. } = answer else { panic!("{answer:?}") };
            values.push(part);
        }
        let own = |slots: Slots, key: &str| slots.contains(counter(key).slot());
        for (part, slots) in values.iter().zip(halves) {
            let want = ["a", "b"].map(|key| if own(slots, key) { 5 } else { 0 });
            assert_eq!(part[..], want);
        }
    }

    /// The digest does not depend on how the values came about.
    #[test]
    fn the_digest_depends_on_the_values_alone() {
        let mut one = shard();
        one.batch(1, &[("a", OpKind::Add { delta: 5 }), ("b", OpKind::Add { delta: 9 })]);
        one.batch(2, &[("b", OpKind::Delete)]);
        let mut other = shard();
        other.batch(1, &[("a", OpKind::Add { delta: 2 })]);
        other.batch(2, &[("a", OpKind::Add { delta: 3 })]);
        assert_eq!(one.state.counter_digest, other.state.counter_digest);
        assert_ne!(one.state.counter_digest, 0);
    }

    #[test]
    fn only_ops_that_ask_for_a_value_need_one() {
        let op = |key, kind| Op { counter: counter(key), kind };
        let ops = vec![
            op("b", OpKind::Delete),
            op("a", OpKind::AddReturning { delta: 1 }),
            op("b", OpKind::Delete),
            op("c", OpKind::Add { delta: 1 }),
        ];
        let needs = needs(&Decoded::Ops(ops::decode(ops::encode(&ops)).unwrap()), Slots::ALL);
        assert_eq!(needs.counters, [counter("a"), counter("b")]);
        assert_eq!(needs.records, []);
    }

    /// Operations are applied in parts, and a group of them is passed over if it has no effect.
    #[test]
    fn many_operations_are_applied_in_order_around_groups_of_any_outcome() {
        let mut shard = shard();
        let (mut payload, mut want, mut sums) = (ops::begin(), Vec::new(), BTreeMap::new());
        let put = |payload: &mut Vec<u8>, key: &str, kind| {
            ops::put(payload, &Op { counter: counter(key), kind });
        };
        let mut plain = |payload: &mut Vec<u8>, want: &mut Vec<i128>, count: i128| {
            for delta in 1..=count {
                let key = format!("k{}", delta % 7);
                put(payload, &key, OpKind::AddReturning { delta });
                let sum = sums.entry(key).or_insert(0);
                *sum += delta;
                want.push(*sum);
            }
        };
        let group = |payload: &mut Vec<u8>, hash, kind| {
            let tag = Tag { scope: Scope::Batch, hash, fingerprint: 1 };
            ops::put_token(payload, &tag, IssueTime::Stated(TimeMs(0)), 40);
            (0..40).for_each(|_| put(payload, "group", kind));
        };
        let add = OpKind::Add { delta: 1 };
        plain(&mut payload, &mut want, 33);
        group(&mut payload, 1, add);
        plain(&mut payload, &mut want, 70);
        group(&mut payload, 1, add);
        plain(&mut payload, &mut want, 64);
        // The record of this one, with its values, has no room.
        group(&mut payload, 2, OpKind::AddReturning { delta: 1 });
        want.extend([0; 40]);
        plain(&mut payload, &mut want, 1);
        put(&mut payload, "group", OpKind::AddReturning { delta: 0 });
        want.push(40);
        let (tokens, time) = (vec![Applied, Replayed, Quota], TimeMs(0));
        let answer = shard.payload(1, payload.into());
        assert_eq!(answer, BatchReply::Applied { values: want, tokens, time });
    }

    // ---- tokens --------------------------------------------------------------------------------

    use TokenOutcome::{Applied, Quota, Replayed, Reused, TooOld};

    const ADD: OpKind = OpKind::AddReturning { delta: 5 };

    /// One group of operations with a token: hash and fingerprint in one number, and the issue
    /// time.
    type Group<'a> = (Scope, (u128, u128), u64, &'a [(&'a str, OpKind)]);

    impl Shard {
        /// Applies a batch of such groups at this time, under the next batch number.
        fn tokens(&mut self, time: u64, groups: &[Group<'_>]) -> (Vec<i128>, Vec<TokenOutcome>) {
            let mut payload = ops::begin();
            for &(scope, (hash, fingerprint), issued, group) in groups {
                let tag = Tag { scope, hash, fingerprint };
                let issued = IssueTime::Stated(TimeMs(issued));
                ops::put_token(&mut payload, &tag, issued, group.len());
                for &(key, kind) in group {
                    ops::put(&mut payload, &Op { counter: counter(key), kind });
                }
            }
            let session = SessionId(Revision { incarnation: 1, revision: 1 });
            let last = self.state.sessions.rows.get(&session).map_or(BatchSeq(0), |row| row.last);
            let batch_seq = last.next();
            let payload = payload.into();
            let batch = Batch::seal(Slots::ALL, session, batch_seq, batch_seq, Codec::Raw, payload);
            match self.entry(time, Body::Ops(batch)) {
                Some(BatchReply::Applied { values, tokens, time: answered }) => {
                    assert_eq!(answered, TimeMs(time), "every answer has the shard's time");
                    (values, tokens)
                }
                other => panic!("{other:?}"),
            }
        }

        fn entry(&mut self, time: u64, body: Body) -> Option<BatchReply> {
            let entry = Entry::after(self.state.applied, Epoch(1), TimeMs(time), body);
            let decoded = decode(&entry).unwrap();
            apply(&mut self.state, &mut self.tables, &entry, &decoded, &self.loaded, &LIMITS)
        }

        /// One operation on counter "a" with this token, issued when it is applied.
        #[track_caller]
        fn one(&mut self, time: u64, tag: (u128, u128), want: (i128, TokenOutcome)) {
            let got = self.tokens(time, &[(Scope::Counter, tag, time, &[("a", ADD)])]);
            assert_eq!(got, (vec![want.0], vec![want.1]));
        }
    }

    #[test]
    fn a_token_counts_once_and_its_result_comes_back() {
        let mut shard = shard();
        shard.one(1_000, (1, 1), (5, Applied));
        shard.one(2_000, (2, 1), (10, Applied));
        shard.one(3_000, (1, 1), (5, Replayed));
        shard.one(4_000, (1, 2), (0, Reused));
        assert_eq!(shard.batch(5, &[("a", OpKind::AddReturning { delta: 0 })]), {
            let time = TimeMs(0);
            BatchReply::Applied { values: vec![10], tokens: vec![], time }
        });
        assert_eq!(shard.state.tokens.records(), 2);
    }

    /// A batch was sealed before a split, and the home of its token is the other child.
    #[test]
    fn a_child_does_nothing_before_the_home_of_a_token() {
        let group: Group<'_> = (Scope::Batch, (1, 1), 0, &[("a", ADD)]);
        let tag = Tag { scope: Scope::Batch, hash: 1, fingerprint: 1 };
        let home = tag.home(counter("a").namespace()).unwrap().slot().0;
        let own = counter("a").slot().0;
        let at = home.max(own);
        let halves = [Slots { lo: 0, hi: at - 1 }, Slots { lo: at, hi: u16::MAX }];
        let [child] = halves.iter().filter(|it| it.contains(Slot(own))).collect::<Vec<_>>()[..]
        else {
            panic!("home and counter are in different halves")
        };
        assert!(!child.contains(Slot(home)));
        let mut shard = shard();
        shard.state.slots = *child;
        assert_eq!(shard.tokens(0, &[group]), (vec![0], vec![Quota]));
        assert_eq!(shard.state.tokens.records(), 0);
        shard.state.slots = Slots::ALL;
        assert_eq!(shard.tokens(0, &[group]), (vec![5], vec![Applied]));
    }

    /// Within one batch: the second group finds the first one's record.
    #[test]
    fn a_token_counts_once_within_a_batch_too() {
        let mut shard = shard();
        let group: Group<'_> = (Scope::Counter, (1, 1), 0, &[("a", ADD)]);
        assert_eq!(shard.tokens(0, &[group, group]), (vec![5, 5], vec![Applied, Replayed]));
    }

    #[test]
    fn a_part_is_applied_or_replayed_as_a_whole_and_a_delete_too() {
        let mut shard = shard();
        let part: Group<'_> = (
            Scope::Batch,
            (1, 1),
            0,
            &[("a", OpKind::Add { delta: 1 }), ("b", ADD), ("a", OpKind::Delete)],
        );
        assert_eq!(shard.tokens(0, &[part]), (vec![5, 1], vec![Applied]));
        assert_eq!(shard.tokens(0, &[part]), (vec![5, 1], vec![Replayed]));
        let other: Group<'_> =
            (Scope::Batch, (1, 2), 0, &[("a", OpKind::Add { delta: 1 }), ("b", ADD)]);
        assert_eq!(shard.tokens(0, &[other]), (vec![0], vec![Reused]));
        let slot = Slot(Slots::ALL.lo);
        assert!(shard.tables.active.record(RecordId { slot, hash: 1 }).is_some());
        let read: Group<'_> =
            (Scope::Counter, (9, 9), 0, &[("b", OpKind::AddReturning { delta: 0 })]);
        assert_eq!(shard.tokens(0, &[read]), (vec![5], vec![Applied]));
    }

    #[test]
    fn too_old_and_over_quota_have_no_effect_and_leave_no_record() {
        let mut shard = shard();
        let late: Group<'_> = (Scope::Counter, (1, 1), 1_000, &[("a", ADD)]);
        assert_eq!(shard.tokens(7_001, &[late]), (vec![0], vec![TooOld]));
        assert_eq!(shard.state.tokens.records(), 0);
        for (n, value) in [(1, 5), (2, 10), (3, 15)] {
            shard.one(8_000, (n, n), (value, Applied));
        }
        shard.one(8_000, (4, 4), (0, Quota));
        shard.one(8_000, (3, 3), (15, Replayed));
        assert_eq!(shard.state.counter_digest, digest::share(digest::weight(b"ns\0a"), 15));
    }

    /// With its bucket the record is gone, wherever its row still lies: the token counts again.
    #[test]
    fn an_expired_record_does_not_exist() {
        let mut shard = shard();
        shard.one(1_000, (1, 1), (5, Applied));
        // Time passes in steps, since a single large one would be a leap.
        for time in (2_000..=14_000).step_by(1_000) {
            assert_eq!(shard.entry(time, Body::Barrier), None);
        }
        assert_eq!(shard.entry(14_749, Body::ExpireTokens { bucket: 1 }), None);
        shard.one(14_749, (1, 1), (5, Replayed));
        assert_eq!(shard.entry(14_750, Body::ExpireTokens { bucket: 1 }), None);
        assert_eq!(shard.state.tokens.records(), 0);
        shard.one(14_750, (1, 1), (10, Applied));
    }

    #[test]
    fn a_record_is_found_in_the_frozen_table_and_in_the_state() {
        let mut shard = shard();
        shard.one(1_000, (1, 1), (5, Applied));
        let active = std::mem::take(&mut shard.tables.active);
        let id = RecordId { slot: counter("a").slot(), hash: 1 };
        let record = active.record(id).cloned().expect("it was just written");
        shard.tables.sealed = Some(std::sync::Arc::new(active.seal()));
        shard.one(2_000, (1, 1), (5, Replayed));
        shard.tables.sealed = None;
        shard.loaded.values.insert(counter("a"), 5);
        shard.loaded.records.insert(id, record);
        shard.one(3_000, (1, 1), (5, Replayed));
        shard.one(4_000, (2, 2), (10, Applied));
    }

    /// The bucket's digest is the sum over the rows, in any order.
    #[test]
    fn a_buckets_digest_is_the_sum_over_its_rows() {
        let mut shard = shard();
        shard.one(1_000, (1, 1), (5, Applied));
        shard.one(1_500, (2, 2), (10, Applied));
        let sealed = std::mem::take(&mut shard.tables.active).seal();
        let shares = sealed.records().map(|(id, record)| layout::record_share(id, record));
        let mut counted = idempotency::BucketCounts::default();
        shares.for_each(|(share, bytes)| counted.add(1, share, bytes));
        assert!(shard.state.tokens.matches(&counted));
        counted.add(1, 0, 1);
        assert!(!shard.state.tokens.matches(&counted));
    }

    #[test]
    fn records_are_needed_at_the_counters_slot_or_at_the_shards_first() {
        let mut payload = ops::begin();
        for (scope, hash, key) in [(Scope::Batch, 0, "a"), (Scope::Counter, 1, "b")] {
            let tag = Tag { scope, hash, fingerprint: 0 };
            ops::put_token(&mut payload, &tag, IssueTime::Stated(TimeMs(0)), 1);
            let kind = OpKind::Add { delta: 1 };
            ops::put(&mut payload, &Op { counter: counter(key), kind });
        }
        let decoded = Decoded::Ops(ops::decode(payload.into()).unwrap());
        let needs = needs(&decoded, Slots { lo: 7, hi: 9 });
        assert_eq!(needs.counters, []);
        let mut want = vec![
            RecordId { slot: Slot(7), hash: 0 },
            RecordId { slot: counter("b").slot(), hash: 1 },
        ];
        want.sort();
        assert_eq!(needs.records, want);
    }
}
