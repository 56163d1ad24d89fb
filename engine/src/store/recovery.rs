//! The recovery plan: what the state and the log, read together, say a store holds.
//!
//! The state has a shard record per copy (as of some applied entry); the log has what came after,
//! the promises and the copy numbers. They were written at different moments, so they may disagree,
//! and each disagreement means something:
//!
//! | copy number | meaning |
//! |---|---|
//! | state = log | replay the log above `applied` |
//! | state > log | crash between installing a snapshot and the log's `Copy`: what the log holds is void |
//! | state < log, copy began empty | the state's rows are of a former copy: to be removed |
//! | state < log, copy began higher | the installed state is gone: damage |
//! | log says dropped | the rows are to be removed |
//!
//! Whatever happens to copies, a promise is never forgotten. A copy is *suspect* when its entries do
//! not chain from `applied` to where the log says it reached, or when anything durable anywhere in
//! the log is damaged.

use std::collections::BTreeMap;

use crate::apply::ShardState;
use crate::entry::{Body, Entry};
use crate::ids::{CopyNo, Seq, ShardId, Slots};
use crate::node::{RecoveredContent, RecoveredReplica};
use crate::store::log::index::Index;
use crate::store::log::scan::{Damage, Group, Scanned};
use crate::store::log::writer::Resume;
use crate::store::log::{Held, Identity, Record, SmallState, Unreadable};

/// Takes the groups of the log, in order.
#[derive(Debug, Default)]
pub struct Recovery {
    state: BTreeMap<ShardId, (CopyNo, ShardState)>,
    shards: BTreeMap<ShardId, Found>,
    identity: Option<Identity>,
    index: Index,
    unreadable: Vec<Unreadable>,
}

/// What the log says of one shard so far.
#[derive(Debug, Default)]
struct Found {
    small: SmallState,
    /// Of the present copy, above what the state has.
    entries: BTreeMap<Seq, Entry>,
    /// The log is not what an honest store writes, or part of it can't be read.
    contradicted: bool,
}

/// What a store holds, and what is wrong with it.
#[derive(Debug)]
pub struct Plan {
    pub replicas: Vec<RecoveredReplica>,
    pub identity: Option<Identity>,
    /// What the log writer goes on with.
    pub resume: Resume,
    /// Rows of former copies that are still in the state: to be removed before anything else.
    pub stale_rows: Vec<Slots>,
    pub damage: Vec<Damage>,
    pub unreadable: Vec<Unreadable>,
}

impl Plan {
    /// The store as a whole is suspect.
    pub fn is_damaged(&self) -> bool {
        !self.damage.is_empty() || !self.unreadable.is_empty()
    }
}

impl Recovery {
    /// `state`: the shard records found in it.
    pub fn new(state: Vec<(CopyNo, ShardState)>) -> Self {
        let by_shard = |record: (CopyNo, ShardState)| (record.1.slots.shard(), record);
        Self { state: state.into_iter().map(by_shard).collect(), ..Self::default() }
    }

    /// Takes the next group.
    pub fn group(&mut self, group: Group) {
        self.index.group(&group);
        self.unreadable.extend(group.unreadable);
        for record in group.records {
            match (record.shard(), record) {
                (_, Record::Identity(identity)) => self.identity = Some(identity),
                (Some(shard), record) => {
                    let state = self.state.get(&shard);
                    self.shards.entry(shard).or_default().record(state, record);
                }
                (None, _) => {}
            }
        }
    }

    /// All groups were given.
    pub fn finish(mut self, scanned: Scanned) -> Plan {
        let damaged =
            !scanned.damage.is_empty() || self.unreadable.iter().any(|one| one.shard.is_none());
        let mut plan = Plan {
            replicas: Vec::new(),
            identity: self.identity.clone(),
            resume: Resume {
                owner: scanned.owner.unwrap_or_default(),
                identity: self.identity,
                next_group: scanned.next_group,
                next_segment: scanned.next_segment,
                shards: BTreeMap::new(),
                index: self.index,
            },
            stale_rows: Vec::new(),
            damage: scanned.damage,
            unreadable: self.unreadable,
        };
        for (&shard, (_, state)) in &self.state {
            self.shards.entry(shard).or_insert_with(|| Found {
                // Nobody writes rows of a shard without having promised: the log lost it.
                contradicted: true,
                small: SmallState { promised: state.applied.epoch, ..SmallState::default() },
                ..Found::default()
            });
        }
        for (shard, mut found) in self.shards {
            let unreadable = plan.unreadable.iter().any(|one| one.shard == Some(shard));
            found.contradicted |= damaged || unreadable;
            found.finish(shard, self.state.remove(&shard), &mut plan);
        }
        plan
    }
}

