//! Conversion of the messages between coordinators, gateways and storage nodes.

use engine::ids::{Epoch, Seq, ShardId, StoreBoot, StoreId, TimeMs};
use engine::message::{
    HealthReport, NodeQuery, NodeQueryReply, RecordsKept, ReplicaHealth, ReplicaStatus, RoleStatus,
    ScrubStatus, ShardEnd,
};

use crate::Invalid;
use crate::common::{all, boot_of, each, shard_of, shards_of, store_of};
use crate::wire::{self, node_query, node_query_reply};

impl wire::NodeQuery {
    /// The request for a query, from a process of `cluster`.
    pub fn new(cluster: u128, query: NodeQuery) -> Self {
        use node_query::Kind;
        let kind = match query {
            NodeQuery::Probe { to } => Kind::Probe(to.into()),
            NodeQuery::Gather { shards } => {
                Kind::Gather(wire::Gather { shards: numbers_of(shards) })
            }
            NodeQuery::StepDown { shard, epoch } => {
                Kind::StepDown(wire::StepDown { shard: u32::from(shard.0), epoch: epoch.0 })
            }
            NodeQuery::Status => Kind::Status(wire::Empty {}),
            NodeQuery::Scrub { shards, bytes_per_s } => {
                Kind::Scrub(wire::Scrub { shards: numbers_of(shards), bytes_per_s })
            }
        };
        Self { open: Some(wire::Open::new(cluster, 0)), kind: Some(kind) }
    }
}

fn numbers_of(shards: Vec<ShardId>) -> Vec<u32> {
    shards.into_iter().map(|shard| u32::from(shard.0)).collect()
}

/// Converts a request. Its `open` is not checked here: the server accepts it first.
pub fn query_of(from: wire::NodeQuery) -> Result<NodeQuery, Invalid> {
    Ok(match from.kind.ok_or(Invalid::Missing("node_query.kind"))? {
        node_query::Kind::Probe(to) => NodeQuery::Probe { to: to.into() },
        node_query::Kind::Gather(gather) => NodeQuery::Gather { shards: shards_of(gather.shards)? },
        node_query::Kind::StepDown(step) => {
            NodeQuery::StepDown { shard: shard_of(step.shard)?, epoch: Epoch(step.epoch) }
        }
        node_query::Kind::Status(_) => NodeQuery::Status,
        node_query::Kind::Scrub(scrub) => {
            NodeQuery::Scrub { shards: shards_of(scrub.shards)?, bytes_per_s: scrub.bytes_per_s }
        }
    })
}

