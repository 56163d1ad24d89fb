//! When all faults are over, everything is answered and the in-sync replicas become equal.

use engine::config::ShardConfig;
use engine::node::Node;

use super::Violation;

const PROMISE: &str = "heals";

/// What still keeps a shard from being whole, if anything: as many members as there are to be are in sync, and each holds
/// what the primary has committed.
pub fn unfinished<'a>(
    config: &ShardConfig,
    replicas: usize,
    node: impl Fn(engine::ids::StoreId) -> Option<&'a Node>,
) -> Option<String> {
    let shard = config.shard();
    let view = |store| node(store)?.replicas().find(|view| view.shard == shard);
    let Some(primary) = view(config.primary.store) else {
        return Some(format!("shard {shard}: the primary {:?} is not there", config.primary));
    };
    if config.isr.len() != replicas || !config.learners.is_empty() || !config.tainted.is_empty() {
        let ShardConfig { isr, learners, tainted, .. } = config;
        return Some(format!(
            "shard {shard}: {isr:?} in sync, {learners:?} learn, {tainted:?} tainted"
        ));
    }
    let want = primary.last.seq;
    for &store in &config.isr {
        let Some(replica) = view(store) else {
            return Some(format!("shard {shard}: {store:?} has no replica"));
        };
        if replica.state.applied.seq != want {
            let at = replica.state.applied.seq;
            return Some(format!("shard {shard}: {store:?} applied {at:?} of {want:?}"));
        }
    }
    None
}

pub fn violation(detail: String) -> Violation {
    Violation { promise: PROMISE, detail }
}
