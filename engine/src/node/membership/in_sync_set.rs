//! Changes of the in-sync set, decided by the primary: eject silent members, add followers that
//! have caught up, swap members at `min_in_sync`, freeze the shard where none of it is possible.
//!
//! Silence is observed for a peer as a whole, not for a shard; the records are written shard by
//! shard. All of it is hints and compare-and-set: a wrong suspicion costs an ejection, never data.

use std::collections::BTreeMap;

use crate::ids::{Boot, Now, ShardId, StoreId};
use crate::message::ReplicaHealth;
use crate::node::context::Context;
use crate::node::event::Effect;
use crate::node::membership::Membership;
use crate::node::membership::replica_health::{
    HealthView, ReplicaHealths, is_near, update_progress,
};
use crate::node::peers::Peers;
use crate::node::settings::NodeTiming;
use crate::planted::Planted;
use crate::replica::primary::{InSyncProposal, Primary};
use crate::shard_record::ShardRecord;

/// The wait of an ejected peer before it is added again: 1, 2, 4 … 60 s for the same process, reset
/// once it has stayed in sync for a minute. A new process does not wait.
#[derive(Clone, Debug, Default)]
pub(super) struct Backoff {
    ejected: BTreeMap<StoreId, Ejected>,
}

#[derive(Clone, Debug)]
struct Ejected {
    boot: Boot,
    wait_ms: u64,
    at: Now,
}

impl Backoff {
    fn on_ejected(&mut self, store: StoreId, boot: Boot, now: Now, timing: &NodeTiming) {
        let before = self.ejected.get(&store);
        let wait_ms = match before {
            // Every shard ejects the peer at the same moment: that counts as one ejection.
            Some(before) if before.boot == boot && now.ms_since(before.at) < before.wait_ms => {
                before.wait_ms
            }
            Some(before)
                if before.boot == boot && now.ms_since(before.at) < 2 * timing.ejected_ms_max =>
            {
                (2 * before.wait_ms).min(timing.ejected_ms_max)
            }
            _ => timing.ejected_ms,
        };
        self.ejected.insert(store, Ejected { boot, wait_ms, at: now });
    }

    fn may_return(&self, store: StoreId, boot: Boot, now: Now) -> bool {
        self.ejected.get(&store).is_none_or(|ejected| {
            ejected.boot != boot || now.ms_since(ejected.at) >= ejected.wait_ms
        })
    }
}

impl Membership {
    /// Reviews one shard that this node leads.
    pub(in crate::node) fn review(&mut self, ctx: &mut Context<'_>, peers: &Peers, shard: ShardId) {
        resume_after_step_down(ctx, shard);
        let healths = HealthView::of(ctx, peers).replica_healths(shard);
        update_progress(ctx, shard, &healths);
        review_frozen(ctx, peers, shard, &healths);
        self.review_joining(ctx, peers, shard, &healths);
        self.review_isr(ctx, peers, shard, &healths);
    }

