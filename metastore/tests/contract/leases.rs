//! Leases: keys that exist while the process is healthy, and are created again when they are gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::ids::{Boot, StoreId};
use engine::records::{GatewayRecord, NameRecord, NodeRecord, StoreRecord, StoreStatus};
use metastore::{
    BootGuard, CasOutcome, HeldKey, Lease, LeaseEvent, LeaseSettings, Metastore, Settings,
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

/// Waits for the next event other than a confirmation.
async fn next_change(lease: &mut Lease) -> Option<LeaseEvent> {
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

/// Waits until key 0 is registered, and returns its create_revision.
async fn registered(lease: &mut Lease) -> u64 {
    loop {
        match next_change(lease).await {
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
    let stored = store.get::<GatewayRecord>(&nonce).await.expect("a read");
    stored.map(|stored| stored.created)
}

#[tokio::test]
async fn keys_exist_while_their_lease_is_renewed_and_vanish_at_once_when_it_is_revoked() {
    let (_etcd, store) = start().await;
    let mut lease = store.hold(vec![gateway(1), gateway(2)], settings());
    let granted = next_change(&mut lease).await;
    assert_eq!(granted, Some(LeaseEvent::Granted { ttl_s: 1, asked_s: 1 }));
    for want in 0..2 {
        let event = next_change(&mut lease).await;
        let Some(LeaseEvent::Registered { key, created }) = event else { panic!("{event:?}") };
        assert_eq!(key, want);
        assert_eq!(session(&store, want as u128 + 1).await, Some(created));
    }
    let stored = store.get::<GatewayRecord>(&1).await.expect("a read").expect("it stands");
    let left = store.lease_left(stored.lease).await.expect("a read").expect("it lives");
    assert!(left.left <= left.granted, "{left:?}");
    assert_eq!(left.granted, Duration::from_secs(1));
    // The keys must outlive three times the time to live.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        confirmed(&mut lease).await;
    }
    assert_eq!(session(&store, 1).await, Some(stored.created));

    within(3, lease.stop()).await;
    assert_eq!(session(&store, 1).await, None);
    assert_eq!(store.lease_left(stored.lease).await.expect("a read"), None);
}

/// After `kill -9` the lease is not revoked.
#[tokio::test]
async fn keys_of_a_process_that_died_expire() {
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
    // A confirmation from before the restart may still be in the channel.
    while tokio::time::timeout(Duration::ZERO, lease.next()).await.is_ok() {}
    confirmed(&mut lease).await;
    assert_eq!(session(&store, 1).await, Some(created));
}

/// An etcd that was stopped for longer than the time to live lets every lease expire when it
/// resumes, although every process is healthy.
#[tokio::test]
async fn when_all_leases_vanish_the_keys_are_made_again() {
    let (etcd, store) = start().await;
    let made = store.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    assert!(matches!(made, CasOutcome::Done { .. }));
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
        assert_eq!(next_change(lease).await, Some(LeaseEvent::Lost));
        let after = registered(lease).await;
        assert!(after > before, "{after} is a new life, {before} was the old one");
    }
    let nodes = store.list::<NodeRecord>().await.expect("a list");
    assert_eq!(nodes.all.len(), 1);
}

/// etcd may acknowledge the renewal of a lease whose key is gone. Only a read of the key shows
/// that.
#[tokio::test]
async fn a_key_that_vanished_under_a_living_lease_is_made_again() {
    let (etcd, store) = start().await;
    let settings = LeaseSettings { verify_every: Duration::from_millis(300), ..settings() };
    let mut lease = store.hold(vec![gateway(1)], settings);
    let before = registered(&mut lease).await;
    let key = format!("/dkc/test/gateway/{:032x}", 1);
    raw(&etcd).await.delete(key, None).await.expect("etcd answers");
    assert_eq!(next_change(&mut lease).await, Some(LeaseEvent::Lost));
    let after = registered(&mut lease).await;
    assert!(after > before);
    assert_eq!(session(&store, 1).await, Some(after));
}

/// A node whose disk stalls must not look alive, and registers again once the disk works.
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

    // A process that was never healthy does not register.
    let mut other = store.hold(vec![gateway(2)], settings);
    let unheard = tokio::time::timeout(Duration::from_secs(1), other.next()).await;
    assert!(unheard.is_err(), "{unheard:?}");
    assert_eq!(session(&store, 1).await, None);

    healthy.store(true, Ordering::SeqCst);
    assert_eq!(next_change(&mut lease).await, Some(LeaseEvent::Lost));
    assert!(registered(&mut lease).await > before);
    registered(&mut other).await;
}

/// A process that lost its lease without knowing finds its own old key. Overwriting it would keep
/// the old create_revision, and with it the old identity.
#[tokio::test]
async fn the_key_of_an_earlier_lease_of_the_same_process_is_created_again() {
    let (_etcd, store) = start().await;
    let long = LeaseSettings { ttl_s: 60, ..settings() };
    let mut earlier = store.hold(vec![gateway(1)], long.clone());
    let before = loop {
        if let Some(LeaseEvent::Registered { created, .. }) = next_change(&mut earlier).await {
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
    let CasOutcome::Done { mod_revision: revision } = made else { panic!("{made:?}") };
    let quick = LeaseSettings { verify_every: Duration::from_millis(300), ..settings() };
    let mut first = store.hold(vec![node(1, 11)], quick);
    let before = registered(&mut first).await;

    let claimed = store.replace(&STORE, &store_record(2, 22), revision).await.expect("an answer");
    assert!(matches!(claimed, CasOutcome::Done { .. }));
    let mut second = store.hold(vec![node(2, 22)], settings());
    let after = registered(&mut second).await;
    assert!(after > before);
    assert_eq!(next_change(&mut first).await, Some(LeaseEvent::Lost));
    assert!(matches!(next_change(&mut first).await, Some(LeaseEvent::Granted { .. })));
    assert_eq!(next_change(&mut first).await, Some(LeaseEvent::Superseded(Boot(2))));
    assert_eq!(next_change(&mut first).await, None);
    let stored = store.get::<NodeRecord>(&STORE).await.expect("a read").expect("it stands");
    assert_eq!(
        (stored.record.boot, stored.created),
        (Boot(2), after),
        "the older one left it alone"
    );
}

/// A cloned disk has the same boot number, but another nonce.
#[tokio::test]
async fn the_same_boot_with_another_nonce_does_not_register() {
    let (_etcd, store) = start().await;
    store.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    let mut clone = store.hold(vec![node(1, 12)], settings());
    loop {
        match next_change(&mut clone).await {
            Some(LeaseEvent::Granted { .. }) => {}
            other => {
                assert_eq!(other, Some(LeaseEvent::Superseded(Boot(1))));
                break;
            }
        }
    }
    assert_eq!(store.get::<NodeRecord>(&STORE).await.expect("a read"), None);
}

/// A store was removed while its process hung: the process must not register again.
#[tokio::test]
async fn the_process_of_a_store_that_was_removed_ends() {
    let (_etcd, store) = start().await;
    let removed = StoreRecord { status: StoreStatus::Retired, ..store_record(1, 11) };
    store.create(&STORE, &removed).await.expect("an answer");
    let mut lease = store.hold(vec![node(1, 11)], settings());
    assert!(matches!(next_change(&mut lease).await, Some(LeaseEvent::Granted { .. })));
    assert_eq!(next_change(&mut lease).await, Some(LeaseEvent::GivenUp));
    assert_eq!(next_change(&mut lease).await, None);
    assert_eq!(store.get::<NodeRecord>(&STORE).await.expect("a read"), None);
}

#[tokio::test]
async fn a_record_for_a_limited_time_is_deleted_by_etcd() {
    let (_etcd, store) = start().await;
    let record = store_record(1, 11);
    let made = store.create_for(&STORE, &record, 5).await.expect("an answer");
    let CasOutcome::Done { mod_revision } = made else { panic!("{made:?}") };
    let kept = store.get::<StoreRecord>(&STORE).await.expect("a read").expect("it stands");
    assert_eq!((&kept.record, kept.modified), (&record, mod_revision));
    assert_eq!(store.create_for(&STORE, &record, 5).await.expect("an answer"), CasOutcome::Failed);
    within(15, async {
        while store.get::<StoreRecord>(&STORE).await.expect("a read").is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

/// The coordinator marks a store as `suspect` while its node registers: the node must not give up.
#[tokio::test]
async fn a_changed_store_record_of_the_same_boot_does_not_end_a_node() {
    let (_etcd, store) = start().await;
    let made = store.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    let CasOutcome::Done { mod_revision: revision } = made else { panic!("{made:?}") };
    let quick = LeaseSettings { verify_every: Duration::from_millis(200), ..settings() };
    let mut lease = store.hold(vec![node(1, 11)], quick);
    let created = registered(&mut lease).await;
    let mut record = store_record(1, 11);
    record.status = StoreStatus::Suspect;
    store.replace::<StoreRecord>(&STORE, &record, revision).await.expect("an answer");
    for _ in 0..5 {
        confirmed(&mut lease).await;
    }
    let stored = store.get::<NodeRecord>(&STORE).await.expect("a read").expect("it stands");
    assert_eq!(stored.created, created);
}

#[tokio::test]
async fn a_longer_lease_than_asked_for_is_reported() {
    // etcd grants no lease shorter than 1.5 times its election timeout.
    let etcd = Etcd::start_electing_within(1_000).await;
    let store = connect(etcd.endpoint()).await;
    let mut lease = store.hold(vec![gateway(1)], settings());
    let granted = next_change(&mut lease).await;
    assert_eq!(granted, Some(LeaseEvent::Granted { ttl_s: 2, asked_s: 1 }));
}

/// `--check-config` and `dkc doctor` report this before anything is started.
#[tokio::test]
async fn an_inspection_returns_version_and_shortest_lease() {
    let etcd = Etcd::start_electing_within(1_000).await;
    let at = |endpoint| Settings::new(vec![endpoint], "test");
    let inspection =
        within(10, Metastore::inspect(&at(etcd.endpoint()), 1)).await.expect("etcd answers");
    assert_eq!((inspection.granted_s, inspection.warning), (2, None));
    assert!(inspection.version.starts_with("3."), "{inspection:?}");
    let unreachable = within(10, Metastore::inspect(&at("127.0.0.1:1".to_owned()), 1)).await;
    assert!(unreachable.expect_err("the port is closed").is_transient());
}

/// A newer boot claims the store between the older one's read of the store's record and its
/// transaction, which compares the revision of that read.
#[tokio::test]
async fn a_claim_between_the_read_and_the_registration_excludes_it() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let (store, direct) = (connect(calls.endpoint()).await, connect(etcd.endpoint()).await);
    let made = direct.create(&STORE, &store_record(1, 11)).await.expect("an answer");
    let CasOutcome::Done { mod_revision: revision } = made else { panic!("{made:?}") };
    calls.next("Txn", Fate::HoldCall);
    let mut lease = store.hold(vec![node(1, 11)], settings());
    calls.holds(1).await;
    let claimed = direct.replace(&STORE, &store_record(2, 22), revision).await;
    assert!(matches!(claimed, Ok(CasOutcome::Done { .. })), "{claimed:?}");
    calls.release();
    let end = loop {
        match next_change(&mut lease).await {
            Some(LeaseEvent::Granted { .. }) => {}
            other => break other,
        }
    };
    assert_eq!(end, Some(LeaseEvent::Superseded(Boot(2))));
    assert_eq!(direct.get::<NodeRecord>(&STORE).await.expect("a read"), None);
}

/// A store is paused between its claim and its registration, while an operator gives its name to
/// another one. A read before that change and a read after it must both keep the older store from
/// serving beside the newer one.
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
        let CasOutcome::Done { mod_revision: revision } = made else { panic!("{made:?}") };
        let taken = async || {
            let taken = direct.replace(&name, &NameRecord { store: other }, revision).await;
            assert!(matches!(taken, Ok(CasOutcome::Done { .. })), "{taken:?}");
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
            match next_change(&mut lease).await {
                Some(LeaseEvent::Granted { .. }) => {}
                end => break end,
            }
        };
        assert_eq!(end, Some(LeaseEvent::NameLost(other)), "{before_the_look}");
        assert_eq!(direct.get::<NodeRecord>(&STORE).await.expect("a read"), None);
    }
}

/// The key was created and the reply lost: the key is found bound to this lease, and not created
/// again.
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

/// The reply to a renewal may be lost while the lease is alive: the keys stay as they are.
#[tokio::test]
async fn a_renewal_whose_answer_was_lost_loses_no_key() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let store = connect(calls.endpoint()).await;
    let mut lease = store.hold(vec![gateway(1)], LeaseSettings { ttl_s: 5, ..settings() });
    let created = loop {
        match next_change(&mut lease).await {
            Some(LeaseEvent::Registered { created, .. }) => break created,
            Some(LeaseEvent::Granted { .. }) => {}
            other => panic!("{other:?}"),
        }
    };
    for fate in [Fate::LoseAnswer, Fate::LoseCall] {
        calls.next("LeaseKeepAlive", fate);
        within(15, calls.happened()).await;
        // The event comes at the next turn, which reads the key again.
        confirmed(&mut lease).await;
        confirmed(&mut lease).await;
    }
    assert_eq!(session(&store, 1).await, Some(created));
    assert_eq!(calls.seen("LeaseGrant"), 1);
}

/// The lease vanishes between its renewal and the transaction that creates the key: another one is
/// requested.
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
        seen.push(next_change(&mut lease).await.expect("it goes on"));
    }
    assert!(seen.contains(&LeaseEvent::Lost), "{seen:?}");
    // The new lease comes at once: the first one was not renewed again to find out.
    assert_eq!((calls.seen("LeaseGrant"), calls.seen("LeaseKeepAlive")), (2, 2));
}

/// The key would name a store without a record.
#[tokio::test]
async fn a_node_whose_store_has_no_record_does_not_register() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let (store, direct) = (connect(calls.endpoint()).await, connect(etcd.endpoint()).await);
    let mut lease = store.hold(vec![node(1, 11)], settings());
    // Each of three turns reads the key and the record.
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
