//! Leases: keys that stand while the process is well, and are made again whenever they are gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::ids::{Boot, StoreId};
use engine::records::{GatewayRecord, NameRecord, NodeRecord, StoreRecord};
use metastore::{
    BootGuard, HeldKey, Lease, LeaseEvent, LeaseSettings, Metastore, Outcome, Settings,
};

use crate::calls::{Calls, Fate};
use crate::etcd::Etcd;
use crate::{connect, gateway_record, node_record, raw, start, store_record, within};

const STORE: StoreId = StoreId(9);

fn settings() -> LeaseSettings {
    LeaseSettings { ttl_s: 1, ..LeaseSettings::default() }
}

fn gateway(nonce: u128) -> HeldKey {
    HeldKey::gateway(nonce, &gateway_record("a"))
}

fn node(boot: u64, nonce: u128) -> HeldKey {
    let guard = BootGuard { store: STORE, boot: Boot(boot), nonce };
    HeldKey::node(&node_record(boot), guard)
}

/// The next event that is not a mere confirmation.
async fn news(lease: &mut Lease) -> Option<LeaseEvent> {
    within(15, async {
        loop {
            match lease.next().await {
                Some(LeaseEvent::Confirmed) => {}
                other => return other,
            }
        }
    })
    .await
}

/// Where key 0 was made, once it stands.
async fn registered(lease: &mut Lease) -> u64 {
    loop {
        match news(lease).await {
            Some(LeaseEvent::Registered { created, .. }) => return created,
            Some(LeaseEvent::Granted { ttl_s, asked_s }) => assert_eq!((ttl_s, asked_s), (1, 1)),
            other => panic!("{other:?}"),
        }
    }
}

async fn confirmed(lease: &mut Lease) {
    within(15, async { while lease.next().await != Some(LeaseEvent::Confirmed) {} }).await;
}

async fn session(store: &Metastore, nonce: u128) -> Option<u64> {
    let kept = store.get::<GatewayRecord>(&nonce).await.expect("a read");
    kept.map(|kept| kept.created)
}

#[tokio::test]
async fn keys_stand_while_they_are_held_and_go_at_once_when_given_back() {
    let (_etcd, store) = start().await;
    let mut lease = store.hold(vec![gateway(1), gateway(2)], settings());
    let granted = news(&mut lease).await;
    assert_eq!(granted, Some(LeaseEvent::Granted { ttl_s: 1, asked_s: 1 }));
    for want in 0..2 {
        let event = news(&mut lease).await;
        let Some(LeaseEvent::Registered { key, created, revision }) = event else {
            panic!("{event:?}")
        };
        assert_eq!(key, want);
        assert_eq!(session(&store, want as u128 + 1).await, Some(created));
        assert!(revision >= created);
    }
    let kept = store.get::<GatewayRecord>(&1).await.expect("a read").expect("it stands");
    let left = store.lease_left(kept.lease).await.expect("a read").expect("it lives");
    assert!(left.left <= left.granted, "{left:?}");
    assert_eq!(left.granted, Duration::from_secs(1));
    // Three times the time to live.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        confirmed(&mut lease).await;
    }
    assert_eq!(session(&store, 1).await, Some(kept.created));

    within(3, lease.stop()).await;
    assert_eq!(session(&store, 1).await, None);
    assert_eq!(store.lease_left(kept.lease).await.expect("a read"), None);
}

/// kill -9: nothing is given back.
#[tokio::test]
async fn keys_of_a_process_that_died_run_out() {
    let (_etcd, store) = start().await;
    let mut lease = store.hold(vec![gateway(1)], settings());
    registered(&mut lease).await;
    drop(lease);
    assert!(session(&store, 1).await.is_some(), "not before its time");
    within(4, async { while session(&store, 1).await.is_some() {} }).await;
}

#[tokio::test]
async fn a_short_restart_of_etcd_changes_nothing() {
    let (mut etcd, store) = start().await;
    let mut lease = store.hold(vec![gateway(1)], settings());
    let created = registered(&mut lease).await;
    etcd.kill();
    etcd.run().await;
    // What was confirmed before the restart may still lie in the channel.
    while tokio::time::timeout(Duration::ZERO, lease.next()).await.is_ok() {}
    confirmed(&mut lease).await;
    assert_eq!(session(&store, 1).await, Some(created));
}

