//! Who can acknowledge: one judgement of every member and learner, from which all else follows.
//!
//! A commit waits for every member of *M*, so one member that can't acknowledge holds up its shard,
//! whatever the reason. The reason is judged here and nowhere else:
//!
//! ```text
//!   standing ──┬─▶ who leaves the in-sync set, is marked in it, or is added   review.rs
//!              ├─▶ frozen: within two seconds, whatever the reason            review.rs
//!              └─▶ the report: the planner's spare member, `dkc status`       queries.rs
//! ```

use crate::ids::{Now, Seq, ShardId, StoreId};
use crate::message::Standing;
use crate::node::Node;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::primary::{Feed, Follower, Primary};

/// How the commit of a shard moves, seen at each review.
#[derive(Clone, Debug)]
pub struct Progress {
    commit: Seq,
    /// The commit moved last, or nothing waited for it.
    moved: Now,
    /// A member of M can't acknowledge, or M is too small, without a break since then.
    blocked: Option<Now>,
    /// The commit at two earlier moments, the older first.
    before: [(Now, Seq); 2],
}

impl Progress {
    pub fn new(now: Now) -> Self {
        Self { commit: Seq(0), moved: now, blocked: None, before: [(now, Seq(0)); 2] }
    }

    fn look(&mut self, now: Now, commit: Seq, last: Seq, blocked: bool, near_ms: u64) {
        if commit > self.commit || last <= commit {
            (self.commit, self.moved) = (commit, now);
        }
        self.blocked = blocked.then(|| self.blocked.unwrap_or(now));
        let [_, (at, _)] = self.before;
        if now.ms_since(at) >= near_ms {
            self.before = [self.before[1], (now, commit)];
        }
    }

    /// This process itself was away: the time is nobody's delay.
    pub fn forgive(&mut self, now: Now) {
        self.moved = now;
        self.blocked = self.blocked.map(|_| now);
    }
}

/// The standing of a shard's replicas: of the primary itself, its members and its learners.
pub(super) type Standings = Vec<(StoreId, Standing)>;

impl Node {
    /// The standing of every replica of a shard that this node leads; nothing if it does not.
    pub(super) fn standings(&self, shard: ShardId) -> Standings {
        let primary = self.replicas.get(&shard).and_then(Replica::primary);
        let of = |primary: &Primary| {
            let others = primary.followers.iter();
            let others = others.map(|(&store, it)| (store, self.standing(primary, store, it)));
            [(self.me.store, self.own_standing())].into_iter().chain(others).collect()
        };
        primary.map_or(Vec::new(), of)
    }

    /// Those of them that hold the shard up, or would if they counted: for the report, for status
    /// and for the simulator's oracles.
    pub fn hindered_by(&self, shard: ShardId) -> Vec<(StoreId, Standing)> {
        let Some(replica) = self.replicas.get(&shard) else { return Vec::new() };
        let Some(primary) = replica.primary() else { return Vec::new() };
        let mut all = self.standings(shard);
        if primary.frozen && self.is_stalled(primary) {
            let members = primary.members(None);
            let held = |store: &StoreId| match primary.followers.get(store) {
                Some(follower) => follower.acked,
                None => replica.log.durable(),
            };
            let good = all.iter_mut().filter(|(_, standing)| *standing == Standing::Good);
            good.filter(|(store, _)| members.contains(store) && held(store) <= replica.commit)
                .for_each(|(_, standing)| *standing = Standing::Behind);
        }
        all.retain(|(_, standing)| *standing != Standing::Good);
        all
    }

    fn standing(&self, primary: &Primary, store: StoreId, follower: &Follower) -> Standing {
        let connected = self.dialled_to.contains_key(&store);
        match follower.feed {
            _ if self.is_short(primary, store, follower) => Standing::Lost,
            _ if self.is_silent(store) => Standing::Silent,
            Feed::Full => Standing::Full,
            _ if self.health.is_full(store) => Standing::Full,
            Feed::NeedsSnapshot | Feed::Snapshot { .. } => Standing::Filling,
            Feed::Cut if connected => Standing::NoCopy,
            // Without a connection it is silent in a second.
            Feed::Cut | Feed::Streaming { .. } | Feed::FromLog { .. } => Standing::Good,
        }
    }

