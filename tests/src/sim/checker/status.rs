//! A status page is correct: a node's own account of its replicas agrees with what they are.
//!
//! Operators act on it. If a shard reports itself as open and takes no writes, or hides that it
//! leads, they look for the fault in the wrong place.

use engine::ids::StoreBoot;
use engine::message::RoleStatus;
use engine::node::{Node, ReplicaView};

use super::Violation;

const PROMISE: &str = "status";

pub fn check(me: StoreBoot, node: &Node, violations: &mut Vec<Violation>) {
    let all = node.status();
    let held = node.replicas().filter(|view| view.exists).count();
    if all.len() != held {
        let detail = format!("{me:?} shows {} replicas of {held}", all.len());
        violations.push(Violation { promise: PROMISE, detail });
    }
    for status in all {
        let view = node.replicas().find(|view| view.shard == status.shard && view.exists);
        let is_so = view.as_ref().is_some_and(|view| {
            let position = (status.promised, status.last, status.applied);
            position == (view.promised, view.last.seq, view.state.applied.seq)
                && status.digest.seq == status.applied
                && status.stopped.as_deref() == view.stopped
                && role_is_so(&status.role, view)
        });
        if !is_so {
            let detail = format!("{me:?} shows {status:?} of {view:?}");
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}

fn role_is_so(role: &RoleStatus, view: &ReplicaView<'_>) -> bool {
    match (role, view.primary) {
        (RoleStatus::Follower, None) => true,
        (RoleStatus::Primary { epoch, open, .. }, Some(primary)) => {
            *epoch == primary.epoch && *open == (primary.active && !primary.frozen)
        }
        _ => false,
    }
}
