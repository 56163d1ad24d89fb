//! Decide at apply: the pure function every replica runs over the committed log (DESIGN §6.5).
//!
//! Duplicate? Malformed? What value? All of it is decided here, in log order, from nothing but the
//! log, so replicas can't disagree, and truncating the log needs no undo.
//!
//! In two steps, since some ops need a counter's value, which may lie on disk: [`needs`] names
//! the counters to load, [`apply`] takes what was loaded. What lies in the tables is added inside
//! `apply`, so a loaded value stays right however long it waits, as long as no ingest has moved
//! table content below it.

use std::collections::BTreeMap;

use crate::entry::{Body, Entry, Position};
use crate::ids::Slots;
use crate::key::{self, CounterKey};
use crate::message::Answer;
use crate::ops::{self, Op, OpKind, OpsError};
use crate::planted::Planted;
use crate::sessions::{BatchResult, Judgement, Sessions};
use crate::store::table::Tables;

/// Everything a shard's log has built, but for the counters themselves (those are in the table and
/// in `state`). Written to disk whole with every flush.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ShardState {
    pub slots: Slots,
    /// The last entry applied.
    pub applied: Position,
    /// Σ H(name) · value mod 2^128 over all counters, H odd.
    pub counter_digest: u128,
    pub sessions: Sessions,
}

/// Values that were loaded for an entry: counters that it names, as they are in the state.
pub type Loaded = BTreeMap<CounterKey, i128>;

/// An entry's ops, decoded once.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Decoded {
    /// Not an `ops` entry.
    #[default]
    NoOps,
    Ops(Vec<Op>),
    /// Intact, but not to be read: applied as "no effect" on every replica alike.
    Malformed,
}

/// A newer build wrote this entry. Guessing at it would make this replica differ from the others,
/// so the shard must stop here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Unknown(pub &'static str);

/// Decodes what the entry says.
pub fn decode(entry: &Entry) -> Result<Decoded, Unknown> {
    let batch = match &entry.body {
        Body::Ops(batch) => batch,
        Body::Barrier | Body::Collect { .. } => return Ok(Decoded::NoOps),
        Body::Expire { .. } => return Err(Unknown("expire")),
        Body::Split { .. } => return Err(Unknown("split")),
    };
    match ops::decode_batch(batch) {
        Ok(ops) => Ok(Decoded::Ops(ops)),
        Err(OpsError::Malformed(_)) => Ok(Decoded::Malformed),
        Err(OpsError::Unknown(what)) => Err(Unknown(what)),
    }
}

/// The counters whose value must be known before the entry can be applied, each once.
pub fn needs(decoded: &Decoded) -> Vec<CounterKey> {
    let Decoded::Ops(ops) = decoded else { return Vec::new() };
    let mut keys: Vec<_> =
        ops.iter().filter(|op| op.kind.needs_value()).map(|op| op.counter.clone()).collect();
    keys.sort();
    keys.dedup();
    keys
}

/// Applies the next entry, and says how its batch is to be answered (none for other entries).
///
/// `decoded` and `loaded` are what [`decode`] and [`needs`] asked for. Pure and total.
pub fn apply(
    state: &mut ShardState,
    tables: &mut Tables,
    entry: &Entry,
    decoded: &Decoded,
    loaded: &Loaded,
    planted: Option<Planted>,
) -> Option<Answer> {
    state.applied = entry.position();
    let batch = match &entry.body {
        Body::Ops(batch) => batch,
        Body::Collect { r, l } => {
            state.sessions.collect(*r, l, planted);
            return None;
        }
        Body::Barrier | Body::Expire { .. } | Body::Split { .. } => return None,
    };
    let answer = match state.sessions.judge(batch.session, batch.bseq) {
        Judgement::Next => {
            let result = run(state, tables, decoded, loaded);
            state.sessions.record(batch.session, batch.bseq, result.clone());
            answer_of(result, entry)
        }
        Judgement::Decided(Some(result)) => answer_of(result, entry),
        Judgement::Decided(None) => Answer::AnsweredBefore,
        Judgement::Expired => Answer::Expired,
        Judgement::NoEffect => Answer::NoEffect,
    };
    state.sessions.forget_below(batch.session, batch.answered_below);
    Some(answer)
}

fn answer_of(result: BatchResult, entry: &Entry) -> Answer {
    match result {
        BatchResult::Applied { values } => Answer::Applied { values, time: entry.time },
        BatchResult::Malformed => Answer::Malformed,
    }
}

