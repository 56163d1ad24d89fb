//! Applying a log does what a plain map would, whenever the table is frozen and flushed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use engine::apply::{Decoded, Loaded, ShardState, apply, decode, needs};
use engine::batch::{Batch, Codec};
use engine::entry::{Body, Entry};
use engine::ids::{Bseq, CopyNo, Epoch, Revision, SessionId, Slots, TimeMs};
use engine::key::CounterKey;
use engine::message::Answer;
use engine::ops::{self, Op, OpKind};
use engine::store::layout::{self, Change, RowKey};
use engine::store::table::{Table, Tables};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::{config, values};

/// One step of a shard's life.
#[derive(Clone, Debug)]
enum Step {
    /// A worker's next batch, or one that it has sent before.
    Batch {
        session: u64,
        again: Option<u64>,
        ops: Vec<(u8, OpKind)>,
    },
    /// Sessions up to this one are gone, but for those named.
    Collect {
        r: u64,
        l: BTreeSet<u64>,
    },
    Freeze,
    Flush,
}

/// Few counters and few sessions, so that they meet.
fn step() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        4 => values::delta().prop_map(|delta| OpKind::Add { delta }),
        2 => values::delta().prop_map(|delta| OpKind::AddReturning { delta }),
        1 => Just(OpKind::Delete),
    ];
    prop_oneof![
        10 => (1..5u64, prop::option::weighted(0.3, 1..4u64), vec((0..6u8, kind), 0..5))
            .prop_map(|(session, again, ops)| Step::Batch { session, again, ops }),
        1 => (0..5u64, prop::collection::btree_set(1..5u64, 0..3)).prop_map(|(r, l)| Step::Collect { r, l }),
        1 => Just(Step::Freeze),
        1 => Just(Step::Flush),
    ]
}

fn counter(number: u8) -> CounterKey {
    CounterKey::new(b"fuzz", &[number]).expect("one byte is a key")
}

fn session(number: u64) -> SessionId {
    SessionId(Revision { incarnation: 1, revision: number })
}

/// The engine's shard: state, tables, and what RocksDB would hold.
struct Shard {
    state: ShardState,
    tables: Tables,
    disk: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Shard {
    fn new() -> Self {
        let state = ShardState { slots: Slots::ALL, ..ShardState::default() };
        Self { state, tables: Tables::default(), disk: BTreeMap::new() }
    }

    fn apply(&mut self, body: Body) -> Option<Answer> {
        let entry = Entry::after(self.state.applied, Epoch(1), TimeMs(0), body);
        let decoded = decode(&entry).expect("of this build");
        assert_ne!(decoded, Decoded::Malformed);
        let loaded: Loaded = needs(&decoded)
            .into_iter()
            .map(|counter| (counter.clone(), self.on_disk(&counter)))
            .collect();
        apply(&mut self.state, &mut self.tables, &entry, &decoded, &loaded)
    }

    fn on_disk(&self, counter: &CounterKey) -> i128 {
        let row = self.disk.get(&layout::counter_key(counter.slot(), counter.name()));
        row.map_or(0, |row| layout::decode_counter(row).expect("written by a merge"))
    }

    fn value(&self, counter: &CounterKey) -> i128 {
        let hash = engine::key::hash(counter.name());
        self.tables.value(Some(self.on_disk(counter)), counter.name(), hash)
    }

    fn freeze(&mut self) {
        if self.tables.frozen.is_none() {
            let full = std::mem::replace(&mut self.tables.active, Table::new());
            self.tables.frozen = Some(Arc::new(full.freeze()));
        }
    }

    fn flush(&mut self) {
        let Some(frozen) = self.tables.frozen.take() else { return };
        let shards = [(CopyNo(1), self.state.clone())];
        for (key, change) in layout::rows(&frozen, &shards) {
            match change {
                Change::Put(value) => drop(self.disk.insert(key, value)),
                Change::Delete => drop(self.disk.remove(&key)),
                Change::Merge(operand) => {
                    let existing = self.disk.get(&key).map(Vec::as_slice);
                    let merged = layout::merge(existing, [operand.as_slice()]);
                    self.disk.insert(key, merged.expect("both were written here"));
                }
            }
        }
    }

    /// What the scrubber would find, with all flushed.
    fn digest_of_disk(&mut self) -> u128 {
        self.flush();
        self.freeze();
        self.flush();
        let counters = self
            .disk
            .iter()
            .filter(|(key, _)| matches!(RowKey::decode(key), Ok(RowKey::Counter { .. })));
        layout::scrub(counters.map(|(key, value)| (key.as_slice(), value.as_slice())))
            .expect("rows that a flush wrote")
    }
}

/// What the shard is held against: a map of values, and what each batch was answered.
#[derive(Default)]
struct Oracle {
    values: BTreeMap<u8, i128>,
    /// By session: the values that each batch returned.
    rows: BTreeMap<u64, Vec<Vec<i128>>>,
    collected: u64,
    survivors: BTreeSet<u64>,
}

impl Oracle {
    fn expired(&self, session: u64) -> bool {
        session <= self.collected && !self.survivors.contains(&session)
    }

