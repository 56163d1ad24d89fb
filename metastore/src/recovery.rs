//! The rewriting of an etcd that was lost, from records that were recovered.
//!
//! All of it happens under the key of the leading coordinator, which every transaction compares: no
//! coordinator leads meanwhile, so nothing else writes shard records or the settings of the
//! cluster. The settings come last, and those of an old etcd go first: without them no process
//! starts. So a run that is interrupted leaves an etcd that nothing follows, and the next run
//! replaces what is there.

use engine::ids::{Epoch, ShardId, StoreId};
use engine::records::{
    LossRecord, Meta, NameRecord, PauseIntent, PromoteIntent, RemoveIntent, StoreRecord,
    StoreStatus,
};
use engine::recovery_plan::RecoveredRecords;
use engine::shard_record::ShardRecord;
use etcd_client::{GetOptions, KeyValue};

use crate::{CasOutcome, CoordinatorRecord, DrainIntent, Error, EtcdRecord, Metastore, Txn};

/// etcd accepts 128 operations in a transaction, each with its comparison; one is the term's.
const WRITES_MAX: usize = 100;

/// One record to be written or deleted, and the mod_revision at which the old one was read; 0 if no
/// old one exists.
enum RecoveryWrite {
    Store(StoreId, Option<StoreRecord>, u64),
    Name(String, Option<NameRecord>, u64),
    Shard(ShardId, Option<ShardRecord>, u64),
    Loss((ShardId, Epoch), LossRecord, u64),
    Drain(StoreId, u64),
    Promote(ShardId, u64),
    Remove(StoreId, u64),
    Pause(u64),
}

impl RecoveryWrite {
    fn add_to(&self, txn: Txn) -> Txn {
        match self {
            Self::Store(id, record, modified) => put(txn, id, record.as_ref(), *modified),
            Self::Name(id, record, modified) => put(txn, id, record.as_ref(), *modified),
            Self::Shard(id, record, modified) => put(txn, id, record.as_ref(), *modified),
            Self::Loss(id, record, modified) => put(txn, id, Some(record), *modified),
            Self::Drain(id, modified) => txn.delete::<DrainIntent>(id, *modified),
            Self::Promote(id, modified) => txn.delete::<PromoteIntent>(id, *modified),
            Self::Remove(id, modified) => txn.delete::<RemoveIntent>(id, *modified),
            Self::Pause(modified) => txn.delete::<PauseIntent>(&(), *modified),
        }
    }
}

fn put<R: EtcdRecord>(txn: Txn, id: &R::Id, record: Option<&R>, modified: u64) -> Txn {
    match (record, modified) {
        (Some(record), 0) => txn.create(id, record),
        (Some(record), modified) => txn.replace(id, record, modified),
        (None, modified) => txn.delete::<R>(id, modified),
    }
}

impl Metastore {
    /// Writes the records of a recovered cluster, and deletes all others of the same kinds. `term`
    /// is the create_revision of the caller's `coordinator` key. Returns whether all was written;
    /// if not, something else has written meanwhile, or an answer was lost, and the caller may run
    /// it again.
    pub async fn write_recovered(
        &self,
        term: u64,
        recovered: &RecoveredRecords,
    ) -> Result<bool, Error> {
        let begun = || self.txn().if_created_at::<CoordinatorRecord>(&(), term);
        if let Some(old) = self.get::<Meta>(&()).await? {
            if old.record == recovered.meta {
                return Ok(true); // An earlier attempt, whose answer was lost, has ended.
            }
            let gone = begun().delete::<Meta>(&(), old.modified).commit().await?;
            if !is_done(gone) {
                return Ok(false);
            }
        }
        let writes = self.recovery_writes(recovered).await?;
        for some in writes.chunks(WRITES_MAX) {
            let txn = some.iter().fold(begun(), |txn, write| write.add_to(txn));
            if !is_done(txn.commit().await?) {
                return Ok(false);
            }
        }
        Ok(is_done(begun().create(&(), &recovered.meta).commit().await?))
    }

