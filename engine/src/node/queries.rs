//! Answers to queries of the coordinator and of operators.

use crate::ids::ShardId;
use crate::message::{NodeQuery, NodeQueryReply, RecordsKept, ReplicaStatus, RoleStatus, ShardEnd};
use crate::node::{Effect, Node};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::trust::Trust;

impl Node {
    pub(super) fn on_query(&mut self, query: u64, message: NodeQuery, effects: &mut Vec<Effect>) {
        let reply = match message {
            NodeQuery::Probe { to: _ } => NodeQueryReply::Probe {
                from: self.me,
                fsync_age_ms: self.groups.fsync_age_ms(self.now),
            },
            NodeQuery::Gather { shards } => NodeQueryReply::Gather {
                from: self.me,
                ends: shards.into_iter().filter_map(|shard| self.end_of(shard)).collect(),
            },
            NodeQuery::StepDown { shard, epoch } => {
                let until = self.now.plus_ms(self.settings.timing.step_down_ms);
                let replica = self.replicas.get_mut(&shard);
                let end = replica.and_then(|replica| {
                    let last = replica.log.last();
                    let primary = replica.primary_mut().filter(|p| p.epoch == epoch)?;
                    primary.stepping_down = Some(until);
                    Some((last.epoch, last.seq))
                });
                NodeQueryReply::StepDown { shard, end }
            }
            NodeQuery::Scrub { shards, bytes_per_s } => {
                self.request_scrub(shards, bytes_per_s);
                self.scrub_if_due(effects);
                NodeQueryReply::Scrub { from: self.me }
            }
            NodeQuery::Status => NodeQueryReply::Status {
                from: self.me,
                scrub: self.scrub_status(),
                replicas: self.status(),
                full: self.disk_full,
            },
        };
        effects.push(Effect::QueryReply { query, reply });
    }

    /// Returns the status of all copies on this node.
    pub fn status(&self) -> Vec<ReplicaStatus> {
        let held = self.replicas.values().filter(|replica| replica.trust.exists());
        held.map(|replica| self.status_of(replica)).collect()
    }

    fn end_of(&self, shard: ShardId) -> Option<ShardEnd> {
        let replica = self.replicas.get(&shard).filter(|replica| replica.trust.exists())?;
        let last = replica.log.last();
        Some(ShardEnd {
            shard,
            promised: replica.promised,
            last: (last.epoch, last.seq),
            applied: replica.state.applied.seq,
            unfit: replica.trust != Trust::Good
                && !Planted::UnfitPasses.is_in(self.settings.planted),
        })
    }

    fn status_of(&self, replica: &Replica) -> ReplicaStatus {
        let role = match replica.primary() {
            None => RoleStatus::Follower,
            Some(primary) => RoleStatus::Primary {
                epoch: primary.epoch,
                open: primary.active
                    && (!primary.frozen || Planted::StatusSaysOpen.is_in(self.settings.planted)),
                hindered_by: self.hindered_by(replica.shard),
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
}