    fn review_isr(
        &mut self,
        ctx: &mut Context<'_>,
        peers: &Peers,
        shard: ShardId,
        healths: &ReplicaHealths,
    ) {
        let Some(replica) = ctx.shards.get(shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let min = ctx.settings.min_in_sync;
        if primary.is_pending() || ctx.now < primary.propose_after {
            return;
        }
        let is_ready =
            |store: &StoreId| primary.is_caught_up(*store, replica.commit, ctx.settings.planted);
        let mut remove = removable(ctx, peers, primary, healths);
        // One store at a time: the compare contains one candidate's key.
        let good = self.candidates(ctx, peers, ReplicaHealth::Good, primary, healths);
        let mut add = Vec::from_iter(good.into_iter().find(is_ready));
        // At `min_in_sync`, a store whose disk is full but that has everything takes the place of a
        // member that does not even acknowledge a barrier: reads are answered then, and a log that
        // is full of what could not be committed is trimmed.
        let at_floor = primary.record.room(min) == 0;
        if add.is_empty() && at_floor && !ctx.planted(Planted::FullReplacesNobody) {
            let full: Vec<_> = of(healths, ReplicaHealth::Full).collect();
            let gone =
                |store: &StoreId| primary.record.isr.contains(store) && !full.contains(store);
            let spare = self.candidates(ctx, peers, ReplicaHealth::Full, primary, healths);
            let spare = spare.into_iter().find(is_ready);
            if spare.is_some() && remove.iter().any(gone) {
                remove.retain(gone);
                add.extend(spare);
            }
        }
        let taint: Vec<_> = of(healths, ReplicaHealth::Lost).collect();
        let mut floor = min;
        if ctx.planted(Planted::TrustMakesRoom) {
            let record = &primary.record;
            floor -= add.iter().filter(|store| record.isr.contains(store)).count();
        }
        let next = primary.record.changed(&add, &remove, &taint, floor);
        let nothing = next.isr == primary.record.isr && next.tainted == primary.record.tainted;
        // A proposal whose outcome is unknown is settled by a newer version, even without a change.
        if nothing && !primary.is_unsettled() {
            return;
        }
        self.propose(ctx, peers, shard, next, add.first().copied());
    }

    /// Returns the learners and tainted members that may be added once they have caught up. None
    /// while a proposal is unsettled or etcd does not answer: each addition without an answer
    /// counts until there is one, and the death of that store would stop the shard.
    fn candidates(
        &self,
        ctx: &Context<'_>,
        peers: &Peers,
        health: ReplicaHealth,
        primary: &Primary,
        healths: &ReplicaHealths,
    ) -> Vec<StoreId> {
        let etcd_answers =
            peers.health().has_etcd_answered(ctx.now, ctx.settings.timing.etcd_fresh_ms);
        let may_return = |store: &StoreId| {
            let follower = &primary.followers.get(store);
            follower.zip(peers.registered(*store)).is_some_and(|(follower, (boot, _))| {
                follower.boot == boot && self.backoff.may_return(*store, boot, ctx.now)
            })
        };
        let record = &primary.record;
        let wanted =
            |store: &StoreId| record.learners.contains(store) || record.tainted.contains(store);
        if !etcd_answers || primary.is_unsettled() {
            return Vec::new();
        }
        of(healths, health).filter(wanted).filter(may_return).collect()
    }

    /// A learner that is always a moment late never has all that is committed. So the commit waits
    /// for it for a moment, as it will when it is a member.
    fn review_joining(
        &self,
        ctx: &mut Context<'_>,
        peers: &Peers,
        shard: ShardId,
        healths: &ReplicaHealths,
    ) {
        let (now, timing) = (ctx.now, ctx.settings.timing);
        let Some(primary) = ctx.shards.primary(shard) else { return };
        let joins = |store: StoreId| {
            let follower = primary.followers.get(&store);
            follower.is_some_and(|follower| is_near(primary, follower))
        };
        let candidates = self.candidates(ctx, peers, ReplicaHealth::Good, primary, healths);
        let joining = match primary.joining {
            Some((store, since)) => {
                let goes_on = candidates.contains(&store);
                primary.joining.filter(|_| goes_on && now.ms_since(since) < 2 * timing.near_ms)
            }
            None if now < primary.join_after => None,
            None => candidates.into_iter().find(|&store| joins(store)).map(|store| (store, now)),
        };
        let given_up = primary.joining.is_some() && joining.is_none();
        if let Some(primary) = ctx.shards.primary_mut(shard) {
            primary.joining = joining;
            if given_up {
                primary.join_after = now.plus_ms(timing.join_again_ms);
                ctx.shards.dirty.insert(shard);
            }
        }
    }

    fn propose(
        &mut self,
        ctx: &mut Context<'_>,
        peers: &Peers,
        shard: ShardId,
        record: ShardRecord,
        add: Option<StoreId>,
    ) {
        let id = ctx.fresh_id();
        let candidate = add.and_then(|store| {
            let (_, key_revision) = peers.registered(store)?;
            Some((store, key_revision))
        });
        let now = ctx.now;
        let Some(primary) = ctx.shards.primary_mut(shard) else {
            return;
        };
        for store in primary.record.isr.iter().filter(|store| !record.isr.contains(store)) {
            if let Some((boot, _)) = peers.registered(*store) {
                self.backoff.on_ejected(*store, boot, now, &ctx.settings.timing);
            }
        }
        // The proposal counts before it is made. The same proposal made again needs no second
        // place.
        let base = primary.record.version;
        primary.proposals.retain(|earlier| earlier.pending || earlier.record != record);
        primary.proposals.push(InSyncProposal { id, base, record: record.clone(), pending: true });
        primary.propose_after = now;
        primary.joining = None;
        let expect = primary.mod_revision;
        self.proposals.insert(id, shard);
        ctx.effects.push(Effect::Propose { proposal: id, expect, record, candidate });
    }
}

/// Resumes a shard whose hand-over the coordinator requested, if no other primary was named in
/// time.
fn resume_after_step_down(ctx: &mut Context<'_>, shard: ShardId) {
    let now = ctx.now;
    if let Some(primary) = ctx.shards.primary_mut(shard) {
        primary.stepping_down = primary.stepping_down.filter(|&until| now < until);
    }
}

fn review_frozen(ctx: &mut Context<'_>, peers: &Peers, shard: ShardId, healths: &ReplicaHealths) {
    let Some(primary) = ctx.shards.primary(shard) else { return };
    let frozen = HealthView::of(ctx, peers).is_frozen(primary, healths);
    if let Some(primary) = ctx.shards.primary_mut(shard) {
        primary.frozen = frozen;
    }
}

/// Returns the members that can't acknowledge, those first that will not recover by themselves. The
/// record keeps `min_in_sync` of them.
fn removable(
    ctx: &Context<'_>,
    peers: &Peers,
    primary: &Primary,
    healths: &ReplicaHealths,
) -> Vec<StoreId> {
    let silent = may_eject(ctx, peers);
    let blocked = HealthView::of(ctx, peers).is_blocked(primary);
    let leave = |wanted: ReplicaHealth, may: bool| of(healths, wanted).filter(move |_| may);
    leave(ReplicaHealth::Lost, true)
        .chain(leave(ReplicaHealth::Full, true))
        .chain(leave(ReplicaHealth::Filling, true))
        .chain(leave(ReplicaHealth::Silent, silent))
        .chain(leave(ReplicaHealth::NoCopy, blocked))
        .collect()
}

/// Returns whether this node may eject peers: its disk answers and it has contact to a peer or to
/// etcd. Otherwise the silence is its own.
fn may_eject(ctx: &Context<'_>, peers: &Peers) -> bool {
    let silent_after_ms = ctx.settings.silent_after_ms;
    let well = ctx.storage.groups().waiting_ms(ctx.now) < silent_after_ms / 2;
    well && peers.health().has_contact(ctx.now, silent_after_ms)
}

fn of(healths: &ReplicaHealths, wanted: ReplicaHealth) -> impl Iterator<Item = StoreId> {
    healths.iter().filter(move |(_, health)| *health == wanted).map(|&(store, _)| store)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: StoreId = StoreId(1);

    #[track_caller]
    fn check(ejected_s: &[u64], returns_s: u64) {
        let mut backoff = Backoff::default();
        let second = |s: u64| Now(s * 1_000_000);
        let timing = NodeTiming::default();
        ejected_s.iter().for_each(|&s| backoff.on_ejected(A, Boot(1), second(s), &timing));
        assert!(!backoff.may_return(A, Boot(1), Now(returns_s * 1_000_000 - 1)));
        assert!(backoff.may_return(A, Boot(1), second(returns_s)));
        assert!(backoff.may_return(A, Boot(2), second(0)));
    }

    #[test]
    fn waits_double_for_the_same_process() {
        check(&[10], 11);
        check(&[10, 12], 14);
        check(&[10, 12, 20], 24);
    }

    #[test]
    fn many_shards_ejecting_at_once_are_one_ejection() {
        check(&[10, 10, 10], 11);
    }

    #[test]
    fn the_wait_is_reset_after_a_long_time_in_sync() {
        check(&[10, 12, 500], 501);
    }
}
