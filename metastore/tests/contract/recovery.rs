//! A lost etcd: its records are rebuilt whole, or no process follows it; and snapshots.

use engine::ids::{Boot, Epoch, Seq, ShardId, StoreBoot, StoreId, TimeMs, Version};
use engine::records::{
    LossRecord, Meta, NameRecord, Operator, PauseIntent, RemoveIntent, StoreRecord,
};
use engine::recovery_plan::RecoveredRecords;
use engine::shard_record::ShardRecord;
use metastore::{
    CasOutcome, CoordinatorRecord, DrainIntent, LeadershipChange, LeaseSettings, Metastore,
};

use crate::{shard, start, store_record, within};

/// More shards than one transaction has room for.
const SHARDS: u16 = 250;

fn meta(incarnation: u32) -> Meta {
    Meta {
        cluster: 7,
        shards: SHARDS.into(),
        replicas: 3,
        min_in_sync: 2,
        hash: 1,
        incarnation,
        idempotency: engine::shard::idempotency::TokenSettings::default(),
    }
}

fn recovered() -> RecoveredRecords {
    let newer = |lo| ShardRecord { epoch: Epoch(9), version: Version(40), ..shard(lo) };
    RecoveredRecords {
        meta: meta(2),
        stores: vec![(StoreId(1), store_record(3, 99))],
        shards: (0..SHARDS).map(newer).collect(),
        losses: vec![LossRecord {
            shard: ShardId(7),
            epoch: Epoch(9),
            primary: StoreBoot { store: StoreId(1), boot: Boot(0) },
            last: (Epoch(8), Seq(70)),
            given_up: vec![(StoreId(2), None)],
            accepted_by: Some(operator()),
        }],
    }
}

fn operator() -> Operator {
    Operator { at: TimeMs(5), name: "ann@host".into() }
}

async fn written(store: &Metastore) -> RecoveredRecords {
    let shards = store.list::<ShardRecord>().await.expect("a list").all;
    let stores = store.list::<StoreRecord>().await.expect("a list").all;
    let losses = store.list::<LossRecord>().await.expect("a list").all;
    RecoveredRecords {
        meta: store.get::<Meta>(&()).await.expect("a read").expect("it is written last").record,
        stores: stores.into_iter().map(|kept| (kept.id, kept.record)).collect(),
        shards: shards.into_iter().map(|kept| kept.record).collect(),
        losses: losses.into_iter().map(|kept| kept.record).collect(),
    }
}

/// Some records are those of an old snapshot, and some those of stores that are gone.
#[tokio::test]
async fn the_records_of_a_lost_etcd_replace_all_that_is_there() {
    let (_etcd, store) = start().await;
    store.create(&(), &meta(1)).await.expect("an answer");
    for lo in [0, 7, 60_000] {
        store.create(&ShardId(lo), &shard(lo)).await.expect("an answer");
    }
    store.create(&StoreId(5), &store_record(1, 1)).await.expect("an answer");
    store.create(&StoreId(5), &DrainIntent).await.expect("an answer");
    let remove = RemoveIntent { boot: Boot(3), from: operator() };
    store.create(&StoreId(5), &remove).await.expect("an answer");
    store.create(&(), &PauseIntent { from: operator() }).await.expect("an answer");
    let candidate = CoordinatorRecord { address: "127.0.0.1:1".into() };
    let mut election = store.stand_for_election(&candidate, LeaseSettings::default());
    let Some(LeadershipChange::Leading { term }) = within(10, election.next()).await else {
        panic!("not elected")
    };

    // Another one leads: nothing is written.
    let refused = store.write_recovered(term + 1, &recovered()).await;
    assert!(!refused.expect("an answer"));
    assert_eq!(store.get::<Meta>(&()).await.expect("a read").expect("as before").record, meta(1));

    for _ in 0..2 {
        assert!(store.write_recovered(term, &recovered()).await.expect("an answer"));
        let mut found = written(&store).await;
        found.shards.sort_by_key(ShardRecord::shard);
        assert_eq!(found, recovered());
    }
    assert_eq!(store.list::<DrainIntent>().await.expect("a list").all, []);
    assert_eq!(store.list::<RemoveIntent>().await.expect("a list").all, []);
    assert_eq!(store.get::<PauseIntent>(&()).await.expect("a read"), None);
    let name = store_record(3, 99).name;
    let named = store.get::<NameRecord>(&name).await.expect("a read").expect("it has its name");
    assert_eq!(named.record.store, StoreId(1));
}

/// A gateway that follows a rebuilt etcd without having noticed would make a session under the old
/// incarnation, which may be one that was used before.
#[tokio::test]
async fn a_process_writes_only_to_the_incarnation_that_it_has_joined() {
    let (_etcd, store) = start().await;
    store.create(&(), &meta(1)).await.expect("an answer");
    store.stay_with(&meta(1));
    let done = store.create(&ShardId(7), &shard(7)).await.expect("an answer");
    assert!(matches!(done, CasOutcome::Done { .. }));
    let other = crate::connect(_etcd.endpoint()).await;
    let kept = other.get::<Meta>(&()).await.expect("a read").expect("it is there");
    let done = other.replace(&(), &meta(2), kept.modified).await.expect("an answer");
    assert!(matches!(done, CasOutcome::Done { .. }));
    let failed = store.create(&ShardId(8), &shard(8)).await.expect("an answer");
    assert_eq!(failed, CasOutcome::Failed);
}

#[tokio::test]
async fn a_snapshot_replaces_the_one_before_once_it_is_whole() {
    let (etcd, store) = start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("etcd.snapshot");
    let made = store.create(&ShardId(7), &shard(7)).await.expect("an answer");
    assert!(matches!(made, CasOutcome::Done { .. }));
    let bytes = within(30, store.save_snapshot(&path)).await.expect("a snapshot");
    assert_eq!(std::fs::metadata(&path).expect("a file").len(), bytes);
    drop(etcd);
    within(30, store.save_snapshot(&path)).await.expect_err("etcd is gone");
    let left: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(std::fs::metadata(&path).expect("a file").len(), bytes);
}
