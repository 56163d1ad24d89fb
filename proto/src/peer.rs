//! Conversion of the messages between storage nodes.

use bytes::Bytes;
use engine::codec::Reader;
use engine::entry::Entry;
use engine::ids::{CopyNo, Epoch, TimeMs};
use engine::message::{FromFollower, Reject, Slice, SnapshotOutcome, ToFollower};

use crate::Invalid;
use crate::common::{WireField, from_wire, into_wire};
use crate::wire::{self, from_follower, reject, snapshot_outcome, to_follower};

impl From<ToFollower> for wire::ToFollower {
    fn from(from: ToFollower) -> Self {
        use to_follower::Kind;
        let kind = match from {
            ToFollower::Hello { from, to } => Kind::Hello(into_wire!(wire::Hello { from, to })),
            ToFollower::Append { n, slices } => {
                Kind::Append(into_wire!(wire::Append { n, slices }))
            }
            ToFollower::Heartbeat { sent, commits } => {
                Kind::Heartbeat(into_wire!(wire::Heartbeat { sent, commits }))
            }
            ToFollower::ReadIndex { round, shards } => {
                Kind::ReadIndex(into_wire!(wire::ReadIndexRequest { round, shards }))
            }
            ToFollower::Proof { request, proven, refused } => {
                Kind::Proof(into_wire!(wire::Proof { request, proven, refused }))
            }
            ToFollower::Snapshot { transfer, shard, epoch, copy, bytes } => {
                let notice =
                    into_wire!(wire::SnapshotNotice { transfer, shard, epoch, copy, bytes });
                Kind::Snapshot(notice)
            }
            ToFollower::Damaged { epoch, copy, point } => {
                Kind::Damaged(into_wire!(wire::Damaged { epoch, copy, point }))
            }
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
            Kind::Hello(hello) => from_wire!(hello => Self::Hello { from, to }),
            Kind::Append(append) => from_wire!(append => Self::Append { n, slices }),
            Kind::Heartbeat(beat) => from_wire!(beat => Self::Heartbeat { sent, commits }),
            Kind::ReadIndex(request) => from_wire!(request => Self::ReadIndex { round, shards }),
            Kind::Proof(proof) => from_wire!(proof => Self::Proof { request, proven, refused }),
            Kind::Snapshot(notice) => {
                from_wire!(notice => Self::Snapshot { transfer, shard, epoch, copy, bytes })
            }
            Kind::Damaged(damaged) => from_wire!(damaged => Self::Damaged { epoch, copy, point }),
        })
    }
}

impl WireField<wire::Slice> for Slice {
    fn into_wire(self) -> wire::Slice {
        let Self { shard, slots, epoch, copy, prev, commit, resume, entries } = self;
        let entries = entries_out(&entries);
        into_wire!(wire::Slice { shard, slots, epoch, copy, prev, commit, resume, entries })
    }

    fn from_wire(_: &'static str, slice: wire::Slice) -> Result<Self, Invalid> {
        Ok(from_wire!(slice => Self {
            shard,
            slots: WireField::from_wire("slots", slice.slots)?,
            epoch,
            copy,
            prev,
            commit,
            resume,
            entries: entries_in(slice.entries)?,
        }))
    }
}

fn entries_out(entries: &[Entry]) -> Bytes {
    let mut out = Vec::with_capacity(entries.iter().map(|entry| entry.size() + 65).sum());
    for entry in entries {
        entry.encode(&mut out);
    }
    out.into()
}

fn entries_in(bytes: Bytes) -> Result<Vec<Entry>, Invalid> {
    let mut from = Reader::new(bytes);
    let mut entries = Vec::new();
    while !from.is_empty() {
        entries.push(Entry::decode(&mut from).map_err(Invalid::entry)?);
    }
    Ok(entries)
}

