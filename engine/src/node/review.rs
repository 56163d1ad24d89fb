//! What a primary does about its in-sync set: eject the silent, add the caught up, swap at the
//! floor, freeze where none of it is possible.
//!
//! Decided for a whole node pair at once (silence is the peer's, not the shard's), written shard by
//! shard. All of it is hints and compare-and-set: a wrong suspicion costs an ejection, never data.

use std::collections::BTreeMap;

use crate::config::ShardConfig;
use crate::ids::{Boot, Now, ShardId, StoreId};
use crate::message::{Report, Standing};
use crate::node::standing::Standings;
use crate::node::{Effect, Node, Timing};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::primary::{Primary, Proposal};
use crate::replica::trust::Trust;

/// A peer that was ejected waits before it is added again: 1, 2, 4 … 60 s for the same process,
/// forgotten once it has stayed in sync for a minute. A new process waits for nothing.
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
    fn on_ejected(&mut self, store: StoreId, boot: Boot, now: Now, timing: &Timing) {
        let before = self.ejected.get(&store);
        let wait_ms = match before {
            // Every shard ejects the peer in the same moment: that is one ejection.
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

impl Node {
    /// Looks at one shard that this node leads.
    pub(super) fn review(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        self.review_step_down(shard);
        let standings = self.standings(shard);
        self.look_at_progress(shard, &standings);
        self.review_frozen(shard, &standings);
        self.review_joining(shard, &standings);
        self.review_isr(shard, &standings, effects);
    }

    /// The coordinator asked for a hand-over, but nobody was named: go on.
    fn review_step_down(&mut self, shard: ShardId) {
        let now = self.now;
        if let Some(primary) = self.replicas.get_mut(&shard).and_then(Replica::primary_mut) {
            primary.stepping_down = primary.stepping_down.filter(|&until| now < until);
        }
    }

    fn review_frozen(&mut self, shard: ShardId, standings: &Standings) {
        let Some(primary) = self.replicas.get(&shard).and_then(Replica::primary) else { return };
        let frozen = self.is_frozen(primary, standings);
        if let Some(primary) = self.replicas.get_mut(&shard).and_then(Replica::primary_mut) {
            primary.frozen = frozen;
        }
    }

    fn review_isr(&mut self, shard: ShardId, standings: &Standings, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get(&shard) else { return };
        let Some(primary) = replica.primary() else { return };
        if primary.is_pending() || self.now < primary.propose_after {
            return;
        }
        let is_ready =
            |store: &StoreId| primary.is_caught_up(*store, replica.commit, self.settings.planted);
        let mut remove = self.removable(primary, standings);
        // One at a time: the compare names one candidate's key.
        let good = self.candidates(Standing::Good, primary, standings);
        let mut add = Vec::from_iter(good.into_iter().find(is_ready));
        // At the floor one whose disk is full, but that has everything, takes the place of a member that does not even
        // acknowledge a barrier: reads are answered then, and a log that is full of what could not be committed is trimmed.
        let at_floor = primary.record.room(self.min_in_sync()) == 0;
        if add.is_empty() && at_floor && !Planted::FullReplacesNobody.is_in(self.settings.planted) {
            let full: Vec<_> = of(standings, Standing::Full).collect();
            let gone =
                |store: &StoreId| primary.record.isr.contains(store) && !full.contains(store);
            let spare = self.candidates(Standing::Full, primary, standings);
            let spare = spare.into_iter().find(is_ready);
            if spare.is_some() && remove.iter().any(gone) {
                remove.retain(gone);
                add.extend(spare);
            }
        }
        let taint: Vec<_> = of(standings, Standing::Lost).collect();
        let mut floor = self.min_in_sync();
        if Planted::TrustMakesRoom.is_in(self.settings.planted) {
            let record = &primary.record;
            floor -= add.iter().filter(|store| record.isr.contains(store)).count();
        }
        let next = primary.record.changed(&add, &remove, &taint, floor);
        let nothing = next.isr == primary.record.isr && next.tainted == primary.record.tainted;
        // A proposal whose outcome is unknown is settled by a newer version, even without change.
        if nothing && !primary.is_unsettled() {
            return;
        }
        self.propose(shard, next, add.first().copied(), effects);
    }

    /// Learners and tainted members that may be added once they are caught up. Nobody while a
    /// proposal is unsettled or etcd away: each addition without an answer counts until there is
    /// one, and its death would stop the shard.
    fn candidates(
        &self,
        standing: Standing,
        primary: &Primary,
        standings: &Standings,
    ) -> Vec<StoreId> {
        let heard = self.health.is_etcd_heard(self.now, self.settings.timing.etcd_fresh_ms);
        let may_return = |store: &StoreId| {
            let follower = &primary.followers.get(store);
            follower.zip(self.peers.get(store)).is_some_and(|(follower, (boot, _))| {
                follower.boot == *boot && self.backoff.may_return(*store, *boot, self.now)
            })
        };
        let record = &primary.record;
        let wanted =
            |store: &StoreId| record.learners.contains(store) || record.tainted.contains(store);
        if !heard || primary.is_unsettled() {
            return Vec::new();
        }
        of(standings, standing).filter(wanted).filter(may_return).collect()
    }

    /// A learner that is always a moment late is never seen with all that is committed. The commit
    /// waits for it for a moment, as it will when it is a member.
    fn review_joining(&mut self, shard: ShardId, standings: &Standings) {
        let (now, timing) = (self.now, self.settings.timing);
        let Some(primary) = self.replicas.get(&shard).and_then(Replica::primary) else { return };
        let joins = |store: StoreId| {
            let follower = primary.followers.get(&store);
            follower.is_some_and(|follower| self.is_near(primary, follower))
        };
        let candidates = self.candidates(Standing::Good, primary, standings);
        let joining = match primary.joining {
            Some((store, since)) => {
                let goes_on = candidates.contains(&store);
                primary.joining.filter(|_| goes_on && now.ms_since(since) < 2 * timing.near_ms)
            }
            None if now < primary.join_after => None,
            None => candidates.into_iter().find(|&store| joins(store)).map(|store| (store, now)),
        };
        let given_up = primary.joining.is_some() && joining.is_none();
        if let Some(primary) = self.replicas.get_mut(&shard).and_then(Replica::primary_mut) {
            primary.joining = joining;
            if given_up {
                primary.join_after = now.plus_ms(timing.join_again_ms);
                self.dirty.insert(shard);
            }
        }
    }

    /// Members that can't acknowledge, those first that will not by themselves. How many of them
    /// leave is for the floor to say.
    fn removable(&self, primary: &Primary, standings: &Standings) -> Vec<StoreId> {
        let (silent, blocked) = (self.may_eject(), self.is_blocked(primary));
        let leave = |wanted: Standing, may: bool| of(standings, wanted).filter(move |_| may);
        leave(Standing::Lost, true)
            .chain(leave(Standing::Full, true))
            .chain(leave(Standing::Filling, true))
            .chain(leave(Standing::Silent, silent))
            .chain(leave(Standing::NoCopy, blocked))
            .collect()
    }

    /// This node is well itself, and somebody hears it: else the silence is its own.
    fn may_eject(&self) -> bool {
        let well = self.groups.waiting_ms(self.now) < self.settings.silent_after_ms / 2;
        well && self.health.hears_anybody(self.now, self.settings.silent_after_ms)
    }

    fn propose(
        &mut self,
        shard: ShardId,
        config: ShardConfig,
        add: Option<StoreId>,
        effects: &mut Vec<Effect>,
    ) {
        let id = self.fresh_id();
        let candidate = add.and_then(|store| {
            let (_, key_revision) = self.peers.get(&store)?;
            Some((store, *key_revision))
        });
        let now = self.now;
        let Some(primary) = self.replicas.get_mut(&shard).and_then(Replica::primary_mut) else {
            return;
        };
        for store in primary.record.isr.iter().filter(|store| !config.isr.contains(store)) {
            if let Some(&(boot, _)) = self.peers.get(store) {
                self.backoff.on_ejected(*store, boot, now, &self.settings.timing);
            }
        }
        // Counted first, proposed second. The same proposal made again needs no second place.
        let base = primary.record.version;
        primary.proposals.retain(|earlier| earlier.pending || earlier.config != config);
        primary.proposals.push(Proposal { id, base, config: config.clone(), pending: true });
        primary.propose_after = now;
        primary.joining = None;
        let expect = primary.mod_revision;
        self.proposals.insert(id, shard);
        effects.push(Effect::Propose { proposal: id, expect, config, candidate });
    }

    /// Tells the coordinator, on change and every so often, what it can't see from etcd.
    pub(super) fn report(&mut self, effects: &mut Vec<Effect>) {
        let mut report = Report {
            silent: self.health.silent(self.now, self.settings.silent_after_ms),
            leaving: self.is_leaving(),
            full: self.disk_full,
            ..Report::default()
        };
        for replica in self.replicas.values() {
            let Some(primary) = replica.primary() else { continue };
            let others = || primary.record.isr.iter().filter(|&&store| store != self.me.store);
            if primary.frozen {
                report.frozen.push((replica.shard, self.hindered_by(replica.shard)));
            }
            let alone = others().count() > 0 && others().all(|&store| self.is_silent(store));
            let damaged = matches!(replica.trust, Trust::Wrong(_));
            let deaf = alone && !self.health.hears_anybody(self.now, self.settings.silent_after_ms);
            if damaged || deaf {
                report.resigned.push(replica.shard);
            }
        }
        if report == self.reported && self.now < self.next_report {
            return;
        }
        self.next_report = self.now.plus_ms(self.settings.timing.report_every_ms);
        self.reported = report.clone();
        effects.push(Effect::Report(report));
    }
}

fn of(standings: &Standings, wanted: Standing) -> impl Iterator<Item = StoreId> {
    standings.iter().filter(move |(_, standing)| *standing == wanted).map(|&(store, _)| store)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: StoreId = StoreId(1);

    #[track_caller]
    fn check(ejected_s: &[u64], returns_s: u64) {
        let mut backoff = Backoff::default();
        let second = |s: u64| Now(s * 1_000_000);
        let timing = Timing::default();
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
    fn a_long_good_time_is_forgiven() {
        check(&[10, 12, 500], 501);
    }
}
