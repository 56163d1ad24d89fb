//! Proves that what was captured is current, without a clock (DESIGN §6 rule 13, §8).
//!
//! A *claim* says: this node led the shard in this epoch when it captured something. The order is
//! the whole argument. The capture comes first; then every other member of M says, to a round that
//! began after it, that it has promised no higher epoch. A newer primary would have needed the
//! promise of one of them before it could commit anything, so nothing was acknowledged by the moment
//! of the capture that the captured state lacks. A pause after the proof does no harm: what is told
//! then was right while the question was under way.
//!
//! One round serves all claims that wait for it. A round that some peer does not answer in time is
//! replaced by one linearizable etcd read, begun after the captures too.
//!
//! Claims are made by [`reads`](super::reads) for values and by [`bounded`](super::bounded) for
//! commits that a follower asks for.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::ShardConfig;
use crate::ids::{Epoch, Now, ShardId, StoreId};
use crate::message::ToFollower;
use crate::node::{Effect, Node};
use crate::planted::Planted;
use crate::replica::Replica;

#[derive(Clone, Debug, Default)]
pub(super) struct Proving {
    /// By number, which counts up: the oldest is the first.
    claims: BTreeMap<u64, Claim>,
    /// In no round yet.
    unproven: BTreeSet<u64>,
    round: Option<Round>,
    /// Claims that a round did not prove in time.
    for_etcd: BTreeSet<u64>,
    /// The etcd read under way, and the claims that it will prove.
    check: Option<(u64, BTreeSet<u64>)>,
    next_check: Now,
}

#[derive(Clone, Copy, Debug)]
struct Claim {
    shard: ShardId,
    epoch: Epoch,
    since: Now,
}

/// One question to all peers.
#[derive(Clone, Debug)]
struct Round {
    number: u64,
    until: Now,
    claims: BTreeSet<u64>,
    /// Peers whose answer a shard still waits for.
    missing: BTreeMap<ShardId, BTreeSet<StoreId>>,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// Nothing was acknowledged before the capture that it lacks.
    Current,
    /// Somebody else leads by now.
    Replaced,
    /// Neither the peers nor etcd have answered.
    Unknown,
}

impl Proving {
    /// When to look again although nothing has come.
    pub(super) fn deadline(&self) -> Option<Now> {
        let round = self.round.as_ref().map(|round| round.until);
        let check = (!self.for_etcd.is_empty() && self.check.is_none()).then_some(self.next_check);
        round.into_iter().chain(check).min()
    }

    /// Whoever waits for it is gone.
    pub(super) fn forget(&mut self, claim: u64) {
        self.claims.remove(&claim);
    }

    /// Nobody waits: so nothing is asked any more.
    fn rest(&mut self) {
        self.unproven.clear();
        self.for_etcd.clear();
        self.round = None;
    }

    fn shards(&self, claims: &BTreeSet<u64>) -> BTreeSet<ShardId> {
        claims.iter().filter_map(|claim| Some(self.claims.get(claim)?.shard)).collect()
    }
}

impl Node {
    /// To be proved by a round, or an etcd read, that begins after this moment. The number is one
    /// by [`Node::fresh_id`]; whoever made the claim is told the verdict, once.
    pub(super) fn claim(&mut self, claim: u64, shard: ShardId, epoch: Epoch) {
        self.proving.claims.insert(claim, Claim { shard, epoch, since: self.now });
        let joins_old_round = Planted::CheckReadBeforeCapture.is_in(self.settings.planted);
        match &mut self.proving.round {
            Some(round) if joins_old_round => round.claims.insert(claim),
            _ => self.proving.unproven.insert(claim),
        };
    }

    fn judged(&mut self, claim: u64, verdict: Verdict, effects: &mut Vec<Effect>) {
        if self.proving.claims.remove(&claim).is_some() {
            self.on_read_judged(claim, verdict, effects);
            self.on_probe_judged(claim, verdict);
        }
    }

    /// Does this node lead the shard, and in this very epoch?
    pub(super) fn leads(&self, shard: ShardId, epoch: Epoch) -> bool {
        let primary = self.replicas.get(&shard).and_then(Replica::primary);
        primary.is_some_and(|primary| primary.epoch == epoch)
    }

    /// Begins what can begin: a round for new claims, an etcd read for what no round proved.
    pub(super) fn advance_claims(&mut self, effects: &mut Vec<Effect>) {
        if self.proving.claims.is_empty() {
            self.proving.rest();
            return;
        }
        self.close_late_round(effects);
        self.begin_round(effects);
        self.begin_etcd_check(effects);
        self.give_up(effects);
    }

