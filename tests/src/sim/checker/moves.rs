//! The commit position of a shard moves, or its primary reports within two seconds that the shard
//! is frozen: an ordered entry that hangs silently is a client that waits for its time-out, and a
//! status page that shows an open shard.
//!
//! Causes of false alarms: a paused process reports nothing, and is not checked
//! meanwhile. From its own view it was paused, too, when its clock leapt: so the time is that of
//! its clock.

use std::collections::BTreeMap;

use engine::ids::{Epoch, Seq, ShardId, StoreBoot};
use engine::node::ReplicaView;

use super::Violation;

const PROMISE: &str = "moves";
/// The time limit for the report, in microseconds of the processes' clocks: two seconds, and the
/// next review.
const WITHIN: u64 = 2_200_000;
/// A process that was not checked for this long was paused.
const GAP: u64 = 200_000;

#[derive(Default)]
pub struct Moves {
    waiting: BTreeMap<(StoreBoot, ShardId), Waiting>,
}

#[derive(Clone, Copy)]
struct Waiting {
    epoch: Epoch,
    commit: Seq,
    since: u64,
    looked: u64,
}

impl Moves {
    pub fn look(
        &mut self,
        now: u64,
        me: StoreBoot,
        view: &ReplicaView<'_>,
        violations: &mut Vec<Violation>,
    ) {
        let place = (me, view.shard);
        let waits = view.primary.filter(|p| view.last.seq > view.commit && !p.frozen);
        let Some(primary) = waits else {
            self.waiting.remove(&place);
            return;
        };
        let (epoch, commit) = (primary.epoch, view.commit);
        let fresh = Waiting { epoch, commit, since: now, looked: now };
        let waiting = self.waiting.entry(place).or_insert(fresh);
        let same = (waiting.epoch, waiting.commit) == (epoch, commit);
        if !same || now - waiting.looked > GAP {
            *waiting = fresh;
        }
        waiting.looked = now;
        if now - waiting.since > WITHIN {
            let shard = view.shard;
            let detail = format!(
                "{me:?} has committed {commit:?} of {:?} in shard {shard} since {}, \
                 and reports nothing at {now}",
                view.last.seq, waiting.since
            );
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}
