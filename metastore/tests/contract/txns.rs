//! Compare-and-set: done, failed or unknown, and never in part.

use std::time::Duration;

use engine::ids::{ShardId, StoreId, Version};
use engine::records::{GatewayRecord, NodeRecord};
use engine::shard_record::ShardRecord;
use metastore::{CasOutcome, CoordinatorRecord, Error, Metastore, Revisioned, Settings};

use crate::calls::{Calls, Fate};
use crate::etcd::{Etcd, Relay};
use crate::{at_version, cas_shards, connect, gateway_record, node_record, shard, start, within};

#[track_caller]
fn done(outcome: CasOutcome) -> u64 {
    let CasOutcome::Done { mod_revision: revision } = outcome else { panic!("{outcome:?}") };
    revision
}

async fn read(store: &Metastore, lo: u16) -> Revisioned<ShardRecord> {
    store.get(&ShardId(lo)).await.expect("a read").expect("it was written")
}

#[tokio::test]
async fn only_what_was_read_is_replaced_or_deleted() {
    let (_etcd, store) = start().await;
    let first = done(store.create(&1, &gateway_record("a")).await.expect("an answer"));
    assert_eq!(
        store.create(&1, &gateway_record("b")).await.expect("an answer"),
        CasOutcome::Failed
    );
    let second = done(store.replace(&1, &gateway_record("c"), first).await.expect("an answer"));
    assert!(second > first);
    let stale = store.replace(&1, &gateway_record("d"), first).await;
    assert_eq!(stale.expect("an answer"), CasOutcome::Failed);
    let stale = store.delete::<GatewayRecord>(&1, first).await;
    assert_eq!(stale.expect("an answer"), CasOutcome::Failed);
    let stored = store.get::<GatewayRecord>(&1).await.expect("a read").expect("not deleted");
    assert_eq!(
        (stored.record, stored.created, stored.modified),
        (gateway_record("c"), first, second)
    );

    done(store.delete::<GatewayRecord>(&1, second).await.expect("an answer"));
    let third = done(store.create(&1, &gateway_record("a")).await.expect("an answer"));
    let stored = store.get::<GatewayRecord>(&1).await.expect("a read").expect("made again");
    assert_eq!((stored.created, stored.modified), (third, third), "a new life");
}

/// A node claims its store only after the key of its former boot is gone.
#[tokio::test]
async fn absence_can_be_compared() {
    let (_etcd, store) = start().await;
    let claim = || store.txn().create(&1, &gateway_record("a"));
    done(store.create(&StoreId(1), &node_record(1)).await.expect("an answer"));
    let held = claim().if_absent::<NodeRecord>(&StoreId(1)).commit().await;
    assert_eq!(held.expect("an answer"), CasOutcome::Failed);
    let free = claim().if_absent::<NodeRecord>(&StoreId(2)).commit().await;
    done(free.expect("an answer"));
}

#[tokio::test]
async fn a_primary_adds_only_the_candidate_that_it_shook_hands_with() {
    let (_etcd, store) = start().await;
    let modified = done(store.create(&ShardId(5), &shard(5)).await.expect("an answer"));
    let node = StoreId(9);
    let first = done(store.create(&node, &node_record(1)).await.expect("an answer"));
    done(store.delete::<NodeRecord>(&node, first).await.expect("an answer"));
    let second = done(store.create(&node, &node_record(2)).await.expect("an answer"));

    let newer = at_version(shard(5), 2);
    let bounced = store.cas_shard(&newer, modified, Some((node, first))).await;
    assert_eq!(bounced.expect("an answer"), CasOutcome::Failed);
    let stranger = store.cas_shard(&newer, modified, Some((StoreId(8), second))).await;
    assert_eq!(stranger.expect("an answer"), CasOutcome::Failed);
    let modified =
        done(store.cas_shard(&newer, modified, Some((node, second))).await.expect("an answer"));
    done(store.cas_shard(&at_version(shard(5), 3), modified, None).await.expect("an answer"));
    assert_eq!(read(&store, 5).await.record.version, Version(3));
}

#[tokio::test]
async fn a_leader_changes_127_shards_at_once_or_none() {
    let (_etcd, store) = start().await;
    // etcd accepts 128 comparisons in a transaction, and one of them is the term.
    let count = 127;
    let candidate = CoordinatorRecord { address: "127.0.0.1:1".into() };
    let term = done(store.create(&(), &candidate).await.expect("an answer"));
    let mut txn = store.txn();
    for lo in 0..count {
        txn = txn.create(&ShardId(lo), &shard(lo));
    }
    let made = done(txn.commit().await.expect("an answer"));

    let newer: Vec<ShardRecord> = (0..count).map(|lo| at_version(shard(lo), 2)).collect();
    let changes = || newer.iter().map(|record| (record, made));
    let deposed = cas_shards(&store, changes(), term + 1).await;
    assert_eq!(deposed.expect("an answer"), CasOutcome::Failed);
    let changed = done(cas_shards(&store, changes(), term).await.expect("an answer"));
    let listed = store.list::<ShardRecord>().await.expect("a list");
    assert_eq!(listed.all.len(), usize::from(count));
    assert!(listed.all.iter().all(|stored| stored.modified == changed && stored.created == made));

    // If the record of one shard has changed, no record is written.
    done(store.cas_shard(&at_version(shard(60), 3), changed, None).await.expect("an answer"));
    let newest: Vec<ShardRecord> = (0..count).map(|lo| at_version(shard(lo), 4)).collect();
    let mixed = newest.iter().map(|record| (record, changed));
    let mixed = cas_shards(&store, mixed, term).await;
    assert_eq!(mixed.expect("an answer"), CasOutcome::Failed);
    let listed = store.list::<ShardRecord>().await.expect("a list");
    assert!(listed.all.iter().all(|stored| stored.record.version < Version(4)));
}

