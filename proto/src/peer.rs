//! Conversion of the messages between storage nodes.

use bytes::Bytes;
use engine::codec::Reader;
use engine::entry::Entry;
use engine::ids::{CopyNo, Epoch, Seq, ShardId, TimeMs};
use engine::message::{FromFollower, Reject, Slice, SnapshotOutcome, ToFollower};

use crate::Invalid;
use crate::common::{all, boot_of, each, position_of, shard_of, shards_of, slots_of};
use crate::wire::{self, from_follower, reject, snapshot_outcome, to_follower};

impl From<ToFollower> for wire::ToFollower {
    fn from(from: ToFollower) -> Self {
        use to_follower::Kind;
        let kind = match from {
            ToFollower::Hello { from, to } => {
                Kind::Hello(wire::Hello { from: Some(from.into()), to: Some(to.into()) })
            }
            ToFollower::Append { n, slices } => {
                Kind::Append(wire::Append { n, slices: each(slices) })
            }
            ToFollower::Heartbeat { sent, commits } => {
                Kind::Heartbeat(wire::Heartbeat { sent, commits: each(commits) })
            }
            ToFollower::ReadIndex { round, shards } => {
                Kind::ReadIndex(wire::ReadIndexRequest { round, shards: each(shards) })
            }
            ToFollower::Proof { request, proven, refused } => Kind::Proof(wire::Proof {
                request,
                proven: each(proven),
                refused: refused.into_iter().map(|shard| u32::from(shard.0)).collect(),
            }),
            ToFollower::Snapshot { transfer, shard, epoch, copy, bytes } => {
                Kind::Snapshot(wire::SnapshotNotice {
                    transfer,
                    shard: u32::from(shard.0),
                    epoch: epoch.0,
                    copy: copy.0,
                    bytes,
                })
            }
            ToFollower::Damaged { epoch, copy, point } => Kind::Damaged(wire::Damaged {
                epoch: epoch.0,
                copy: copy.0,
                point: Some(point.into()),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::ToFollower> for ToFollower {
    type Error = Invalid;

    fn try_from(from: wire::ToFollower) -> Result<Self, Invalid> {
        use to_follower::Kind;
        Ok(match from.kind.ok_or(Invalid::Missing("to_follower.kind"))? {
            Kind::Open(_) => return Err(Invalid::Open),
            Kind::Hello(hello) => Self::Hello {
                from: boot_of("hello.from", hello.from)?,
                to: boot_of("hello.to", hello.to)?,
            },
            Kind::Append(append) => Self::Append { n: append.n, slices: all(append.slices)? },
            Kind::Heartbeat(beat) => {
                Self::Heartbeat { sent: beat.sent, commits: all(beat.commits)? }
            }
            Kind::ReadIndex(request) => {
                Self::ReadIndex { round: request.round, shards: all(request.shards)? }
            }
            Kind::Proof(proof) => Self::Proof {
                request: proof.request,
                proven: all(proof.proven)?,
                refused: shards_of(proof.refused)?,
            },
            Kind::Snapshot(notice) => Self::Snapshot {
                transfer: notice.transfer,
                shard: shard_of(notice.shard)?,
                epoch: Epoch(notice.epoch),
                copy: CopyNo(notice.copy),
                bytes: notice.bytes,
            },
            Kind::Damaged(damaged) => Self::Damaged {
                epoch: Epoch(damaged.epoch),
                copy: CopyNo(damaged.copy),
                point: damaged.point.ok_or(Invalid::Missing("damaged.point"))?.try_into()?,
            },
        })
    }
}

impl From<Slice> for wire::Slice {
    fn from(from: Slice) -> Self {
        let mut entries = Vec::with_capacity(from.entries.iter().map(|e| e.size() + 65).sum());
        for entry in &from.entries {
            entry.encode(&mut entries);
        }
        Self {
            shard: u32::from(from.shard.0),
            slots: Some(from.slots.into()),
            epoch: from.epoch.0,
            copy: from.copy.0,
            prev: Some(from.prev.into()),
            commit: from.commit.0,
            resume: from.resume,
            entries: entries.into(),
        }
    }
}

impl TryFrom<wire::Slice> for Slice {
    type Error = Invalid;

    fn try_from(from: wire::Slice) -> Result<Self, Invalid> {
        Ok(Self {
            shard: shard_of(from.shard)?,
            slots: slots_of(from.slots)?,
            epoch: Epoch(from.epoch),
            copy: CopyNo(from.copy),
            prev: position_of("slice.prev", from.prev)?,
            commit: Seq(from.commit),
            resume: from.resume,
            entries: entries_in(from.entries)?,
        })
    }
}

fn entries_in(bytes: Bytes) -> Result<Vec<Entry>, Invalid> {
    let mut from = Reader::new(bytes);
    let mut entries = Vec::new();
    while !from.is_empty() {
        entries.push(Entry::decode(&mut from).map_err(Invalid::entry)?);
    }
    Ok(entries)
}

impl From<(ShardId, Epoch, Seq)> for wire::Commit {
    fn from((shard, epoch, seq): (ShardId, Epoch, Seq)) -> Self {
        Self { shard: u32::from(shard.0), epoch: epoch.0, seq: seq.0 }
    }
}

impl TryFrom<wire::Commit> for (ShardId, Epoch, Seq) {
    type Error = Invalid;

    fn try_from(from: wire::Commit) -> Result<Self, Invalid> {
        Ok((shard_of(from.shard)?, Epoch(from.epoch), Seq(from.seq)))
    }
}

impl From<(ShardId, CopyNo)> for wire::ShardCopy {
    fn from((shard, copy): (ShardId, CopyNo)) -> Self {
        Self { shard: u32::from(shard.0), copy: copy.0 }
    }
}

impl TryFrom<wire::ShardCopy> for (ShardId, CopyNo) {
    type Error = Invalid;

    fn try_from(from: wire::ShardCopy) -> Result<Self, Invalid> {
        Ok((shard_of(from.shard)?, CopyNo(from.copy)))
    }
}

impl From<FromFollower> for wire::FromFollower {
    fn from(from: FromFollower) -> Self {
        use from_follower::Kind;
        let kind = match from {
            FromFollower::Welcome { from, copies } => {
                Kind::Welcome(wire::Welcome { from: Some(from.into()), copies: each(copies) })
            }
            FromFollower::Copy { shard, copy } => Kind::Copy((shard, copy).into()),
            FromFollower::Ack { n } => Kind::Ack(wire::Ack { n }),
            FromFollower::Reject { n, shard, reason } => Kind::Reject(wire::Reject {
                n,
                shard: u32::from(shard.0),
                reason: Some(reason.into()),
            }),
            FromFollower::Alive { sent, fsync_age_ms, full, room_bytes, wall, digests } => {
                let (digests, wall_ms) = (each(digests), wall.0);
                Kind::Alive(wire::Alive { sent, fsync_age_ms, full, room_bytes, digests, wall_ms })
            }
            FromFollower::ReadIndex { round, newer } => {
                Kind::ReadIndex(wire::ReadIndexReply { round, newer: each(newer) })
            }
            FromFollower::ProofRequest { request, shards } => {
                Kind::ProofRequest(wire::ProofRequest {
                    request,
                    shards: shards.into_iter().map(|shard| u32::from(shard.0)).collect(),
                })
            }
            FromFollower::Snapshot { transfer, shard, outcome } => {
                Kind::Snapshot(wire::SnapshotOutcome {
                    transfer,
                    shard: u32::from(shard.0),
                    outcome: Some(outcome.into()),
                })
            }
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::FromFollower> for FromFollower {
    type Error = Invalid;

    fn try_from(from: wire::FromFollower) -> Result<Self, Invalid> {
        use from_follower::Kind;
        Ok(match from.kind.ok_or(Invalid::Missing("from_follower.kind"))? {
            Kind::Welcome(welcome) => Self::Welcome {
                from: boot_of("welcome.from", welcome.from)?,
                copies: all(welcome.copies)?,
            },
            Kind::Copy(copy) => {
                let (shard, copy) = copy.try_into()?;
                Self::Copy { shard, copy }
            }
            Kind::Ack(ack) => Self::Ack { n: ack.n },
            Kind::Reject(reject) => Self::Reject {
                n: reject.n,
                shard: shard_of(reject.shard)?,
                reason: reject.reason.ok_or(Invalid::Missing("reject.reason"))?.try_into()?,
            },
            Kind::Alive(alive) => Self::Alive {
                sent: alive.sent,
                fsync_age_ms: alive.fsync_age_ms,
                full: alive.full,
                wall: TimeMs(alive.wall_ms),
                room_bytes: alive.room_bytes,
                digests: all(alive.digests)?,
            },
            Kind::ReadIndex(reply) => {
                Self::ReadIndex { round: reply.round, newer: all(reply.newer)? }
            }
            Kind::ProofRequest(proof) => {
                Self::ProofRequest { request: proof.request, shards: shards_of(proof.shards)? }
            }
            Kind::Snapshot(report) => Self::Snapshot {
                transfer: report.transfer,
                shard: shard_of(report.shard)?,
                outcome: report.outcome.ok_or(Invalid::Missing("snapshot.outcome"))?.into(),
            },
        })
    }
}

impl From<SnapshotOutcome> for snapshot_outcome::Outcome {
    fn from(from: SnapshotOutcome) -> Self {
        let empty = wire::Empty {};
        match from {
            SnapshotOutcome::Accepted => Self::Accepted(empty),
            SnapshotOutcome::NoSpace => Self::NoSpace(empty),
            SnapshotOutcome::Installed => Self::Installed(empty),
            SnapshotOutcome::NotInstalled => Self::NotInstalled(empty),
        }
    }
}

impl From<snapshot_outcome::Outcome> for SnapshotOutcome {
    fn from(from: snapshot_outcome::Outcome) -> Self {
        use snapshot_outcome::Outcome;
        match from {
            Outcome::Accepted(_) => Self::Accepted,
            Outcome::NoSpace(_) => Self::NoSpace,
            Outcome::Installed(_) => Self::Installed,
            Outcome::NotInstalled(_) => Self::NotInstalled,
        }
    }
}

impl From<Reject> for reject::Reason {
    fn from(from: Reject) -> Self {
        match from {
            Reject::StaleEpoch { promised } => Self::StaleEpoch(promised.0),
            Reject::Mismatch { ends, applied } => Self::Mismatch(wire::Mismatch {
                ends: ends.into_iter().map(Into::into).collect(),
                applied: Some(applied.into()),
            }),
            Reject::WrongCopy { copy } => Self::WrongCopy(copy.0),
            Reject::Stopped => Self::Stopped(wire::Empty {}),
            Reject::NoSpace => Self::NoSpace(wire::Empty {}),
        }
    }
}

impl TryFrom<reject::Reason> for Reject {
    type Error = Invalid;

    fn try_from(from: reject::Reason) -> Result<Self, Invalid> {
        Ok(match from {
            reject::Reason::StaleEpoch(promised) => Self::StaleEpoch { promised: Epoch(promised) },
            reject::Reason::Mismatch(mismatch) => Self::Mismatch {
                ends: mismatch.ends.into_iter().map(Into::into).collect(),
                applied: position_of("mismatch.applied", mismatch.applied)?,
            },
            reject::Reason::WrongCopy(copy) => Self::WrongCopy { copy: CopyNo(copy) },
            reject::Reason::Stopped(_) => Self::Stopped,
            reject::Reason::NoSpace(_) => Self::NoSpace,
        })
    }
}
