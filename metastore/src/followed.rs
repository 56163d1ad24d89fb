//! A process's copy of all records of one kind, kept up to date by a watch.

use std::collections::{BTreeMap, BTreeSet};

use crate::client::Revisioned;
use crate::{EtcdRecord, Metastore, Watch, WatchChange, WatchEvent, WatchSettings};

/// All records of one kind. Like the watch that it follows, the copy may be arbitrarily late.
pub struct Followed<R: EtcdRecord> {
    watch: Watch<R>,
    all: BTreeMap<R::Id, Revisioned<R>>,
    changed: BTreeSet<R::Id>,
}

impl Metastore {
    /// Follows one kind of record. The copy is empty until [`Followed::next`] has returned.
    pub fn follow<R: EtcdRecord>(&self) -> Followed<R> {
        let watch = self.watch(WatchSettings::default());
        Followed { watch, all: BTreeMap::new(), changed: BTreeSet::new() }
    }
}

impl<R: EtcdRecord> Followed<R> {
    /// Waits for the next change and applies it. Safe to cancel and call again.
    ///
    /// Returns false if etcd's history went back, which is in the log: such an etcd must not be
    /// followed, and the process keeps what it has.
    pub async fn next(&mut self) -> bool {
        match self.watch.next().await {
            Some(WatchEvent::All(listed)) => {
                self.all = listed.all.into_iter().map(|kept| (kept.id.clone(), kept)).collect();
                self.changed.extend(self.all.keys().cloned());
            }
            Some(WatchEvent::Change(WatchChange::Changed(kept))) => {
                self.changed.insert(kept.id.clone());
                self.all.insert(kept.id.clone(), kept);
            }
            Some(WatchEvent::Change(WatchChange::Deleted { id, .. })) => {
                self.all.remove(&id);
                self.changed.insert(id);
            }
            Some(WatchEvent::WentBack(_)) | None => return false,
        }
        true
    }

    /// Returns the records that changed since they were last taken, each with `None` if it was
    /// deleted.
    pub fn take_changed(&mut self) -> impl Iterator<Item = (R::Id, Option<&Revisioned<R>>)> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|id| {
            let kept = self.all.get(&id);
            (id, kept)
        })
    }

    /// Returns all records, in the order of their ids.
    pub fn all(&self) -> impl Iterator<Item = &Revisioned<R>> {
        self.all.values()
    }

    /// Returns copies of all records by their ids.
    pub fn records(&self) -> BTreeMap<R::Id, R> {
        self.all().map(|kept| (kept.id.clone(), kept.record.clone())).collect()
    }

    /// Returns the record of a kind that has only one.
    pub fn only(&self) -> Option<&R> {
        self.all().next().map(|kept| &kept.record)
    }
}
