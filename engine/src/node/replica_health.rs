//! The health of replicas: one judgement which members and learners can acknowledge, from which all
//! else follows.
//!
//! A commit waits for every member of *M* (the in-sync set plus unconfirmed additions), so one
//! member that can't acknowledge holds up its shard, whatever the reason. The reason is judged here
//! and nowhere else:
//!
//! ```text
//!   health ──┬─▶ which replica leaves the in-sync set, is marked in it, or added  in_sync_set.rs
//!            ├─▶ frozen: within two seconds, whatever the reason                  in_sync_set.rs
//!            └─▶ the report: the planner's spare member, `dkc status`             queries.rs
//! ```

use crate::ids::{Now, Seq, ShardId, StoreId};
use crate::message::ReplicaHealth;
use crate::node::Node;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::primary::{Feed, Follower, Primary};

/// The progress of a shard's commit, updated at each review.
#[derive(Clone, Debug)]
pub struct CommitProgress {
    commit: Seq,
    /// When the commit last moved, or nothing waited for it.
    moved: Now,
    /// Since when, without a break, a member of M can't acknowledge or M is too small.
    blocked: Option<Now>,
    /// The commit at two earlier moments, the older first.
    before: [(Now, Seq); 2],
}

impl CommitProgress {
    /// The progress of a shard that this node begins to lead.
    pub fn new(now: Now) -> Self {
        Self { commit: Seq(0), moved: now, blocked: None, before: [(now, Seq(0)); 2] }
    }

    fn update(&mut self, now: Now, commit: Seq, last: Seq, blocked: bool, near_ms: u64) {
        if commit > self.commit || last <= commit {
            (self.commit, self.moved) = (commit, now);
        }
        self.blocked = blocked.then(|| self.blocked.unwrap_or(now));
        let [_, (at, _)] = self.before;
        if now.ms_since(at) >= near_ms {
            self.before = [self.before[1], (now, commit)];
        }
    }

    /// Restarts the waits after a pause of this process, which is no delay of a member.
    pub fn reset_after_pause(&mut self, now: Now) {
        self.moved = now;
        self.blocked = self.blocked.map(|_| now);
    }
}

/// The health of a shard's replicas: of the primary itself, its members and its learners.
pub(super) type ReplicaHealths = Vec<(StoreId, ReplicaHealth)>;

impl Node {
    /// Returns the health of every replica of a shard that this node leads; nothing if it does not.
    pub(super) fn replica_healths(&self, shard: ShardId) -> ReplicaHealths {
        let primary = self.replicas.get(&shard).and_then(Replica::primary);
        let of = |primary: &Primary| {
            let others = primary.followers.iter();
            let others = others.map(|(&store, it)| (store, self.health_of(primary, store, it)));
            [(self.me.store, self.own_health())].into_iter().chain(others).collect()
        };
        primary.map_or(Vec::new(), of)
    }

    /// Returns the replicas that hold up the shard, or would if they counted: for the report, for
    /// status and for the checkers of the simulator.
    pub fn hindered_by(&self, shard: ShardId) -> Vec<(StoreId, ReplicaHealth)> {
        let Some(replica) = self.replicas.get(&shard) else { return Vec::new() };
        let Some(primary) = replica.primary() else { return Vec::new() };
        let mut all = self.replica_healths(shard);
        if primary.frozen && self.is_stalled(primary) {
            let members = primary.members(None);
            let held = |store: &StoreId| match primary.followers.get(store) {
                Some(follower) => follower.acked,
                None => replica.log.durable(),
            };
            let good = all.iter_mut().filter(|(_, health)| *health == ReplicaHealth::Good);
            good.filter(|(store, _)| members.contains(store) && held(store) <= replica.commit)
                .for_each(|(_, health)| *health = ReplicaHealth::Behind);
        }
        all.retain(|(_, health)| *health != ReplicaHealth::Good);
        all
    }

    fn health_of(&self, primary: &Primary, store: StoreId, follower: &Follower) -> ReplicaHealth {
        let connected = self.dialled_to.contains_key(&store);
        match follower.feed {
            _ if self.has_lost_acked_data(primary, store, follower) => ReplicaHealth::Lost,
            _ if self.is_silent(store) => ReplicaHealth::Silent,
            Feed::Full => ReplicaHealth::Full,
            _ if self.health.is_full(store) => ReplicaHealth::Full,
            Feed::NeedsSnapshot | Feed::Snapshot { .. } => ReplicaHealth::Filling,
            Feed::Cut if connected => ReplicaHealth::NoCopy,
            // A follower without a connection is silent in a second.
            Feed::Cut | Feed::Streaming { .. } | Feed::FromLog { .. } => ReplicaHealth::Good,
        }
    }

