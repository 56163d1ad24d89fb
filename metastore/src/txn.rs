//! Compare-and-set: the only way to write, and what to do when the answer was lost.
//!
//! A transaction whose answer was lost may have taken effect, or may yet, even after a read that does not show it
//! (trap T7). Sending it again would be a second transaction. So it is never sent again here. Once the record's
//! mod_revision has moved past the one that the lost transaction compares, it can never take effect any more: who has to know
//! writes the record once more, as a newer version.

use engine::config::ShardConfig;
use engine::ids::StoreId;
use engine::records::NodeRecord;
use etcd_client::{Compare, CompareOp, DeleteOptions, PutOptions, TxnOp};
use tracing::warn;

use crate::{Error, Metastore, Record};

/// What became of a transaction.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It took effect. `revision` is the new mod_revision of every key it wrote (and the create_revision of those it
    /// made).
    Done { revision: u64 },
    /// A comparison did not hold: it had no effect and never will.
    Failed,
    /// The answer was lost: it may have taken effect, or may yet.
    Unknown,
}

/// Writes that happen all or not at all, each guarded by a comparison.
#[derive(Clone)]
pub struct Txn {
    store: Metastore,
    compares: Vec<Compare>,
    writes: Vec<TxnOp>,
}

impl Metastore {
    pub fn txn(&self) -> Txn {
        Txn { store: self.clone(), compares: Vec::new(), writes: Vec::new() }
    }

    /// Makes a record that is not there yet.
    pub async fn create<R: Record>(&self, id: &R::Id, record: &R) -> Result<Outcome, Error> {
        self.txn().create(id, record).commit().await
    }

    /// Replaces the record that was read at `modified`.
    pub async fn replace<R: Record>(
        &self,
        id: &R::Id,
        record: &R,
        modified: u64,
    ) -> Result<Outcome, Error> {
        self.txn().replace(id, record, modified).commit().await
    }

    /// Deletes the record that was read at `modified`.
    pub async fn delete<R: Record>(&self, id: &R::Id, modified: u64) -> Result<Outcome, Error> {
        self.txn().delete::<R>(id, modified).commit().await
    }

    /// Writes one shard's record as its primary does: if the record is still at `modified`, and if the `node/` key of
    /// the candidate, where one is named, still has that create_revision.
    pub async fn cas_shard(
        &self,
        config: &ShardConfig,
        modified: u64,
        candidate: Option<(StoreId, u64)>,
    ) -> Result<Outcome, Error> {
        let mut txn = self.txn().replace(&config.shard(), config, modified);
        if let Some((store, created)) = candidate {
            txn = txn.if_created_at::<NodeRecord>(&store, created);
        }
        txn.commit().await
    }
}

impl Txn {
    /// Makes a record, if there is none of that name.
    pub fn create<R: Record>(self, id: &R::Id, record: &R) -> Self {
        self.create_with_lease(id, record, 0)
    }

    /// The same, bound to a lease.
    pub(crate) fn create_with_lease<R: Record>(self, id: &R::Id, record: &R, lease: i64) -> Self {
        let key = self.store.key::<R>(id);
        self.create_raw(key, record.encode(), lease)
    }

    pub(crate) fn create_raw(mut self, key: String, value: Vec<u8>, lease: i64) -> Self {
        let bound = (lease != 0).then(|| PutOptions::new().with_lease(lease));
        self.compares.push(Compare::create_revision(key.clone(), CompareOp::Equal, 0));
        self.writes.push(TxnOp::put(key, value, bound));
        self
    }

    /// Replaces a record, if it is still the one that was read at `modified`. Its lease, if it has one, stays.
    pub fn replace<R: Record>(mut self, id: &R::Id, record: &R, modified: u64) -> Self {
        let key = self.store.key::<R>(id);
        let keep = PutOptions::new().with_ignore_lease();
        self = self.if_modified_at::<R>(id, modified);
        self.writes.push(TxnOp::put(key, record.encode(), Some(keep)));
        self
    }

    /// Deletes a record, if it is still the one that was read at `modified`.
    pub fn delete<R: Record>(mut self, id: &R::Id, modified: u64) -> Self {
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

    /// Only if that record has not changed since it was read.
    pub fn if_modified_at<R: Record>(mut self, id: &R::Id, modified: u64) -> Self {
        assert!(modified > 0, "0 would mean: if there is no such key");
        let key = self.store.key::<R>(id);
        self.compares.push(Compare::mod_revision(key, CompareOp::Equal, signed(modified)));
        self
    }

    /// Only if that key is still the very one that was read: not deleted, nor deleted and made again.
    pub fn if_created_at<R: Record>(mut self, id: &R::Id, created: u64) -> Self {
        assert!(created > 0, "0 would mean: if there is no such key");
        let key = self.store.key::<R>(id);
        self.compares.push(Compare::create_revision(key, CompareOp::Equal, signed(created)));
        self
    }

    /// Only if there is no such key.
    pub fn if_absent<R: Record>(mut self, id: &R::Id) -> Self {
        let key = self.store.key::<R>(id);
        self.compares.push(Compare::create_revision(key, CompareOp::Equal, 0));
        self
    }

    /// Sends it, once. An error means that it had no effect and never will.
    pub async fn commit(self) -> Result<Outcome, Error> {
        assert!(!self.writes.is_empty(), "a transaction without writes says nothing");
        let txn = etcd_client::Txn::new().when(self.compares).and_then(self.writes);
        let answered = self.store.paced(&self.store.writes, async {
            let asked = self.store.asks()?;
            let mut kv = self.store.kv();
            let reply = self.store.call("transaction", kv.txn(txn)).await?;
            self.store.outcome(asked, &reply)
        });
        match answered.await {
            Err(error) if error.is_transient() => {
                warn!(%error, "it is not known what became of a transaction");
                Ok(Outcome::Unknown)
            }
            answered => answered,
        }
    }
}

/// A revision as etcd wants it. One beyond i64 is none that etcd ever gave, so it must match nothing.
fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}
