//! Conversion of the messages between coordinators, gateways and storage nodes.

use bytes::Bytes;
use engine::codec::Reader;
use engine::etcd_memory::EtcdMemory;
use engine::ids::{Epoch, Seq, StoreBoot, StoreId, TimeMs};
use engine::message::{
    CopyEnd, HealthReport, NodeQuery, NodeQueryReply, RecordsKept, ReplicaHealth, ReplicaStatus,
    RoleStatus, ScrubStatus, ShardEnd, ShardKnowledge, StoreKnowledge,
};
use engine::shard_record::ShardRecord;

use crate::Invalid;
use crate::common::{WireField, from_wire, into_wire, message_of_kind, oneof};
use crate::wire::{self, node_query, node_query_reply};

impl wire::NodeQuery {
    /// The request for a query, from a process of `cluster`.
    pub fn new(cluster: u128, query: NodeQuery) -> Self {
        Self { open: Some(wire::Open::new(cluster, 0)), kind: query.into_wire() }
    }
}

/// Converts a request. Its `open` is not checked here: the server accepts it first.
pub fn query_of(from: wire::NodeQuery) -> Result<NodeQuery, Invalid> {
    WireField::from_wire("node_query.kind", from.kind)
}

oneof! {
    NodeQuery = node_query::Kind;
    message Gather(gather: wire::Gather) { shards };
    message StepDown(step: wire::StepDown) { shard, epoch };
    message Scrub(scrub: wire::Scrub) { shards, bytes_per_s };
    message Recover(recover: wire::Recover) { promise };
    empty Status;
    into_wire {
        Self::Probe { to } => Kind::Probe(to.into()),
        Self::Split { shard, epoch, at } => {
            let at = u32::from(at);
            Kind::Split(into_wire!(wire::Split { shard, epoch, at }))
        }
    }
    from_wire {
        Kind::Probe(to) => Self::Probe { to: to.into() },
        Kind::Split(split) => from_wire!(split => Self::Split {
            shard,
            epoch,
            at: u16::try_from(split.at).map_err(|_| Invalid::Range("split.at"))?,
        }),
    }
}

message_of_kind!(NodeQueryReply = wire::NodeQueryReply, "node_query_reply.kind");

oneof! {
    NodeQueryReply = node_query_reply::Kind;
    message Probe(probe: wire::ProbeReply) { from, fsync_age_ms };
    message Gather(gather: wire::GatherReply) { from, ends };
    into_wire {
        Self::StepDown { shard, end } => {
            let end = end.map(WireField::into_wire);
            Kind::StepDown(wire::StepDownReply { shard: shard.into_wire(), end })
        }
        Self::Status { from, replicas, scrub, full } => {
            Kind::Status(into_wire!(wire::StatusReply { from, replicas, scrub, full }))
        }
        Self::Scrub { from } => Kind::Scrub(from.into()),
        Self::Recover(knowledge) => Kind::Recover((*knowledge).into_wire()),
        Self::Split { shard, outcome } => {
            let refused = outcome.err();
            Kind::Split(wire::SplitReply { shard: shard.into_wire(), refused })
        }
    }
    from_wire {
        Kind::StepDown(step) => from_wire!(step => Self::StepDown {
            shard,
            end: step.end.map(|end| WireField::from_wire("step.end", end)).transpose()?,
        }),
        Kind::Status(status) => from_wire!(status => Self::Status {
            from,
            replicas,
            scrub: WireField::from_wire("status.scrub", status.scrub.unwrap_or_default())?,
            full,
        }),
        Kind::Scrub(from) => Self::Scrub { from: from.into() },
        Kind::Split(split) => from_wire!(split => Self::Split {
            shard,
            outcome: split.refused.map_or(Ok(()), Err),
        }),
        Kind::Recover(knowledge) => {
            Self::Recover(Box::new(WireField::from_wire("recover", knowledge)?))
        }
    }
}

