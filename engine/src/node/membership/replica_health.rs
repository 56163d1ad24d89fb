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

use crate::ids::{Now, ShardId, StoreId};
use crate::message::ReplicaHealth;
use crate::node::peers::Peers;
use crate::node::settings::Settings;
use crate::node::shared::Shards;
use crate::node::shared::Storage;
use crate::node::shared::{NodeTurn, Shared};
use crate::planted::Planted;
use crate::replica::primary::{Feed, Follower, Primary};

/// The health of a shard's replicas: of the primary itself, its members and its learners.
pub(super) type ReplicaHealths = Vec<(StoreId, ReplicaHealth)>;

/// The state from which health is judged.
#[derive(Clone, Copy)]
pub(in crate::node) struct HealthView<'a> {
    now: Now,
    me: StoreId,
    settings: &'a Settings,
    shards: &'a Shards,
    storage: &'a Storage,
    peers: &'a Peers,
}

impl<'a> HealthView<'a> {
    /// Returns the view during an event.
    pub(in crate::node) fn of(turn: &'a NodeTurn<'_>, peers: &'a Peers) -> Self {
        Self {
            now: turn.now,
            me: turn.me.store,
            settings: turn.settings,
            shards: turn.shards,
            storage: turn.storage,
            peers,
        }
    }

    /// Returns the view between two events.
    pub(in crate::node) fn at_rest(shared: &'a Shared, peers: &'a Peers) -> Self {
        Self {
            now: shared.now,
            me: shared.me.store,
            settings: &shared.settings,
            shards: &shared.shards,
            storage: &shared.storage,
            peers,
        }
    }

    /// Returns the health of every replica of a shard that this node leads; nothing if it does not.
    pub(in crate::node) fn replica_healths(&self, shard: ShardId) -> ReplicaHealths {
        let primary = self.shards.primary(shard);
        let of = |primary: &Primary| {
            let others = primary.followers.iter();
            let others = others.map(|(&store, it)| (store, self.health_of(primary, store, it)));
            [(self.me, self.own_health())].into_iter().chain(others).collect()
        };
        primary.map_or(Vec::new(), of)
    }

    /// Returns the replicas that hold up the shard, or would if they counted: for the report, for
    /// status and for the checkers of the simulator.
    pub(in crate::node) fn hindered_by(&self, shard: ShardId) -> Vec<(StoreId, ReplicaHealth)> {
        let Some(replica) = self.shards.get(shard) else { return Vec::new() };
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
        let connected = self.peers.connection_to(store).is_some();
        match follower.feed {
            _ if self.has_lost_acked_data(primary, store, follower) => ReplicaHealth::Lost,
            _ if self.peers.is_silent(store, self.now, self.settings) => ReplicaHealth::Silent,
            Feed::Full => ReplicaHealth::Full,
            _ if self.peers.health().is_full(store) => ReplicaHealth::Full,
            Feed::NeedsSnapshot | Feed::Snapshot { .. } => ReplicaHealth::Filling,
            Feed::Cut if connected => ReplicaHealth::NoCopy,
            // A follower without a connection is silent in a second.
            Feed::Cut | Feed::Streaming { .. } | Feed::FromLog { .. } => ReplicaHealth::Good,
        }
    }

    /// Returns whether nothing is wrong with the store as a whole, be it this one or a peer.
    pub(super) fn is_well(&self, store: StoreId) -> bool {
        match store == self.me {
            true => self.own_health() == ReplicaHealth::Good,
            false => {
                !self.peers.is_silent(store, self.now, self.settings)
                    && !self.peers.health().is_full(store)
            }
        }
    }

    fn own_health(&self) -> ReplicaHealth {
        let stalled = self.storage.groups().waiting_ms(self.now) >= self.settings.silent_after_ms;
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

    /// Returns whether the shard is frozen: what waits will not be committed soon, and new batches
    /// would only wait, too.
    pub(in crate::node) fn is_frozen(&self, primary: &Primary, healths: &ReplicaHealths) -> bool {
        let (min, me) = (self.settings.min_in_sync, self.me);
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
    pub(in crate::node) fn is_blocked(&self, primary: &Primary) -> bool {
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
}

/// Updates the progress of the shard's commit.
pub(super) fn update_progress(turn: &mut NodeTurn<'_>, shard: ShardId, healths: &ReplicaHealths) {
    let (now, near_ms) = (turn.now, turn.settings.timing.near_ms);
    let min = turn.settings.min_in_sync;
    let Some(replica) = turn.shards.get_mut(shard) else { return };
    let (commit, last) = (replica.commit, replica.log.last().seq);
    let Some(primary) = replica.primary_mut() else { return };
    let blocked = primary.is_below_floor(min) || hinder(primary, healths).next().is_some();
    primary.progress.update(now, commit, last, blocked, near_ms);
}

/// Returns whether the follower has what was committed a moment ago: it keeps up, with a delay.
pub(super) fn is_near(primary: &Primary, follower: &Follower) -> bool {
    let [(_, before), _] = primary.progress.before;
    follower.proven && follower.acked >= before.max(primary.barrier)
}

/// Returns the members of M that can't acknowledge, with their health.
fn hinder<'a>(
    primary: &'a Primary,
    healths: &'a ReplicaHealths,
) -> impl Iterator<Item = (StoreId, ReplicaHealth)> + use<'a> {
    let members = primary.members(None);
    let hinders = move |&(store, health): &(StoreId, ReplicaHealth)| {
        health != ReplicaHealth::Good && members.contains(&store)
    };
    healths.iter().copied().filter(hinders)
}
