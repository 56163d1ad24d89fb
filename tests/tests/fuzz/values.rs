//! Values that the engine's formats can hold, the extreme ones among them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use engine::batch::{Batch, Codec};
use engine::entry::{Body, Entry, Position};
use engine::etcd_memory::EtcdMemory;
use engine::ids::{
    BatchSeq, Boot, Chain, CopyNo, Epoch, Revision, Seq, SessionId, ShardId, Slots, StoreBoot,
    StoreId, TimeMs, Version,
};
use engine::key::CounterKey;
use engine::ops::{self, Op, OpKind, Ops, TokenedOps};
use engine::records::{
    GatewayRecord, Meta, NameRecord, NodeRecord, Operator, RemoveIntent, StoreRecord, StoreStatus,
};
use engine::shard::idempotency::{
    self, Bucket, Buckets, IssueTime, Leap, Scope, Tag, TokenOutcome,
};
use engine::shard::sessions::{BatchResult, SessionExpiry, SessionRow, SessionTable};
use engine::shard::state::ShardState;
use engine::shard_record::ShardRecord;
use engine::store::log::{CLAIMS_MAX, CopyExtent, Identity, LogRecord, ShardCheckpoint};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

/// Small numbers and the largest are as likely as those between.
pub(crate) fn number() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0..64u32).prop_map(|(bits, shift)| bits >> shift)
}

pub(crate) fn delta() -> impl Strategy<Value = i128> {
    (any::<i128>(), 0..128u32).prop_map(|(bits, shift)| bits >> shift)
}

pub(crate) fn payload() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..60).prop_map(Bytes::from)
}

pub(crate) fn counter() -> impl Strategy<Value = CounterKey> {
    ("[a-z0-9_.-]{1,64}", vec(any::<u8>(), 1..50)).prop_map(|(namespace, key)| {
        CounterKey::new(namespace.as_bytes(), &key).expect("of allowed characters and lengths")
    })
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![
        delta().prop_map(|delta| OpKind::Add { delta }),
        delta().prop_map(|delta| OpKind::AddReturning { delta }),
        Just(OpKind::Delete),
    ];
    (counter(), kind).prop_map(|(counter, kind)| Op { counter, kind })
}

/// The operations of a payload, as a list.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct ListedOps {
    pub ops: Vec<Op>,
    pub tokened: Vec<TokenedOps>,
}

impl From<Ops> for ListedOps {
    fn from(ops: Ops) -> Self {
        Self { ops: ops.iter().map(|op| ops.to_op(op)).collect(), tokened: ops.tokened }
    }
}

/// Ops without a token, and groups of ops with one.
pub(crate) fn ops() -> impl Strategy<Value = ListedOps> {
    let group = || (tag(), issue_time(), vec(op(), 1..4)).prop_map(Some);
    let plain = || Just(None);
    vec((prop_oneof![group().boxed(), plain().boxed()], op()), 0..6).prop_map(|parts| {
        let mut all = ListedOps::default();
        for (group, op) in parts {
            let Some((tag, issued, mut ops)) = group else {
                all.ops.push(op);
                continue;
            };
            if tag.scope == Scope::Counter {
                ops.truncate(1);
            }
            let (first, count) = (all.ops.len(), ops.len());
            all.tokened.push(TokenedOps { tag, issued, first, count });
            all.ops.extend(ops);
        }
        all
    })
}

fn issue_time() -> impl Strategy<Value = IssueTime> {
    let kind = prop_oneof![Just(IssueTime::Stated as fn(_) -> _), Just(IssueTime::Arrived as _)];
    (kind, number()).prop_map(|(kind, time)| kind(TimeMs(time)))
}

fn tag() -> impl Strategy<Value = Tag> {
    (any::<bool>(), any::<u128>(), any::<u128>()).prop_map(|(single, hash, fingerprint)| Tag {
        scope: if single { Scope::Counter } else { Scope::Batch },
        hash,
        fingerprint,
    })
}

/// Encodes operations as the batcher does.
pub(crate) fn write_ops(ListedOps { ops, tokened }: &ListedOps) -> Vec<u8> {
    let mut out = ops::begin();
    for (at, op) in ops.iter().enumerate() {
        if let Some(group) = tokened.iter().find(|group| group.first == at) {
            ops::put_token(&mut out, &group.tag, group.issued, group.count);
        }
        ops::put(&mut out, op);
    }
    out
}

pub(crate) fn token_record() -> impl Strategy<Value = idempotency::TokenRecord> {
    (number(), any::<u64>(), vec(delta(), 0..4)).prop_map(|(bucket, fingerprint, values)| {
        idempotency::TokenRecord { bucket, fingerprint, values }
    })
}

pub(crate) fn slots() -> impl Strategy<Value = Slots> {
    (any::<u16>(), any::<u16>()).prop_map(|(a, b)| Slots { lo: a.min(b), hi: a.max(b) })
}