fn run(
    state: &mut ShardState,
    tables: &mut Tables,
    decoded: &Decoded,
    loaded: &Loaded,
) -> BatchResult {
    let Decoded::Ops(ops) = decoded else { return BatchResult::Malformed };
    // An op for another shard's slot can only come from a gateway gone wrong. It must have no
    // effect: its counter's rows belong to another log.
    if ops.iter().any(|op| !state.slots.contains(op.counter.slot())) {
        return BatchResult::Malformed;
    }
    let mut values = Vec::new();
    for op in ops {
        let name = op.counter.name();
        let hash = key::hash(name);
        let before = || {
            let base = loaded.get(&op.counter).copied().unwrap_or(0);
            tables.value(Some(base), name, hash)
        };
        match op.kind {
            OpKind::Add { delta } => {
                tables.active.add(name, hash, delta);
                add_to_digest(state, hash, delta);
            }
            OpKind::AddReturning { delta } => {
                values.push(before().wrapping_add(delta));
                tables.active.add(name, hash, delta);
                add_to_digest(state, hash, delta);
            }
            OpKind::Delete => {
                let value = before();
                values.push(value);
                tables.active.set(name, hash, 0);
                add_to_digest(state, hash, value.wrapping_neg());
            }
        }
    }
    BatchResult::Applied { values }
}

/// Linear, so that adding needs no old value.
fn add_to_digest(state: &mut ShardState, hash: u128, delta: i128) {
    let term = (hash | 1).wrapping_mul(delta as u128);
    state.counter_digest = state.counter_digest.wrapping_add(term);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Codec};
    use crate::ids::{Bseq, Epoch, Revision, SessionId, TimeMs};

    struct Shard {
        state: ShardState,
        tables: Tables,
        loaded: Loaded,
    }

    fn shard() -> Shard {
        Shard {
            state: ShardState { slots: Slots::ALL, ..ShardState::default() },
            tables: Tables::default(),
            loaded: Loaded::new(),
        }
    }

    fn counter(key: &str) -> CounterKey {
        CounterKey::new(b"ns", key.as_bytes()).unwrap()
    }

    impl Shard {
        fn batch(&mut self, bseq: u64, ops: &[(&str, OpKind)]) -> Answer {
            let op = |&(key, kind): &(&str, OpKind)| Op { counter: counter(key), kind };
            let ops: Vec<_> = ops.iter().map(op).collect();
            self.payload(bseq, ops::encode(&ops))
        }

        fn payload(&mut self, bseq: u64, payload: bytes::Bytes) -> Answer {
            let session = SessionId(Revision { incarnation: 1, revision: 1 });
            let batch =
                Batch::seal(Slots::ALL, session, Bseq(bseq), Bseq(bseq), Codec::Raw, payload);
            let entry = Entry::after(self.state.applied, Epoch(1), TimeMs(0), Body::Ops(batch));
            let decoded = decode(&entry).unwrap();
            let (state, tables) = (&mut self.state, &mut self.tables);
            apply(state, tables, &entry, &decoded, &self.loaded, None).unwrap()
        }
    }

    fn applied(values: &[i128]) -> Answer {
        Answer::Applied { values: values.to_vec(), time: TimeMs(0) }
    }

    #[test]
    fn adds_build_on_what_was_loaded_and_on_each_other() {
        let mut shard = shard();
        shard.loaded.insert(counter("a"), 100);
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
        assert_eq!(shard.batch(3, &add), Answer::NoEffect);
        assert_eq!(shard.batch(2, &add), applied(&[2]));
        assert_eq!(shard.batch(1, &add), Answer::AnsweredBefore);
    }

    #[test]
    fn a_malformed_batch_is_decided_and_takes_its_number() {
        let mut shard = shard();
        let nonsense = bytes::Bytes::from_static(&[1, 0, 99]);
        assert_eq!(shard.payload(1, nonsense), Answer::Malformed);
        assert_eq!(shard.batch(2, &[("a", OpKind::AddReturning { delta: 1 })]), applied(&[1]));
    }

    #[test]
    fn an_op_of_another_shard_makes_the_batch_malformed() {
        let mut shard = shard();
        let slot = counter("a").slot().0;
        shard.state.slots = Slots { lo: slot.wrapping_add(1), hi: slot.wrapping_add(1) };
        assert_eq!(shard.batch(1, &[("a", OpKind::Delete)]), Answer::Malformed);
    }

    /// The digest is the same whatever way led to the values.
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
    fn what_a_newer_build_wrote_stops_the_shard() {
        let at = Position::default();
        let split = Entry::after(at, Epoch(1), TimeMs(0), Body::Split { at: 7 });
        assert_eq!(decode(&split), Err(Unknown("split")));
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
        assert_eq!(needs(&Decoded::Ops(ops)), vec![counter("a"), counter("b")]);
    }
}