/// An etcd that was stopped for longer than the time to live lets every lease run out when it goes on, though every
/// process is well.
#[tokio::test]
async fn when_all_leases_vanish_the_keys_are_made_again() {
    let (etcd, store) = start().await;
    let made = store.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    assert!(matches!(made, Outcome::Done { .. }));
    let mut held = vec![
        store.hold(vec![gateway(1)], settings()),
        store.hold(vec![gateway(2)], settings()),
        store.hold(vec![node(1, 11)], settings()),
    ];
    let mut before = Vec::new();
    for lease in &mut held {
        before.push(registered(lease).await);
    }
    etcd.freeze();
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    etcd.thaw();
    for (lease, before) in held.iter_mut().zip(before) {
        assert_eq!(news(lease).await, Some(LeaseEvent::Lost));
        let after = registered(lease).await;
        assert!(after > before, "{after} is a new life, {before} was the old one");
    }
    let nodes = store.list::<NodeRecord>().await.expect("a list");
    assert_eq!(nodes.all.len(), 1);
}

/// Trap T4: etcd may say that a lease is renewed though its key is gone. Only looking at the key tells.
#[tokio::test]
async fn a_key_that_vanished_under_a_living_lease_is_made_again() {
    let (etcd, store) = start().await;
    let settings = LeaseSettings { verify_every: Duration::from_millis(300), ..settings() };
    let mut lease = store.hold(vec![gateway(1)], settings);
    let before = registered(&mut lease).await;
    let key = format!("/dkc/test/gateway/{:032x}", 1);
    raw(&etcd).await.delete(key, None).await.expect("etcd answers");
    assert_eq!(news(&mut lease).await, Some(LeaseEvent::Lost));
    let after = registered(&mut lease).await;
    assert!(after > before);
    assert_eq!(session(&store, 1).await, Some(after));
}

/// A node whose disk stalls must not look alive, and is back once it does not.
#[tokio::test]
async fn an_unhealthy_process_is_not_renewed() {
    let (_etcd, store) = start().await;
    let healthy = Arc::new(AtomicBool::new(true));
    let asks = Arc::clone(&healthy);
    let settings =
        LeaseSettings { healthy: Arc::new(move || asks.load(Ordering::SeqCst)), ..settings() };
    let mut lease = store.hold(vec![gateway(1)], settings.clone());
    let before = registered(&mut lease).await;
    healthy.store(false, Ordering::SeqCst);
    within(4, async { while session(&store, 1).await.is_some() {} }).await;

    // Neither does one register that was never well.
    let mut other = store.hold(vec![gateway(2)], settings);
    let unheard = tokio::time::timeout(Duration::from_secs(1), other.next()).await;
    assert!(unheard.is_err(), "{unheard:?}");
    assert_eq!(session(&store, 1).await, None);

    healthy.store(true, Ordering::SeqCst);
    assert_eq!(news(&mut lease).await, Some(LeaseEvent::Lost));
    assert!(registered(&mut lease).await > before);
    registered(&mut other).await;
}

/// A process that lost its lease without knowing finds its own old key. Put over, it would keep the old
/// create_revision, and with it the old identity.
#[tokio::test]
async fn the_key_of_an_earlier_lease_of_our_own_is_made_anew() {
    let (_etcd, store) = start().await;
    let long = LeaseSettings { ttl_s: 60, ..settings() };
    let mut earlier = store.hold(vec![gateway(1)], long.clone());
    let before = loop {
        if let Some(LeaseEvent::Registered { created, .. }) = news(&mut earlier).await {
            break created;
        }
    };
    drop(earlier);
    let mut lease = store.hold(vec![gateway(1)], settings());
    let after = registered(&mut lease).await;
    assert!(after > before);
    assert_eq!(session(&store, 1).await, Some(after));
}

#[tokio::test]
async fn a_newer_boot_takes_the_key_and_the_older_one_ends() {
    let (_etcd, store) = start().await;
    let made = store.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    let Outcome::Done { revision } = made else { panic!("{made:?}") };
    let quick = LeaseSettings { verify_every: Duration::from_millis(300), ..settings() };
    let mut first = store.hold(vec![node(1, 11)], quick);
    let before = registered(&mut first).await;

    let claimed = store.replace(&STORE, &store_record(2, 22), revision).await.expect("an answer");
    assert!(matches!(claimed, Outcome::Done { .. }));
    let mut second = store.hold(vec![node(2, 22)], settings());
    let after = registered(&mut second).await;
    assert!(after > before);
    assert_eq!(news(&mut first).await, Some(LeaseEvent::Lost));
    assert!(matches!(news(&mut first).await, Some(LeaseEvent::Granted { .. })));
    assert_eq!(news(&mut first).await, Some(LeaseEvent::Superseded { boot: Boot(2) }));
    assert_eq!(news(&mut first).await, None);
    let kept = store.get::<NodeRecord>(&STORE).await.expect("a read").expect("it stands");
    assert_eq!((kept.record.boot, kept.created), (Boot(2), after), "the older one left it alone");
}

