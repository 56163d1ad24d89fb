//! Answers to queries of the coordinator and of operators.

use crate::ids::ShardId;
use crate::message::{NodeQuery, NodeQueryReply, RecordsKept, ReplicaStatus, RoleStatus, ShardEnd};
use crate::node::audit::Audit;
use crate::node::event::Effect;
use crate::node::membership::{HealthView, order_split};
use crate::node::peers::Peers;
use crate::node::settings::Settings;
use crate::node::shared::NodeTurn;
use crate::node::shared::Shards;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::trust::Trust;

/// Answers a query.
pub(super) fn on_query(
    turn: &mut NodeTurn<'_>,
    peers: &Peers,
    audit: &mut Audit,
    query: u64,
    message: NodeQuery,
) {
    let reply = match message {
        NodeQuery::Probe { to: _ } => NodeQueryReply::Probe {
            from: turn.me,
            fsync_age_ms: turn.storage.groups().fsync_age_ms(turn.now),
        },
        NodeQuery::Gather { shards } => NodeQueryReply::Gather {
            from: turn.me,
            ends: shards.into_iter().filter_map(|shard| end_of(turn, shard)).collect(),
        },
        NodeQuery::StepDown { shard, epoch } => {
            let until = turn.now.plus_ms(turn.settings.timing.step_down_ms);
            let end = turn.shards.get_mut(shard).and_then(|replica| {
                let last = replica.log.last();
                let primary = replica.primary_mut().filter(|p| p.epoch == epoch)?;
                primary.stepping_down = Some(until);
                Some((last.epoch, last.seq))
            });
            NodeQueryReply::StepDown { shard, end }
        }
        NodeQuery::Split { shard, epoch, at } => {
            let outcome = order_split(turn, peers, shard, epoch, at).map_err(str::to_owned);
            NodeQueryReply::Split { shard, outcome }
        }
        NodeQuery::Recover { promise } => {
            turn.promise_incarnation(promise);
            NodeQueryReply::Recover(Box::new(turn.knowledge()))
        }
        NodeQuery::Scrub { shards, bytes_per_s } => {
            audit.request_scrub(turn.settings, shards, bytes_per_s);
            audit.scrub_if_due(turn);
            NodeQueryReply::Scrub { from: turn.me }
        }
        NodeQuery::Status => NodeQueryReply::Status {
            from: turn.me,
            scrub: audit.scrub_status(),
            replicas: status(turn.shards, HealthView::of(turn, peers), turn.settings),
            full: turn.storage.is_disk_full(),
        },
    };
    turn.effects.push(Effect::QueryReply { query, reply });
}

/// Returns the status of all copies on this node.
pub(super) fn status(
    shards: &Shards,
    health: HealthView<'_>,
    settings: &Settings,
) -> Vec<ReplicaStatus> {
    let held = shards.iter().filter(|replica| replica.trust.exists());
    held.map(|replica| status_of(replica, health, settings)).collect()
}

fn end_of(turn: &NodeTurn<'_>, shard: ShardId) -> Option<ShardEnd> {
    let replica = turn.shards.get(shard).filter(|replica| replica.trust.exists())?;
    let last = replica.log.last();
    Some(ShardEnd {
        shard,
        promised: replica.promised,
        last: (last.epoch, last.seq),
        applied: replica.state.applied.seq,
        unfit: replica.trust != Trust::Good && !turn.planted(Planted::UnfitPasses),
    })
}

fn status_of(replica: &Replica, health: HealthView<'_>, settings: &Settings) -> ReplicaStatus {
    let role = match replica.primary() {
        None => RoleStatus::Follower,
        Some(primary) => RoleStatus::Primary {
            epoch: primary.epoch,
            open: primary.active
                && (!primary.frozen || Planted::StatusSaysOpen.is_in(settings.planted)),
            hindered_by: health.hindered_by(replica.shard),
            records: RecordsKept {
                count: replica.state.tokens.records(),
                bytes: replica.state.tokens.bytes(),
            },
        },
    };
    ReplicaStatus {
        shard: replica.shard,
        promised: replica.promised,
        last: replica.log.last().seq,
        applied: replica.state.applied.seq,
        digest: replica.digest(),
        role,
        stopped: replica.trust.stopped().map(str::to_owned),
    }
}
