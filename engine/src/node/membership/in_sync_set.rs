//! Changes of the in-sync set, decided by the primary: eject silent members, add followers that
//! have caught up, swap members at `min_in_sync`, freeze the shard where none of it is possible.
//!
//! Silence is observed for a peer as a whole, not for a shard; the records are written shard by
//! shard. All of it is hints and compare-and-set: a wrong suspicion costs an ejection, never data.

use std::collections::BTreeMap;

use crate::ids::{ShardId, StoreId};
use crate::message::ReplicaHealth;
use crate::node::event::Effect;
use crate::node::membership::Membership;
use crate::node::membership::replica_health::{
    HealthView, ReplicaHealths, is_near, update_progress,
};
use crate::node::peers::Peers;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::primary::{InSyncProposal, Primary};
use crate::shard_record::ShardRecord;

impl Membership {
    /// Reviews one shard that this node leads.
    pub(in crate::node) fn review(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &Peers,
        shard: ShardId,
    ) {
        resume_after_step_down(turn, shard);
        let healths = HealthView::of(turn, peers).replica_healths(shard);
        update_progress(turn, shard, &healths);
        review_frozen(turn, peers, shard, &healths);
        self.review_joining(turn, peers, shard, &healths);
        self.review_isr(turn, peers, shard, &healths);
    }