pub(crate) fn revision() -> impl Strategy<Value = Revision> {
    (any::<u32>(), number()).prop_map(|(incarnation, revision)| Revision { incarnation, revision })
}

pub(crate) fn session() -> impl Strategy<Value = SessionId> {
    revision().prop_map(SessionId)
}

/// A batch whose payload is real operations, packed or not, or no operations at all.
pub(crate) fn batch() -> impl Strategy<Value = Batch> {
    let raw = ops().prop_map(|ops| (Codec::Raw, write_ops(&ops).into()));
    let packed = ops().prop_map(|ops| {
        (Codec::Lz4, lz4_flex::block::compress_prepend_size(&write_ops(&ops)).into())
    });
    let nonsense = payload().prop_map(|bytes| (Codec::Lz4, bytes));
    let body = prop_oneof![raw, packed, nonsense];
    (slots(), session(), number(), number(), body).prop_map(
        |(slots, session, batch_seq, below, (codec, payload))| {
            Batch::seal(slots, session, BatchSeq(batch_seq), BatchSeq(below), codec, payload)
        },
    )
}

pub(crate) fn position() -> impl Strategy<Value = Position> {
    (number(), number(), any::<u64>(), number()).prop_map(|(epoch, seq, chain, time)| Position {
        epoch: Epoch(epoch),
        // Another entry follows this one.
        seq: Seq(seq >> 1),
        chain: Chain(chain),
        time: TimeMs(time),
    })
}

pub(crate) fn entry() -> impl Strategy<Value = Entry> {
    let body = prop_oneof![
        batch().prop_map(Body::Ops),
        Just(Body::Barrier),
        (revision(), vec(session(), 0..5))
            .prop_map(|(up_to, survivors)| Body::ExpireSessions { up_to, survivors }),
        number().prop_map(|bucket| Body::ExpireTokens { bucket }),
        any::<u16>().prop_map(|at| Body::Split { at }),
        (6..=u8::MAX, vec(any::<u8>(), 0..9))
            .prop_map(|(kind, bytes)| Body::Unknown { kind, bytes: bytes.into() }),
    ];
    (position(), number(), number(), body).prop_map(|(previous, epoch, time, body)| {
        Entry::after(previous, Epoch(epoch), TimeMs(time), body)
    })
}

fn checkpoint() -> impl Strategy<Value = ShardCheckpoint> {
    let extent = (slots(), position(), number()).prop_map(|(slots, base, last)| CopyExtent {
        slots,
        base,
        last: Seq(last),
    });
    (number(), number(), any::<bool>(), option::of(extent)).prop_map(
        |(promised, copy, suspect, extent)| ShardCheckpoint {
            promised: Epoch(promised),
            copy: CopyNo(copy),
            suspect,
            extent,
        },
    )
}

fn identity() -> impl Strategy<Value = Identity> {
    let nonces = (option::of(any::<u128>()), vec(any::<u128>(), 1..=CLAIMS_MAX));
    (any::<[u128; 2]>(), number(), nonces).prop_map(
        |([cluster, store], boot, (read_nonce, claims))| Identity {
            cluster,
            store: StoreId(store),
            boot: Boot(boot),
            read_nonce,
            claims,
        },
    )
}

pub(crate) fn record() -> impl Strategy<Value = LogRecord> {
    let shard = || any::<u16>().prop_map(ShardId);
    prop_oneof![
        4 => (shard(), entry()).prop_map(|(shard, entry)| LogRecord::Append { shard, entry }),
        1 => (shard(), number()).prop_map(|(shard, after)| LogRecord::Truncate { shard, after: Seq(after) }),
        1 => (shard(), number()).prop_map(|(shard, epoch)| LogRecord::Promise { shard, epoch: Epoch(epoch) }),
        1 => (shard(), slots(), number(), position())
            .prop_map(|(shard, slots, copy, base)| LogRecord::Copy { shard, slots, copy: CopyNo(copy), base }),
        1 => (shard(), number()).prop_map(|(shard, copy)| LogRecord::Drop { shard, copy: CopyNo(copy) }),
        1 => (shard(), number()).prop_map(|(shard, copy)| LogRecord::Suspect { shard, copy: CopyNo(copy) }),
        1 => identity().prop_map(LogRecord::Identity),
        1 => config().prop_map(|record| LogRecord::ActedOn(Box::new(record))),
        1 => (meta(), store(), any::<u32>()).prop_map(|(meta, store, promised)| {
            LogRecord::Etcd(Box::new(EtcdMemory { meta, store, promised }))
        }),
        1 => (shard(), checkpoint()).prop_map(|(shard, checkpoint)| LogRecord::Checkpoint { shard, checkpoint }),
    ]
}

