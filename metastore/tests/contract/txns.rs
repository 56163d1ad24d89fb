//! Compare-and-set: done, failed or unknown, and nothing half.

use std::time::Duration;

use engine::config::ShardConfig;
use engine::ids::{ShardId, StoreId, Version};
use engine::records::{GatewayRecord, NodeRecord};
use metastore::{Candidate, Error, Kept, Metastore, Outcome, Settings};

use crate::calls::{Calls, Fate};
use crate::etcd::{Etcd, Relay};
use crate::{at_version, cas_shards, connect, gateway_record, node_record, shard, start, within};

#[track_caller]
fn done(outcome: Outcome) -> u64 {
    let Outcome::Done { revision } = outcome else { panic!("{outcome:?}") };
    revision
}

async fn read(store: &Metastore, lo: u16) -> Kept<ShardConfig> {
    store.get(&ShardId(lo)).await.expect("a read").expect("it was written")
}

#[tokio::test]
async fn only_what_was_read_is_replaced_or_deleted() {
    let (_etcd, store) = start().await;
    let first = done(store.create(&1, &gateway_record("a")).await.expect("an answer"));
    assert_eq!(store.create(&1, &gateway_record("b")).await.expect("an answer"), Outcome::Failed);
    let second = done(store.replace(&1, &gateway_record("c"), first).await.expect("an answer"));
    assert!(second > first);
    let stale = store.replace(&1, &gateway_record("d"), first).await;
    assert_eq!(stale.expect("an answer"), Outcome::Failed);
    let stale = store.delete::<GatewayRecord>(&1, first).await;
    assert_eq!(stale.expect("an answer"), Outcome::Failed);
    let kept = store.get::<GatewayRecord>(&1).await.expect("a read").expect("not deleted");
    assert_eq!((kept.record, kept.created, kept.modified), (gateway_record("c"), first, second));

    done(store.delete::<GatewayRecord>(&1, second).await.expect("an answer"));
    let third = done(store.create(&1, &gateway_record("a")).await.expect("an answer"));
    let kept = store.get::<GatewayRecord>(&1).await.expect("a read").expect("made again");
    assert_eq!((kept.created, kept.modified), (third, third), "a new life");
}

/// A node claims its store only after the key of its last run is gone.
#[tokio::test]
async fn absence_can_be_compared() {
    let (_etcd, store) = start().await;
    let claim = || store.txn().create(&1, &gateway_record("a"));
    done(store.create(&StoreId(1), &node_record(1)).await.expect("an answer"));
    let held = claim().if_absent::<NodeRecord>(&StoreId(1)).commit().await;
    assert_eq!(held.expect("an answer"), Outcome::Failed);
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
    assert_eq!(bounced.expect("an answer"), Outcome::Failed);
    let stranger = store.cas_shard(&newer, modified, Some((StoreId(8), second))).await;
    assert_eq!(stranger.expect("an answer"), Outcome::Failed);
    let modified =
        done(store.cas_shard(&newer, modified, Some((node, second))).await.expect("an answer"));
    done(store.cas_shard(&at_version(shard(5), 3), modified, None).await.expect("an answer"));
    assert_eq!(read(&store, 5).await.record.version, Version(3));
}

#[tokio::test]
async fn a_leader_changes_127_shards_at_once_or_none() {
    let (_etcd, store) = start().await;
    // etcd takes 128 comparisons in a transaction, and one is the term.
    let count = 127;
    let candidate = Candidate { address: "127.0.0.1:1".into() };
    let term = done(store.create(&(), &candidate).await.expect("an answer"));
    let mut txn = store.txn();
    for lo in 0..count {
        txn = txn.create(&ShardId(lo), &shard(lo));
    }
    let made = done(txn.commit().await.expect("an answer"));

    let newer: Vec<ShardConfig> = (0..count).map(|lo| at_version(shard(lo), 2)).collect();
    let changes = || newer.iter().map(|config| (config, made));
    let deposed = cas_shards(&store, changes(), term + 1).await;
    assert_eq!(deposed.expect("an answer"), Outcome::Failed);
    let changed = done(cas_shards(&store, changes(), term).await.expect("an answer"));
    let listed = store.list::<ShardConfig>().await.expect("a list");
    assert_eq!(listed.all.len(), usize::from(count));
    assert!(listed.all.iter().all(|kept| kept.modified == changed && kept.created == made));

    // One shard has moved: nothing changes.
    done(store.cas_shard(&at_version(shard(60), 3), changed, None).await.expect("an answer"));
    let newest: Vec<ShardConfig> = (0..count).map(|lo| at_version(shard(lo), 4)).collect();
    let mixed = newest.iter().map(|config| (config, changed));
    let mixed = cas_shards(&store, mixed, term).await;
    assert_eq!(mixed.expect("an answer"), Outcome::Failed);
    let listed = store.list::<ShardConfig>().await.expect("a list");
    assert!(listed.all.iter().all(|kept| kept.record.version < Version(4)));
}

