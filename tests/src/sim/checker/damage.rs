//! Damage is never served: a copy of which something durable was lost leads nothing until it was made anew.
//!
//! That none of its acknowledgements counts needs no checker of its own: what counted on one would be lost, and is
//! missed by the clients. A copy that is only *suspect*, since its disk has failed and kept everything, may lead where
//! there is no better one.

use std::collections::BTreeSet;

use engine::ids::{CopyNo, ShardId, StoreBoot, StoreId};
use engine::node::ReplicaView;

use super::Violation;

/// Copies that were found damaged.
#[derive(Default)]
pub struct Damaged(BTreeSet<(StoreId, ShardId, CopyNo)>);

impl Damaged {
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
