//! Everything that a disk reported as durable is found at the next start, and nothing that was
//! never written: a torn group is cut silently, damage is reported, and neither is taken for the
//! other.
//!
//! The checker keeps the records of every group as the node wrote them, and knows nothing of bytes.
//! The result of recovery must be what these records imply, up to the last group that it found.
//! False alarms would come from damage, after which the records contain more than the disk: then
//! only what is suspect is compared.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use engine::entry::{Entry, Position};
use engine::ids::{CopyNo, Epoch, Seq, ShardId, Slots, StoreId};
use engine::node::{RecoveredContent, RecoveredReplica};
use engine::shard::state::ShardState;
use engine::shard_record::ShardRecord;
use engine::store::log::{Identity, LogRecord};

use super::Violation;
use super::logged_records::DurableShard;

const PROMISE: &str = "durable";

/// The log of one store, as a list of records.
#[derive(Clone, Debug, Default)]
pub struct Durable {
    /// The last group that is applied to `shards`; every start must find it.
    durable: u64,
    shards: BTreeMap<ShardId, RecordedShard>,
    identity: Option<Identity>,
    /// Groups after `durable`.
    tail: VecDeque<(u64, Vec<LogRecord>)>,
    /// The shards that have changed since they were taken.
    changed: BTreeSet<ShardId>,
}

/// The state of one shard that the records imply.
#[derive(Clone, Debug, Default)]
struct RecordedShard {
    slots: Slots,
    promised: Epoch,
    copy: CopyNo,
    /// The newest record of etcd that the store has acted on.
    acted_on: Option<Box<ShardRecord>>,
    base: Option<Position>,
    entries: BTreeMap<Seq, Entry>,
    /// Damage was found, and the copy has not been replaced since.
    suspect: bool,
}

/// The result of recovery at a start.
pub struct RecoveryFindings<'a> {
    pub store: StoreId,
    /// The number of the last group.
    pub group: u64,
    pub damaged: bool,
    /// The disk was harmed since the last start: damage must be reported.
    pub must_be_damaged: bool,
    /// The disk was harmed earlier, and the damage may still be there.
    pub may_be_damaged: bool,
    pub identity: Option<&'a Identity>,
    pub replicas: &'a [RecoveredReplica],
    pub state: &'a BTreeMap<ShardId, (CopyNo, ShardState)>,
}

impl Durable {
    pub fn written(&mut self, group: u64, records: &[LogRecord]) {
        self.tail.push_back((group, records.to_vec()));
    }

    pub fn synced(&mut self, group: u64) {
        while self.tail.front().is_some_and(|(number, _)| *number <= group) {
            self.take_next();
        }
    }

    /// Takes the durable content about each shard that has changed since the last call.
    pub fn take_changed(
        &mut self,
        state: &BTreeMap<ShardId, (CopyNo, ShardState)>,
    ) -> Vec<DurableShard> {
        let changed = std::mem::take(&mut self.changed);
        let shards = changed.iter().filter_map(|shard| Some((*shard, self.shards.get(shard)?)));
        shards.map(|(shard, known)| known.durable(shard, state.get(&shard))).collect()
    }

    fn take_next(&mut self) {
        let Some((number, records)) = self.tail.pop_front() else { return };
        self.durable = number;
        for record in records {
            match (record.shard(), &record) {
                (_, LogRecord::Identity(identity)) => self.identity = Some(identity.clone()),
                (Some(shard), _) => {
                    self.changed.insert(shard);
                    self.shards.entry(shard).or_default().take(record);
                }
                (None, _) => {}
            }
        }
    }

    /// A start has read the disk; its findings are the new base line.
    pub fn recovered(&mut self, found: &RecoveryFindings<'_>, violations: &mut Vec<Violation>) {
        let mut wrong = Vec::new();
        if found.damaged && !found.may_be_damaged {
            wrong.push("damage is reported where nothing was damaged".to_owned());
        }
        if found.must_be_damaged && !found.damaged {
            wrong.push("damage is not reported".to_owned());
        }
        if found.damaged {
            if found.replicas.iter().any(|one| one.content.as_ref().is_some_and(|c| !c.suspect)) {
                wrong.push("damage was found, and a copy is not suspect".to_owned());
            }
            self.restart_from(found);
        } else {
            if found.group < self.durable {
                let durable = self.durable;
                wrong.push(format!("group {durable} was durable, {} is the last", found.group));
            }
            while self.tail.front().is_some_and(|(number, _)| *number <= found.group) {
                self.take_next();
            }
            self.tail.clear();
            if found.identity != self.identity.as_ref() {
                wrong.push(format!("identity: {:?}, not {:?}", found.identity, self.identity));
            }
            wrong.extend(self.differences(found));
        }
        for detail in wrong {
            let detail = format!("{:?}: {detail}", found.store);
            violations.push(Violation { promise: PROMISE, detail });
        }
    }