impl WireField<wire::StoreKnowledge> for StoreKnowledge {
    fn into_wire(self) -> wire::StoreKnowledge {
        let Self { from, etcd: memory, durable, damaged, shards } = self;
        let mut etcd = Vec::new();
        if let Some(memory) = memory {
            memory.encode(&mut etcd);
        }
        let etcd = Bytes::from(etcd);
        into_wire!(wire::StoreKnowledge { from, etcd, durable, damaged, shards })
    }

    fn from_wire(_: &'static str, knowledge: wire::StoreKnowledge) -> Result<Self, Invalid> {
        let decode = |bytes: Bytes| {
            let mut from = Reader::new(bytes);
            let memory = EtcdMemory::decode(&mut from)?;
            from.finish("etcd memory").map(|()| Box::new(memory))
        };
        let etcd = Some(knowledge.etcd.clone()).filter(|bytes| !bytes.is_empty()).map(decode);
        let invalid = |why| Invalid::Malformed { field: "knowledge.etcd", why };
        Ok(from_wire!(knowledge => Self {
            from,
            etcd: etcd.transpose().map_err(invalid)?,
            durable,
            damaged,
            shards,
        }))
    }
}

impl WireField<wire::ShardKnowledge> for ShardKnowledge {
    fn into_wire(self) -> wire::ShardKnowledge {
        let Self { shard, promised, record, copy } = self;
        let record = record.map_or(Bytes::new(), |record| record.encode().into());
        wire::ShardKnowledge {
            shard: shard.into_wire(),
            promised: promised.into_wire(),
            record,
            copy: copy.map(WireField::into_wire),
        }
    }

    fn from_wire(_: &'static str, known: wire::ShardKnowledge) -> Result<Self, Invalid> {
        let record = Some(&known.record).filter(|bytes| !bytes.is_empty());
        let record = record.map(|bytes| ShardRecord::decode(bytes)).transpose();
        let invalid = |why| Invalid::Malformed { field: "knowledge.record", why };
        let record = record.map_err(invalid)?;
        let copy = known.copy.map(|copy| WireField::from_wire("knowledge.copy", copy));
        let copy = copy.transpose()?;
        Ok(from_wire!(known => Self { shard, promised, record: record, copy: copy }))
    }
}

impl WireField<wire::CopyEnd> for CopyEnd {
    fn into_wire(self) -> wire::CopyEnd {
        let Self { last: (last_epoch, last_seq), unfit, damaged } = self;
        into_wire!(wire::CopyEnd { last_epoch, last_seq, unfit, damaged })
    }

    fn from_wire(_: &'static str, end: wire::CopyEnd) -> Result<Self, Invalid> {
        let last = (Epoch(end.last_epoch), Seq(end.last_seq));
        Ok(from_wire!(end => Self { last: last, unfit, damaged }))
    }
}

impl WireField<wire::ShardEnd> for ShardEnd {
    fn into_wire(self) -> wire::ShardEnd {
        let Self { shard, promised, last: (last_epoch, last_seq), applied, unfit } = self;
        into_wire!(wire::ShardEnd { shard, promised, last_epoch, last_seq, applied, unfit })
    }

    fn from_wire(_: &'static str, end: wire::ShardEnd) -> Result<Self, Invalid> {
        let last = (Epoch(end.last_epoch), Seq(end.last_seq));
        Ok(from_wire!(end => Self { shard, promised, last: last, applied, unfit }))
    }
}

impl WireField<wire::Hindrance> for (StoreId, ReplicaHealth) {
    fn into_wire(self) -> wire::Hindrance {
        let (store, health) = self;
        let health = match health {
            ReplicaHealth::Good => wire::ReplicaHealth::Unspecified,
            ReplicaHealth::Silent => wire::ReplicaHealth::Silent,
            ReplicaHealth::Full => wire::ReplicaHealth::Full,
            ReplicaHealth::NoCopy => wire::ReplicaHealth::NoCopy,
            ReplicaHealth::Lost => wire::ReplicaHealth::Lost,
            ReplicaHealth::Filling => wire::ReplicaHealth::Filling,
            ReplicaHealth::Behind => wire::ReplicaHealth::Behind,
        };
        wire::Hindrance { store: store.into_wire(), health: health.into() }
    }

