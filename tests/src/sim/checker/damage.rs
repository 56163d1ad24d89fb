//! Damage is never served: a copy that lost something durable leads nothing until it was replaced.
//!
//! No checker of its own is needed for its acknowledgements: an increment that depended on one
//! would be lost, and the clients miss it. A copy that is only *suspect*, since its disk has failed
//! and kept everything, may lead where there is no better one.

use std::collections::BTreeSet;

use engine::ids::{CopyNo, ShardId, StoreBoot, StoreId};
use engine::node::ReplicaView;

use super::Violation;

/// The copies that were found damaged.
#[derive(Default)]
pub struct DamagedCopies(BTreeSet<(StoreId, ShardId, CopyNo)>);

impl DamagedCopies {
    pub fn found(&mut self, store: StoreId, copies: impl Iterator<Item = (ShardId, CopyNo)>) {
        self.0.extend(copies.map(|(shard, copy)| (store, shard, copy)));
    }

    pub fn look(&self, me: StoreBoot, view: &ReplicaView<'_>, violations: &mut Vec<Violation>) {
        let damaged = self.0.contains(&(me.store, view.shard, view.copy));
        if damaged && view.primary.is_some() {
            let detail = format!("{me:?} leads shard {} with a damaged copy", view.shard);
            violations.push(Violation { promise: "damage", detail });
        }
    }
}
