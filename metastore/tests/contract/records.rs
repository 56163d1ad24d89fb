//! Connections, and reads of records: typed, complete, with their revisions.

use std::time::Duration;

use engine::ids::{Boot, ShardId, StoreId, TimeMs};
use engine::records::{
    GatewayRecord, Meta, NodeRecord, Operator, PauseIntent, RemoveIntent, StoreRecord,
};
use engine::shard_record::ShardRecord;
use metastore::{
    CasOutcome, CoordinatorRecord, DrainIntent, Error, EtcdRecord, Metastore, Settings,
};

use crate::calls::{Calls, Fate};
use crate::etcd::{Etcd, free_port};
use crate::{gateway_record, node_record, raw, shard, start, store_record, within};

/// Writes a record, and reads it alone and in a list.
async fn round_trip<R: EtcdRecord>(store: &Metastore, id: R::Id, record: R) {
    assert_eq!(store.get::<R>(&id).await.expect("a read"), None);
    let outcome = store.create(&id, &record).await.expect("an answer");
    let CasOutcome::Done { mod_revision: revision } = outcome else { panic!("{outcome:?}") };
    let stored = store.get::<R>(&id).await.expect("a read").expect("it was written");
    assert_eq!((&stored.id, &stored.record), (&id, &record));
    assert_eq!((stored.created, stored.modified, stored.lease), (revision, revision, 0));
    let listed = store.list::<R>().await.expect("a list");
    assert_eq!((listed.all, listed.revision), (vec![stored], revision));
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
        idempotency: engine::shard::idempotency::TokenSettings::default(),
    };
    round_trip(&store, (), meta).await;
    round_trip(&store, (), CoordinatorRecord { address: "127.0.0.1:7".into() }).await;
    round_trip(&store, StoreId(9), store_record(3, 99)).await;
    round_trip(&store, StoreId(9), node_record(3)).await;
    round_trip(&store, u128::MAX, gateway_record("127.0.0.1:8")).await;
    round_trip(&store, ShardId(2730), shard(2730)).await;
    round_trip(&store, StoreId(9), DrainIntent).await;
    let from = Operator { at: TimeMs(7), name: "me@here".into() };
    round_trip(&store, (), PauseIntent { from: from.clone() }).await;
    round_trip(&store, StoreId(9), RemoveIntent { boot: Boot(3), from }).await;
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

    let listed = store.list::<ShardRecord>().await.expect("a list");
    let ids: Vec<u16> = listed.all.iter().map(|stored| stored.id.0).collect();
    assert_eq!(ids, [10, 2, 300], "in the order of the keys");
    // The expiry of sessions needs this: the revision is that of the read itself, not that of the
    // newest record in the list.
    assert!(listed.all.iter().all(|stored| stored.modified < listed.revision));
    let sessions = store.list::<GatewayRecord>().await.expect("a list");
    assert_eq!(sessions.revision, listed.revision);
    assert_eq!(sessions.all.len(), 1);
}

/// If a gateway's record that can't be read were skipped, its session would expire while it is
/// alive.
#[tokio::test]
async fn a_record_that_cannot_be_decoded_fails_the_list_and_its_key_is_named() {
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
    // A record that was copied to another key is detected by the id in its value.
    let copied = shard(5).encode();
    raw(&etcd).await.put("/dkc/test/shard/6", copied, None).await.expect("etcd answers");
    let error = store.get::<ShardRecord>(&ShardId(6)).await.expect_err("shard 5 at key 6");
    assert!(matches!(error, Error::Malformed { .. }));
}

/// tonic's default limit of a message is 4 MiB.
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
    let error = within(5, Metastore::connect(&settings)).await.err().expect("the port is closed");
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

/// dkc relies on features of 3.5, so waiting does not help.
#[tokio::test]
async fn an_etcd_that_is_too_old_is_refused_and_a_faulty_one_is_warned_of() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let settings = Settings::new(vec![calls.endpoint()], "test");
    (0..2).for_each(|_| calls.next("Status", Fate::ReplyVersion("3.4.27")));
    let refused = within(10, Metastore::connect(&settings)).await.err().expect("too old");
    assert!(matches!(&refused, Error::TooOld(found) if found == "3.4.27"), "{refused}");
    assert!(!refused.is_transient());
    let refused = within(10, Metastore::inspect(&settings, 5)).await.expect_err("too old");
    assert!(matches!(&refused, Error::TooOld(found) if found == "3.4.27"), "{refused}");
    (0..2).for_each(|_| calls.next("Status", Fate::ReplyVersion("3.5.2")));
    assert!(within(10, Metastore::connect(&settings)).await.is_ok());
    let inspection = within(10, Metastore::inspect(&settings, 5)).await.expect("it works");
    assert!(inspection.warning.is_some_and(|text| text.contains("3.5.6")), "{inspection:?}");
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

/// One member of three may be down for good. If calls were spread over all members, every third
/// would fail.
#[tokio::test]
async fn a_dead_member_beside_a_live_one_fails_nothing() {
    let (mut etcd, _) = start().await;
    let endpoints = vec![format!("127.0.0.1:{}", free_port()), etcd.endpoint()];
    let settings = Settings::new(endpoints, "test");
    // Each connection begins at a random member: of so many, some begin at the dead one.
    for _ in 0..20 {
        within(5, Metastore::connect(&settings)).await.map(drop).expect("one answers");
        within(5, Metastore::inspect(&settings, 5)).await.expect("one answers");
    }
    let store = within(5, Metastore::connect(&settings)).await.expect("one answers");
    for nonce in 0..50 {
        let outcome = store.create(&nonce, &gateway_record("a")).await.expect("an answer");
        assert!(matches!(outcome, CasOutcome::Done { .. }), "call {nonce}: {outcome:?}");
    }
    // While the live member is away, both are tried in turn, so that its return is noticed.
    etcd.kill();
    assert!(store.list::<NodeRecord>().await.is_err());
    etcd.run().await;
    within(5, async { while store.list::<NodeRecord>().await.is_err() {} }).await;
}