    fn from_wire(_: &'static str, from: wire::Hindrance) -> Result<Self, Invalid> {
        let health = match from.health() {
            wire::ReplicaHealth::Unspecified => ReplicaHealth::Good,
            wire::ReplicaHealth::Silent => ReplicaHealth::Silent,
            wire::ReplicaHealth::Full => ReplicaHealth::Full,
            wire::ReplicaHealth::NoCopy => ReplicaHealth::NoCopy,
            wire::ReplicaHealth::Lost => ReplicaHealth::Lost,
            wire::ReplicaHealth::Filling => ReplicaHealth::Filling,
            wire::ReplicaHealth::Behind => ReplicaHealth::Behind,
        };
        Ok((WireField::from_wire("hindrance.store", from.store)?, health))
    }
}

impl WireField<wire::ReplicaStatus> for ReplicaStatus {
    fn into_wire(self) -> wire::ReplicaStatus {
        let primary = match self.role {
            RoleStatus::Follower => None,
            RoleStatus::Primary { epoch, open, hindered_by, records: kept } => {
                let RecordsKept { count: records, bytes: record_bytes } = kept;
                Some(into_wire!(wire::PrimaryStatus {
                    epoch,
                    open,
                    hindered_by,
                    records,
                    record_bytes
                }))
            }
        };
        wire::ReplicaStatus {
            shard: self.shard.into_wire(),
            promised: self.promised.0,
            last: self.last.0,
            applied: self.applied.0,
            digest: self.digest.into_wire(),
            primary,
            stopped: self.stopped,
        }
    }

    fn from_wire(_: &'static str, status: wire::ReplicaStatus) -> Result<Self, Invalid> {
        Ok(from_wire!(status => Self {
            shard,
            promised,
            last,
            applied,
            digest,
            role: match status.primary {
                None => RoleStatus::Follower,
                Some(primary) => from_wire!(primary => RoleStatus::Primary {
                    epoch,
                    open,
                    hindered_by,
                    records: RecordsKept { count: primary.records, bytes: primary.record_bytes },
                }),
            },
            stopped: status.stopped,
        }))
    }
}

impl WireField<wire::ScrubStatus> for ScrubStatus {
    fn into_wire(self) -> wire::ScrubStatus {
        let Self { running, ended: ended_ms, shards, damaged } = self;
        into_wire!(wire::ScrubStatus { running, ended_ms, shards, damaged })
    }

    fn from_wire(_: &'static str, scrub: wire::ScrubStatus) -> Result<Self, Invalid> {
        Ok(from_wire!(scrub => Self { running, ended: TimeMs(scrub.ended_ms), shards, damaged }))
    }
}

impl wire::NodeReport {
    /// The request for a report. `from` is `None` for reports of a gateway.
    pub fn new(cluster: u128, from: Option<StoreBoot>, report: HealthReport) -> Self {
        let HealthReport { silent, frozen, resigned, leaving, full } = report;
        Self {
            open: Some(wire::Open::new(cluster, 0)),
            from: from.map(wire::StoreBoot::from),
            silent: silent.into_wire(),
            frozen: frozen.into_wire(),
            resigned: resigned.into_wire(),
            leaving,
            full,
        }
    }
}

impl TryFrom<wire::NodeReport> for HealthReport {
    type Error = Invalid;

    fn try_from(report: wire::NodeReport) -> Result<Self, Invalid> {
        Ok(from_wire!(report => Self { silent, frozen, resigned, leaving, full }))
    }
}
