//! When all faults are over, everything is answered and the in-sync replicas become equal.

use engine::node::{Node, ReplicaView};
use engine::shard_record::ShardRecord;

use super::Violation;

const PROMISE: &str = "heals";

/// The reason why a shard is not whole yet, if there is one: it is whole when as many members as
/// there are to be are in sync, and each holds what the primary has committed.
pub fn unfinished<'a>(
    config: &ShardRecord,
    replicas: usize,
    node: impl Fn(engine::ids::StoreId) -> Option<&'a Node>,
) -> Option<String> {
    let shard = config.shard();
    let view = |store| node(store)?.replicas().find(|view| view.shard == shard);
    let Some(primary) = view(config.primary.store) else {
        return Some(format!("shard {shard}: the primary {:?} is not there", config.primary));
    };
    if config.isr.len() != replicas || !config.learners.is_empty() || !config.tainted.is_empty() {
        let ShardRecord { isr, learners, tainted, .. } = config;
        return Some(format!(
            "shard {shard}: {isr:?} in sync, {learners:?} learn, {tainted:?} tainted"
        ));
    }
    for &store in &config.isr {
        let Some(replica) = view(store) else {
            return Some(format!("shard {shard}: {store:?} has no replica"));
        };
        // The last entry is applied when its commit position arrives, with the next message or soon
        // after. Where a clock was set back by an hour, an entry of every tenth of a second moves
        // the shard's time after it, so there is always a last one.
        let (last, applied) = (primary.last.seq, replica.state.applied.seq);
        if replica.last != primary.last || applied.next() < last {
            let ReplicaView { last: holds, .. } = replica;
            return Some(format!(
                "shard {shard}: {store:?} holds {holds:?}, applied {applied:?} of {last:?}"
            ));
        }
    }
    None
}

pub fn violation(detail: String) -> Violation {
    Violation { promise: PROMISE, detail }
}