    /// Returns the names of the other clusters of this etcd that have this id.
    pub async fn other_names(&self, cluster: u128) -> Result<Vec<String>, Error> {
        let options = GetOptions::new().with_prefix();
        let (reply, _) = self.range("list", "/dkc/".to_owned(), Some(options)).await?;
        let name = |kv: &KeyValue| {
            let (name, kind) = kv.key_str().ok()?.strip_prefix("/dkc/")?.split_once('/')?;
            let is_meta = kind == Meta::FOLDER;
            let meta = <Meta as EtcdRecord>::decode(kv.value()).ok().filter(|_| is_meta)?;
            (meta.cluster == cluster).then(|| name.to_owned())
        };
        Ok(reply.kvs().iter().filter_map(name).collect())
    }

    async fn recovery_writes(
        &self,
        recovered: &RecoveredRecords,
    ) -> Result<Vec<RecoveryWrite>, Error> {
        let mut writes = Vec::new();
        let old = self.list::<StoreRecord>().await?.all;
        let stores = recovered.stores.iter().cloned();
        // A store that was given up has no name that another one could need.
        let names = recovered.stores.iter().filter(|(_, it)| it.status != StoreStatus::Lost);
        let names =
            names.map(|(store, record)| (record.name.clone(), NameRecord { store: *store }));
        merge(stores, &old, |id, record, at| writes.push(RecoveryWrite::Store(id, record, at)));
        let old = self.list::<NameRecord>().await?.all;
        merge(names, &old, |id, record, at| writes.push(RecoveryWrite::Name(id, record, at)));
        let old = self.list::<ShardRecord>().await?.all;
        let shards = recovered.shards.iter().map(|record| (record.shard(), record.clone()));
        merge(shards, &old, |id, record, at| writes.push(RecoveryWrite::Shard(id, record, at)));
        // Losses are kept for good, also those of an old snapshot.
        for loss in &recovered.losses {
            let id = (loss.shard, loss.epoch);
            let old = self.get::<LossRecord>(&id).await?.map_or(0, |kept| kept.modified);
            writes.push(RecoveryWrite::Loss(id, loss.clone(), old));
        }
        self.old_intents(&mut writes).await?;
        Ok(writes)
    }

    /// The wishes of operators are of the time before the loss: all are withdrawn. One to remove a
    /// store would be carried out at that store's next stop.
    async fn old_intents(&self, writes: &mut Vec<RecoveryWrite>) -> Result<(), Error> {
        let drains = self.list::<DrainIntent>().await?.all;
        writes.extend(drains.iter().map(|old| RecoveryWrite::Drain(old.id, old.modified)));
        let promotes = self.list::<PromoteIntent>().await?.all;
        writes.extend(promotes.iter().map(|old| RecoveryWrite::Promote(old.id, old.modified)));
        let removes = self.list::<RemoveIntent>().await?.all;
        writes.extend(removes.iter().map(|old| RecoveryWrite::Remove(old.id, old.modified)));
        let pause = self.get::<PauseIntent>(&()).await?;
        writes.extend(pause.map(|old| RecoveryWrite::Pause(old.modified)));
        Ok(())
    }
}

/// Calls `write` for every record to be written, with the mod_revision of the old one, and for
/// every old one that is not among them.
fn merge<R: EtcdRecord>(
    new: impl Iterator<Item = (R::Id, R)>,
    old: &[crate::Revisioned<R>],
    mut write: impl FnMut(R::Id, Option<R>, u64),
) {
    let mut left: std::collections::BTreeMap<_, _> =
        old.iter().map(|kept| (kept.id.clone(), kept.modified)).collect();
    for (id, record) in new {
        let modified = left.remove(&id).unwrap_or(0);
        write(id, Some(record), modified);
    }
    for (id, modified) in left {
        write(id, None, modified);
    }
}

fn is_done(outcome: CasOutcome) -> bool {
    matches!(outcome, CasOutcome::Done { .. })
}
