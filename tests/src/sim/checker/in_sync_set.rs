//! Committed entries are durable on every member of the in-sync set that etcd's record names, at
//! every moment: any member that is promoted next has them. (Members that are marked as `tainted`
//! are not promoted.)
//!
//! A mistake in counting acknowledgements shows here at once; without this checker a second failure
//! at the right moment would be needed to lose something. Causes of false alarms: a
//! member whose disk has lied or is known to be damaged is excluded; other promises limit what such
//! a disk may do.

use std::collections::BTreeMap;

use engine::ids::{Boot, Chain, CopyNo, Seq, ShardId, StoreBoot, StoreId};
use engine::node::ReplicaView;
use engine::shard_record::ShardRecord;

use super::Violation;

#[derive(Default)]
pub struct InSyncSet {
    records: BTreeMap<ShardId, ShardRecord>,
    /// The highest commit that any primary of the shard has reached, and the entry there.
    committed: BTreeMap<ShardId, (Seq, Option<Chain>)>,
    held: BTreeMap<(StoreId, ShardId), DurableEnd>,
}

/// The end of a shard's log that is durable on a store; for a store that is down, the one it had.
#[derive(Clone, Copy, Debug, Default)]
struct DurableEnd {
    boot: Boot,
    durable: Seq,
    /// This copy was found damaged when the process began.
    damaged: Option<CopyNo>,
    /// The disk was harmed while it held this copy.
    harmed: Option<CopyNo>,
    copy: CopyNo,
    is_sound: bool,
}

impl InSyncSet {
    pub fn record_written(&mut self, config: &ShardRecord, violations: &mut Vec<Violation>) {
        self.records.insert(config.shard(), config.clone());
        self.check(config.shard(), violations);
    }

    /// All records are lost, and with a process a deletion that was not durable: the copy may be
    /// on its disk all the same. What disks hold is judged by
    /// [`logged_records`](super::logged_records).
    pub fn etcd_lost(&mut self) {
        self.records.clear();
        self.held.retain(|_, held| held.durable > Seq(0));
    }

    /// The store's disk may have lost what was durable: its copies are excluded until they are
    /// replaced.
    pub fn harmed(&mut self, store: StoreId) {
        for held in self.held.iter_mut().filter(|((of, _), _)| *of == store).map(|(_, held)| held) {
            held.harmed = Some(held.copy);
            held.is_sound = false;
        }
    }

    pub fn look(&mut self, me: StoreBoot, view: &ReplicaView<'_>, violations: &mut Vec<Violation>) {
        let before = self.held.get(&(me.store, view.shard)).copied().unwrap_or_default();
        let begins = before.boot != me.boot;
        let damaged = if begins { view.unfit.then_some(view.copy) } else { before.damaged };
        let made_anew = |copy: CopyNo| view.exists && view.copy > copy;
        let harmed = before.harmed.filter(|&copy| !made_anew(copy));
        let is_sound = view.stopped.is_none() && damaged != Some(view.copy) && harmed.is_none();
        let durable = if view.exists { view.durable } else { Seq(0) };
        let held =
            DurableEnd { boot: me.boot, durable, damaged, harmed, copy: view.copy, is_sound };
        self.held.insert((me.store, view.shard), held);
        let shrank = durable < before.durable;
        let mut grew = false;
        if let Some(primary) = view.primary.filter(|primary| primary.active) {
            let known = self.committed.entry(view.shard).or_default();
            if view.commit > known.0 && view.commit >= primary.barrier {
                *known = (view.commit, view.log.position(view.commit).map(|at| at.chain));
                grew = true;
            }
        }
        if shrank || grew {
            self.check(view.shard, violations);
        }
        if is_sound && view.exists {
            self.check_entry(me, view, violations);
        }
    }

    fn check(&self, shard: ShardId, violations: &mut Vec<Violation>) {
        let Some(record) = self.records.get(&shard) else { return };
        let Some(&(committed, _)) = self.committed.get(&shard) else { return };
        for &store in record.isr.iter().filter(|store| !record.tainted.contains(store)) {
            let Some(held) = self.held.get(&(store, shard)) else { continue };
            if held.is_sound && held.durable < committed {
                let detail = format!(
                    "shard {shard}: {committed:?} is committed, {store:?} in {record:?} has {:?}",
                    held.durable
                );
                violations.push(Violation { promise: PROMISE, detail });
            }
        }
    }

    /// A member may hold another entry at that position: the number alone proves nothing.
    fn check_entry(&self, me: StoreBoot, view: &ReplicaView<'_>, violations: &mut Vec<Violation>) {
        let Some(record) = self.records.get(&view.shard) else { return };
        let Some(&(committed, Some(chain))) = self.committed.get(&view.shard) else { return };
        let counts = record.isr.contains(&me.store) && !record.tainted.contains(&me.store);
        let there = view.log.position(committed).filter(|_| counts);
        if let Some(there) = there.filter(|there| there.chain != chain) {
            let shard = view.shard;
            let detail =
                format!("shard {shard}: {me:?} has {there:?} where {chain:?} is committed");
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}

const PROMISE: &str = "in-sync-set";
