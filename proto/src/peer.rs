//! Conversion of the messages between storage nodes.

use bytes::Bytes;
use engine::codec::Reader;
use engine::entry::Entry;
use engine::ids::{CopyNo, Epoch, TimeMs};
use engine::message::{FromFollower, Reject, Slice, SnapshotOutcome, ToFollower};

use crate::Invalid;
use crate::common::{WireField, from_wire, into_wire, message_of_kind, oneof};
use crate::wire::{self, from_follower, reject, snapshot_outcome, to_follower};

message_of_kind!(ToFollower = wire::ToFollower, "to_follower.kind");

oneof! {
    ToFollower = to_follower::Kind;
    message Hello(hello: wire::Hello) { from, to };
    message Append(append: wire::Append) { n, slices };
    message Heartbeat(beat: wire::Heartbeat) { sent, commits };
    message ReadIndex(request: wire::ReadIndexRequest) { round, shards };
    message Proof(proof: wire::Proof) { request, proven, refused };
    message Snapshot(notice: wire::SnapshotNotice) { transfer, shard, epoch, copy, bytes };
    message Damaged(damaged: wire::Damaged) { epoch, copy, point };
    from_wire {
        Kind::Open(_) => return Err(Invalid::Open),
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

message_of_kind!(FromFollower = wire::FromFollower, "from_follower.kind");

oneof! {
    FromFollower = from_follower::Kind;
    message Welcome(welcome: wire::Welcome) { from, copies };
    message Copy(copied: wire::ShardCopy) { shard, copy };
    message Ack(ack: wire::Ack) { n };
    message Reject(reject: wire::Reject) { n, shard, reason };
    message ReadIndex(reply: wire::ReadIndexReply) { round, newer };
    message ProofRequest(proof: wire::ProofRequest) { request, shards };
    message Snapshot(snapshot: wire::SnapshotOutcome) { transfer, shard, outcome };
    into_wire {
        Self::Alive { sent, fsync_age_ms, full, room_bytes, wall, digests } => {
            let (digests, wall_ms) = (digests.into_wire(), wall.0);
            Kind::Alive(wire::Alive { sent, fsync_age_ms, full, room_bytes, digests, wall_ms })
        }
    }
    from_wire {
        Kind::Alive(alive) => from_wire!(alive => Self::Alive {
            sent,
            fsync_age_ms,
            full,
            wall: TimeMs(alive.wall_ms),
            room_bytes,
            digests,
        }),
    }
}

oneof! {
    SnapshotOutcome = snapshot_outcome::Outcome;
    empty Accepted, NoSpace, Installed, NotInstalled;
}

oneof! {
    Reject = reject::Reason;
    message Mismatch(mismatch: wire::Mismatch) { ends, applied };
    empty Stopped, NoSpace;
    into_wire {
        Self::StaleEpoch { promised } => Kind::StaleEpoch(promised.0),
        Self::WrongCopy { copy } => Kind::WrongCopy(copy.0),
    }
    from_wire {
        Kind::StaleEpoch(promised) => Self::StaleEpoch { promised: Epoch(promised) },
        Kind::WrongCopy(copy) => Self::WrongCopy { copy: CopyNo(copy) },
    }
}
