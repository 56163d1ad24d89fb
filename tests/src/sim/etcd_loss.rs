//! All of etcd is lost while the cluster counts, and rebuilt from what the stores know
//! (`dkc recover-etcd`): the engine answers for a store that runs, its log for one that starts, and
//! `engine::recovery_plan` decides what is written.
//!
//! At the moment of the loss some nodes die, and the disk of one may be lost for good: its store is
//! given up. What runs goes on, without any etcd, and is restarted
//! some time after the rebuild. Production keeps such a process from the new etcd by the fence of a
//! node, by etcd's history and by a comparison of `meta`; here etcd does not answer it.

use std::collections::BTreeSet;

use engine::etcd_memory::EtcdMemory;
use engine::ids::{Boot, ShardId, StoreBoot, StoreId, TimeMs};
use engine::message::StoreKnowledge;
use engine::node::RecoveredReplica;
use engine::records::{Meta, Operator, StoreRecord, StoreStatus};
use engine::recovery_plan::{RecoveredRecords, RecoveryTerms, UNUSED_EPOCHS, plan};
use engine::shard_record::ShardRecord;
use engine::store::log::Identity;

use super::checker::Violation;
use super::cluster::SimCluster;
use super::core::Core;
use super::coverage::Path;
use super::etcd::{EtcdHealth, EtcdKey, EtcdValue, Write, name_key};
use super::event::SimEvent;
use super::place::{Place, ProcessId, index_of, name_of, zone_of};

/// The pause between two rounds of questions.
const ASK_EVERY: u64 = 50_000;
/// The time within which the processes that run on without etcd are restarted.
const RESTARTED_WITHIN: u64 = 1_500_000;

impl SimCluster {
    /// Loses etcd, once all shards were led and no other fault has etcd in its hands. (A shard that
    /// no store has led or seen is unknown afterwards: nothing was counted there.)
    pub fn etcd_is_lost(&mut self) {
        if !self.core.is_faulty() {
            return;
        }
        let led = self.core.oracle.logs_cover_all(None);
        let is_up = self.core.etcd.health == EtcdHealth::Up && !self.core.etcd.is_restored();
        if !led || !is_up {
            return self.core.after(ASK_EVERY, SimEvent::EtcdLost);
        }
        self.core.trace.note(self.core.now, || "etcd is lost".into());
        for coordinator in &mut self.coordinators {
            coordinator.crash(&mut self.core);
        }
        self.chaos.crash();
        for at in 0..self.nodes.len() {
            let rng = &mut self.core.plan.etcd_loss.rng;
            let (dies, power_lost) = (rng.percent(50), rng.percent(50));
            let back = rng.between(1_000, 500_000);
            let node = &mut self.nodes[at];
            if dies || node.listening().is_none() {
                node.crash(&mut self.core, power_lost);
                let place = node.place;
                self.core.after(back, SimEvent::Restart { place });
            }
        }
        self.lose_a_disk();
        let left: Vec<ProcessId> = self.running().collect();
        self.core.etcd_is_lost(left);
        self.core.after(ASK_EVERY, SimEvent::EtcdRebuild);
    }

    /// Loses the disk of a node as well. With `min_in_sync` of one it may be the only one with what
    /// was acknowledged. A shard that only this store has ever led is known to no other log: then
    /// the plan is refused.
    fn lose_a_disk(&mut self) {
        let rng = &mut self.core.plan.etcd_loss.rng;
        let (at, is_lost) = (rng.index(self.nodes.len()), rng.percent(40));
        let node = &mut self.nodes[at];
        let (place, store) = (node.place, node.store);
        let is_known = self.core.oracle.logs_cover_all(Some(store));
        if !is_lost || !is_known || self.core.plan.min_in_sync < 2 {
            return;
        }
        node.crash(&mut self.core, true);
        node.is_emptied();
        self.core.oracle.harmed(store);
        self.core.plan.etcd_loss.given_up = Some(store);
        self.core.after(300_000, SimEvent::Restart { place });
    }

    /// Asks all nodes, and rebuilds etcd once all have promised to follow the new one.
    pub fn etcd_is_rebuilt(&mut self) {
        let incarnation = self.core.etcd.incarnation();
        let mut answers = Vec::new();
        for node in &mut self.nodes {
            answers.extend(node.knowledge_of_etcd(&mut self.core, incarnation));
        }
        if answers.len() < self.nodes.len() || answers.iter().any(|answer| !answer.durable) {
            return self.core.after(ASK_EVERY, SimEvent::EtcdRebuild);
        }
        let from = Operator { at: TimeMs(self.core.now / 1_000), name: "sim".into() };
        let records =
            || answers.iter().flat_map(|it| &it.shards).filter_map(|it| it.record.as_ref());
        let named = |store: &StoreId| records().any(|record| record.mentions(*store));
        let without = self.core.plan.etcd_loss.given_up.filter(named).into_iter().collect();
        let planted = self.core.plan.planted;
        let unused_epochs = UNUSED_EPOCHS;
        let terms =
            RecoveryTerms { incarnation, promised: true, without, from, unused_epochs, planted };
        match plan(&answers, &terms) {
            Ok(recovered) => self.follow_rebuilt_etcd(&answers, recovered),
            Err(refusals) => {
                let detail = format!("etcd can't be rebuilt: {refusals:?} from {answers:?}");
                self.core.oracle.violations.push(Violation { promise: "etcd-rebuilt", detail });
            }
        }
    }

