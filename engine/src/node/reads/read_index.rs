//! Read index: proves that what was captured is current, without a clock.
//!
//! A *claim* states that this node led the shard in this epoch when it captured something. The
//! order is the whole argument. The capture comes first; then every other member of M (the in-sync
//! set plus unconfirmed additions) confirms, in a round that began after the capture, that it has
//! promised no higher epoch. A newer primary would have needed the promise of one of them before it
//! could commit anything, so nothing was acknowledged by the moment of the capture that the
//! captured state lacks. A pause after the proof does no harm: the values were current while the
//! read was in flight.
//!
//! One round serves all claims that wait for it, and proves those of each shard as soon as the
//! peers of that shard have answered. Claims of a round that a peer does not answer in time are in
//! the next one, too, and a linearizable etcd read begins for them, also after the captures. So a
//! claim may be in a round and in an etcd read at once: the first of them settles it.
//!
//! Claims are made by [`captured`](super::captured) for values and by [`bounded`](super::bounded)
//! for commits that a follower asks for.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Conn, Epoch, Now, ShardId, StoreId};
use crate::message::{FromFollower, ToFollower};
use crate::node::event::Effect;
use crate::node::peers::Peers;
use crate::node::reads::Reads;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::shard_record::ShardRecord;

#[derive(Clone, Debug, Default)]
pub(super) struct ReadIndex {
    /// The claims by number, which counts up: the oldest is the first.
    claims: BTreeMap<u64, LeadershipClaim>,
    /// Claims for the next round.
    unproven: BTreeSet<u64>,
    round: Option<ReadIndexRound>,
    /// Claims that a round did not prove in time.
    for_etcd: BTreeSet<u64>,
    /// The etcd read in flight, and the claims that it will prove.
    check: Option<(u64, BTreeSet<u64>)>,
    next_check: Now,
}

#[derive(Clone, Copy, Debug)]
struct LeadershipClaim {
    shard: ShardId,
    epoch: Epoch,
    since: Now,
}

/// A round: one question to all peers.
#[derive(Clone, Debug)]
struct ReadIndexRound {
    number: u64,
    until: Now,
    claims: BTreeSet<u64>,
    /// The peers whose answer each shard still waits for.
    missing: BTreeMap<ShardId, BTreeSet<StoreId>>,
}

/// The outcome of a claim.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ClaimOutcome {
    /// The captured state lacks nothing that was acknowledged before the capture.
    Current,
    /// Another process leads by now.
    Replaced,
    /// The peers have not answered, and etcd has not either.
    Unknown,
}

impl ReadIndex {
    /// Returns when to handle a tick although no event has come.
    pub(in crate::node) fn deadline(&self) -> Option<Now> {
        let round = self.round.as_ref().map(|round| round.until);
        let check = (!self.for_etcd.is_empty() && self.check.is_none()).then_some(self.next_check);
        round.into_iter().chain(check).min()
    }

    /// Discards a claim: the request that made it is gone.
    pub(in crate::node) fn forget(&mut self, claim: u64) {
        self.claims.remove(&claim);
    }

    /// Discards the rounds and checks to come: no claim is left.
    fn clear(&mut self) {
        self.unproven.clear();
        self.for_etcd.clear();
        self.round = None;
    }

    fn shards(&self, claims: &BTreeSet<u64>) -> BTreeSet<ShardId> {
        claims.iter().filter_map(|claim| Some(self.claims.get(claim)?.shard)).collect()
    }
}

impl Reads {
    /// Makes a claim, to be proved by a round or an etcd read that begins after this moment. The
    /// number is one by [`NodeTurn::fresh_id`]; the outcome is reported under it, once.
    pub(super) fn prove_leadership(
        &mut self,
        turn: &NodeTurn<'_>,
        claim: u64,
        shard: ShardId,
        epoch: Epoch,
    ) {
        self.read_index.claims.insert(claim, LeadershipClaim { shard, epoch, since: turn.now });
        let joins_old_round = turn.planted(Planted::CheckReadBeforeCapture);
        match &mut self.read_index.round {
            Some(round) if joins_old_round => round.claims.insert(claim),
            _ => self.read_index.unproven.insert(claim),
        };
    }

    fn settle_claim(&mut self, turn: &mut NodeTurn<'_>, claim: u64, outcome: ClaimOutcome) {
        if self.read_index.claims.remove(&claim).is_some() {
            self.on_read_claim_settled(turn, claim, outcome);
            self.on_commit_claim_settled(turn, claim, outcome);
        }
    }

    /// Begins what can begin: a round for new claims, an etcd read for those of a late round.
    pub(in crate::node) fn advance_claims(&mut self, turn: &mut NodeTurn<'_>, peers: &Peers) {
        if self.read_index.claims.is_empty() {
            self.read_index.clear();
            return;
        }
        self.close_late_round(turn);
        self.begin_round(turn, peers);
        self.begin_etcd_check(turn);
        self.give_up(turn);
    }

