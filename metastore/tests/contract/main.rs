//! The promises of the metastore, against a real etcd: one for each test, which may stop, pause or
//! replace it.

mod calls;
mod elections;
mod etcd;
mod fitness;
mod leases;
mod records;
mod recovery;
mod txns;
mod watches;

use std::future::Future;
use std::time::Duration;

use engine::ids::{Boot, Epoch, Slots, StoreBoot, StoreId, Version};
use engine::records::{GatewayRecord, NodeRecord, StoreRecord, StoreStatus};
use engine::shard_record::ShardRecord;
use metastore::{CasOutcome, CoordinatorRecord, Error, Metastore, Settings};

use etcd::Etcd;

async fn connect(endpoint: String) -> Metastore {
    let settings = Settings::new(vec![endpoint], "test");
    within(10, Metastore::connect(&settings)).await.expect("etcd answers")
}

/// Starts an etcd, and connects a metastore to it.
async fn start() -> (Etcd, Metastore) {
    let etcd = Etcd::start().await;
    let store = connect(etcd.endpoint()).await;
    (etcd, store)
}

/// Returns a client of etcd's library, for calls that the metastore does not offer on purpose.
async fn raw(etcd: &Etcd) -> etcd_client::Client {
    etcd_client::Client::connect([etcd.endpoint()], None).await.expect("an endpoint")
}

/// Waits, but fails instead of hanging.
#[track_caller]
fn within<T>(seconds: u64, what: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let waited = tokio::time::timeout(Duration::from_secs(seconds), what).await;
        waited.unwrap_or_else(|_| panic!("{caller}: nothing for {seconds} s"))
    }
}

fn shard(lo: u16) -> ShardRecord {
    ShardRecord {
        slots: Slots { lo, hi: lo },
        epoch: Epoch(1),
        version: Version(1),
        primary: StoreBoot { store: StoreId(1), boot: Boot(1) },
        isr: vec![StoreId(1), StoreId(2)],
        ..ShardRecord::default()
    }
}

/// Writes the records of several shards as the leading coordinator does: if each is still at the
/// revision at which it was read, and the term is current.
async fn cas_shards<'a>(
    store: &Metastore,
    changes: impl IntoIterator<Item = (&'a ShardRecord, u64)>,
    term: u64,
) -> Result<CasOutcome, Error> {
    let guarded = store.txn().if_created_at::<CoordinatorRecord>(&(), term);
    let replace = |txn: metastore::Txn, (record, modified): (&ShardRecord, u64)| {
        txn.replace(&record.shard(), record, modified)
    };
    changes.into_iter().fold(guarded, replace).commit().await
}

fn at_version(mut record: ShardRecord, version: u64) -> ShardRecord {
    record.version = Version(version);
    record
}

fn store_record(boot: u64, nonce: u128) -> StoreRecord {
    StoreRecord {
        name: "node-1".into(),
        address: "127.0.0.1:1".into(),
        zone: "a".into(),
        host: "h".into(),
        boot: Boot(boot),
        nonce,
        status: StoreStatus::Active,
    }
}

fn node_record(boot: u64) -> NodeRecord {
    NodeRecord {
        boot: Boot(boot),
        address: "127.0.0.1:1".into(),
        capacity: 1 << 40,
        versions: (1, 1),
    }
}

fn gateway_record(address: &str) -> GatewayRecord {
    GatewayRecord { address: address.into(), worker: 1 }
}