impl Found {
    fn record(&mut self, state: Option<&(CopyNo, ShardState)>, record: Record) {
        let copy = self.small.copy;
        // Entries without a copy: what began it is gone.
        self.contradicted |= matches!(record, Record::Append { .. }) && self.small.held.is_none();
        self.small.observe(&record);
        match record {
            Record::Append { entry, .. } => {
                let flushed = match state {
                    Some((of, _)) if *of > copy => Seq(u64::MAX),
                    Some((of, state)) if *of == copy => state.applied.seq,
                    _ => Seq(0),
                };
                if entry.seq > flushed && self.small.held.is_some() {
                    self.entries.insert(entry.seq, entry);
                }
            }
            Record::Truncate { after, .. } => {
                self.entries.split_off(&Seq(after.0.saturating_add(1)));
            }
            Record::Copy { .. } | Record::Drop { .. } => {
                self.entries.clear();
                self.contradicted = false;
            }
            // A restatement is what the store went on with, so it decides: after a recovery it may
            // name an installed copy whose `Copy` was never written.
            Record::Shard { small, .. } => {
                if small.copy != copy {
                    self.entries.clear();
                }
                self.contradicted |= small.suspect;
            }
            Record::Promise { .. } | Record::Identity(_) => {}
        }
    }

    fn finish(mut self, shard: ShardId, state: Option<(CopyNo, ShardState)>, plan: &mut Plan) {
        let state_copy = state.as_ref().map(|(copy, _)| *copy);
        let slots = state.as_ref().map(|(_, state)| state.slots);
        let newer = state_copy.is_some_and(|copy| copy > self.small.copy);
        let same = state_copy == Some(self.small.copy);
        let content = match (state, self.small.held) {
            (Some((copy, state)), _) if newer => {
                let held =
                    Held { slots: state.slots, base: state.applied, last: state.applied.seq };
                self.small.copy = copy;
                self.small.held = Some(held);
                Some(self.replay(state))
            }
            (Some((_, state)), Some(_)) if same => Some(self.replay(state)),
            (_, Some(held)) => {
                plan.stale_rows.extend(slots);
                self.contradicted |= held.base.seq > Seq(0);
                Some(self.replay(ShardState { slots: held.slots, ..ShardState::default() }))
            }
            (_, None) => {
                plan.stale_rows.extend(slots);
                None
            }
        };
        if let Some(content) = &content {
            let last = content.entries.last().map_or(content.state.applied, Entry::position);
            self.small.promised = self.small.promised.max(last.epoch);
        }
        let own = Slots { lo: shard.0, hi: shard.0 };
        plan.resume.shards.insert(shard, self.small);
        plan.replicas.push(RecoveredReplica {
            shard,
            slots: self.small.held.map(|held| held.slots).or(slots).unwrap_or(own),
            promised: self.small.promised,
            copy: self.small.copy,
            content,
        });
    }

    /// The entries that chain onto the state; suspect if that is not all of them.
    fn replay(&mut self, state: ShardState) -> RecoveredContent {
        let mut suspect = self.contradicted;
        let mut at = state.applied;
        let mut entries = Vec::new();
        for (_, entry) in std::mem::take(&mut self.entries) {
            let intact = !matches!(&entry.body, Body::Ops(batch) if !batch.is_intact());
            if !intact || !entry.follows(at) {
                suspect = true;
                break;
            }
            at = entry.position();
            entries.push(entry);
        }
        // Short: what it acknowledged is gone. Long: the log lost what the state has.
        suspect |= self.small.held.is_none_or(|held| at.seq != held.last);
        self.small.suspect = suspect;
        RecoveredContent { state, entries, suspect }
    }
}
