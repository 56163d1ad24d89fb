//! Applying a log has the same result as a plain map, whenever the table is sealed and flushed.

use std::collections::{BTreeMap, BTreeSet};

use engine::batch::{Batch, Codec};
use engine::codec::Malformed;
use engine::entry::{Body, Entry};
use engine::ids::{BatchSeq, CopyNo, Epoch, Revision, SessionId, Slots, TimeMs};
use engine::key::CounterKey;
use engine::message::BatchReply;
use engine::ops::{Op, OpKind, TokenedOps};
use engine::shard::apply::{Decoded, Loaded, apply, decode, needs};
use engine::shard::idempotency::{
    ClientToken, IssueTime, Scope, TokenLimits, TokenOutcome, TokenSettings,
};
use engine::shard::state::ShardState;
use engine::store::layout::{self, RowChange, RowKey};
use engine::store::table::Tables;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::{config, values};

/// No record is dropped in the time that a case lasts.
const LIMITS: TokenLimits = TokenLimits { settings: SETTINGS, planted: None };
const SETTINGS: TokenSettings =
    TokenSettings { window_ms: 3_600_000, buckets: 16, bytes_max: 1 << 20, namespaces_max: 64 };

/// One step of a shard.
#[derive(Clone, Debug)]
enum Step {
    /// A worker's next batch, or one that it has sent before. With a token it names its request,
    /// too: the token may have been used for another one.
    Batch {
        session: u64,
        again: Option<u64>,
        token: Option<(u8, u8)>,
        ops: Vec<(u8, OpKind)>,
    },
    /// Sessions up to this one are expired, except for the named ones.
    Collect {
        r: u64,
        l: BTreeSet<u64>,
    },
    Freeze,
    Flush,
}

