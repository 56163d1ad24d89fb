//! Each codec: what it wrote reads back the same, and no bytes make it panic or accept what it
//! can't write.

use std::fmt::Debug;

use bytes::Bytes;
use engine::batch::Batch;
use engine::codec::Reader;
use engine::entry::Entry;
use engine::key::CounterKey;
use engine::ops;
use engine::records::{
    GatewayRecord, Meta, NameRecord, NodeRecord, PauseIntent, RemoveIntent, StoreRecord,
};
use engine::shard_record::ShardRecord;
use engine::store::layout::{self, RowKey};
use engine::store::log::LogRecord;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::{bytes::outside, config, values};

/// A format with both directions, where the decoder is given all of the bytes and must use all of
/// them.
struct Codec<T> {
    encode: fn(&T) -> Vec<u8>,
    decode: fn(Bytes) -> Option<T>,
}

impl<T: Clone + Debug + PartialEq> Codec<T> {
    fn check(&self, values: impl Strategy<Value = T> + Clone) {
        let Self { encode, decode } = *self;
        let mut runner = TestRunner::new(config());
        runner
            .run(&values, |value| {
                prop_assert_eq!(decode(encode(&value).into()), Some(value));
                Ok(())
            })
            .unwrap_or_else(|failure| panic!("a round trip: {failure}"));
        runner
            .run(&outside(values.prop_map(move |value| encode(&value))), |bytes| {
                if let Some(value) = decode(bytes.into()) {
                    prop_assert_eq!(decode(encode(&value).into()), Some(value));
                }
                Ok(())
            })
            .unwrap_or_else(|failure| panic!("bytes from outside: {failure}"));
    }
}

/// Reads one value that must use all bytes.
fn whole<T, E>(bytes: Bytes, decode: fn(&mut Reader) -> Result<T, E>) -> Option<T> {
    let mut from = Reader::new(bytes);
    let value = decode(&mut from).ok()?;
    from.is_empty().then_some(value)
}

fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut out);
    out
}

#[test]
fn ops() {
    let decode = |bytes| ops::decode(bytes).ok().map(values::ListedOps::from);
    Codec { encode: values::write_ops, decode }.check(values::ops().boxed());
}

/// The same holds for what is unpacked: a few bytes that claim to contain gigabytes must be
/// refused.
#[test]
fn batches() {
    let decode = |bytes| {
        let batch = whole(bytes, Batch::decode)?;
        let _ = ops::decode_batch(&batch);
        Some(batch)
    };
    let encode = |batch: &Batch| written(|out| batch.encode(out));
    Codec { encode, decode }.check(values::batch().boxed());
}

#[test]
fn entries() {
    let encode = |entry: &Entry| written(|out| entry.encode(out));
    Codec { encode, decode: |bytes| whole(bytes, Entry::decode) }.check(values::entry().boxed());
}

#[test]
fn log_records() {
    let encode = |record: &LogRecord| written(|out| record.encode(out));
    let decode = |bytes| whole(bytes, LogRecord::decode)?.ok();
    Codec { encode, decode }.check(values::record().boxed());
}

#[test]
fn etcd_records() {
    Codec { encode: ShardRecord::encode, decode: |bytes| ShardRecord::decode(&bytes).ok() }
        .check(values::config().boxed());
    Codec { encode: Meta::encode, decode: |bytes| Meta::decode(&bytes).ok() }
        .check(values::meta().boxed());
    Codec { encode: StoreRecord::encode, decode: |bytes| StoreRecord::decode(&bytes).ok() }
        .check(values::store().boxed());
    Codec { encode: NameRecord::encode, decode: |bytes| NameRecord::decode(&bytes).ok() }
        .check(values::name().boxed());
    Codec { encode: NodeRecord::encode, decode: |bytes| NodeRecord::decode(&bytes).ok() }
        .check(values::node().boxed());
    Codec { encode: GatewayRecord::encode, decode: |bytes| GatewayRecord::decode(&bytes).ok() }
        .check(values::gateway().boxed());
    Codec { encode: RemoveIntent::encode, decode: |bytes| RemoveIntent::decode(&bytes).ok() }
        .check(values::removal().boxed());
    Codec { encode: PauseIntent::encode, decode: |bytes| PauseIntent::decode(&bytes).ok() }
        .check(values::removal().prop_map(|it| PauseIntent { from: it.from }).boxed());
}

#[test]
fn state_keys() {
    let encode = |key: &RowKey| match key {
        RowKey::Counter { slot, counter } => layout::counter_key(*slot, counter.name()),
        RowKey::Idempotency { slot, hash } => layout::idempotency_key(*slot, *hash),
        RowKey::Shard(shard) => layout::shard_key(*shard),
    };
    let counter = |counter: CounterKey| RowKey::Counter { slot: counter.slot(), counter };
    let keys = prop_oneof![
        values::counter().prop_map(counter),
        any::<(u16, u128)>()
            .prop_map(|(slot, hash)| RowKey::Idempotency { slot: engine::ids::Slot(slot), hash }),
        any::<u16>().prop_map(|shard| RowKey::Shard(engine::ids::ShardId(shard))),
    ];
    Codec { encode, decode: |bytes| RowKey::decode(&bytes).ok() }.check(keys.boxed());
}

#[test]
fn state_values() {
    Codec {
        encode: |&value: &i128| layout::counter_value(value),
        decode: |bytes| layout::decode_counter(&bytes).ok(),
    }
    .check(values::delta().boxed());
    Codec { encode: layout::encode_record, decode: |bytes| layout::decode_record(&bytes).ok() }
        .check(values::token_record().boxed());
    Codec {
        encode: |(copy, state)| layout::encode_shard(*copy, state),
        decode: |bytes| layout::decode_shard(&bytes).ok(),
    }
    .check(values::shard_state().boxed());
}

/// RocksDB passes the bytes that it finds on disk to merges.
#[test]
fn merges_of_any_bytes() {
    let good = prop_oneof![
        values::delta().prop_map(layout::counter_operand),
        values::delta().prop_map(layout::counter_value),
    ];
    let rows = prop::collection::vec(outside(good.boxed()), 0..4);
    TestRunner::new(config())
        .run(&rows, |rows| {
            let mut rows = rows.iter().map(Vec::as_slice);
            let existing = rows.next();
            let operands: Vec<_> = rows.collect();
            let _ = layout::merge_operands(operands.iter().copied());
            if let Ok(merged) = layout::merge(existing, operands) {
                prop_assert!(layout::decode_counter(&merged).is_ok());
            }
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}