/// Trap T7: the answer is lost, the effect is not.
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
    assert_eq!(lost.expect("not refused"), Outcome::Unknown);
    let direct = connect(etcd.endpoint()).await;
    within(5, async { while read(&direct, 5).await.modified == modified {} }).await;

    relay.mend();
    let found = within(10, async {
        loop {
            if let Ok(Some(found)) = store.get::<ShardConfig>(&ShardId(5)).await {
                return found;
            }
        }
    });
    let found = found.await;
    assert_eq!((found.record, found.modified), (newer, modified + 1), "it was sent once");
}

/// One answer is lost and the next call would be answered: that it is unknown is said at once, and it is not sent again.
#[tokio::test]
async fn a_transaction_is_sent_once_whatever_becomes_of_it() {
    let etcd = Etcd::start().await;
    let calls = Calls::start(etcd.endpoint()).await;
    let (store, direct) = (connect(calls.endpoint()).await, connect(etcd.endpoint()).await);
    let modified = done(store.create(&ShardId(5), &shard(5)).await.expect("an answer"));
    let sent = calls.seen("Txn");

    calls.next("Txn", Fate::LoseAnswer);
    let lost = store.cas_shard(&at_version(shard(5), 2), modified, None).await;
    assert_eq!(lost.expect("not refused"), Outcome::Unknown);
    assert_eq!(read(&direct, 5).await.modified, modified + 1, "it took effect once");
    assert_eq!(calls.seen("Txn"), sent + 1);
    let again = store.cas_shard(&at_version(shard(5), 2), modified, None).await;
    assert_eq!(again.expect("an answer"), Outcome::Failed, "the connection stands");

    calls.next("Txn", Fate::LoseCall);
    let lost = store.cas_shard(&at_version(shard(5), 3), modified + 1, None).await;
    assert_eq!(lost.expect("not refused"), Outcome::Unknown);
    assert_eq!(read(&direct, 5).await.modified, modified + 1, "it took no effect");
    assert_eq!(calls.seen("Txn"), sent + 3);
}

/// The change never arrived. A read can't tell that it will not, so a primary writes the same content as a newer version,
/// which shuts it out.
#[tokio::test]
async fn a_newer_version_shuts_out_a_change_that_may_yet_come() {
    let (mut etcd, store) = start().await;
    let modified = done(store.create(&ShardId(5), &shard(5)).await.expect("an answer"));
    etcd.kill();
    let mut lost = at_version(shard(5), 2);
    lost.isr.push(StoreId(3));
    let outcome = within(5, store.cas_shard(&lost, modified, None)).await;
    assert_eq!(outcome.expect("not refused"), Outcome::Unknown);

    etcd.run().await;
    let newer = at_version(shard(5), 2);
    done(store.cas_shard(&newer, modified, None).await.expect("an answer"));
    // Should it come now, it is too late.
    let late = store.cas_shard(&lost, modified, None).await;
    assert_eq!(late.expect("an answer"), Outcome::Failed);
    assert_eq!(read(&store, 5).await.record, newer);
}

/// Trap T10. No watch has noticed yet, and what is asked now was never in this etcd's history.
#[tokio::test]
async fn an_etcd_whose_history_went_back_tells_nothing_and_is_told_nothing() {
    let (mut etcd, store) = start().await;
    for nonce in 0..10 {
        done(store.create(&nonce, &gateway_record("a")).await.expect("an answer"));
    }
    etcd.replace_by_empty().await;
    let other = connect(etcd.endpoint()).await;
    // It would be done, and would have been, had the one before not forbidden it.
    let outcome = within(15, async {
        loop {
            let outcome = store.create(&1, &gateway_record("b")).await.expect("an answer");
            let was_asked = other.get::<GatewayRecord>(&1).await.expect("a read").is_some();
            if was_asked || outcome != Outcome::Unknown {
                return outcome;
            }
        }
    })
    .await;
    assert_eq!(outcome, Outcome::Unknown);
    let read = store.get::<GatewayRecord>(&1).await;
    assert!(matches!(read, Err(Error::WentBack(_))), "{read:?}");
    // From now on it is not even asked.
    let outcome = store.create(&2, &gateway_record("b")).await.expect("an answer");
    assert_eq!(outcome, Outcome::Unknown);
    assert_eq!(other.get::<GatewayRecord>(&2).await.expect("a read"), None);
}
