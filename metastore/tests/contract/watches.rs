//! Watches: the complete list, then the changes; and the complete list again after any failure.

use std::time::Duration;

use engine::history::WentBack;
use engine::ids::{ShardId, Version};
use engine::records::GatewayRecord;
use engine::shard_record::ShardRecord;
use etcd_client::CompactionOptions;
use metastore::{
    CasOutcome, Listed, Metastore, Watch, WatchChange, WatchEvent, WatchFailure, WatchSettings,
};

use crate::etcd::{Etcd, Relay};
use crate::{at_version, connect, gateway_record, raw, shard, start, within};

async fn next<R: metastore::EtcdRecord>(watch: &mut Watch<R>) -> WatchEvent<R> {
    within(15, watch.next()).await.expect("it goes on")
}

/// Waits for the next list, and skips single changes.
async fn next_list<R: metastore::EtcdRecord>(watch: &mut Watch<R>) -> Listed<R> {
    loop {
        if let WatchEvent::All(listed) = next(watch).await {
            return listed;
        }
    }
}

async fn make(store: &Metastore, lo: u16) -> u64 {
    let outcome = store.create(&ShardId(lo), &shard(lo)).await.expect("an answer");
    let CasOutcome::Done { mod_revision: revision } = outcome else { panic!("{outcome:?}") };
    revision
}

#[tokio::test]
async fn everything_first_then_each_change_in_order() {
    let (_etcd, store) = start().await;
    let first = make(&store, 1).await;
    let mut watch = store.watch::<ShardRecord>(WatchSettings::default());
    let WatchEvent::All(listed) = next(&mut watch).await else { panic!("a list comes first") };
    assert_eq!((listed.all.len(), listed.revision), (1, first));

    let second = make(&store, 2).await;
    store.create(&1, &gateway_record("another kind")).await.expect("an answer");
    store.cas_shard(&at_version(shard(1), 2), first, None).await.expect("an answer");
    store.delete::<ShardRecord>(&ShardId(2), second).await.expect("an answer");
    let WatchEvent::Change(WatchChange::Changed(stored)) = next(&mut watch).await else {
        panic!("shard 2 was made")
    };
    assert_eq!((stored.id, stored.created, stored.modified), (ShardId(2), second, second));
    let WatchEvent::Change(WatchChange::Changed(stored)) = next(&mut watch).await else {
        panic!("shard 1 changed")
    };
    assert_eq!((stored.record.version, stored.created), (Version(2), first));
    let deleted =
        WatchEvent::Change(WatchChange::Deleted { id: ShardId(2), revision: stored.modified + 1 });
    assert_eq!(next(&mut watch).await, deleted);
}

#[tokio::test]
async fn everything_is_read_again_though_nothing_is_wrong() {
    let (_etcd, store) = start().await;
    let settings =
        WatchSettings { relist_every: Duration::from_millis(200), ..WatchSettings::default() };
    let mut watch = store.watch::<ShardRecord>(settings);
    assert_eq!(next_list(&mut watch).await.all, []);
    make(&store, 1).await;
    within(10, async { while next_list(&mut watch).await.all.is_empty() {} }).await;
}

/// A change during a silence is in the list that follows, whether it was compacted or not.
#[tokio::test]
async fn a_broken_stream_is_followed_by_a_list_that_lacks_nothing() {
    let etcd = Etcd::start().await;
    let relay = Relay::start(etcd.endpoint()).await;
    let (store, direct) = (connect(relay.endpoint()).await, connect(etcd.endpoint()).await);
    let first = make(&direct, 1).await;
    make(&direct, 2).await;
    let mut watch = store.watch::<ShardRecord>(WatchSettings::default());
    assert_eq!(next_list(&mut watch).await.all.len(), 2);
    // Once a change is received, the stream is open, and only its end leads to another list.
    let second = make(&direct, 3).await;
    assert!(
        matches!(next(&mut watch).await, WatchEvent::Change(WatchChange::Changed(stored)) if stored.modified == second)
    );

    relay.lose_answers();
    direct.delete::<ShardRecord>(&ShardId(1), first).await.expect("an answer");
    let last = make(&direct, 4).await;
    let everything = CompactionOptions::new().with_physical();
    let newest = i64::try_from(last).expect("a small number");
    raw(&etcd).await.compact(newest, Some(everything)).await.expect("etcd answers");
    relay.mend();
    let listed = next_list(&mut watch).await;
    let ids: Vec<u16> = listed.all.iter().map(|stored| stored.id.0).collect();
    assert_eq!((ids, listed.revision), (vec![2, 3, 4], last));
    make(&direct, 5).await;
    assert!(
        matches!(next(&mut watch).await, WatchEvent::Change(WatchChange::Changed(stored)) if stored.id == ShardId(5))
    );
}