    fn differences(&mut self, found: &RecoveryFindings<'_>) -> Option<String> {
        let known: Vec<_> = self.shards.keys().copied().collect();
        let want: Vec<_> = known.into_iter().map(|shard| self.expected(shard, found)).collect();
        let differ = |(want, got): &(&RecoveredReplica, &RecoveredReplica)| !are_same(want, got);
        if want.len() != found.replicas.len() {
            return Some(format!("{want:?} was written, {:?} is found", found.replicas));
        }
        let first = want.iter().zip(found.replicas).find(differ);
        first.map(|(want, got)| format!("{want:?} was written, {got:?} is found"))
    }

    fn expected(&mut self, shard: ShardId, found: &RecoveryFindings<'_>) -> RecoveredReplica {
        let state = found.state.get(&shard);
        let known = self.shards.get_mut(&shard).expect("asked for what is known");
        let content = known.content(state);
        let last = content.as_ref().map(|content| {
            content.entries.last().map_or(content.state.applied, Entry::position).epoch
        });
        known.promised = known.promised.max(last.unwrap_or_default());
        let own = Slots { lo: shard.0, hi: shard.0 };
        RecoveredReplica {
            shard,
            slots: content.as_ref().map_or(own, |content| content.state.slots),
            promised: known.promised,
            copy: known.copy,
            acted_on: known.acted_on.clone(),
            content,
        }
    }

    /// After damage, what recovery found is all that can be expected.
    fn restart_from(&mut self, found: &RecoveryFindings<'_>) {
        self.tail.clear();
        self.durable = found.group;
        self.identity = found.identity.cloned();
        let shard = |replica: &RecoveredReplica| {
            let mut shard = RecordedShard {
                slots: replica.slots,
                promised: replica.promised,
                copy: replica.copy,
                acted_on: replica.acted_on.clone(),
                ..RecordedShard::default()
            };
            if let Some(content) = &replica.content {
                shard.base = Some(content.state.applied);
                let entries = content.entries.iter().map(|entry| (entry.seq, entry.clone()));
                shard.entries = entries.collect();
                shard.suspect = true;
            }
            (replica.shard, shard)
        };
        self.shards = found.replicas.iter().map(shard).collect();
        self.changed.extend(self.shards.keys());
    }
}

/// The part that comes from the state is the same by construction: both sides read it from the
/// disk.
fn are_same(one: &RecoveredReplica, other: &RecoveredReplica) -> bool {
    let head =
        |it: &RecoveredReplica| (it.shard, it.slots, it.promised, it.copy, it.acted_on.clone());
    head(one) == head(other)
        && match (&one.content, &other.content) {
            (None, None) => true,
            (Some(one), Some(other)) => {
                one.state.applied == other.state.applied
                    && one.entries == other.entries
                    && one.suspect == other.suspect
            }
            _ => false,
        }
}

impl RecordedShard {
    fn take(&mut self, record: LogRecord) {
        match record {
            LogRecord::Append { entry, .. } => drop(self.entries.insert(entry.seq, entry)),
            LogRecord::Truncate { after, .. } => drop(self.entries.split_off(&after.next())),
            LogRecord::Promise { epoch, .. } => self.promised = self.promised.max(epoch),
            LogRecord::Copy { slots, copy, base, .. } => {
                *self = Self { slots, copy, base: Some(base), ..self.emptied() };
            }
            LogRecord::Drop { copy, .. } => *self = Self { copy, ..self.emptied() },
            LogRecord::Suspect { copy, .. } => self.suspect |= copy == self.copy,
            LogRecord::ActedOn(record) => self.acted_on = Some(record),
            LogRecord::Identity(_) | LogRecord::Etcd(_) | LogRecord::Checkpoint { .. } => {}
        }
    }

    fn emptied(&self) -> Self {
        let acted_on = self.acted_on.clone();
        Self { slots: self.slots, promised: self.promised, acted_on, ..Self::default() }
    }

    fn durable(&self, shard: ShardId, state: Option<&(CopyNo, ShardState)>) -> DurableShard {
        let (acted_on, suspect) = (self.acted_on.clone(), self.suspect);
        let applied = |copy| state.filter(|it| it.0 == copy).map(|it| it.1.applied.seq);
        let (copy, end) = match state {
            // The copy was installed, and the log has not recorded it yet.
            Some((copy, _)) if *copy > self.copy => (*copy, applied(*copy)),
            _ => {
                let last = self.entries.last_key_value().map(|(&seq, _)| seq);
                let base = self.base.map(|base| base.seq);
                (self.copy, base.max(last).max(applied(self.copy)).filter(|_| base.is_some()))
            }
        };
        DurableShard { shard, acted_on, copy, end, suspect }
    }

    fn content(&mut self, state: Option<&(CopyNo, ShardState)>) -> Option<RecoveredContent> {
        if let Some((copy, state)) = state
            && *copy > self.copy
        {
            // The copy was installed, and the process ended before the log recorded it.
            let (slots, base) = (state.slots, Some(state.applied));
            *self = Self { slots, copy: *copy, base, ..self.emptied() };
        }
        let base = self.base?;
        let state = match state {
            Some((copy, state)) if *copy == self.copy => state.clone(),
            _ => ShardState { slots: self.slots, applied: base, ..ShardState::default() },
        };
        let above = self.entries.range(state.applied.seq.next()..);
        let entries = above.map(|(_, entry)| entry.clone()).collect();
        Some(RecoveredContent { state, entries, suspect: self.suspect })
    }
}