    fn run(&mut self, ops: &[(u8, OpKind)]) -> Vec<i128> {
        let mut returned = Vec::new();
        for &(number, kind) in ops {
            let value = self.values.entry(number).or_default();
            match kind {
                OpKind::Add { delta } => *value = value.wrapping_add(delta),
                OpKind::AddReturning { delta } => {
                    *value = value.wrapping_add(delta);
                    returned.push(*value);
                }
                OpKind::Delete => returned.push(std::mem::take(value)),
            }
        }
        returned
    }

    /// The values that a batch must be answered with; none: it must have had no effect.
    fn batch(&mut self, session: u64, bseq: u64, ops: &[(u8, OpKind)]) -> Option<Vec<i128>> {
        if self.expired(session) {
            return None;
        }
        let sent = self.rows.get(&session).map_or(0, Vec::len) as u64;
        if bseq == sent + 1 {
            let returned = self.run(ops);
            self.rows.entry(session).or_default().push(returned);
        }
        let row = self.rows.get(&session)?;
        row.get(usize::try_from(bseq).ok()? - 1).cloned()
    }

    fn collect(&mut self, r: u64, l: &BTreeSet<u64>) {
        if r >= self.collected {
            let stays = |id: &&u64| **id > self.collected || self.survivors.contains(id);
            self.survivors = l.iter().filter(stays).copied().collect();
            self.collected = r;
            let gone: Vec<_> = self.rows.keys().copied().filter(|&id| self.expired(id)).collect();
            gone.iter().for_each(|id| drop(self.rows.remove(id)));
        }
    }
}

#[test]
fn a_shard_counts_as_a_map_does() {
    TestRunner::new(config())
        .run(&vec(step(), 0..60), |steps| {
            let (mut shard, mut oracle) = (Shard::new(), Oracle::default());
            for step in steps {
                match step {
                    Step::Batch { session: number, again, ops } => {
                        let sent = oracle.rows.get(&number).map_or(0, Vec::len) as u64;
                        let bseq = (sent + 1).saturating_sub(again.unwrap_or(0)).max(1);
                        let op = |&(key, kind): &_| Op { counter: counter(key), kind };
                        let payload = ops::encode(&ops.iter().map(op).collect::<Vec<_>>());
                        // Every answer is still wanted, so that duplicates are answered in full.
                        let batch = Batch::seal(
                            Slots::ALL,
                            session(number),
                            Bseq(bseq),
                            Bseq(1),
                            Codec::Raw,
                            payload,
                        );
                        let answer = shard.apply(Body::Ops(batch));
                        let got = match answer {
                            Some(Answer::Applied { values, .. }) => Some(values),
                            Some(Answer::Expired | Answer::NoEffect) => None,
                            other => return Err(TestCaseError::fail(format!("{other:?}"))),
                        };
                        prop_assert_eq!(got, oracle.batch(number, bseq, &ops));
                    }
                    Step::Collect { r, l } => {
                        oracle.collect(r, &l);
                        let l = l.into_iter().map(session).collect();
                        shard.apply(Body::Collect { r: session(r).0, l });
                    }
                    Step::Freeze => shard.freeze(),
                    Step::Flush => shard.flush(),
                }
                for (&number, &value) in &oracle.values {
                    prop_assert_eq!(shard.value(&counter(number)), value);
                }
            }
            prop_assert_eq!(shard.digest_of_disk(), shard.state.counter_digest);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}
