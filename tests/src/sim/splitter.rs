//! An operator who splits shards (`dkc shards split`), again and again, at places that separate
//! counters.

use engine::ids::{Slots, StoreBoot};
use engine::key::CounterKey;
use engine::message::NodeQuery;
use engine::shard_record::ShardRecord;

use super::cluster::SimCluster;
use super::event::SimEvent;
use super::place::{Place, ProcessId, place_of};

impl SimCluster {
    /// Asks the primary of some shard to split it.
    pub fn operator_splits(&mut self) {
        let Some(every) = self.core.plan.splits.every else { return };
        if self.core.now >= self.core.plan.load_until {
            return;
        }
        self.core.after(every, SimEvent::OperatorSplits);
        let made = self.core.etcd.shards().count() as u64;
        if made >= u64::from(self.core.plan.shards) + self.core.plan.splits.most {
            return;
        }
        let records: Vec<ShardRecord> =
            self.core.etcd.shards().map(|(record, _)| record.clone()).collect();
        if records.is_empty() {
            return;
        }
        let used: Vec<u16> = self.clients.history.counters.iter().map(|it| slot(&it.key)).collect();
        let rng = &mut self.core.plan.splits.rng;
        let record = &records[rng.index(records.len())];
        let Some(at) = place(record.slots, &used, rng) else { return };
        let StoreBoot { store, .. } = record.primary;
        let from = ProcessId { place: Place::Coordinator(0), incarnation: 0 };
        let message = NodeQuery::Split { shard: record.shard(), epoch: record.epoch, at };
        let to = place_of(store);
        self.core.after(0, SimEvent::Query { to, from, query: u64::MAX, message });
    }
}

fn slot(key: &CounterKey) -> u16 {
    key.slot().0
}

/// A slot between two counters of the shard, or any.
fn place(slots: Slots, used: &[u16], rng: &mut super::rng::Rng) -> Option<u16> {
    let mut inside: Vec<u16> =
        used.iter().copied().filter(|&at| slots.lo < at && at <= slots.hi).collect();
    inside.sort_unstable();
    inside.dedup();
    match inside.as_slice() {
        [] => (slots.lo < slots.hi).then(|| slots.lo + (slots.hi - slots.lo) / 2 + 1),
        some => Some(some[rng.index(some.len())]),
    }
}