/// A cloned disk: the same boot number, another nonce.
#[tokio::test]
async fn the_same_boot_with_another_nonce_does_not_register() {
    let (_etcd, store) = start().await;
    store.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    let mut clone = store.hold(vec![node(1, 12)], settings());
    loop {
        match news(&mut clone).await {
            Some(LeaseEvent::Granted { .. }) => {}
            other => {
                assert_eq!(other, Some(LeaseEvent::Superseded { boot: Boot(1) }));
                break;
            }
        }
    }
    assert_eq!(store.get::<NodeRecord>(&STORE).await.expect("a read"), None);
}

/// The coordinator notes `suspect` in a store's record while its node registers: no reason to give up.
#[tokio::test]
async fn a_changed_store_record_of_the_same_boot_does_not_end_a_node() {
    let (_etcd, store) = start().await;
    let made = store.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    let Outcome::Done { revision } = made else { panic!("{made:?}") };
    let quick = LeaseSettings { verify_every: Duration::from_millis(200), ..settings() };
    let mut lease = store.hold(vec![node(1, 11)], quick);
    let created = registered(&mut lease).await;
    let mut record = store_record(1, 11);
    record.status = engine::records::StoreStatus::Suspect;
    store.replace::<StoreRecord>(&STORE, &record, revision).await.expect("an answer");
    for _ in 0..5 {
        confirmed(&mut lease).await;
    }
    let kept = store.get::<NodeRecord>(&STORE).await.expect("a read").expect("it stands");
    assert_eq!(kept.created, created);
}

#[tokio::test]
async fn a_longer_lease_than_asked_for_is_reported() {
    // etcd grants no less than 1.5 times what it allows itself for an election.
    let etcd = Etcd::start_electing_within(1_000).await;
    let store = connect(etcd.endpoint()).await;
    let mut lease = store.hold(vec![gateway(1)], settings());
    let granted = news(&mut lease).await;
    assert_eq!(granted, Some(LeaseEvent::Granted { ttl_s: 2, asked_s: 1 }));
}

/// What `--check-config` and `dkc doctor` tell before anything is started.
#[tokio::test]
async fn a_probe_tells_version_and_shortest_lease() {
    let etcd = Etcd::start_electing_within(1_000).await;
    let at = |endpoint| Settings::new(vec![endpoint], "test");
    let probe = within(10, Metastore::probe(&at(etcd.endpoint()), 1)).await.expect("etcd answers");
    assert_eq!((probe.granted_s, probe.warning), (2, None));
    assert!(probe.version.starts_with("3."), "{probe:?}");
    let nobody = within(10, Metastore::probe(&at("127.0.0.1:1".to_owned()), 1)).await;
    assert!(nobody.expect_err("nobody listens").is_transient());
}

/// Between its look at the store's record and its own transaction a newer run claims the store: the transaction compares
/// what the look saw.
#[tokio::test]
async fn a_claim_between_the_look_and_the_registration_shuts_it_out() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let (store, direct) = (connect(calls.endpoint()).await, connect(etcd.endpoint()).await);
    let made = direct.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    let Outcome::Done { revision } = made else { panic!("{made:?}") };
    calls.next("Txn", Fate::HoldCall);
    let mut lease = store.hold(vec![node(1, 11)], settings());
    calls.holds(1).await;
    let claimed = direct.replace(&STORE, &store_record(2, 22), revision).await;
    assert!(matches!(claimed, Ok(Outcome::Done { .. })), "{claimed:?}");
    calls.release();
    let end = loop {
        match news(&mut lease).await {
            Some(LeaseEvent::Granted { .. }) => {}
            other => break other,
        }
    };
    assert_eq!(end, Some(LeaseEvent::Superseded { boot: Boot(2) }));
    assert_eq!(direct.get::<NodeRecord>(&STORE).await.expect("a read"), None);
}