    fn review_isr(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &Peers,
        shard: ShardId,
        healths: &ReplicaHealths,
    ) {
        let Some(replica) = turn.shards.get(shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let min = turn.settings.min_in_sync;
        // A proposal is made from a record that a recovery of etcd would find: who is added is a
        // learner there.
        let is_recording = primary.recording.is_some() || turn.shards.fence.is_some();
        if primary.is_pending() || is_recording || turn.now < primary.propose_after {
            return;
        }
        if self.propose_split(turn, shard) {
            return;
        }
        let Some(replica) = turn.shards.get(shard) else { return };
        let Some(primary) = replica.primary() else { return };
        let is_ready =
            |store: &StoreId| primary.is_caught_up(*store, replica.commit, turn.settings.planted);
        let mut remove = removable(turn, peers, primary, healths);
        // One store at a time: the compare contains one candidate's key.
        let good = self.candidates(turn, peers, ReplicaHealth::Good, primary, healths);
        let mut add = Vec::from_iter(good.into_iter().find(is_ready));
        // At `min_in_sync`, a store whose disk is full but that has everything takes the place of a
        // member that does not even acknowledge a barrier: reads are answered then, and a log that
        // is full of what could not be committed is trimmed.
        let at_floor = primary.record.room(min) == 0;
        if add.is_empty() && at_floor && !turn.planted(Planted::FullReplacesNobody) {
            let full: Vec<_> = of(healths, ReplicaHealth::Full).collect();
            let gone =
                |store: &StoreId| primary.record.isr.contains(store) && !full.contains(store);
            let spare = self.candidates(turn, peers, ReplicaHealth::Full, primary, healths);
            let spare = spare.into_iter().find(is_ready);
            if spare.is_some() && remove.iter().any(gone) {
                remove.retain(gone);
                add.extend(spare);
            }
        }
        let taint: Vec<_> = of(healths, ReplicaHealth::Lost).collect();
        let mut floor = min;
        if turn.planted(Planted::TrustMakesRoom) {
            let record = &primary.record;
            floor -= add.iter().filter(|store| record.isr.contains(store)).count();
        }
        let next = primary.record.changed(&add, &remove, &taint, floor);
        let nothing = next.isr == primary.record.isr && next.tainted == primary.record.tainted;
        // A proposal whose outcome is unknown is settled by a newer version, even without a change.
        if nothing && !primary.is_unsettled() {
            return;
        }
        self.propose(turn, peers, shard, next, add.first().copied());
    }

    /// Returns the learners and tainted members that may be added once they have caught up. None
    /// while a proposal is unsettled or etcd does not answer: each addition without an answer
    /// counts until there is one, and the death of that store would stop the shard.
    fn candidates(
        &self,
        turn: &NodeTurn<'_>,
        peers: &Peers,
        health: ReplicaHealth,
        primary: &Primary,
        healths: &ReplicaHealths,
    ) -> Vec<StoreId> {
        let etcd_answers =
            peers.health().has_etcd_answered(turn.now, turn.settings.timing.etcd_fresh_ms);
        let may_return = |store: &StoreId| {
            let follower = &primary.followers.get(store);
            follower.zip(peers.registered(*store)).is_some_and(|(follower, (boot, _))| {
                follower.boot == boot && self.backoff.may_return(*store, boot, turn.now)
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
        turn: &mut NodeTurn<'_>,
        peers: &Peers,
        shard: ShardId,
        healths: &ReplicaHealths,
    ) {
        let (now, timing) = (turn.now, turn.settings.timing);
        let Some(primary) = turn.shards.primary(shard) else { return };
        let joins = |store: StoreId| {
            let follower = primary.followers.get(&store);
            follower.is_some_and(|follower| is_near(primary, follower))
        };
        let candidates = self.candidates(turn, peers, ReplicaHealth::Good, primary, healths);
        let joining = match primary.joining {
            Some((store, since)) => {
                let goes_on = candidates.contains(&store);
                primary.joining.filter(|_| goes_on && now.ms_since(since) < 2 * timing.near_ms)
            }
            None if now < primary.join_after => None,
            None => candidates.into_iter().find(|&store| joins(store)).map(|store| (store, now)),
        };
        let given_up = primary.joining.is_some() && joining.is_none();
        if let Some(primary) = turn.shards.primary_mut(shard) {
            primary.joining = joining;
            if given_up {
                primary.join_after = now.plus_ms(timing.join_again_ms);
                turn.shards.to_advance.insert(shard);
            }
        }
    }

    fn propose(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &Peers,
        shard: ShardId,
        record: ShardRecord,
        add: Option<StoreId>,
    ) {
        let id = turn.fresh_id();
        let candidate = add.and_then(|store| {
            let (_, key_revision) = peers.registered(store)?;
            Some((store, key_revision))
        });
        let now = turn.now;
        let Some(primary) = turn.shards.primary_mut(shard) else {
            return;
        };
        for store in primary.record.isr.iter().filter(|store| !record.isr.contains(store)) {
            if let Some((boot, _)) = peers.registered(*store) {
                self.backoff.on_ejected(*store, boot, now, &turn.settings.timing);
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
        turn.effects.push(Effect::Propose { proposal: id, expect, record, candidate });
    }
}

/// Reviews the shards that this node leads, by the clock. Of a thousand shards nearly all are at
/// rest: nothing waits, no split is to be written, and every member is well. A review of such a one
/// finds nothing, so only the time is noted at which nothing waited.
pub(in crate::node) fn review_by_clock(turn: &mut NodeTurn<'_>, peers: &Peers) {
    let view = HealthView::of(turn, peers);
    let mut well = BTreeMap::new();
    let mut is_well = |store| *well.entry(store).or_insert_with(|| view.is_well(store));
    let (mut at_rest, mut others) = (Vec::new(), Vec::new());
    for (replica, primary) in turn.shards.led() {
        let (commit, last) = (replica.commit, replica.log.last().seq);
        let rests = last <= commit
            && primary.is_at_rest()
            && primary.record.slots == replica.slots
            && !primary.is_below_floor(turn.settings.min_in_sync)
            && is_well(turn.me.store)
            && primary.followers.keys().all(|&store| is_well(store));
        match rests {
            true => at_rest.push((replica.shard, commit, last)),
            false => others.push(replica.shard),
        }
    }
    let (now, near_ms) = (turn.now, turn.settings.timing.near_ms);
    for (shard, commit, last) in at_rest {
        if let Some(primary) = turn.shards.primary_mut(shard) {
            primary.progress.update(now, commit, last, false, near_ms);
        }
    }
    turn.shards.to_review.extend(others);
}

/// Resumes a shard whose hand-over the coordinator requested, if no other primary was named in
/// time.
fn resume_after_step_down(turn: &mut NodeTurn<'_>, shard: ShardId) {
    let now = turn.now;
    if let Some(primary) = turn.shards.primary_mut(shard) {
        primary.stepping_down = primary.stepping_down.filter(|&until| now < until);
    }
}

fn review_frozen(turn: &mut NodeTurn<'_>, peers: &Peers, shard: ShardId, healths: &ReplicaHealths) {
    let Some(primary) = turn.shards.primary(shard) else { return };
    let frozen = HealthView::of(turn, peers).is_frozen(primary, healths);
    if let Some(primary) = turn.shards.primary_mut(shard) {
        primary.frozen = frozen;
    }
}

/// Returns the members that can't acknowledge, those first that will not recover by themselves. The
/// record keeps `min_in_sync` of them.
fn removable(
    turn: &NodeTurn<'_>,
    peers: &Peers,
    primary: &Primary,
    healths: &ReplicaHealths,
) -> Vec<StoreId> {
    let silent = may_eject(turn, peers);
    let blocked = HealthView::of(turn, peers).is_blocked(primary);
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
fn may_eject(turn: &NodeTurn<'_>, peers: &Peers) -> bool {
    let silent_after_ms = turn.settings.silent_after_ms;
    let well = turn.storage.groups().waiting_ms(turn.now) < silent_after_ms / 2;
    well && peers.health().has_contact(turn.now, silent_after_ms)
}

fn of(healths: &ReplicaHealths, wanted: ReplicaHealth) -> impl Iterator<Item = StoreId> {
    healths.iter().filter(move |(_, health)| *health == wanted).map(|&(store, _)| store)
}