    fn own_standing(&self) -> Standing {
        let stalled = self.groups.waiting_ms(self.now) >= self.settings.silent_after_ms;
        if stalled { Standing::Silent } else { Standing::Good }
    }

    /// It lacks what it has acknowledged. A trusted member that can only go on with a whole copy
    /// does so, however that was found out.
    fn is_short(&self, primary: &Primary, store: StoreId, follower: &Follower) -> bool {
        let record = &primary.record;
        let trusted = record.isr.contains(&store) && !record.tainted.contains(&store);
        let needs_copy = trusted && follower.feed == Feed::NeedsSnapshot;
        (follower.short || needs_copy) && !Planted::NeedyIsWaitedFor.is_in(self.settings.planted)
    }

    /// Looks how the commit of a shard moves.
    pub(super) fn look_at_progress(&mut self, shard: ShardId, standings: &Standings) {
        let (now, min, near_ms) = (self.now, self.min_in_sync(), self.settings.timing.near_ms);
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let (commit, last) = (replica.commit, replica.log.last().seq);
        let Some(primary) = replica.primary_mut() else { return };
        let blocked = primary.is_below_floor(min) || hinder(primary, standings).next().is_some();
        primary.progress.look(now, commit, last, blocked, near_ms);
    }

    /// What waits will not be committed soon, and what comes would only wait, too.
    pub(super) fn is_frozen(&self, primary: &Primary, standings: &Standings) -> bool {
        let (min, me) = (self.min_in_sync(), self.me.store);
        let room = primary.record.room(min);
        let is = |wanted: &[Standing], it: &(StoreId, Standing)| wanted.contains(&it.1);
        if Planted::FrozenIsSilence.is_in(self.settings.planted) {
            let others = || hinder(primary, standings).filter(|&(store, _)| store != me);
            return room == 0 && others().any(|it| is(&[Standing::Silent], &it));
        }
        // Those that will not acknowledge by themselves leave, if the floor can spare them; the primary stays.
        let lasting = [Standing::Silent, Standing::Full];
        let stay = || hinder(primary, standings).filter(|it| is(&lasting, it));
        primary.is_below_floor(min)
            || stay().count() > room
            || stay().any(|(store, _)| store == me)
            || self.is_blocked(primary)
            || self.is_stalled(primary)
    }

    /// A member has not been able to acknowledge for longer than it takes to do without it.
    pub(super) fn is_blocked(&self, primary: &Primary) -> bool {
        let long = |since| self.now.ms_since(since) >= self.settings.timing.blocked_ms;
        primary.progress.blocked.is_some_and(long)
    }

    /// What was ordered waits for its commit for longer than a member may be silent.
    fn is_stalled(&self, primary: &Primary) -> bool {
        let after_ms = match primary.active {
            true => self.settings.timing.stalled_ms,
            false => self.settings.frozen_after_ms,
        };
        self.now.ms_since(primary.progress.moved) >= after_ms
    }

    /// The follower has what was committed a moment ago: it goes along, and is late.
    pub(super) fn is_near(&self, primary: &Primary, follower: &Follower) -> bool {
        let [(_, before), _] = primary.progress.before;
        follower.proven && follower.acked >= before.max(primary.barrier)
    }
}

/// The members of M that can't acknowledge.
fn hinder<'a>(
    primary: &Primary,
    standings: &'a Standings,
) -> impl Iterator<Item = (StoreId, Standing)> + use<'a> {
    let members = primary.members(None);
    let hinders = move |&(store, standing): &(StoreId, Standing)| {
        standing != Standing::Good && members.contains(&store)
    };
    standings.iter().copied().filter(hinders)
}
