//! Misconfigured etcds: full, or with authentication. The problems are distinguished, and a caller
//! that retries is delayed.

use std::time::{Duration, Instant};

use engine::records::GatewayRecord;
use etcd_client::{AlarmAction, AlarmOptions, AlarmType, CompactionOptions, ConnectOptions};
use metastore::{CasOutcome, Error, Metastore, Settings};

use crate::etcd::{Etcd, free_port};
use crate::{connect, gateway_record, raw, start, within};

#[tokio::test]
async fn a_full_etcd_is_reported_and_not_called_in_a_hot_loop() {
    let etcd = Etcd::start_with(&["--quota-backend-bytes", "8388608"]).await;
    let store = connect(etcd.endpoint()).await;
    let mut raw = raw(&etcd).await;
    let mut fillers = 0;
    while raw.put(format!("fill-{fillers}"), vec![7; 900_000], None).await.is_ok() {
        fillers += 1;
        assert!(fillers < 100, "it does not fill up");
    }
    assert!(store.is_full().await.expect("it answers"));
    assert_eq!(store.list::<GatewayRecord>().await.expect("reads go on").all, []);
    let began = Instant::now();
    let mut tries = 0;
    while began.elapsed() < Duration::from_secs(2) {
        let outcome = store.create(&1, &gateway_record("a")).await.expect("unknown is no error");
        assert_eq!(outcome, CasOutcome::Unknown);
        tries += 1;
    }
    assert!(tries < 20, "{tries} in 2 s");
    assert_eq!(store.write_failure(), Some("etcd-full"));
    let settings = Settings::new(vec![etcd.endpoint()], "test");
    let error = Metastore::inspect(&settings, 5).await.expect_err("it grants no lease");
    assert!(matches!(error, Error::Full(_)), "{error}");
    // A starting process waits for it.
    assert!(within(5, Metastore::connect(&settings)).await.is_ok());

    for filler in 0..fillers {
        raw.delete(format!("fill-{filler}"), None).await.expect("deletes are taken");
    }
    let revision = raw.get("x", None).await.expect("a read").header().expect("a header").revision();
    let physically = CompactionOptions::new().with_physical();
    raw.compact(revision, Some(physically)).await.expect("compacted");
    raw.defragment().await.expect("defragmented");
    let member = raw.member_list().await.expect("a list").members()[0].id();
    let mut of = AlarmOptions::new();
    of.with_member(member);
    raw.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(of)).await.expect("disarmed");
    assert!(!store.is_full().await.expect("it answers"));
    let outcome = within(5, store.create(&2, &gateway_record("a"))).await.expect("an answer");
    assert!(matches!(outcome, CasOutcome::Done { .. }), "{outcome:?}");
    assert_eq!(store.write_failure(), None);
}

#[tokio::test]
async fn an_etcd_that_requires_authentication_is_refused_unless_another_member_may_reply() {
    let (etcd, store) = start().await;
    let mut raw = raw(&etcd).await;
    raw.user_add("root", "secret", None).await.expect("a user");
    raw.role_add("root").await.expect("a role");
    raw.user_grant_role("root", "root").await.expect("granted");
    raw.auth_enable().await.expect("enabled");

    let error = store.list::<GatewayRecord>().await.expect_err("authentication is required");
    assert!(matches!(error, Error::RequiresAuth(..)), "{error}");
    let error =
        store.create(&1, &gateway_record("a")).await.expect_err("authentication is required");
    assert!(matches!(error, Error::RequiresAuth(..)), "{error}");
    let alone = Settings::new(vec![etcd.endpoint()], "test");
    let error =
        within(5, Metastore::connect(&alone)).await.err().expect("authentication is required");
    assert!(error.is_misfit() && !error.is_transient(), "{error}");
    let away = format!("127.0.0.1:{}", free_port());
    let with_another = Settings::new(vec![etcd.endpoint(), away], "test");
    for _ in 0..5 {
        let error = within(5, Metastore::connect(&with_another)).await.err().expect("none serves");
        assert!(error.is_transient(), "{error}");
    }

    let user = ConnectOptions::new().with_user("root", "secret");
    let mut root = etcd_client::Client::connect([etcd.endpoint()], Some(user)).await.expect("root");
    root.auth_disable().await.expect("disabled");
    assert!(store.list::<GatewayRecord>().await.is_ok(), "it goes on by itself");
}