impl From<FromFollower> for wire::FromFollower {
    fn from(from: FromFollower) -> Self {
        use from_follower::Kind;
        let kind = match from {
            FromFollower::Welcome { from, copies } => {
                Kind::Welcome(into_wire!(wire::Welcome { from, copies }))
            }
            FromFollower::Copy { shard, copy } => {
                Kind::Copy(into_wire!(wire::ShardCopy { shard, copy }))
            }
            FromFollower::Ack { n } => Kind::Ack(wire::Ack { n }),
            FromFollower::Reject { n, shard, reason } => {
                Kind::Reject(into_wire!(wire::Reject { n, shard, reason }))
            }
            FromFollower::Alive { sent, fsync_age_ms, full, room_bytes, wall, digests } => {
                let (digests, wall_ms) = (digests.into_wire(), wall.0);
                Kind::Alive(wire::Alive { sent, fsync_age_ms, full, room_bytes, digests, wall_ms })
            }
            FromFollower::ReadIndex { round, newer } => {
                Kind::ReadIndex(into_wire!(wire::ReadIndexReply { round, newer }))
            }
            FromFollower::ProofRequest { request, shards } => {
                Kind::ProofRequest(into_wire!(wire::ProofRequest { request, shards }))
            }
            FromFollower::Snapshot { transfer, shard, outcome } => {
                Kind::Snapshot(into_wire!(wire::SnapshotOutcome { transfer, shard, outcome }))
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
            Kind::Welcome(welcome) => from_wire!(welcome => Self::Welcome { from, copies }),
            Kind::Copy(copied) => from_wire!(copied => Self::Copy { shard, copy }),
            Kind::Ack(ack) => Self::Ack { n: ack.n },
            Kind::Reject(reject) => from_wire!(reject => Self::Reject { n, shard, reason }),
            Kind::Alive(alive) => from_wire!(alive => Self::Alive {
                sent, fsync_age_ms, full, wall: TimeMs(alive.wall_ms), room_bytes, digests
            }),
            Kind::ReadIndex(reply) => from_wire!(reply => Self::ReadIndex { round, newer }),
            Kind::ProofRequest(proof) => {
                from_wire!(proof => Self::ProofRequest { request, shards })
            }
            Kind::Snapshot(snapshot) => {
                from_wire!(snapshot => Self::Snapshot { transfer, shard, outcome })
            }
        })
    }
}

impl WireField<snapshot_outcome::Outcome> for SnapshotOutcome {
    fn into_wire(self) -> snapshot_outcome::Outcome {
        use snapshot_outcome::Outcome;
        let empty = wire::Empty {};
        match self {
            Self::Accepted => Outcome::Accepted(empty),
            Self::NoSpace => Outcome::NoSpace(empty),
            Self::Installed => Outcome::Installed(empty),
            Self::NotInstalled => Outcome::NotInstalled(empty),
        }
    }

    fn from_wire(_: &'static str, from: snapshot_outcome::Outcome) -> Result<Self, Invalid> {
        use snapshot_outcome::Outcome;
        Ok(match from {
            Outcome::Accepted(_) => Self::Accepted,
            Outcome::NoSpace(_) => Self::NoSpace,
            Outcome::Installed(_) => Self::Installed,
            Outcome::NotInstalled(_) => Self::NotInstalled,
        })
    }
}

impl WireField<reject::Reason> for Reject {
    fn into_wire(self) -> reject::Reason {
        use reject::Reason;
        match self {
            Self::StaleEpoch { promised } => Reason::StaleEpoch(promised.0),
            Self::Mismatch { ends, applied } => {
                Reason::Mismatch(into_wire!(wire::Mismatch { ends, applied }))
            }
            Self::WrongCopy { copy } => Reason::WrongCopy(copy.0),
            Self::Stopped => Reason::Stopped(wire::Empty {}),
            Self::NoSpace => Reason::NoSpace(wire::Empty {}),
        }
    }

    fn from_wire(_: &'static str, from: reject::Reason) -> Result<Self, Invalid> {
        use reject::Reason;
        Ok(match from {
            Reason::StaleEpoch(promised) => Self::StaleEpoch { promised: Epoch(promised) },
            Reason::Mismatch(mismatch) => from_wire!(mismatch => Self::Mismatch { ends, applied }),
            Reason::WrongCopy(copy) => Self::WrongCopy { copy: CopyNo(copy) },
            Reason::Stopped(_) => Self::Stopped,
            Reason::NoSpace(_) => Self::NoSpace,
        })
    }
}