/// The reply is lost, but the transaction takes effect.
#[tokio::test]
async fn a_lost_answer_is_unknown_and_a_later_read_finds_the_change() {
    let etcd = Etcd::start().await;
    let relay = Relay::start(etcd.endpoint()).await;
    let settings = Settings {
        call_timeout: Duration::from_millis(500),
        ..Settings::new(vec![relay.endpoint()], "test")
    };
    let store = within(10, Metastore::connect(&settings)).await.expect("etcd answers");
    let modified = done(store.create(&ShardId(5), &shard(5)).await.expect("an answer"));
    relay.lose_answers();
    let newer = at_version(shard(5), 2);
    let lost = within(3, store.cas_shard(&newer, modified, None)).await;
    assert_eq!(lost.expect("not refused"), CasOutcome::Unknown);
    let direct = connect(etcd.endpoint()).await;
    within(5, async { while read(&direct, 5).await.modified == modified {} }).await;

    relay.mend();
    let found = within(10, async {
        loop {
            if let Ok(Some(found)) = store.get::<ShardRecord>(&ShardId(5)).await {
                return found;
            }
        }
    });
    let found = found.await;
    assert_eq!((found.record, found.modified), (newer, modified + 1), "it was sent once");
}

/// One reply is lost, while the next call would succeed: the outcome is reported as unknown at
/// once, and the transaction is not sent again.
#[tokio::test]
async fn a_transaction_is_sent_once_whatever_its_outcome() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let (store, direct) = (connect(calls.endpoint()).await, connect(etcd.endpoint()).await);
    let modified = done(store.create(&ShardId(5), &shard(5)).await.expect("an answer"));
    let sent = calls.seen("Txn");

    calls.next("Txn", Fate::LoseAnswer);
    let lost = store.cas_shard(&at_version(shard(5), 2), modified, None).await;
    assert_eq!(lost.expect("not refused"), CasOutcome::Unknown);
    assert_eq!(read(&direct, 5).await.modified, modified + 1, "it took effect once");
    assert_eq!(calls.seen("Txn"), sent + 1);
    let again = store.cas_shard(&at_version(shard(5), 2), modified, None).await;
    assert_eq!(again.expect("an answer"), CasOutcome::Failed, "the connection stands");

    calls.next("Txn", Fate::LoseCall);
    let lost = store.cas_shard(&at_version(shard(5), 3), modified + 1, None).await;
    assert_eq!(lost.expect("not refused"), CasOutcome::Unknown);
    assert_eq!(read(&direct, 5).await.modified, modified + 1, "it took no effect");
    assert_eq!(calls.seen("Txn"), sent + 3);
}

/// The write has not arrived. A read can't show that it never will, so a primary writes the same
/// content as a newer version, which excludes it.
#[tokio::test]
async fn a_newer_version_shuts_out_a_change_that_may_yet_come() {
    let (mut etcd, store) = start().await;
    let modified = done(store.create(&ShardId(5), &shard(5)).await.expect("an answer"));
    etcd.kill();
    let mut lost = at_version(shard(5), 2);
    lost.isr.push(StoreId(3));
    let outcome = within(5, store.cas_shard(&lost, modified, None)).await;
    assert_eq!(outcome.expect("not refused"), CasOutcome::Unknown);

    etcd.run().await;
    let newer = at_version(shard(5), 2);
    done(store.cas_shard(&newer, modified, None).await.expect("an answer"));
    // If the write arrives now, it fails.
    let late = store.cas_shard(&lost, modified, None).await;
    assert_eq!(late.expect("an answer"), CasOutcome::Failed);
    assert_eq!(read(&store, 5).await.record, newer);
}

/// No watch has noticed yet, and the revision of the next call was never in this etcd's history.
#[tokio::test]
async fn an_etcd_whose_history_went_back_is_neither_read_nor_written() {
    let (mut etcd, store) = start().await;
    for nonce in 0..10 {
        done(store.create(&nonce, &gateway_record("a")).await.expect("an answer"));
    }
    etcd.replace_by_empty().await;
    let other = connect(etcd.endpoint()).await;
    // The transaction would succeed, if the call before had not detected the other history.
    let outcome = within(15, async {
        loop {
            let outcome = store.create(&1, &gateway_record("b")).await.expect("an answer");
            let was_asked = other.get::<GatewayRecord>(&1).await.expect("a read").is_some();
            if was_asked || outcome != CasOutcome::Unknown {
                return outcome;
            }
        }
    })
    .await;
    assert_eq!(outcome, CasOutcome::Unknown);
    let read = store.get::<GatewayRecord>(&1).await;
    assert!(matches!(read, Err(Error::WentBack(_))), "{read:?}");
    // From now on no call is made.
    let outcome = store.create(&2, &gateway_record("b")).await.expect("an answer");
    assert_eq!(outcome, CasOutcome::Unknown);
    assert_eq!(other.get::<GatewayRecord>(&2).await.expect("a read"), None);
}