/// A store that stood still between its claim and its registration, while an operator gave its name to another one: neither
/// a look before the change nor one after it lets the older one serve beside the newer.
#[tokio::test]
async fn a_store_that_has_lost_its_name_does_not_register() {
    for before_the_look in [true, false] {
        let etcd = Etcd::start().await;
        let calls = Calls::start(etcd.endpoint()).await;
        let (store, direct) = (connect(calls.endpoint()).await, connect(etcd.endpoint()).await);
        let name = "node-1".to_owned();
        let other = StoreId(STORE.0 + 1);
        direct.create(&STORE, &store_record(1, 11)).await.expect("an answer");
        let made = direct.create(&name, &NameRecord { store: STORE }).await.expect("an answer");
        let Outcome::Done { revision } = made else { panic!("{made:?}") };
        let taken = async || {
            let taken = direct.replace(&name, &NameRecord { store: other }, revision).await;
            assert!(matches!(taken, Ok(Outcome::Done { .. })), "{taken:?}");
        };
        if before_the_look {
            taken().await;
        } else {
            calls.next("Txn", Fate::HoldCall);
        }
        let mut lease = store.hold(vec![node(1, 11)], settings());
        if !before_the_look {
            calls.holds(1).await;
            taken().await;
            calls.release();
        }
        let end = loop {
            match news(&mut lease).await {
                Some(LeaseEvent::Granted { .. }) => {}
                end => break end,
            }
        };
        assert_eq!(end, Some(LeaseEvent::NameLost { store: other }), "{before_the_look}");
        assert_eq!(direct.get::<NodeRecord>(&STORE).await.expect("a read"), None);
    }
}

/// The key was made and its answer lost: it is found standing by this very lease, and not made again.
#[tokio::test]
async fn a_registration_whose_answer_was_lost_is_found() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let (store, direct) = (connect(calls.endpoint()).await, connect(etcd.endpoint()).await);
    calls.next("LeaseGrant", Fate::LoseAnswer);
    calls.next("Txn", Fate::LoseAnswer);
    let mut lease = store.hold(vec![gateway(1)], settings());
    let created = registered(&mut lease).await;
    assert_eq!(session(&direct, 1).await, Some(created));
    assert_eq!(calls.seen("Txn"), 1);
}

/// The answer to a renewal may be lost while the lease stands: the keys stay what they were.
#[tokio::test]
async fn a_renewal_whose_answer_was_lost_loses_no_key() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let store = connect(calls.endpoint()).await;
    let mut lease = store.hold(vec![gateway(1)], LeaseSettings { ttl_s: 5, ..settings() });
    let created = loop {
        match news(&mut lease).await {
            Some(LeaseEvent::Registered { created, .. }) => break created,
            Some(LeaseEvent::Granted { .. }) => {}
            other => panic!("{other:?}"),
        }
    };
    for fate in [Fate::LoseAnswer, Fate::LoseCall] {
        calls.next("LeaseKeepAlive", fate);
        within(15, calls.happened()).await;
        // Not before the next turn, which looks at the key again.
        confirmed(&mut lease).await;
        confirmed(&mut lease).await;
    }
    assert_eq!(session(&store, 1).await, Some(created));
    assert_eq!(calls.seen("LeaseGrant"), 1);
}

/// The lease goes between its renewal and the transaction that makes the key: another one is made.
#[tokio::test]
async fn a_lease_that_goes_before_its_key_is_made_is_replaced() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let (store, mut raw) = (connect(calls.endpoint()).await, raw(&etcd).await);
    calls.next("Txn", Fate::HoldCall);
    let mut lease = store.hold(vec![gateway(1)], settings());
    within(15, calls.holds(1)).await;
    for granted in raw.leases().await.expect("etcd answers").leases() {
        raw.lease_revoke(granted.id()).await.expect("etcd answers");
    }
    calls.release();
    let mut seen = Vec::new();
    while !matches!(seen.last(), Some(LeaseEvent::Registered { .. })) {
        seen.push(news(&mut lease).await.expect("it goes on"));
    }
    assert!(seen.contains(&LeaseEvent::Lost), "{seen:?}");
    // At once: the first lease was not renewed again to find out.
    assert_eq!((calls.seen("LeaseGrant"), calls.seen("LeaseKeepAlive")), (2, 2));
}

/// A key would name a store that nobody can look up.
#[tokio::test]
async fn a_node_whose_store_has_no_record_does_not_register() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let (store, direct) = (connect(calls.endpoint()).await, connect(etcd.endpoint()).await);
    let mut lease = store.hold(vec![node(1, 11)], settings());
    // Key and record, in each of three turns.
    within(15, async {
        while calls.seen("Range") < 6 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(direct.get::<NodeRecord>(&STORE).await.expect("a read"), None);
    direct.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    registered(&mut lease).await;
}
