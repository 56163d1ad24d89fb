//! An operator who does not wait: for a shard without a primary, the operator names a copy that is
//! to lead, whatever it lacks (`dkc shards promote --accept-loss`).
//!
//! No promise would hold if something were lost by it. So this operator only names copies of
//! trusted members of the in-sync set, and only in runs whose disks keep what they have: all that
//! is acknowledged by then is in such a copy. The operator is slow to type, and does not always
//! withdraw an intent that was not obeyed: an intent about a record that has changed must not be
//! obeyed, since the copy may lack what was acknowledged meanwhile.

use engine::ids::{ShardId, TimeMs};
use engine::records::{Operator, PromoteIntent};
use engine::shard_record::ShardRecord;

use super::cluster::SimCluster;
use super::core::Core;
use super::etcd::{EtcdKey, EtcdValue, Write};
use super::event::SimEvent;
use super::nodes::NodeHost;

impl SimCluster {
    pub fn operator_looks(&mut self) {
        let Some(every) = self.core.plan.operator.every else { return };
        if !self.core.is_faulty() {
            return;
        }
        self.core.after(every, SimEvent::OperatorLooks);
        let unled = |config: &&ShardRecord| {
            !self.nodes.iter().any(|node| node.me() == Some(config.primary))
        };
        let shards = self.core.etcd.shards().map(|(config, _)| config);
        let shards: Vec<ShardRecord> = shards.filter(unled).cloned().collect();
        for config in shards {
            let mut able: Vec<&NodeHost> =
                self.nodes.iter().filter(|node| holds_all(node, &config)).collect();
            let rng = &mut self.core.plan.operator.rng;
            rng.shuffle(&mut able);
            let Some(node) = able.first() else { continue };
            let from = Operator { at: TimeMs(self.core.now / 1_000), name: "sim".into() };
            let intent = PromoteIntent { store: node.store, version: config.version, from };
            let types = rng.between(1_000, 1_500_000);
            let withdraws = rng.percent(50).then(|| types + rng.between(100_000, 2_000_000));
            let shard = config.shard();
            self.core.after(types, SimEvent::OperatorWants { shard, intent: Some(intent) });
            if let Some(withdraws) = withdraws {
                self.core.after(withdraws, SimEvent::OperatorWants { shard, intent: None });
            }
        }
    }
}

/// The node runs, and is a trusted member. A copy that its own disk has not filled yet may hold
/// less.
fn holds_all(node: &NodeHost, config: &ShardRecord) -> bool {
    let Some(running) = node.node() else { return false };
    let is_trusted = config.isr.contains(&node.store) && !config.tainted.contains(&node.store);
    let view = running.replicas().find(|view| view.shard == config.shard());
    let is_whole = view.is_some_and(|view| view.exists && (!view.unfit || view.stopped.is_some()));
    is_trusted && is_whole
}

impl Core {
    pub fn operator_wants(&mut self, shard: ShardId, intent: Option<PromoteIntent>) {
        let key = EtcdKey::Promote(shard);
        self.etcd_write(match intent {
            Some(intent) => Write::Put(key, EtcdValue::Promote(intent), None),
            None => Write::Delete(key),
        });
    }
}