    fn begin_round(&mut self, effects: &mut Vec<Effect>) {
        if self.proving.round.is_some() || self.proving.unproven.is_empty() {
            return;
        }
        let claims = std::mem::take(&mut self.proving.unproven);
        let number = self.fresh_id();
        let mut missing = BTreeMap::new();
        let mut questions: BTreeMap<StoreId, Vec<(ShardId, Epoch)>> = BTreeMap::new();
        for shard in self.proving.shards(&claims) {
            let Some(primary) = self.replicas.get(&shard).and_then(Replica::primary) else {
                continue;
            };
            let mut members = primary.members(None);
            members.remove(&self.me.store);
            for &member in &members {
                questions.entry(member).or_default().push((shard, primary.epoch));
            }
            missing.insert(shard, members);
        }
        for (store, shards) in questions {
            let Some(&conn) = self.dialled_to.get(&store) else { continue };
            let message = ToFollower::ReadIndex { round: number, shards };
            effects.push(Effect::ToFollower { conn, message });
        }
        let until = self.now.plus_ms(self.settings.read_index_ms);
        self.proving.round = Some(Round { number, until, claims, missing });
        self.finish_round_if_answered(effects);
    }

    pub(super) fn on_read_index_answer(
        &mut self,
        store: StoreId,
        number: u64,
        newer: &[(ShardId, Epoch)],
        effects: &mut Vec<Effect>,
    ) {
        let Some(round) = &mut self.proving.round else { return };
        if round.number != number {
            return;
        }
        for (shard, missing) in &mut round.missing {
            if !newer.iter().any(|(newer, _)| newer == shard) {
                missing.remove(&store);
            }
        }
        self.finish_round_if_answered(effects);
    }

    fn finish_round_if_answered(&mut self, effects: &mut Vec<Effect>) {
        let Some(round) = &self.proving.round else { return };
        let majority = Planted::ReadIndexMajority.is_in(self.settings.planted);
        if round.missing.values().any(|missing| missing.len() > usize::from(majority)) {
            return;
        }
        if let Some(round) = self.proving.round.take() {
            round
                .claims
                .into_iter()
                .for_each(|claim| self.judged(claim, Verdict::Current, effects));
        }
        self.begin_round(effects);
    }

    /// A peer has not answered in time: claims of other shards are proved all the same, the rest is
    /// left to etcd.
    fn close_late_round(&mut self, effects: &mut Vec<Effect>) {
        let Some(round) = self.proving.round.take_if(|round| self.now >= round.until) else {
            return;
        };
        for claim in round.claims {
            let shard = self.proving.claims.get(&claim).map(|claim| claim.shard);
            let missing = shard.and_then(|shard| round.missing.get(&shard));
            if missing.is_some_and(BTreeSet::is_empty) {
                self.judged(claim, Verdict::Current, effects);
            } else {
                self.proving.for_etcd.insert(claim);
            }
        }
    }

    fn begin_etcd_check(&mut self, effects: &mut Vec<Effect>) {
        let idle = self.proving.check.is_none() && !self.proving.for_etcd.is_empty();
        if !idle || self.now < self.proving.next_check {
            return;
        }
        self.proving.next_check = self.now.plus_ms(self.settings.etcd_check_every_ms);
        let claims = std::mem::take(&mut self.proving.for_etcd);
        let shards = self.proving.shards(&claims);
        let check = self.fresh_id();
        self.proving.check = Some((check, claims));
        effects.push(Effect::CheckEtcd { check, shards: shards.into_iter().collect() });
    }

    pub(super) fn on_etcd_checked(
        &mut self,
        check: u64,
        configs: Option<Vec<ShardConfig>>,
        effects: &mut Vec<Effect>,
    ) {
        let Some((_, claims)) = self.proving.check.take_if(|(number, _)| *number == check) else {
            return;
        };
        let Some(configs) = configs else {
            self.proving.for_etcd.extend(claims); // Etcd did not answer: ask again.
            return;
        };
        for number in claims {
            let Some(&claim) = self.proving.claims.get(&number) else { continue };
            let current = configs.iter().any(|config| {
                config.shard() == claim.shard
                    && config.epoch == claim.epoch
                    && config.primary == self.me
            });
            let unread = Planted::EtcdCheckUnread.is_in(self.settings.planted);
            let verdict = if current || unread { Verdict::Current } else { Verdict::Replaced };
            self.judged(number, verdict, effects);
        }
    }

    fn give_up(&mut self, effects: &mut Vec<Effect>) {
        let limit = self.settings.read_give_up_ms;
        while let Some((&number, claim)) = self.proving.claims.first_key_value()
            && self.now.ms_since(claim.since) >= limit
        {
            self.judged(number, Verdict::Unknown, effects);
        }
    }
}
