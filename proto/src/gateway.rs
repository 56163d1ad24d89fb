//! Conversion of the messages between gateway workers and storage nodes.

use bytes::Bytes;
use engine::batch::Batch;
use engine::codec::{Reader, put_varint_i128};
use engine::ids::{BatchSeq, TimeMs};
use engine::key::CounterKey;
use engine::message::{
    BatchReply, GatewayMessage, NodeReply, ReadResult, Refusal, ShardAvailability,
};
use engine::shard::idempotency::TokenOutcome;
use engine::shard_record::ShardRecord;

use crate::Invalid;
use crate::common::{WireField, message_of_kind, oneof};
use crate::wire::{self, batch_reply, read_reply, refusal, reply, to_node};

impl From<GatewayMessage> for wire::ToNode {
    fn from(from: GatewayMessage) -> Self {
        let kind = match from {
            GatewayMessage::Frame { message, batches } => {
                to_node::Kind::Frame(wire::Frame { message, batches: batches_out(&batches) })
            }
            GatewayMessage::Resend { message, shard, batch } => {
                let batch = batches_out(std::slice::from_ref(&batch));
                to_node::Kind::Resend(wire::Resend { message, shard: shard.into_wire(), batch })
            }
            GatewayMessage::Read { id, slots, keys, max_staleness_ms } => {
                to_node::Kind::Read(wire::Read {
                    id,
                    slots: slots.into_wire(),
                    names: keys.into_iter().map(CounterKey::into_name).collect(),
                    max_staleness_ms,
                })
            }
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::ToNode> for GatewayMessage {
    type Error = Invalid;

    fn try_from(from: wire::ToNode) -> Result<Self, Invalid> {
        match from.kind.ok_or(Invalid::Missing("to_node.kind"))? {
            to_node::Kind::Open(_) => Err(Invalid::Open),
            to_node::Kind::Frame(frame) => {
                Ok(Self::Frame { message: frame.message, batches: batches_in(frame.batches)? })
            }
            to_node::Kind::Resend(resend) => {
                let mut batches = batches_in(resend.batch)?.into_iter();
                let (Some(batch), None) = (batches.next(), batches.next()) else {
                    return Err(Invalid::Range("resend.batch"));
                };
                let shard = WireField::from_wire("resend.shard", resend.shard)?;
                Ok(Self::Resend { message: resend.message, shard, batch })
            }
            to_node::Kind::Read(read) => Ok(Self::Read {
                id: read.id,
                slots: WireField::from_wire("slots", read.slots)?,
                keys: keys_in(&read.names)?,
                max_staleness_ms: read.max_staleness_ms,
            }),
        }
    }
}

/// Copies all names into one buffer, which the keys share: a read may wait, and must not keep the
/// buffer of its message alive.
fn keys_in(names: &[Bytes]) -> Result<Vec<CounterKey>, Invalid> {
    let mut all = Bytes::from(names.concat());
    let keys = names.iter().map(|name| CounterKey::from_name(all.split_to(name.len())));
    keys.collect::<Result<_, _>>().map_err(|_| Invalid::Range("read.names"))
}

fn batches_out(batches: &[Batch]) -> Bytes {
    // The header of a batch takes at most 65 bytes.
    let size = batches.iter().map(|batch| batch.payload.len() + 65).sum();
    let mut out = Vec::with_capacity(size);
    for batch in batches {
        batch.encode(&mut out);
    }
    out.into()
}

fn batches_in(bytes: Bytes) -> Result<Vec<Batch>, Invalid> {
    let mut from = Reader::new(bytes);
    let mut batches = Vec::new();
    while !from.is_empty() {
        let batch = Batch::decode(&mut from)
            .map_err(|why| Invalid::Malformed { field: "frame.batches", why })?;
        if batch.slots.lo > batch.slots.hi {
            return Err(Invalid::Range("batch.slots"));
        }
        batches.push(batch);
    }
    Ok(batches)
}

impl From<Vec<wire::Reply>> for wire::ToGateway {
    fn from(replies: Vec<wire::Reply>) -> Self {
        Self { replies }
    }
}

impl From<NodeReply> for wire::ToGateway {
    fn from(reply: NodeReply) -> Self {
        vec![reply.into()].into()
    }
}

impl wire::ToGateway {
    /// Returns the replies in their order. Fails if one of them is invalid.
    pub fn into_replies(self) -> impl Iterator<Item = Result<NodeReply, Invalid>> {
        self.replies.into_iter().map(NodeReply::try_from)
    }
}

impl From<NodeReply> for wire::Reply {
    fn from(from: NodeReply) -> Self {
        let kind = match from {
            NodeReply::Answer { message, slots, session, batch_seq, answer } => {
                reply::Kind::Answer(wire::BatchReply {
                    message,
                    slots: slots.into_wire(),
                    session: session.into_wire(),
                    batch_seq: batch_seq.0,
                    kind: answer.into_wire(),
                })
            }
            NodeReply::Read { id, result } => {
                let staleness_us = result.as_ref().map_or(0, |read| read.staleness_us);
                let kind = match result {
                    Ok(read) => read_reply::Kind::Values(applied_out(&read.values, &[], read.time)),
                    Err(refusal) => read_reply::Kind::Refused(refusal.into()),
                };
                reply::Kind::Read(wire::ReadReply { id, kind: Some(kind), staleness_us })
            }
            NodeReply::ShardState { slots, state } => reply::Kind::ShardState(wire::ShardState {
                slots: slots.into_wire(),
                frozen: state == ShardAvailability::Frozen,
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::Reply> for NodeReply {
    type Error = Invalid;

    fn try_from(from: wire::Reply) -> Result<Self, Invalid> {
        match from.kind.ok_or(Invalid::Missing("reply.kind"))? {
            reply::Kind::Answer(answer) => Ok(Self::Answer {
                message: answer.message,
                slots: WireField::from_wire("slots", answer.slots)?,
                session: WireField::from_wire("answer.session", answer.session)?,
                batch_seq: BatchSeq(answer.batch_seq),
                answer: WireField::from_wire("answer.kind", answer.kind)?,
            }),
            reply::Kind::Read(read) => {
                let result = match read.kind.ok_or(Invalid::Missing("read_reply.kind"))? {
                    read_reply::Kind::Values(values) => {
                        let (values, _, time) = applied_in(values)?;
                        Ok(ReadResult { values, time, staleness_us: read.staleness_us })
                    }
                    read_reply::Kind::Refused(refused) => Err(refused.try_into()?),
                };
                Ok(Self::Read { id: read.id, result })
            }
            reply::Kind::ShardState(shard) => Ok(Self::ShardState {
                slots: WireField::from_wire("slots", shard.slots)?,
                state: match shard.frozen {
                    true => ShardAvailability::Frozen,
                    false => ShardAvailability::Open,
                },
            }),
        }
    }
}

oneof! {
    BatchReply = batch_reply::Kind;
    empty AnsweredBefore, Malformed, NoEffect, Expired;
    into_wire {
        Self::Applied { values, tokens, time } => {
            Kind::Applied(applied_out(&values, &tokens, time))
        }
        Self::Refused(refusal) => Kind::Refused(refusal.into()),
    }
    from_wire {
        Kind::Applied(applied) => {
            let (values, tokens, time) = applied_in(applied)?;
            Self::Applied { values, tokens, time }
        }
        Kind::Refused(refusal) => Self::Refused(refusal.try_into()?),
    }
}

fn applied_out(values: &[i128], tokens: &[TokenOutcome], time: TimeMs) -> wire::Applied {
    let mut out = Vec::with_capacity(4 * values.len());
    for &value in values {
        put_varint_i128(&mut out, value);
    }
    let tokens: Vec<u8> = tokens.iter().map(|&outcome| outcome as u8).collect();
    wire::Applied { values: out.into(), time_ms: time.0, tokens: tokens.into() }
}

/// The values, the outcomes of the tokens, and the time.
type AppliedParts = (Vec<i128>, Vec<TokenOutcome>, TimeMs);

fn applied_in(applied: wire::Applied) -> Result<AppliedParts, Invalid> {
    let mut from = Reader::new(applied.values);
    let mut values = Vec::new();
    while !from.is_empty() {
        let value = from.varint_i128("value");
        values.push(value.map_err(|why| Invalid::Malformed { field: "applied.values", why })?);
    }
    let tokens = applied.tokens.iter().map(|&byte| TokenOutcome::from_byte(byte));
    let tokens = tokens.collect::<Option<_>>().ok_or(Invalid::Range("applied.tokens"))?;
    Ok((values, tokens, TimeMs(applied.time_ms)))
}

message_of_kind!(Refusal = wire::Refusal, "refusal.kind");

oneof! {
    Refusal = refusal::Kind;
    empty NoSuchShard, Frozen, Overloaded, NoSpace, TooLarge, Damaged, Stale;
    into_wire {
        Self::NotPrimary(record) => {
            let record = record.map(|record| record.encode().into()).unwrap_or_default();
            Kind::NotPrimary(wire::NotPrimary { record })
        }
    }
    from_wire {
        Kind::NotPrimary(not) if not.record.is_empty() => Self::NotPrimary(None),
        Kind::NotPrimary(not) => {
            let record = ShardRecord::decode(&not.record)
                .map_err(|why| Invalid::Malformed { field: "not_primary.record", why })?;
            Self::NotPrimary(Some(Box::new(record)))
        }
    }
}