pub(crate) fn config() -> impl Strategy<Value = ShardRecord> {
    let stores = || vec(any::<u128>().prop_map(StoreId), 0..5);
    (
        slots(),
        [number(), number(), number()],
        any::<u128>(),
        [stores(), stores(), stores(), stores()],
    )
        .prop_map(
            |(slots, [epoch, version, boot], store, [isr, learners, target, tainted])| {
                let primary = StoreBoot { store: StoreId(store), boot: Boot(boot) };
                let (epoch, version) = (Epoch(epoch), Version(version));
                ShardRecord { slots, epoch, version, primary, isr, learners, target, tainted }
            },
        )
}

pub(crate) fn meta() -> impl Strategy<Value = Meta> {
    let numbers = (number(), any::<u32>(), number(), any::<u32>());
    (any::<u128>(), any::<u32>(), any::<[u8; 3]>(), any::<u32>(), numbers).prop_map(
        |(cluster, shards, [replicas, min_in_sync, hash], incarnation, idempotency)| Meta {
            cluster,
            shards,
            replicas,
            min_in_sync,
            hash,
            incarnation,
            idempotency: idempotency::TokenSettings {
                window_ms: idempotency.0,
                buckets: idempotency.1,
                bytes_max: idempotency.2,
                namespaces_max: idempotency.3,
            },
        },
    )
}

pub(crate) fn store() -> impl Strategy<Value = StoreRecord> {
    let text = || ".{0,20}";
    let status = prop_oneof![
        Just(StoreStatus::Active),
        Just(StoreStatus::Draining),
        Just(StoreStatus::Suspect),
        Just(StoreStatus::Lost),
        Just(StoreStatus::Retired),
        Just(StoreStatus::LostSuspect),
    ];
    ([text(), text(), text(), text()], number(), any::<u128>(), status).prop_map(
        |([name, address, zone, host], boot, nonce, status)| StoreRecord {
            name,
            address,
            zone,
            host,
            boot: Boot(boot),
            nonce,
            status,
        },
    )
}

pub(crate) fn name() -> impl Strategy<Value = NameRecord> {
    any::<u128>().prop_map(|store| NameRecord { store: StoreId(store) })
}

pub(crate) fn node() -> impl Strategy<Value = NodeRecord> {
    (number(), ".{0,20}", number(), any::<(u32, u32)>()).prop_map(
        |(boot, address, capacity, versions)| NodeRecord {
            boot: Boot(boot),
            address,
            capacity,
            versions,
        },
    )
}

pub(crate) fn gateway() -> impl Strategy<Value = GatewayRecord> {
    (".{0,20}", any::<u32>()).prop_map(|(address, worker)| GatewayRecord { address, worker })
}

pub(crate) fn removal() -> impl Strategy<Value = RemoveIntent> {
    (number(), number(), ".{0,20}").prop_map(|(boot, at, name)| RemoveIntent {
        boot: Boot(boot),
        from: Operator { at: TimeMs(at), name },
    })
}

fn outcome() -> impl Strategy<Value = TokenOutcome> {
    (0..5u8).prop_map(|byte| TokenOutcome::from_byte(byte).expect("there are five"))
}

fn buckets() -> impl Strategy<Value = Buckets> {
    let namespaces = btree_map(any::<u64>(), any::<u32>().prop_map(u64::from), 0..4);
    let bucket = (number(), any::<u128>(), number(), namespaces).prop_map(
        |(records, digest, prolonged_ms, namespaces)| {
            let bytes = namespaces.values().sum();
            Bucket { records, bytes, digest, prolonged_ms, namespaces }
        },
    );
    let leap = (number(), number());
    let leap = leap.prop_map(|(from, step_ms)| Leap { from: TimeMs(from), step_ms });
    (btree_map(number(), bucket, 0..4), vec(leap, 0..3))
        .prop_map(|(live, leaps)| Buckets::new(live, leaps))
}

fn sessions() -> impl Strategy<Value = SessionTable> {
    let result = prop_oneof![
        (vec(delta(), 0..4), vec(outcome(), 0..4))
            .prop_map(|(values, tokens)| BatchResult::Applied { values, tokens }),
        Just(BatchResult::Malformed),
    ];
    let row = (number(), number(), btree_map(number().prop_map(BatchSeq), result, 0..3)).prop_map(
        |(last, below, results): (_, _, BTreeMap<_, _>)| SessionRow {
            last: BatchSeq(last),
            answered_below: BatchSeq(below),
            results: results.into_iter().collect(),
        },
    );
    let expiry = (revision(), btree_set(session(), 0..4))
        .prop_map(|(up_to, survivors): (_, BTreeSet<_>)| SessionExpiry { up_to, survivors });
    (expiry, btree_map(session(), row, 0..4))
        .prop_map(|(expiry, rows)| SessionTable { expiry, rows })
}

pub(crate) fn shard_state() -> impl Strategy<Value = (CopyNo, ShardState)> {
    (number(), slots(), position(), any::<u128>(), sessions(), buckets()).prop_map(
        |(copy, slots, applied, counter_digest, sessions, tokens)| {
            let divided = Seq(applied.seq.0 / 2);
            (CopyNo(copy), ShardState { slots, applied, divided, counter_digest, sessions, tokens })
        },
    )
}