    fn follow_rebuilt_etcd(&mut self, answers: &[StoreKnowledge], recovered: RecoveredRecords) {
        let promised = |shard: ShardId| {
            let known = answers.iter().flat_map(|answer| &answer.shards);
            known.filter(|known| known.shard == shard).map(|known| known.promised).max()
        };
        // A copy that was not good before may have been the one that counts.
        let known = || answers.iter().flat_map(|answer| &answer.shards);
        let is_tainted = |record: &ShardRecord| !record.tainted.is_empty();
        let good = known().all(|it| {
            !it.copy.is_some_and(|copy| copy.unfit) && !it.record.as_ref().is_some_and(is_tainted)
        });
        if !recovered.losses.is_empty() && good {
            let detail = format!("one disk is lost, so nothing is: {:?}", recovered.losses);
            self.core.oracle.violations.push(Violation { promise: "etcd-rebuilt", detail });
        }
        for record in &recovered.shards {
            if promised(record.shard()) >= Some(record.epoch) {
                let detail = format!("{record:?} is not above what was promised");
                self.core.oracle.violations.push(Violation { promise: "etcd-rebuilt", detail });
            }
        }
        let known = answers.iter().flat_map(|answer| &answer.shards);
        let known: BTreeSet<ShardId> =
            known.filter(|it| it.record.is_some()).map(|it| it.shard).collect();
        for record in recovered.shards.iter().filter(|it| !known.contains(&it.shard())) {
            self.core.trace.note(self.core.now, || format!("no store had seen {record:?}"));
        }
        if recovered.shards.len() > usize::from(self.core.plan.shards) {
            self.core.oracle.coverage.reached(Path::SplitRebuilt);
        }
        self.core.trace.note(self.core.now, || format!("etcd is rebuilt: {recovered:?}"));
        self.core.etcd_is_rebuilt(recovered);
        self.core.oracle.coverage.reached(Path::EtcdRebuilt);
        let coordinators = self.coordinators.iter().map(|coordinator| coordinator.place);
        let chaos = self.core.plan.chaos.then_some(Place::Chaos);
        for place in coordinators.chain(chaos).collect::<Vec<_>>() {
            let after = self.core.plan.etcd_loss.rng.between(1_000, 300_000);
            self.core.after(after, SimEvent::Restart { place });
        }
        for process in self.core.etcd.left_behind() {
            let after = self.core.plan.etcd_loss.rng.between(1_000, RESTARTED_WITHIN);
            self.core.after(after, SimEvent::LeavesOldEtcd { process });
        }
    }

    /// Restarts a process that follows no etcd any more, if it still runs.
    pub fn leaves_old_etcd(&mut self, process: ProcessId) {
        if !self.running().any(|running| running == process) {
            return;
        }
        match process.place {
            Place::Node(at) => self.nodes[at as usize].crash(&mut self.core, false),
            Place::Gateway(at) => self.gateways[at as usize].crash(&mut self.core),
            Place::Coordinator(_) | Place::Chaos | Place::Twin | Place::Etcd => {}
        }
        let after = self.core.plan.etcd_loss.rng.between(1_000, 300_000);
        self.core.after(after, SimEvent::Restart { place: process.place });
    }
}

impl Core {
    fn etcd_is_lost(&mut self, left: Vec<ProcessId>) {
        self.etcd.lose(left);
        self.oracle.etcd_lost();
    }

    fn etcd_is_rebuilt(&mut self, recovered: RecoveredRecords) {
        let mut writes = Vec::new();
        let mut put = |key, value| writes.push(Write::Put(key, value, None));
        // The model's coordinators have made these settings; what the stores remember is alike.
        if let Some(meta) = self.etcd.lost_meta() {
            let incarnation = recovered.meta.incarnation;
            put(EtcdKey::Meta, EtcdValue::Meta(Meta { incarnation, ..meta }));
        }
        for (store, record) in recovered.stores {
            let nonce = u64::try_from(record.nonce).expect("drawn as one");
            let (me, status) = (StoreBoot { store, boot: record.boot }, record.status);
            let value = EtcdValue::Store { me, nonce, status, zone: record.zone };
            put(EtcdKey::Store(store), value);
            if status != StoreStatus::Lost {
                put(name_key(store), EtcdValue::Name(store));
            }
        }
        for record in recovered.shards {
            put(EtcdKey::Shard(record.shard()), EtcdValue::Shard(record));
        }
        // The revisions of the new etcd may be below those of the old one, or above.
        let revision = self.plan.etcd_loss.rng.below(2_000);
        self.etcd.begin_again(revision, writes);
        self.etcd_changed(0);
    }

    /// The memory of etcd that a store has after this start.
    pub fn etcd_memory(&self, store: StoreId, boot: Boot, nonce: u128) -> EtcdMemory {
        let meta = Meta {
            cluster: 1,
            shards: self.plan.shards.into(),
            replicas: self.plan.replicas as u8,
            min_in_sync: self.plan.min_in_sync as u8,
            hash: 1,
            incarnation: self.etcd.incarnation(),
            idempotency: Default::default(),
        };
        let record = StoreRecord {
            name: name_of(store),
            address: String::new(),
            zone: zone_of(index_of(store), self.plan.zones),
            host: String::new(),
            boot,
            nonce,
            status: StoreStatus::Active,
        };
        EtcdMemory::following(meta, record, None)
    }

    /// The answer of a store that starts, and waits for an etcd that it may follow.
    pub fn knowledge_of_log(
        &self,
        store: StoreId,
        identity: Option<&Identity>,
        replicas: &[RecoveredReplica],
    ) -> StoreKnowledge {
        let boot = identity.map_or(Boot(0), |identity| identity.boot);
        let etcd = identity.map(|identity| {
            let boot = boot.max(Boot(1));
            Box::new(self.etcd_memory(store, boot, identity.nonce()))
        });
        let shards = replicas.iter().map(RecoveredReplica::knowledge).collect();
        let from = StoreBoot { store, boot };
        StoreKnowledge { from, etcd, durable: true, damaged: false, shards }
    }
}
