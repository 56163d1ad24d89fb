//! Connecting, and records as they are read: typed, whole, placed in history.

use std::time::Duration;

use engine::config::ShardConfig;
use engine::ids::{ShardId, StoreId};
use engine::records::{GatewayRecord, Meta, NodeRecord, StoreRecord};
use metastore::{Candidate, DrainIntent, Error, Metastore, Outcome, Record, Settings};

use crate::calls::{Calls, Fate};
use crate::etcd::{Etcd, free_port};
use crate::{gateway_record, node_record, raw, shard, start, store_record, within};

/// Written, read alone and read in a list.
async fn round_trip<R: Record>(store: &Metastore, id: R::Id, record: R) {
    assert_eq!(store.get::<R>(&id).await.expect("a read"), None);
    let outcome = store.create(&id, &record).await.expect("an answer");
    let Outcome::Done { revision } = outcome else { panic!("{outcome:?}") };
    let kept = store.get::<R>(&id).await.expect("a read").expect("it was written");
    assert_eq!((&kept.id, &kept.record), (&id, &record));
    assert_eq!((kept.created, kept.modified, kept.lease), (revision, revision, 0));
    let listed = store.list::<R>().await.expect("a list");
    assert_eq!((listed.all, listed.revision), (vec![kept], revision));
}

#[tokio::test]
async fn every_kind_comes_back_as_it_was_written() {
    let (_etcd, store) = start().await;
    let meta = Meta {
        cluster: 7,
        shards: 24,
        replicas: 3,
        min_in_sync: 2,
        hash: 1,
        incarnation: 1,
        idempotency: engine::idempotency::Settings::default(),
    };
    round_trip(&store, (), meta).await;
    round_trip(&store, (), Candidate { address: "127.0.0.1:7".into() }).await;
    round_trip(&store, StoreId(9), store_record(3, 99)).await;
    round_trip(&store, StoreId(9), node_record(3)).await;
    round_trip(&store, u128::MAX, gateway_record("127.0.0.1:8")).await;
    round_trip(&store, ShardId(2730), shard(2730)).await;
    round_trip(&store, StoreId(9), DrainIntent).await;
}

#[tokio::test]
async fn a_list_is_one_moment_and_one_kind() {
    let (_etcd, store) = start().await;
    for lo in [300, 2, 10] {
        store.create(&ShardId(lo), &shard(lo)).await.expect("an answer");
    }
    store.create(&1, &gateway_record("a")).await.expect("an answer");
    let other = Settings::new(vec![_etcd.endpoint()], "test-2");
    let other = Metastore::connect(&other).await.expect("etcd answers");
    other.create(&ShardId(7), &shard(7)).await.expect("an answer");

    let listed = store.list::<ShardConfig>().await.expect("a list");
    let ids: Vec<u16> = listed.all.iter().map(|kept| kept.id.0).collect();
    assert_eq!(ids, [10, 2, 300], "in the order of the keys");
    // R and L of a collection: the revision is that of the read itself, not of the newest record in the list.
    assert!(listed.all.iter().all(|kept| kept.modified < listed.revision));
    let sessions = store.list::<GatewayRecord>().await.expect("a list");
    assert_eq!(sessions.revision, listed.revision);
    assert_eq!(sessions.all.len(), 1);
}

/// A gateway that is skipped because its record can't be read would have its live session collected.
#[tokio::test]
async fn what_cannot_be_read_fails_the_list_and_names_the_key() {
    let (etcd, store) = start().await;
    store.create(&1, &gateway_record("a")).await.expect("an answer");
    for (key, value) in [
        ("/dkc/test/gateway/me", &b"\x01"[..]),
        ("/dkc/test/store/00000000000000000000000000000001", b"\xff newer"),
    ] {
        raw(&etcd).await.put(key, value, None).await.expect("etcd answers");
    }
    let error = store.list::<GatewayRecord>().await.expect_err("a key that does not parse");
    assert!(matches!(&error, Error::Malformed { key, .. } if key == "/dkc/test/gateway/me"));
    assert!(!error.is_transient());
    let error = store.get::<StoreRecord>(&StoreId(1)).await.expect_err("a newer format");
    assert!(matches!(error, Error::Malformed { .. }));
    assert!(error.to_string().contains("newer dkc"), "{error}");
    // A record that was copied to another key says so itself.
    let copied = shard(5).encode();
    raw(&etcd).await.put("/dkc/test/shard/6", copied, None).await.expect("etcd answers");
    let error = store.get::<ShardConfig>(&ShardId(6)).await.expect_err("shard 5 at key 6");
    assert!(matches!(error, Error::Malformed { .. }));
}

