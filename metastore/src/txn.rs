//! Compare-and-set, which is the only way to write, and its outcome when the reply was lost.
//!
//! A transaction whose reply was lost may have taken effect, or may still do so, even after a read
//! that does not show it. To send it again would be a second transaction, so it is never sent again
//! here. Once the record's mod_revision is past the one that the lost transaction compares, that
//! transaction can no longer take effect: a caller that has to know the outcome writes the record
//! once more, as a newer version.
//!
//! The `mod_revision` of [`CasOutcome::Done`] is that of every key that was written, and the
//! create_revision of those that were created.

use engine::ids::StoreId;
use engine::node::CasOutcome;
use engine::records::{Meta, NodeRecord};
use engine::shard_record::ShardRecord;
use etcd_client::{Compare, CompareOp, DeleteOptions, PutOptions, TxnOp};
use tracing::warn;

use crate::{Error, EtcdRecord, Metastore};

/// A transaction: writes that happen all or not at all, each guarded by a comparison.
#[derive(Clone)]
pub struct Txn {
    store: Metastore,
    compares: Vec<Compare>,
    writes: Vec<TxnOp>,
}

impl Metastore {
    /// Begins an empty transaction.
    pub fn txn(&self) -> Txn {
        Txn { store: self.clone(), compares: Vec::new(), writes: Vec::new() }
    }

    /// Creates a record that does not exist yet.
    pub async fn create<R: EtcdRecord>(&self, id: &R::Id, record: &R) -> Result<CasOutcome, Error> {
        self.txn().create(id, record).commit().await
    }

    /// Replaces the record that was read at `modified`.
    pub async fn replace<R: EtcdRecord>(
        &self,
        id: &R::Id,
        record: &R,
        modified: u64,
    ) -> Result<CasOutcome, Error> {
        self.txn().replace(id, record, modified).commit().await
    }

    /// Deletes the record that was read at `modified`.
    pub async fn delete<R: EtcdRecord>(
        &self,
        id: &R::Id,
        modified: u64,
    ) -> Result<CasOutcome, Error> {
        self.txn().delete::<R>(id, modified).commit().await
    }

    /// Writes the record of a shard as its primary does: if the record is still at `modified`, and
    /// if the `node/` key of the `candidate`, where one is given, still has that create_revision.
    pub async fn cas_shard(
        &self,
        record: &ShardRecord,
        modified: u64,
        candidate: Option<(StoreId, u64)>,
    ) -> Result<CasOutcome, Error> {
        let mut txn = self.txn().replace(&record.shard(), record, modified);
        if let Some((store, created)) = candidate {
            txn = txn.if_created_at::<NodeRecord>(&store, created);
        }
        txn.commit().await
    }

    /// Writes the records of both children of a split. It compares that the record of the parent,
    /// which is the left one, was not changed since `modified`, and that the right one has none.
    pub async fn split_shard(
        &self,
        left: &ShardRecord,
        modified: u64,
        right: &ShardRecord,
    ) -> Result<CasOutcome, Error> {
        let txn = self.txn().replace(&left.shard(), left, modified);
        txn.create(&right.shard(), right).commit().await
    }
}

impl Txn {
    /// Creates a record, if its key does not exist.
    pub fn create<R: EtcdRecord>(self, id: &R::Id, record: &R) -> Self {
        let key = self.store.key::<R>(id);
        self.create_raw(key, record.encode(), 0)
    }

    /// Creates a key that is bound to a lease, unless `lease` is 0.
    pub(crate) fn create_raw(mut self, key: String, value: Vec<u8>, lease: i64) -> Self {
        let bound = (lease != 0).then(|| PutOptions::new().with_lease(lease));
        self.compares.push(Compare::create_revision(key.clone(), CompareOp::Equal, 0));
        self.writes.push(TxnOp::put(key, value, bound));
        self
    }

    /// Replaces a record, if it is still the one that was read at `modified`. The key stays bound
    /// to its lease, if it has one.
    pub fn replace<R: EtcdRecord>(mut self, id: &R::Id, record: &R, modified: u64) -> Self {
        let key = self.store.key::<R>(id);
        let keep = PutOptions::new().with_ignore_lease();
        self = self.if_modified_at::<R>(id, modified);
        self.writes.push(TxnOp::put(key, record.encode(), Some(keep)));
        self
    }

    /// Deletes a record, if it is still the one that was read at `modified`.
    pub fn delete<R: EtcdRecord>(mut self, id: &R::Id, modified: u64) -> Self {
        let key = self.store.key::<R>(id);
        self = self.if_modified_at::<R>(id, modified);
        self.writes.push(TxnOp::delete(key, None::<DeleteOptions>));
        self
    }

    pub(crate) fn delete_raw(mut self, key: String, created: u64) -> Self {
        self.compares.push(Compare::create_revision(
            key.clone(),
            CompareOp::Equal,
            signed(created),
        ));
        self.writes.push(TxnOp::delete(key, None::<DeleteOptions>));
        self
    }

    /// Adds the condition that a record has not changed since it was read at `modified`.
    pub fn if_modified_at<R: EtcdRecord>(mut self, id: &R::Id, modified: u64) -> Self {
        assert!(modified > 0, "0 would mean that the key does not exist");
        let key = self.store.key::<R>(id);
        self.compares.push(Compare::mod_revision(key, CompareOp::Equal, signed(modified)));
        self
    }

    /// Adds the condition that a key was neither deleted nor deleted and created again since it was
    /// created at `created`.
    pub fn if_created_at<R: EtcdRecord>(mut self, id: &R::Id, created: u64) -> Self {
        assert!(created > 0, "0 would mean that the key does not exist");
        let key = self.store.key::<R>(id);
        self.compares.push(Compare::create_revision(key, CompareOp::Equal, signed(created)));
        self
    }

    /// Adds the condition that a key does not exist.
    pub fn if_absent<R: EtcdRecord>(mut self, id: &R::Id) -> Self {
        let key = self.store.key::<R>(id);
        self.compares.push(Compare::create_revision(key, CompareOp::Equal, 0));
        self
    }

    /// Sends the transaction once. An error means that it had no effect and never will.
    pub async fn commit(self) -> Result<CasOutcome, Error> {
        assert!(!self.writes.is_empty(), "a transaction needs a write");
        let mut compares = self.compares;
        if let Some(meta) = self.store.joined.get() {
            let key = self.store.key::<Meta>(&());
            compares.push(Compare::value(key, CompareOp::Equal, meta.clone()));
        }
        let txn = etcd_client::Txn::new().when(compares).and_then(self.writes);
        let answered = self.store.with_backoff(&self.store.writes, async {
            let asked = self.store.begin_call()?;
            let mut kv = self.store.kv();
            let reply = self.store.call("transaction", kv.txn(txn)).await?;
            self.store.outcome(asked, &reply)
        });
        match answered.await {
            Err(error) if error.is_transient() => {
                warn!(%error, "the outcome of a transaction is unknown");
                Ok(CasOutcome::Unknown)
            }
            answered => answered,
        }
    }
}

/// Converts a revision for etcd. etcd never returns one beyond i64, so such a revision matches
/// none.
fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}
