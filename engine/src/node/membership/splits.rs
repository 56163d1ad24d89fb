//! The primary's part in a split: it orders the entry, and writes both records once it has applied
//! it.
//!
//! The slots alone show which of the two has happened. A primary whose copy has fewer slots
//! than its record writes both records, whichever primary of whichever epoch has ordered the split.
//! Both in-sync sets are the parent's: the entry was committed, so each member has it, and makes
//! its copy of the child when it applies it. See docs/design.md#splitting-a-shard.

use crate::entry::Body;
use crate::ids::{Epoch, ShardId, Slots, Version};
use crate::node::event::Effect;
use crate::node::membership::Membership;
use crate::node::peers::Peers;
use crate::node::shared::NodeTurn;
use crate::replica::Replica;
use crate::replica::primary::InSyncProposal;
use crate::replica::trust::Trust;
use crate::shard::division;
use crate::shard_record::ShardRecord;

/// Orders the split of a shard that this node leads. The error is the reason why it can't be split
/// now.
pub(in crate::node) fn order_split(
    turn: &mut NodeTurn<'_>,
    peers: &Peers,
    shard: ShardId,
    epoch: Epoch,
    at: u16,
) -> Result<(), &'static str> {
    let full = turn.storage.is_disk_full();
    let Some(replica) = turn.shards.get(shard) else { return Err("the node has no such shard") };
    let is_led = replica.primary().is_some_and(|primary| primary.epoch == epoch);
    if is_led && is_splitting(replica) {
        return Ok(());
    }
    may_split(turn, replica, epoch, at)?;
    if full {
        return Err("the disk of the primary is full");
    }
    // Between the entry and the records in etcd the range is only served in part.
    let within_ms = turn.settings.timing.etcd_fresh_ms;
    if !peers.health().has_etcd_answered(turn.now, within_ms) {
        return Err("the primary has no answer of etcd: see why with `dkc doctor`");
    }
    turn.order(peers.health(), shard, Body::Split { at });
    Ok(())
}

/// Returns whether a split is ordered, and is not in etcd yet.
fn is_splitting(replica: &Replica) -> bool {
    let Some(primary) = replica.primary() else { return false };
    let mut seq = replica.state.applied.seq.next();
    while let Some(held) = replica.log.get(seq) {
        if matches!(held.entry.body, Body::Split { .. }) {
            return true;
        }
        seq = seq.next();
    }
    primary.record.slots != replica.slots
}

fn may_split(
    turn: &NodeTurn<'_>,
    replica: &Replica,
    epoch: Epoch,
    at: u16,
) -> Result<(), &'static str> {
    let Some(primary) = replica.primary().filter(|primary| primary.epoch == epoch) else {
        return Err("the node does not lead the shard in that epoch");
    };
    let Some((left, right)) = division::slots_of(replica.slots, at) else {
        return Err("the slot is not in the shard, or its first one");
    };
    let record = &primary.record;
    if !primary.active || primary.frozen || primary.stepping_down.is_some() {
        return Err("the shard takes no writes now: `dkc status` shows why");
    }
    if replica.trust != Trust::Good || !record.tainted.is_empty() || primary.is_unsettled() {
        return Err("a copy of the shard is not whole, or its in-sync set is changing");
    }
    if !record.learners.is_empty() || record.isr != record.target {
        return Err("a copy of the shard is away, moving or being filled: start the nodes that \
                    are down, and wait until `dkc plan` shows no move of it");
    }
    // Records of requests of many are in both children for as long as they live.
    let settings = turn.settings.idempotency;
    let room = settings.bytes_max_of(left).min(settings.bytes_max_of(right)) / 2;
    if replica.state.tokens.bytes() > room {
        return Err("the shard keeps too many idempotency records for the smaller part: split \
                    it in two, or wait until they have expired (--idempotency-window)");
    }
    Ok(())
}

impl Membership {
    /// Writes the records of both children, if a split is applied that etcd does not have. Returns
    /// whether there is one.
    pub(super) fn propose_split(&mut self, turn: &mut NodeTurn<'_>, shard: ShardId) -> bool {
        let Some(replica) = turn.shards.get(shard) else { return false };
        let Some(primary) = replica.primary() else { return false };
        let (slots, record) = (replica.slots, &primary.record);
        if slots == record.slots {
            return false;
        }
        let Some(at) = slots.hi.checked_add(1).filter(|&at| at <= record.slots.hi) else {
            return false;
        };
        let child = ShardId(at);
        // Without its own copy of the child this process can't lead it.
        if !turn.shards.get(child).is_some_and(|child| child.trust.is_working()) {
            return true;
        }
        let (left, right) = records_of(record, slots);
        let (base, expect) = (record.version, primary.mod_revision);
        let (id, now) = (turn.fresh_id(), turn.now);
        if let Some(primary) = turn.shards.primary_mut(shard) {
            primary.proposals.retain(|earlier| earlier.pending || earlier.record != left);
            let record = left.clone();
            primary.proposals.push(InSyncProposal { id, base, record, pending: true });
            primary.propose_after = now;
            primary.joining = None;
        }
        self.proposals.insert(id, shard);
        self.children.insert(id, right.clone());
        turn.effects.push(Effect::ProposeSplit { proposal: id, expect, left, right });
        true
    }
}

/// The records of the children of a split that leaves these slots to the left one.
fn records_of(parent: &ShardRecord, left: Slots) -> (ShardRecord, ShardRecord) {
    let version = Version(parent.version.0 + 1);
    let right = ShardRecord {
        slots: Slots { lo: left.hi + 1, ..parent.slots },
        // In epoch 1 an empty copy counts as complete: that is not so of a child.
        epoch: parent.epoch.max(Epoch(2)),
        version: Version(1),
        ..parent.clone()
    };
    (ShardRecord { slots: left, version, ..parent.clone() }, right)
}
