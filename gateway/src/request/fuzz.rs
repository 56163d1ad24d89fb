//! Random bodies: the three formats mean the same, and no bytes have two meanings or cause a panic.
//!
//! As in `tests/tests/fuzz/`, every run has the same cases; `PROPTEST_RNG_SEED` and
//! `PROPTEST_CASES` select others.

use std::fmt::Write as _;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use engine::ops::{Op, OpKind};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use super::*;

fn runner() -> TestRunner {
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if matches!(config.rng_seed, RngSeed::Random) {
        config.rng_seed = RngSeed::Fixed(1);
    }
    TestRunner::new(config)
}

/// A key of any bytes that a line of text can have, and a delta. Keys that begin with a byte order
/// mark are excluded: at the beginning of a body, the mark is not part of a key.
fn item() -> impl Strategy<Value = (Vec<u8>, i64)> {
    let byte = any::<u8>().prop_filter("ends a line", |&byte| byte != b'\n');
    let key = vec(byte, 1..12).prop_filter("a mark", |key| {
        ![&b"\xef\xbb\xbf"[..], b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"]
            .iter()
            .any(|mark| key.starts_with(mark))
    });
    (key, any::<i64>())
}

fn text(items: &[(Vec<u8>, i64)]) -> Vec<u8> {
    let line = |(key, delta): &(Vec<u8>, i64)| [key, format!("\t{delta}\n").as_bytes()].concat();
    items.iter().flat_map(line).collect()
}

fn json_item((key, delta): &(Vec<u8>, i64)) -> String {
    match str::from_utf8(key) {
        Ok(key) => serde_json::json!({"key": key, "delta": delta}).to_string(),
        Err(_) => serde_json::json!({"delta": delta, "key_base64": BASE64.encode(key)}).to_string(),
    }
}

fn ndjson(items: &[(Vec<u8>, i64)]) -> Vec<u8> {
    let mut out = String::new();
    for item in items {
        writeln!(out, "{}", json_item(item)).expect("a String takes all");
    }
    out.into()
}

fn json_list(items: &[(Vec<u8>, i64)]) -> Vec<u8> {
    let items: Vec<_> = items.iter().map(json_item).collect();
    format!("{{\"increments\": [{}]}}", items.join(",")).into()
}

/// A key and its delta.
type Item = (Vec<u8>, i64);
type Write = fn(&[Item]) -> Vec<u8>;

const FORMS: [(BodyType, Write); 3] =
    [(BodyType::Text, text), (BodyType::NdJson, ndjson), (BodyType::Json, json_list)];

#[test]
fn the_three_formats_mean_the_same() {
    runner()
        .run(&vec(item(), 0..8), |items| {
            let op = |(key, delta): &(Vec<u8>, i64)| Op {
                counter: CounterKey::new(b"ns", key).expect("1 to 11 bytes"),
                kind: OpKind::Add { delta: i128::from(*delta) },
            };
            let want: Vec<_> = items.iter().map(op).collect();
            for (form, write) in FORMS {
                let batch = increments("ns", form, &write(&items), |_| Ok(()));
                prop_assert_eq!(batch.map(|batch| batch.ops), Ok(want.clone()), "{:?}", form);
            }
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

/// Of a damaged body that is still readable, each item is applied or failed, never both or neither.
#[test]
fn every_item_is_accounted_for() {
    let harm = (any::<Index>(), any::<u8>(), 0..4u8);
    let harmed =
        (vec(item(), 0..6), 0..FORMS.len(), vec(harm, 0..4)).prop_map(|(items, form, harms)| {
            let mut body = FORMS[form].1(&items);
            for (at, byte, how) in harms {
                if body.is_empty() {
                    break;
                }
                let at = at.index(body.len());
                match how {
                    0 => body[at] = byte,
                    1 => body.insert(at, byte),
                    2 => body.truncate(at),
                    _ => drop(body.remove(at)),
                }
            }
            body
        });
    let bodies = prop_oneof![vec(any::<u8>(), 0..100), harmed];
    runner()
        .run(&bodies, |body| {
            for (form, _) in FORMS {
                let Ok(batch) = increments("ns", form, &body, |_| Ok(())) else { continue };
                let failed = batch.failed.iter().map(|item| item.index);
                let bad = |key: &Vec<u8>| key.is_empty() || key.len() > 1_024;
                prop_assert!(!batch.failed.iter().filter_map(|item| item.key.as_ref()).any(bad));
                let mut indexes: Vec<_> = batch.indexes.iter().copied().chain(failed).collect();
                indexes.sort_unstable();
                prop_assert_eq!(batch.ops.len(), batch.indexes.len());
                prop_assert!(
                    indexes.into_iter().eq(0..(batch.ops.len() + batch.failed.len()) as u32)
                );
            }
            let _ = keys("ns", &body);
            let _ = increment(BodyType::Json, &body, IncrementQuery::default());
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}
