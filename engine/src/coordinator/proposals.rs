//! The proposals of one term.
//!
//! A shard takes part in at most one proposal at a time. After one that failed, or whose outcome is
//! unknown, its shards *rest* until a list that began afterwards has come back. Shards whose record
//! had moved are proposed *singly* from then on, so that one busy record does not hold up a whole
//! transaction.

use std::collections::{BTreeMap, BTreeSet};

use crate::coordinator::decision::Decision;
use crate::coordinator::records::ClusterRecords;
use crate::coordinator::{CoordinatorTurn, Effect, Writes};
use crate::ids::{Now, ShardId};
use crate::node::CasOutcome;
use crate::shard_record::ShardRecord;

/// All proposals without an answer, and the shards that must wait after one that failed.
#[derive(Debug)]
pub(super) struct LeaderProposals {
    term: u64,
    pending: BTreeMap<u64, PendingProposal>,
    /// The shards of the pending proposals.
    proposed: BTreeSet<ShardId>,
    resting: Resting,
    /// Shards that are proposed in transactions of their own.
    singly: BTreeSet<ShardId>,
    /// There are no proposals before this time.
    paused_until: Now,
}

/// Shards whose last proposal failed, or has an unknown outcome.
#[derive(Debug, Default)]
struct Resting {
    /// Shards that rest until the list in flight is back, or the next one if none is in flight.
    now: BTreeSet<ShardId>,
    /// Shards that rest until the list after that one is back.
    next: BTreeSet<ShardId>,
    /// The shards of failed proposals, each with the mod_revision that was compared.
    failed: Vec<(ShardId, u64)>,
}

/// A proposal without an answer.
#[derive(Debug)]
pub(super) struct PendingProposal {
    pub(super) writes: Writes,
    /// The decisions to log once it is written.
    pub(super) decisions: Vec<Decision>,
}

/// One shard's part of a proposal: the record to write, and the decision to log once it is written.
#[derive(Debug)]
pub(super) struct ShardWrite {
    pub(super) record: ShardRecord,
    pub(super) decision: Option<Decision>,
}

impl LeaderProposals {
    pub(super) fn new(term: u64, now: Now) -> Self {
        Self {
            term,
            pending: BTreeMap::new(),
            proposed: BTreeSet::new(),
            resting: Resting::default(),
            singly: BTreeSet::new(),
            paused_until: now,
        }
    }

    pub(super) fn term(&self) -> u64 {
        self.term
    }

    /// Returns whether a proposal of the shard is in flight or unsettled.
    pub(super) fn is_unsettled(&self, shard: ShardId) -> bool {
        self.resting.now.contains(&shard)
            || self.resting.next.contains(&shard)
            || self.proposed.contains(&shard)
    }

    pub(super) fn is_paused(&self, now: Now) -> bool {
        now < self.paused_until
    }

    /// Returns whether a proposal with such a write is in flight.
    pub(super) fn is_proposing(&self, is_such: impl Fn(&Writes) -> bool) -> bool {
        self.pending.values().any(|proposal| is_such(&proposal.writes))
    }

    // ---- proposing -----------------------------------------------------------------------------

    /// Proposes shard records in as few transactions as possible.
    pub(super) fn propose_shards(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        records: &ClusterRecords,
        writes: Vec<ShardWrite>,
    ) {
        let single = |write: &ShardWrite| self.singly.contains(&write.record.shard());
        let (single, mut together): (Vec<ShardWrite>, Vec<ShardWrite>) =
            writes.into_iter().partition(single);
        let mut transactions: Vec<Vec<ShardWrite>> =
            single.into_iter().map(|one| vec![one]).collect();
        while !together.is_empty() {
            let rest = together.split_off(together.len().min(turn.settings.shards_per_txn));
            transactions.push(std::mem::replace(&mut together, rest));
        }
        for transaction in transactions {
            let mut decisions = Vec::new();
            let mut shards = Vec::new();
            for ShardWrite { record, decision } in transaction {
                shards.push((records.shards.modified(record.shard()), record));
                decisions.extend(decision);
            }
            self.propose(turn, Writes::Shards(shards), decisions);
        }
    }

    pub(super) fn propose(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        writes: Writes,
        decisions: Vec<Decision>,
    ) {
        let proposal = turn.fresh_id();
        self.proposed.extend(writes.shards().iter().map(|(_, record)| record.shard()));
        self.pending.insert(proposal, PendingProposal { writes: writes.clone(), decisions });
        turn.effects.push(Effect::Propose { proposal, term: self.term, writes });
    }

    // ---- outcomes ------------------------------------------------------------------------------

    /// Takes a proposal that was answered.
    pub(super) fn answered(&mut self, id: u64) -> Option<PendingProposal> {
        let proposal = self.pending.remove(&id)?;
        let shards = proposal.writes.shards();
        shards.iter().for_each(|(_, record)| _ = self.proposed.remove(&record.shard()));
        Some(proposal)
    }

    pub(super) fn succeeded(&mut self, writes: &Writes) {
        writes.shards().iter().for_each(|(_, record)| _ = self.singly.remove(&record.shard()));
    }

    /// Lets the shards of a proposal rest that failed, or whose outcome is unknown.
    /// `list_in_flight`: a list has begun before the answer came.
    pub(super) fn failed(
        &mut self,
        turn: &CoordinatorTurn<'_>,
        writes: &Writes,
        outcome: CasOutcome,
        list_in_flight: bool,
    ) {
        let shards = writes.shards();
        if shards.is_empty() {
            self.pause(turn);
        }
        let resting = match list_in_flight {
            true => &mut self.resting.next,
            false => &mut self.resting.now,
        };
        resting.extend(shards.iter().map(|(_, record)| record.shard()));
        if outcome == CasOutcome::Failed {
            let failed = shards.iter().map(|(at, record)| (record.shard(), *at));
            self.resting.failed.extend(failed);
        }
    }

    fn pause(&mut self, turn: &CoordinatorTurn<'_>) {
        self.paused_until = turn.now.plus_ms(turn.settings.timing.pause_ms);
    }

    // ---- lists ---------------------------------------------------------------------------------

    /// Notes that a list begins, after every proposal whose shards rest so far.
    pub(super) fn list_began(&mut self) {
        self.resting.now.append(&mut self.resting.next);
    }

    /// Notes that a list has come back. Finds which records of failed proposals had moved. They are
    /// proposed singly; if none had moved, the reason for the failure is unknown and proposals
    /// pause.
    pub(super) fn listed(&mut self, turn: &CoordinatorTurn<'_>, records: &ClusterRecords) {
        self.resting.now.clear();
        let resting = &self.resting.next;
        let (later, failed): (Vec<_>, Vec<_>) =
            self.resting.failed.drain(..).partition(|(shard, _)| resting.contains(shard));
        self.resting.failed = later;
        let moved = |(shard, expect): &(ShardId, u64)| records.shards.modified(*shard) != *expect;
        let any = !failed.is_empty();
        let moved: Vec<ShardId> =
            failed.into_iter().filter(moved).map(|(shard, _)| shard).collect();
        if any && moved.is_empty() {
            self.pause(turn);
        }
        self.singly.extend(moved);
    }
}