#[tokio::test]
async fn a_restart_of_etcd_is_survived() {
    let (mut etcd, store) = start().await;
    make(&store, 1).await;
    let mut watch = store.watch::<ShardRecord>(WatchSettings::default());
    assert_eq!(next_list(&mut watch).await.all.len(), 1);
    etcd.kill();
    etcd.run().await;
    within(10, async { while store.list::<ShardRecord>().await.is_err() {} }).await;
    make(&store, 2).await;
    within(15, async {
        loop {
            match next(&mut watch).await {
                WatchEvent::All(listed) if listed.all.len() == 2 => return,
                WatchEvent::Change(WatchChange::Changed(stored)) if stored.id == ShardId(2) => {
                    return;
                }
                _ => {}
            }
        }
    })
    .await;
}

/// A quiet stream and a dead one look alike: one that does not reply to a progress request is
/// closed.
#[tokio::test]
async fn a_silent_stream_is_given_up_and_a_quiet_one_is_not() {
    let etcd = Etcd::start().await;
    let relay = Relay::start(etcd.endpoint()).await;
    let store = connect(relay.endpoint()).await;
    let silent_after = Duration::from_millis(400);
    let mut changes = store.changes::<ShardRecord>(1, silent_after).await.expect("a stream");
    // For four times as long, the only messages are replies to progress requests.
    let quiet = tokio::time::timeout(silent_after * 4, changes.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    relay.lose_answers();
    let silent = within(5, changes.next()).await;
    assert!(matches!(silent, Err(WatchFailure::Silent)), "{silent:?}");
}

#[tokio::test]
async fn compacted_history_is_reported_and_later_changes_are_received() {
    let (etcd, store) = start().await;
    let first = make(&store, 1).await;
    make(&store, 2).await;
    let last = make(&store, 3).await;
    let newest = i64::try_from(last).expect("a small number");
    raw(&etcd).await.compact(newest, None).await.expect("etcd answers");
    let silent_after = WatchSettings::default().silent_after;
    let mut gone = store.changes::<ShardRecord>(first, silent_after).await.expect("a stream");
    let broken = within(5, gone.next()).await;
    assert!(matches!(broken, Err(WatchFailure::Compacted)), "{broken:?}");
    let mut rest = store.changes::<ShardRecord>(last + 1, silent_after).await.expect("a stream");
    make(&store, 4).await;
    let change = within(5, rest.next()).await.expect("a change");
    assert!(matches!(change, WatchChange::Changed(stored) if stored.id == ShardId(4)));
}

/// A process that knows all shards but one would consider it missing. It continues with the former
/// records until it can read all.
#[tokio::test]
async fn a_record_that_cannot_be_read_holds_the_watch_up_and_is_not_passed_over() {
    let (etcd, store) = start().await;
    make(&store, 1).await;
    let mut watch = store.watch::<ShardRecord>(WatchSettings::default());
    assert_eq!(next_list(&mut watch).await.all.len(), 1);
    let mut raw = raw(&etcd).await;
    raw.put("/dkc/test/shard/2", "newer", None).await.expect("etcd answers");
    make(&store, 3).await;
    let event = tokio::time::timeout(Duration::from_millis(500), watch.next()).await;
    assert!(event.is_err(), "{event:?}");
    raw.delete("/dkc/test/shard/2", None).await.expect("etcd answers");
    let listed = next_list(&mut watch).await;
    let ids: Vec<_> = listed.all.iter().map(|stored| stored.id).collect();
    assert_eq!(ids, [ShardId(1), ShardId(3)]);
}

/// etcd was restored from a backup, or is another one. No process may follow it without a decision
/// of an operator.
#[tokio::test]
async fn an_etcd_whose_history_went_back_is_not_followed() {
    let (mut etcd, store) = start().await;
    for nonce in 0..10 {
        store.create(&nonce, &gateway_record("a")).await.expect("an answer");
    }
    let mut watch = store.watch::<GatewayRecord>(WatchSettings::default());
    let was = next_list(&mut watch).await.revision;
    etcd.replace_by_empty().await;
    let event = within(15, async {
        loop {
            let event = next(&mut watch).await;
            if !matches!(&event, WatchEvent::All(listed) if listed.revision == was) {
                return event;
            }
        }
    })
    .await;
    let WatchEvent::WentBack(WentBack { was: former, now }) = event else { panic!("{event:?}") };
    assert_eq!(former, was);
    assert!(now < was);
    assert_eq!(within(5, watch.next()).await, None, "it has ended");
}