impl From<NodeQueryReply> for wire::NodeQueryReply {
    fn from(from: NodeQueryReply) -> Self {
        use node_query_reply::Kind;
        let kind = match from {
            NodeQueryReply::Probe { from, fsync_age_ms } => {
                Kind::Probe(wire::ProbeReply { from: Some(from.into()), fsync_age_ms })
            }
            NodeQueryReply::Gather { from, ends } => {
                Kind::Gather(wire::GatherReply { from: Some(from.into()), ends: each(ends) })
            }
            NodeQueryReply::StepDown { shard, end } => {
                let end = end
                    .map(|(epoch, seq)| wire::step_down_reply::End { epoch: epoch.0, seq: seq.0 });
                Kind::StepDown(wire::StepDownReply { shard: u32::from(shard.0), end })
            }
            NodeQueryReply::Status { from, replicas, scrub, full } => {
                let (from, scrub) = (Some(from.into()), Some(scrub.into()));
                Kind::Status(wire::StatusReply { from, replicas: each(replicas), scrub, full })
            }
            NodeQueryReply::Scrub { from } => Kind::Scrub(from.into()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::NodeQueryReply> for NodeQueryReply {
    type Error = Invalid;

    fn try_from(from: wire::NodeQueryReply) -> Result<Self, Invalid> {
        use node_query_reply::Kind;
        Ok(match from.kind.ok_or(Invalid::Missing("node_query_reply.kind"))? {
            Kind::Probe(probe) => Self::Probe {
                from: boot_of("probe.from", probe.from)?,
                fsync_age_ms: probe.fsync_age_ms,
            },
            Kind::Gather(gather) => {
                Self::Gather { from: boot_of("gather.from", gather.from)?, ends: all(gather.ends)? }
            }
            Kind::StepDown(step) => Self::StepDown {
                shard: shard_of(step.shard)?,
                end: step.end.map(|end| (Epoch(end.epoch), Seq(end.seq))),
            },
            Kind::Status(status) => Self::Status {
                from: boot_of("status.from", status.from)?,
                replicas: all(status.replicas)?,
                scrub: status.scrub.map(ScrubStatus::try_from).transpose()?.unwrap_or_default(),
                full: status.full,
            },
            Kind::Scrub(from) => Self::Scrub { from: from.into() },
        })
    }
}

impl From<ShardEnd> for wire::ShardEnd {
    fn from(from: ShardEnd) -> Self {
        Self {
            shard: u32::from(from.shard.0),
            promised: from.promised.0,
            last_epoch: from.last.0.0,
            last_seq: from.last.1.0,
            applied: from.applied.0,
            unfit: from.unfit,
        }
    }
}

impl TryFrom<wire::ShardEnd> for ShardEnd {
    type Error = Invalid;

    fn try_from(from: wire::ShardEnd) -> Result<Self, Invalid> {
        Ok(Self {
            shard: shard_of(from.shard)?,
            promised: Epoch(from.promised),
            last: (Epoch(from.last_epoch), Seq(from.last_seq)),
            applied: Seq(from.applied),
            unfit: from.unfit,
        })
    }
}

impl From<(StoreId, ReplicaHealth)> for wire::Hindrance {
    fn from((store, health): (StoreId, ReplicaHealth)) -> Self {
        let health = match health {
            ReplicaHealth::Good => wire::ReplicaHealth::Unspecified,
            ReplicaHealth::Silent => wire::ReplicaHealth::Silent,
            ReplicaHealth::Full => wire::ReplicaHealth::Full,
            ReplicaHealth::NoCopy => wire::ReplicaHealth::NoCopy,
            ReplicaHealth::Lost => wire::ReplicaHealth::Lost,
            ReplicaHealth::Filling => wire::ReplicaHealth::Filling,
            ReplicaHealth::Behind => wire::ReplicaHealth::Behind,
        };
        Self { store: Some(store.into()), health: health.into() }
    }
}

impl TryFrom<wire::Hindrance> for (StoreId, ReplicaHealth) {
    type Error = Invalid;

    fn try_from(from: wire::Hindrance) -> Result<Self, Invalid> {
        let store = from.store.map(store_of).ok_or(Invalid::Missing("hindrance.store"))?;
        let health = match from.health() {
            wire::ReplicaHealth::Unspecified => ReplicaHealth::Good,
            wire::ReplicaHealth::Silent => ReplicaHealth::Silent,
            wire::ReplicaHealth::Full => ReplicaHealth::Full,
            wire::ReplicaHealth::NoCopy => ReplicaHealth::NoCopy,
            wire::ReplicaHealth::Lost => ReplicaHealth::Lost,
            wire::ReplicaHealth::Filling => ReplicaHealth::Filling,
            wire::ReplicaHealth::Behind => ReplicaHealth::Behind,
        };
        Ok((store, health))
    }
}

impl From<ReplicaStatus> for wire::ReplicaStatus {
    fn from(from: ReplicaStatus) -> Self {
        let primary = match from.role {
            RoleStatus::Follower => None,
            RoleStatus::Primary { epoch, open, hindered_by, records } => {
                Some(wire::PrimaryStatus {
                    epoch: epoch.0,
                    open,
                    hindered_by: each(hindered_by),
                    records: records.count,
                    record_bytes: records.bytes,
                })
            }
        };
        Self {
            shard: u32::from(from.shard.0),
            promised: from.promised.0,
            last: from.last.0,
            applied: from.applied.0,
            digest: Some(from.digest.into()),
            primary,
            stopped: from.stopped,
        }
    }
}

impl TryFrom<wire::ReplicaStatus> for ReplicaStatus {
    type Error = Invalid;

    fn try_from(from: wire::ReplicaStatus) -> Result<Self, Invalid> {
        Ok(Self {
            shard: shard_of(from.shard)?,
            promised: Epoch(from.promised),
            last: Seq(from.last),
            applied: Seq(from.applied),
            digest: from.digest.ok_or(Invalid::Missing("status.digest"))?.try_into()?,
            role: match from.primary {
                None => RoleStatus::Follower,
                Some(primary) => RoleStatus::Primary {
                    epoch: Epoch(primary.epoch),
                    open: primary.open,
                    hindered_by: all(primary.hindered_by)?,
                    records: RecordsKept { count: primary.records, bytes: primary.record_bytes },
                },
            },
            stopped: from.stopped,
        })
    }
}

impl From<ScrubStatus> for wire::ScrubStatus {
    fn from(from: ScrubStatus) -> Self {
        Self {
            running: from.running,
            ended_ms: from.ended.0,
            shards: from.shards,
            damaged: numbers_of(from.damaged),
        }
    }
}

impl TryFrom<wire::ScrubStatus> for ScrubStatus {
    type Error = Invalid;

    fn try_from(from: wire::ScrubStatus) -> Result<Self, Invalid> {
        Ok(Self {
            running: from.running,
            ended: TimeMs(from.ended_ms),
            shards: from.shards,
            damaged: shards_of(from.damaged)?,
        })
    }
}

impl wire::NodeReport {
    /// The request for a report. `from` is `None` for reports of a gateway.
    pub fn new(cluster: u128, from: Option<StoreBoot>, report: HealthReport) -> Self {
        let frozen = |(shard, hindered_by): (ShardId, _)| wire::FrozenShard {
            shard: u32::from(shard.0),
            hindered_by: each(hindered_by),
        };
        Self {
            open: Some(wire::Open::new(cluster, 0)),
            from: from.map(wire::StoreBoot::from),
            silent: each(report.silent),
            frozen: report.frozen.into_iter().map(frozen).collect(),
            resigned: numbers_of(report.resigned),
            leaving: report.leaving,
            full: report.full,
        }
    }
}

impl TryFrom<wire::NodeReport> for HealthReport {
    type Error = Invalid;

    fn try_from(from: wire::NodeReport) -> Result<Self, Invalid> {
        let frozen =
            |frozen: wire::FrozenShard| Ok((shard_of(frozen.shard)?, all(frozen.hindered_by)?));
        Ok(Self {
            silent: from.silent.into_iter().map(store_of).collect(),
            frozen: from.frozen.into_iter().map(frozen).collect::<Result<_, Invalid>>()?,
            resigned: shards_of(from.resigned)?,
            leaving: from.leaving,
            full: from.full,
        })
    }
}