/// Few counters and few sessions, so that steps share them.
fn step() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        4 => values::delta().prop_map(|delta| OpKind::Add { delta }),
        2 => values::delta().prop_map(|delta| OpKind::AddReturning { delta }),
        1 => Just(OpKind::Delete),
    ];
    prop_oneof![
        10 => (
            1..5u64,
            prop::option::weighted(0.3, 1..4u64),
            prop::option::of((0..4u8, 0..2u8)),
            // The request is often the same, so that a token is used for it again.
            prop_oneof![vec((0..6u8, kind), 0..5), Just(vec![(0, OpKind::AddReturning { delta: 1 })])],
        )
            .prop_map(|(session, again, token, ops)| Step::Batch { session, again, token, ops }),
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

    fn apply(&mut self, body: Body) -> Option<BatchReply> {
        let entry = Entry::after(self.state.applied, Epoch(1), TimeMs(0), body);
        let decoded = decode(&entry).expect("of this build");
        assert_ne!(decoded, Decoded::Malformed);
        let needs = needs(&decoded, self.state.slots);
        let values = needs.counters.into_iter().map(|counter| {
            let value = self.on_disk(&counter);
            (counter, value)
        });
        let records = needs.records.into_iter().filter_map(|id| {
            let row = self.disk.get(&layout::idempotency_key(id.slot, id.hash))?;
            Some((id, layout::decode_record(row).expect("written by a flush")))
        });
        let loaded = Loaded { values: values.collect(), records: records.collect() };
        apply(&mut self.state, &mut self.tables, &entry, &decoded, &loaded, &LIMITS)
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
        if self.tables.sealed.is_none() {
            self.tables.seal();
        }
    }

    fn flush(&mut self) {
        let Some(frozen) = self.tables.sealed.take() else { return };
        let shards = [(CopyNo(1), self.state.clone())];
        let written = layout::rows(&frozen, &shards, |key, change| {
            match change {
                RowChange::Put(value) => drop(self.disk.insert(key.to_vec(), value.to_vec())),
                RowChange::Delete => drop(self.disk.remove(key)),
                RowChange::Merge(operand) => {
                    let merged = layout::merge(self.disk.get(key).map(Vec::as_slice), [operand])?;
                    self.disk.insert(key.to_vec(), merged);
                }
            }
            Ok::<(), Malformed>(())
        });
        written.expect("all was written here");
    }

    /// The digest that the scrubber would find, with all flushed.
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

/// The values that a batch returned, and the outcome of its token.
type BatchAnswer = (Vec<i128>, Vec<TokenOutcome>);

/// The request under a token.
type Request = (u8, Vec<(u8, OpKind)>);

/// The model of the shard: a map of values, and the answer to each batch.
#[derive(Default)]
struct Oracle {
    values: BTreeMap<u8, i128>,
    /// The answer to each batch, by session.
    rows: BTreeMap<u64, Vec<BatchAnswer>>,
    /// By token: the request that was applied under it, and the values that it returned.
    tokens: BTreeMap<u8, (Request, Vec<i128>)>,
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

    fn under_token(&mut self, token: u8, request: u8, ops: &[(u8, OpKind)]) -> BatchAnswer {
        match self.tokens.get(&token) {
            Some(((first, asked), values)) if *first == request && asked == ops => {
                (values.clone(), vec![TokenOutcome::Replayed])
            }
            // An operation that asks for a value gets one.
            Some(_) => (vec![0; asking(ops)], vec![TokenOutcome::Reused]),
            None => {
                let values = self.run(ops);
                self.tokens.insert(token, ((request, ops.to_vec()), values.clone()));
                (values, vec![TokenOutcome::Applied])
            }
        }
    }

    /// The expected answer to a batch; `None`: it must have had no effect.
    fn batch(
        &mut self,
        session: u64,
        batch_seq: u64,
        token: Option<(u8, u8)>,
        ops: &[(u8, OpKind)],
    ) -> Option<BatchAnswer> {
        if self.expired(session) {
            return None;
        }
        let sent = self.rows.get(&session).map_or(0, Vec::len) as u64;
        if batch_seq == sent + 1 {
            let answer = match token {
                Some((token, request)) => self.under_token(token, request, ops),
                None => (self.run(ops), Vec::new()),
            };
            self.rows.entry(session).or_default().push(answer);
        }
        let row = self.rows.get(&session)?;
        row.get(usize::try_from(batch_seq).ok()? - 1).cloned()
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

fn asking(ops: &[(u8, OpKind)]) -> usize {
    ops.iter().filter(|(_, kind)| kind.returns_value()).count()
}

fn payload(token: Option<(u8, u8)>, ops: &[(u8, OpKind)]) -> Vec<u8> {
    let ops: Vec<_> = ops.iter().map(|&(key, kind)| Op { counter: counter(key), kind }).collect();
    let tokened = token.and_then(|(token, request)| {
        let token = ClientToken {
            scope: Scope::Batch,
            token: vec![token].into(),
            issued: None,
            extra: request.into(),
        };
        let tag = token.tag(&ops)?;
        let issued = IssueTime::Stated(TimeMs(0));
        Some(TokenedOps { tag, issued, first: 0, count: ops.len() })
    });
    values::write_ops(&values::ListedOps { ops, tokened: tokened.into_iter().collect() })
}

#[test]
fn a_shard_counts_as_a_map_does() {
    TestRunner::new(config())
        .run(&vec(step(), 0..60), |steps| {
            let (mut shard, mut oracle) = (Shard::new(), Oracle::default());
            for step in steps {
                match step {
                    Step::Batch { session: number, again, token, ops } => {
                        let token = token.filter(|_| !ops.is_empty());
                        let sent = oracle.rows.get(&number).map_or(0, Vec::len) as u64;
                        let batch_seq = (sent + 1).saturating_sub(again.unwrap_or(0)).max(1);
                        let payload = payload(token, &ops).into();
                        // Every answer is still wanted, so that duplicates are answered in full.
                        let batch = Batch::seal(
                            Slots::ALL,
                            session(number),
                            BatchSeq(batch_seq),
                            BatchSeq(1),
                            Codec::Raw,
                            payload,
                        );
                        let answer = shard.apply(Body::Ops(batch));
                        let got = match answer {
                            Some(BatchReply::Applied { values, tokens, .. }) => {
                                Some((values, tokens))
                            }
                            Some(BatchReply::Expired | BatchReply::NoEffect) => None,
                            other => return Err(TestCaseError::fail(format!("{other:?}"))),
                        };
                        prop_assert_eq!(got, oracle.batch(number, batch_seq, token, &ops));
                    }
                    Step::Collect { r, l } => {
                        oracle.collect(r, &l);
                        let l = l.into_iter().map(session).collect();
                        shard.apply(Body::ExpireSessions { up_to: session(r).0, survivors: l });
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