    fn own_health(&self) -> ReplicaHealth {
        let stalled = self.groups.waiting_ms(self.now) >= self.settings.silent_after_ms;
        if stalled { ReplicaHealth::Silent } else { ReplicaHealth::Good }
    }

    /// Returns whether the follower lacks entries that it has acknowledged. A trusted member that
    /// needs a snapshot does so, however that was found out.
    fn has_lost_acked_data(&self, primary: &Primary, store: StoreId, follower: &Follower) -> bool {
        let record = &primary.record;
        let trusted = record.isr.contains(&store) && !record.tainted.contains(&store);
        let needs_copy = trusted && follower.feed == Feed::NeedsSnapshot;
        (follower.lost_acked_data || needs_copy)
            && !Planted::NeedyIsWaitedFor.is_in(self.settings.planted)
    }

    /// Updates the progress of the shard's commit.
    pub(super) fn update_progress(&mut self, shard: ShardId, healths: &ReplicaHealths) {
        let (now, min, near_ms) = (self.now, self.min_in_sync(), self.settings.timing.near_ms);
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let (commit, last) = (replica.commit, replica.log.last().seq);
        let Some(primary) = replica.primary_mut() else { return };
        let blocked = primary.is_below_floor(min) || hinder(primary, healths).next().is_some();
        primary.progress.update(now, commit, last, blocked, near_ms);
    }

    /// Returns whether the shard is frozen: what waits will not be committed soon, and new batches
    /// would only wait, too.
    pub(super) fn is_frozen(&self, primary: &Primary, healths: &ReplicaHealths) -> bool {
        let (min, me) = (self.min_in_sync(), self.me.store);
        let room = primary.record.room(min);
        let is = |wanted: &[ReplicaHealth], it: &(StoreId, ReplicaHealth)| wanted.contains(&it.1);
        if Planted::FrozenIsSilence.is_in(self.settings.planted) {
            let others = || hinder(primary, healths).filter(|&(store, _)| store != me);
            return room == 0 && others().any(|it| is(&[ReplicaHealth::Silent], &it));
        }
        // Members that will not acknowledge by themselves leave, if the set can spare them; the
        // primary stays.
        let lasting = [ReplicaHealth::Silent, ReplicaHealth::Full];
        let stay = || hinder(primary, healths).filter(|it| is(&lasting, it));
        primary.is_below_floor(min)
            || stay().count() > room
            || stay().any(|(store, _)| store == me)
            || self.is_blocked(primary)
            || self.is_stalled(primary)
    }

    /// Returns whether a member has not been able to acknowledge for longer than its removal takes.
    pub(super) fn is_blocked(&self, primary: &Primary) -> bool {
        let long = |since| self.now.ms_since(since) >= self.settings.timing.blocked_ms;
        primary.progress.blocked.is_some_and(long)
    }

    /// Returns whether what was ordered waits for its commit for longer than a member may be
    /// silent.
    fn is_stalled(&self, primary: &Primary) -> bool {
        let after_ms = match primary.active {
            true => self.settings.timing.stalled_ms,
            false => self.settings.frozen_after_ms,
        };
        self.now.ms_since(primary.progress.moved) >= after_ms
    }

    /// Returns whether the follower has what was committed a moment ago: it keeps up, with a delay.
    pub(super) fn is_near(&self, primary: &Primary, follower: &Follower) -> bool {
        let [(_, before), _] = primary.progress.before;
        follower.proven && follower.acked >= before.max(primary.barrier)
    }
}

/// Returns the members of M that can't acknowledge, with their health.
fn hinder<'a>(
    primary: &Primary,
    healths: &'a ReplicaHealths,
) -> impl Iterator<Item = (StoreId, ReplicaHealth)> + use<'a> {
    let members = primary.members(None);
    let hinders = move |&(store, health): &(StoreId, ReplicaHealth)| {
        health != ReplicaHealth::Good && members.contains(&store)
    };
    healths.iter().copied().filter(hinders)
}