/// tonic takes 4 MiB if it is not told otherwise.
#[tokio::test]
async fn a_large_list_is_read() {
    let (_etcd, store) = start().await;
    let long = "x".repeat(1 << 20);
    for nonce in 0..6 {
        store.create(&nonce, &gateway_record(&long)).await.expect("an answer");
    }
    assert_eq!(store.list::<GatewayRecord>().await.expect("a list").all.len(), 6);
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_worth_waiting_for_and_a_wrong_name_is_not() {
    let mut settings = Settings::new(vec![format!("127.0.0.1:{}", free_port())], "test");
    let error = within(5, Metastore::connect(&settings)).await.err().expect("nobody listens");
    assert!(error.is_transient(), "{error}");
    settings.cluster = "a/b".into();
    let error = within(5, Metastore::connect(&settings)).await.err().expect("not a name");
    assert!(!error.is_transient(), "{error}");
    for endpoints in [vec![], vec!["http://a b".to_owned()]] {
        let settings = Settings::new(endpoints, "test");
        let error = within(5, Metastore::connect(&settings)).await.err().expect("no address");
        assert!(!error.is_transient(), "{error}");
    }
}

/// What we rely on came with 3.5; waiting does not bring it.
#[tokio::test]
async fn an_etcd_that_is_too_old_is_refused_and_a_faulty_one_is_warned_of() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let settings = Settings::new(vec![calls.endpoint()], "test");
    (0..2).for_each(|_| calls.next("Status", Fate::SayVersion("3.4.27")));
    let refused = within(10, Metastore::connect(&settings)).await.err().expect("too old");
    assert!(matches!(&refused, Error::TooOld { found } if found == "3.4.27"), "{refused}");
    assert!(!refused.is_transient());
    let refused = within(10, Metastore::probe(&settings, 5)).await.expect_err("too old");
    assert!(matches!(&refused, Error::TooOld { found } if found == "3.4.27"), "{refused}");
    (0..2).for_each(|_| calls.next("Status", Fate::SayVersion("3.5.2")));
    assert!(within(10, Metastore::connect(&settings)).await.is_ok());
    let probe = within(10, Metastore::probe(&settings, 5)).await.expect("it works");
    assert!(probe.warning.is_some_and(|said| said.contains("3.5.6")), "{probe:?}");
}

#[tokio::test]
async fn a_frozen_etcd_costs_no_more_than_the_time_allowed() {
    let (etcd, _) = start().await;
    let settings = Settings {
        call_timeout: Duration::from_millis(200),
        ..Settings::new(vec![etcd.endpoint()], "test")
    };
    let store = Metastore::connect(&settings).await.expect("etcd answers");
    etcd.freeze();
    let error = within(1, store.list::<NodeRecord>()).await.expect_err("it is frozen");
    assert!(error.is_transient(), "{error}");
    etcd.thaw();
    within(5, async { while store.list::<NodeRecord>().await.is_err() {} }).await;
}

/// One member of three may be down for good. If calls were spread over all of them, every third would fail.
#[tokio::test]
async fn a_dead_member_beside_a_live_one_fails_nothing() {
    let (mut etcd, _) = start().await;
    let endpoints = vec![format!("127.0.0.1:{}", free_port()), etcd.endpoint()];
    let settings = Settings::new(endpoints, "test");
    // Each begins at either: of so many, some at the dead one.
    for _ in 0..20 {
        within(5, Metastore::connect(&settings)).await.map(drop).expect("one answers");
        within(5, Metastore::probe(&settings, 5)).await.expect("one answers");
    }
    let store = within(5, Metastore::connect(&settings)).await.expect("one answers");
    for nonce in 0..50 {
        let outcome = store.create(&nonce, &gateway_record("a")).await.expect("an answer");
        assert!(matches!(outcome, Outcome::Done { .. }), "call {nonce}: {outcome:?}");
    }
    // When the live one is away both are tried in turn, so its return is noticed.
    etcd.kill();
    assert!(store.list::<NodeRecord>().await.is_err());
    etcd.run().await;
    within(5, async { while store.list::<NodeRecord>().await.is_err() {} }).await;
}