    fn begin_round(&mut self, turn: &mut NodeTurn<'_>, peers: &Peers) {
        if self.read_index.round.is_some() || self.read_index.unproven.is_empty() {
            return;
        }
        let mut claims = std::mem::take(&mut self.read_index.unproven);
        let leads = |claim: &LeadershipClaim| turn.shards.leads(claim.shard, claim.epoch);
        let is_replaced = |number: &u64| !self.read_index.claims.get(number).is_some_and(leads);
        let replaced: Vec<u64> = claims.extract_if(.., is_replaced).collect();
        for claim in replaced {
            self.settle_claim(turn, claim, ClaimOutcome::Replaced);
        }
        let number = turn.fresh_id();
        let mut missing = BTreeMap::new();
        let mut questions: BTreeMap<StoreId, Vec<(ShardId, Epoch)>> = BTreeMap::new();
        for shard in self.read_index.shards(&claims) {
            let Some(primary) = turn.shards.primary(shard) else { continue };
            let mut members: BTreeSet<_> = primary.members(None).iter().copied().collect();
            members.remove(&turn.me.store);
            for &member in &members {
                questions.entry(member).or_default().push((shard, primary.epoch));
            }
            missing.insert(shard, members);
        }
        for (store, shards) in questions {
            let Some(conn) = peers.connection_to(store) else { continue };
            let message = ToFollower::ReadIndex { round: number, shards };
            turn.effects.push(Effect::ToFollower { conn, message });
        }
        let until = turn.now.plus_ms(turn.settings.read_index_ms);
        self.read_index.round = Some(ReadIndexRound { number, until, claims, missing });
        self.settle_answered(turn, peers);
    }

    /// Handles the answer of a peer to a round, with the shards for which it has promised a higher
    /// epoch.
    pub(in crate::node) fn on_round_answered(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &Peers,
        store: StoreId,
        number: u64,
        newer: &[(ShardId, Epoch)],
    ) {
        let Some(round) = &mut self.read_index.round else { return };
        if round.number != number {
            return;
        }
        for (shard, missing) in &mut round.missing {
            if !newer.iter().any(|(newer, _)| newer == shard) {
                missing.remove(&store);
            }
        }
        self.settle_answered(turn, peers);
    }

    /// Settles the claims of shards that have all answers. The round is over when no claim is left
    /// in it.
    fn settle_answered(&mut self, turn: &mut NodeTurn<'_>, peers: &Peers) {
        let ReadIndex { claims, round, .. } = &mut self.read_index;
        let Some(ReadIndexRound { claims: waiting, missing, .. }) = round else { return };
        let absent_max = usize::from(turn.planted(Planted::ReadIndexMajority));
        let is_answered = |number: &u64| {
            let missing = claims.get(number).and_then(|claim| missing.get(&claim.shard));
            missing.is_none_or(|stores| stores.len() <= absent_max)
        };
        let answered: Vec<u64> = waiting.extract_if(.., is_answered).collect();
        let is_over = waiting.is_empty();
        for claim in answered {
            self.settle_claim(turn, claim, ClaimOutcome::Current);
        }
        if is_over {
            self.read_index.round = None;
            self.begin_round(turn, peers);
        }
    }

    /// Closes a round that a peer has not answered in time: what is left in it is for etcd and for
    /// the next round, whichever answers first. Etcd may be away as well.
    fn close_late_round(&mut self, turn: &NodeTurn<'_>) {
        if let Some(round) = self.read_index.round.take_if(|round| turn.now >= round.until) {
            self.read_index.for_etcd.extend(&round.claims);
            self.read_index.unproven.extend(round.claims);
        }
    }

    fn begin_etcd_check(&mut self, turn: &mut NodeTurn<'_>) {
        let ReadIndex { claims, for_etcd, .. } = &mut self.read_index;
        for_etcd.retain(|claim| claims.contains_key(claim));
        let idle = self.read_index.check.is_none() && !self.read_index.for_etcd.is_empty();
        if !idle || turn.now < self.read_index.next_check {
            return;
        }
        self.read_index.next_check = turn.now.plus_ms(turn.settings.etcd_check_every_ms);
        let claims = std::mem::take(&mut self.read_index.for_etcd);
        let shards = self.read_index.shards(&claims);
        let check = turn.fresh_id();
        self.read_index.check = Some((check, claims));
        turn.effects.push(Effect::CheckEtcd { check, shards: shards.into_iter().collect() });
    }

    pub(in crate::node) fn on_etcd_checked(
        &mut self,
        turn: &mut NodeTurn<'_>,
        check: u64,
        records: Option<Vec<ShardRecord>>,
    ) {
        let Some((_, claims)) = self.read_index.check.take_if(|(number, _)| *number == check)
        else {
            return;
        };
        let Some(records) = records else {
            self.read_index.for_etcd.extend(claims); // Etcd did not answer: read again.
            return;
        };
        for number in claims {
            let Some(&claim) = self.read_index.claims.get(&number) else { continue };
            let current = records.iter().any(|record| {
                record.shard() == claim.shard
                    && record.epoch == claim.epoch
                    && record.primary == turn.me
            });
            let unread = turn.planted(Planted::EtcdCheckUnread);
            let outcome =
                if current || unread { ClaimOutcome::Current } else { ClaimOutcome::Replaced };
            self.settle_claim(turn, number, outcome);
        }
    }

    fn give_up(&mut self, turn: &mut NodeTurn<'_>) {
        let limit = turn.settings.read_give_up_ms;
        while let Some((&number, claim)) = self.read_index.claims.first_key_value()
            && turn.now.ms_since(claim.since) >= limit
        {
            self.settle_claim(turn, number, ClaimOutcome::Unknown);
        }
    }
}

/// Answers a round of a primary: the shards for which this node has promised a higher epoch.
pub(in crate::node) fn answer_round(
    turn: &mut NodeTurn<'_>,
    conn: Conn,
    round: u64,
    shards: &[(ShardId, Epoch)],
) {
    let newer = shards.iter().filter_map(|&(shard, epoch)| {
        let promised = turn.shards.get(shard)?.promised;
        (promised > epoch).then_some((shard, promised))
    });
    let message = FromFollower::ReadIndex { round, newer: newer.collect() };
    turn.effects.push(Effect::ToPrimary { conn, message });
}
