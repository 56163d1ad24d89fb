//! The recovery plan: the content of a store according to its state and log together.
//!
//! The state has a shard record per copy (as of some applied entry); the log has what came after,
//! the promises and the copy numbers. They were written at different moments, so they may disagree,
//! and each disagreement has a meaning:
//!
//! | copy number | meaning |
//! |---|---|
//! | state = log | replay the log above `applied` |
//! | state > log | crash between installing a snapshot and the log's `Copy`: the log is void |
//! | state < log, copy began empty | the state's rows are of a former copy: to be removed |
//! | state < log, copy began higher | the installed state is gone: damage |
//! | log has a `Drop` | the rows are to be removed |
//!
//! A promise is kept in every case. A copy is *suspect* when its entries do not chain from
//! `applied` to the position that the log is known to have reached, or when anything durable
//! anywhere in the log is damaged.

use std::collections::{BTreeMap, BTreeSet};

use crate::entry::{Body, Entry};
use crate::etcd_memory::EtcdMemory;
use crate::ids::{CopyNo, Seq, ShardId, Slots};
use crate::replica::recovered::{RecoveredContent, RecoveredReplica};
use crate::shard::state::ShardState;
use crate::shard_record::ShardRecord;
use crate::store::log::index::Index;
use crate::store::log::scan::{Damage, Group, Scanned};
use crate::store::log::writer::Resume;
use crate::store::log::{CopyExtent, Identity, LogRecord, ShardCheckpoint, Unreadable};

/// Builds the plan from the shard records of the state and the groups of the log, in order.
#[derive(Debug, Default)]
pub struct Recovery {
    state: BTreeMap<ShardId, (CopyNo, ShardState)>,
    shards: BTreeMap<ShardId, ShardLog>,
    identity: Option<Identity>,
    etcd: Option<Box<EtcdMemory>>,
    acted_on: BTreeMap<ShardId, Box<ShardRecord>>,
    index: Index,
    unreadable: Vec<Unreadable>,
}

/// The log's content about one shard so far.
#[derive(Debug, Default)]
struct ShardLog {
    checkpoint: ShardCheckpoint,
    /// Entries of the present copy, above what the state has.
    entries: BTreeMap<Seq, Entry>,
    /// The log is not what a correct store writes, or part of it can't be read.
    contradicted: bool,
}

/// The content of a store, and what is wrong with it.
#[derive(Debug)]
pub struct RecoveryPlan {
    /// The replica of each shard that the store has taken part in.
    pub replicas: Vec<RecoveredReplica>,
    /// The store's identity. `None` on a new disk. `None` *with* damage means a store that has lost
    /// its identity: it must not start as a new one.
    pub identity: Option<Identity>,
    /// The store's memory of etcd.
    pub etcd: Option<Box<EtcdMemory>>,
    /// The state from which the log encoder continues.
    pub resume: Resume,
    /// Rows of former copies that are still in the state: to be removed before anything else.
    pub stale_rows: Vec<Slots>,
    /// The damage found in the log.
    pub damage: Vec<Damage>,
    /// Records of the log that this build can't read.
    pub unreadable: Vec<Unreadable>,
}

impl RecoveryPlan {
    /// Returns whether the store as a whole is suspect. A record that is intact and of one shard,
    /// and that this build can't read, stops that shard's copy alone, since a newer build wrote it.
    pub fn is_damaged(&self) -> bool {
        !self.damage.is_empty() || self.unreadable.iter().any(|one| one.shard.is_none())
    }

    /// The shards of which a record can't be read.
    pub fn stopped(&self) -> BTreeSet<ShardId> {
        self.unreadable.iter().filter_map(|one| one.shard).collect()
    }
}

impl Recovery {
    /// A recovery from the shard records that were found in the state.
    pub fn new(state: Vec<(CopyNo, ShardState)>) -> Self {
        let by_shard = |record: (CopyNo, ShardState)| (record.1.slots.shard(), record);
        Self { state: state.into_iter().map(by_shard).collect(), ..Self::default() }
    }

    /// Sets the block size of the log's index.
    pub fn with_block_bytes(self, block_bytes: usize) -> Self {
        Self { index: Index::new(block_bytes), ..self }
    }

    /// Takes the next group of the log.
    pub fn group(&mut self, group: Group) {
        self.index.group(&group);
        self.unreadable.extend(group.unreadable);
        for record in group.records {
            match (record.shard(), record) {
                (_, LogRecord::Identity(identity)) => self.identity = Some(identity),
                (_, LogRecord::Etcd(memory)) => self.etcd = Some(memory.after(self.etcd.take())),
                (Some(shard), LogRecord::ActedOn(record)) => self.acted_on(shard, record),
                (Some(shard), record) => {
                    let state = self.state.get(&shard);
                    self.shards.entry(shard).or_default().record(state, record);
                }
                (None, _) => {}
            }
        }
    }

    fn acted_on(&mut self, shard: ShardId, record: Box<ShardRecord>) {
        let newest = self.acted_on.entry(shard).or_insert_with(|| record.clone());
        if newest.order() < record.order() {
            *newest = record;
        }
    }

    /// Returns the plan. All groups were given.
    pub fn finish(mut self, scanned: Scanned) -> RecoveryPlan {
        let damaged =
            !scanned.damage.is_empty() || self.unreadable.iter().any(|one| one.shard.is_none());
        scanned.segments.iter().for_each(|&segment| self.index.segment(segment));
        let mut plan = RecoveryPlan {
            replicas: Vec::new(),
            identity: self.identity.clone(),
            etcd: self.etcd.clone(),
            resume: Resume {
                owner: scanned.owner.unwrap_or_default(),
                identity: self.identity,
                etcd: self.etcd,
                acted_on: self.acted_on,
                next_group: scanned.next_group,
                next_segment: scanned.next_segment,
                shards: BTreeMap::new(),
                index: self.index,
            },
            stale_rows: Vec::new(),
            damage: scanned.damage,
            unreadable: self.unreadable,
        };
        for (&shard, (copy, state)) in &self.state {
            let known = self.shards.entry(shard).and_modify(|known| {
                // An installed copy of which the log has no `Copy` yet: what the log has found
                // wrong is the one before.
                known.contradicted &= *copy <= known.checkpoint.copy;
            });
            known.or_insert_with(|| ShardLog {
                // No store writes rows of a shard without having promised, so the log has lost the
                // promise.
                contradicted: true,
                checkpoint: ShardCheckpoint {
                    promised: state.applied.epoch,
                    ..ShardCheckpoint::default()
                },
                ..ShardLog::default()
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

impl ShardLog {
    fn record(&mut self, state: Option<&(CopyNo, ShardState)>, record: LogRecord) {
        let copy = self.checkpoint.copy;
        // Entries without a copy: the record that began the copy is gone.
        self.contradicted |=
            matches!(record, LogRecord::Append { .. }) && self.checkpoint.extent.is_none();
        self.checkpoint.observe(&record);
        match record {
            LogRecord::Append { entry, .. } => {
                let flushed = match state {
                    Some((of, _)) if *of > copy => Seq(u64::MAX),
                    Some((of, state)) if *of == copy => state.applied.seq,
                    _ => Seq(0),
                };
                if entry.seq > flushed && self.checkpoint.extent.is_some() {
                    self.entries.insert(entry.seq, entry);
                }
            }
            LogRecord::Truncate { after, .. } => {
                self.entries.split_off(&Seq(after.0.saturating_add(1)));
            }
            LogRecord::Copy { .. } | LogRecord::Drop { .. } => {
                self.entries.clear();
                self.contradicted = false;
            }
            // A checkpoint is the state that the store continued with, so it decides: after a
            // recovery it may name an installed copy whose `Copy` was never written.
            LogRecord::Checkpoint { checkpoint, .. } => {
                if checkpoint.copy != copy {
                    self.entries.clear();
                }
                let last = checkpoint.extent.map_or(Seq(0), |extent| extent.last);
                self.entries.split_off(&last.next());
                self.contradicted |= checkpoint.suspect;
            }
            LogRecord::Suspect { copy: of, .. } => self.contradicted |= of == copy,
            LogRecord::Promise { .. }
            | LogRecord::ActedOn(_)
            | LogRecord::Identity(_)
            | LogRecord::Etcd(_) => {}
        }
    }

    fn finish(
        mut self,
        shard: ShardId,
        state: Option<(CopyNo, ShardState)>,
        plan: &mut RecoveryPlan,
    ) {
        let state_copy = state.as_ref().map(|(copy, _)| *copy);
        let slots = state.as_ref().map(|(_, state)| state.slots);
        let newer = state_copy.is_some_and(|copy| copy > self.checkpoint.copy);
        let same = state_copy == Some(self.checkpoint.copy);
        let content = match (state, self.checkpoint.extent) {
            (Some((copy, state)), _) if newer => {
                let extent =
                    CopyExtent { slots: state.slots, base: state.applied, last: state.applied.seq };
                self.checkpoint.copy = copy;
                self.checkpoint.extent = Some(extent);
                // A follower must not get what the former copy wrote, nor may those entries keep a
                // segment.
                plan.resume.index.forget(shard, Seq(0));
                Some(self.replay(state))
            }
            (Some((_, state)), Some(_)) if same => Some(self.replay(state)),
            (_, Some(extent)) => {
                plan.stale_rows.extend(slots);
                self.contradicted |= extent.base.seq > Seq(0);
                Some(self.replay(ShardState { slots: extent.slots, ..ShardState::default() }))
            }
            (_, None) => {
                plan.stale_rows.extend(slots);
                None
            }
        };
        if let Some(content) = &content {
            let last = content.entries.last().map_or(content.state.applied, Entry::position);
            self.checkpoint.promised = self.checkpoint.promised.max(last.epoch);
            // Entries above it in the log are void: a later start must not find them again.
            plan.resume.index.forget(shard, last.seq);
            if let Some(extent) = &mut self.checkpoint.extent {
                extent.last = last.seq;
            }
        }
        let own = Slots { lo: shard.0, hi: shard.0 };
        let acted_on = plan.resume.acted_on.get(&shard).cloned();
        plan.resume.shards.insert(shard, self.checkpoint);
        plan.replicas.push(RecoveredReplica {
            shard,
            // A shard that was split has fewer slots than its copy began with. Without a copy the
            // store has no rows of it any more.
            slots: content.as_ref().map_or(own, |content| content.state.slots),
            promised: self.checkpoint.promised,
            copy: self.checkpoint.copy,
            acted_on,
            content,
        });
    }

    /// The entries that chain onto the state. The copy is suspect if that is not all of them.
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
        // A log that is too short has lost acknowledged entries; one that is too long has lost what
        // the state has.
        suspect |= self.checkpoint.extent.is_none_or(|extent| at.seq != extent.last);
        self.checkpoint.suspect = suspect;
        RecoveredContent { state, entries, suspect }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::entry::Position;
    use crate::ids::{Epoch, TimeMs};
    use crate::store::log::catch_up::WantedEntries;
    use crate::store::log::group::SegmentHeader;
    use crate::store::log::scan::{LogLocation, Scanner};
    use crate::store::log::writer::LogEncoder;
    use crate::store::testing::{Segments, random_log};

    const SHARD: ShardId = ShardId(16);
    const SLOTS: Slots = Slots { lo: 16, hi: 31 };

    fn recover(state: Vec<(CopyNo, ShardState)>, segments: &Segments) -> RecoveryPlan {
        let mut scanner = Scanner::new(None);
        let mut recovery = Recovery::new(state);
        for (&segment, bytes) in segments {
            for group in scanner.segment(segment, &Bytes::copy_from_slice(bytes)) {
                recovery.group(group);
            }
        }
        recovery.finish(scanner.finish())
    }

    /// A log of these groups, in one segment.
    fn log(groups: Vec<Vec<LogRecord>>) -> Segments {
        log_after(Resume::default(), groups)
    }

    fn log_after(resume: Resume, groups: Vec<Vec<LogRecord>>) -> Segments {
        let first = resume.next_group.max(1);
        let mut writer = LogEncoder::new(resume, 1 << 16);
        let mut segments = Segments::new();
        for (number, group) in (first..).zip(groups) {
            for record in group {
                writer.write(record);
            }
            crate::store::testing::put(&mut segments, writer.sync(number));
            writer.durable(number);
        }
        segments
    }

    /// Entries 1, 2, 3 … of epoch 1.
    fn entries(count: usize) -> Vec<Entry> {
        let mut at = Position::default();
        (0..count)
            .map(|bucket| {
                let body = Body::ExpireTokens { bucket: bucket as u64 };
                let entry = Entry::after(at, Epoch(1), TimeMs(7), body);
                at = entry.position();
                entry
            })
            .collect()
    }

    fn appends(entries: &[Entry]) -> Vec<LogRecord> {
        entries
            .iter()
            .map(|entry| LogRecord::Append { shard: SHARD, entry: entry.clone() })
            .collect()
    }

    fn copy(number: u64, base: Position) -> LogRecord {
        LogRecord::Copy { shard: SHARD, slots: SLOTS, copy: CopyNo(number), base }
    }

    fn promise(epoch: u64) -> LogRecord {
        LogRecord::Promise { shard: SHARD, epoch: Epoch(epoch) }
    }

    fn state(copy: u64, applied: Position) -> Vec<(CopyNo, ShardState)> {
        vec![(CopyNo(copy), ShardState { slots: SLOTS, applied, ..ShardState::default() })]
    }

    /// (copy, promised, applied, seqs of the entries, suspect), and stale rows.
    type Short = (u64, u64, Option<(u64, Vec<u64>, bool)>, usize);

    #[track_caller]
    fn check(state: Vec<(CopyNo, ShardState)>, groups: Vec<Vec<LogRecord>>, want: Short) {
        let plan = recover(state.clone(), &log(groups.clone()));
        assert_eq!(short(&plan), want);
        // Recovery gives the same after a restart that has repeated the checkpoints, with the older
        // segments gone.
        let entries = groups.into_iter().flatten();
        let carried = entries.filter(|record| matches!(record, LogRecord::Append { .. }));
        let kept: Vec<_> = carried
            .filter(|record| match (record, &plan.replicas[0].content) {
                (LogRecord::Append { entry, .. }, Some(content)) => content.entries.contains(entry),
                _ => false,
            })
            .collect();
        let again = recover(state, &log_after(plan.resume, vec![vec![], kept]));
        assert_eq!(short(&again), want, "after a restart");
    }

    fn short(plan: &RecoveryPlan) -> Short {
        let replica = &plan.replicas[0];
        let content = replica.content.as_ref().map(|content| {
            let seqs = content.entries.iter().map(|entry| entry.seq.0).collect();
            (content.state.applied.seq.0, seqs, content.suspect)
        });
        (replica.copy.0, replica.promised.0, content, plan.stale_rows.len())
    }

    #[test]
    fn the_log_is_replayed_above_what_the_state_has() {
        let all = entries(4);
        let groups = vec![vec![promise(3), copy(1, Position::default())], appends(&all)];
        check(vec![], groups.clone(), (1, 3, Some((0, vec![1, 2, 3, 4], false)), 0));
        check(state(1, all[1].position()), groups, (1, 3, Some((2, vec![3, 4], false)), 0));
    }

    #[test]
    fn what_was_written_again_wins() {
        let all = entries(4);
        let other = Entry::after(all[1].position(), Epoch(2), TimeMs(8), Body::Barrier);
        let rewritten = vec![
            LogRecord::Truncate { shard: SHARD, after: Seq(2) },
            LogRecord::Append { shard: SHARD, entry: other },
        ];
        let groups = vec![vec![copy(1, Position::default())], appends(&all), rewritten];
        check(state(1, all[1].position()), groups, (1, 2, Some((2, vec![3], false)), 0));
    }

    #[test]
    fn a_carried_entry_changes_nothing() {
        let all = entries(3);
        let groups = vec![vec![copy(1, Position::default())], appends(&all), appends(&all[1..2])];
        check(vec![], groups, (1, 1, Some((0, vec![1, 2, 3], false)), 0));
    }

    #[test]
    fn a_snapshot_ingested_but_not_yet_logged_voids_the_log() {
        let all = entries(4);
        let groups = vec![vec![copy(1, Position::default())], appends(&all)];
        check(state(2, all[1].position()), groups, (2, 1, Some((2, vec![], false)), 0));
    }

    /// A follower gets none of it either: the index does not contain void entries.
    #[test]
    fn void_entries_are_not_read() {
        let all = entries(4);
        let segments = log(vec![vec![copy(1, Position::default())], appends(&all)]);
        let at = all[1].position();
        assert!(is_readable(&recover(state(1, at), &segments), at));
        assert!(!is_readable(&recover(state(2, at), &segments), at));
    }

    /// Returns whether the log's index has the entry after this one.
    fn is_readable(plan: &RecoveryPlan, after: Position) -> bool {
        let wanted = vec![WantedEntries { shard: SHARD, after }];
        let read = plan.resume.index.next_read(wanted, LogLocation::default());
        read.is_some_and(|read| read.block.is_some())
    }

    #[test]
    fn a_dropped_copy_leaves_number_and_promise() {
        let drop = LogRecord::Drop { shard: SHARD, copy: CopyNo(2) };
        let groups = vec![vec![promise(5), copy(1, Position::default())], vec![drop]];
        check(vec![], groups.clone(), (2, 5, None, 0));
        check(state(1, Position::default()), groups, (2, 5, None, 1));
    }

    #[test]
    fn a_copy_found_wrong_is_suspect_until_it_is_replaced() {
        let all = entries(2);
        let suspect = |number| LogRecord::Suspect { shard: SHARD, copy: CopyNo(number) };
        let begun = vec![copy(1, Position::default())];
        let mut groups = vec![begun, appends(&all), vec![suspect(1)]];
        check(vec![], groups.clone(), (1, 1, Some((0, vec![1, 2], true)), 0));
        groups.push(vec![copy(2, Position::default())]);
        check(vec![], groups.clone(), (2, 0, Some((0, vec![], false)), 0));
        // The next copy was installed, and its record was not written any more.
        let installed = state(2, all[1].position());
        check(installed, groups[..3].to_vec(), (2, 1, Some((2, vec![], false)), 0));
        // The record is about a copy that no longer exists.
        groups.push(vec![suspect(1)]);
        check(vec![], groups, (2, 0, Some((0, vec![], false)), 0));
    }

    #[test]
    fn a_copy_that_began_empty_does_not_inherit_rows() {
        let all = entries(2);
        let groups = vec![vec![copy(3, Position::default())], appends(&all)];
        check(state(1, all[1].position()), groups, (3, 1, Some((0, vec![1, 2], false)), 1));
    }

    #[test]
    fn an_installed_copy_without_its_state_is_suspect() {
        let base = entries(2)[1].position();
        check(vec![], vec![vec![copy(3, base)]], (3, 0, Some((0, vec![], true)), 0));
    }

    #[test]
    fn a_gap_makes_the_copy_suspect() {
        let all = entries(4);
        let broken = [&all[..1], &all[2..]].concat();
        let groups = vec![vec![copy(1, Position::default())], appends(&broken)];
        check(vec![], groups, (1, 1, Some((0, vec![1], true)), 0));
    }

    #[test]
    fn a_log_behind_the_state_is_suspect() {
        let all = entries(4);
        let groups = vec![vec![copy(1, Position::default())], appends(&all[..2])];
        check(state(1, all[3].position()), groups, (1, 1, Some((4, vec![], true)), 0));
    }

    #[test]
    fn a_state_without_a_log_is_suspect() {
        let at = entries(2)[1].position();
        let plan = recover(state(1, at), &Segments::new());
        assert!(plan.replicas[0].content.as_ref().unwrap().suspect);
    }

    /// A crash right after a segment was made, or with its first group torn. The kill loop found
    /// that such a segment was never deleted, and was reported as a gap once its neighbours were
    /// deleted.
    #[test]
    fn an_empty_segment_is_known_to_the_index() {
        let groups = || log(vec![vec![copy(1, Position::default())]]);
        for empty in [1, 2] {
            let mut segments = groups();
            let header = segments[&1][..crate::store::log::group::SEGMENT_HEADER_BYTES].to_vec();
            if empty == 2 {
                let mut header = SegmentHeader::decode(&header.into()).unwrap();
                (header.segment, header.first_group) = (2, 2);
                segments.insert(2, header.encode().to_vec());
            } else {
                segments.insert(1, header);
            }
            let resume = recover(vec![], &segments).resume;
            assert_eq!(resume.next_segment, empty + 1);
            let mut writer = LogEncoder::new(resume, 1 << 16);
            let group = writer.sync(if empty == 2 { 2 } else { 1 });
            assert_eq!(group.segment, empty + 1);
            writer.durable(2);
            let trimmable = writer.index().trimmable(&[], usize::MAX, 2);
            assert_eq!(trimmable, (1..=empty).collect::<Vec<_>>());
        }
    }

    /// The proof of the damage is truncated or trimmed away; the checkpoint still has it, until the
    /// copy is replaced.
    #[test]
    fn suspicion_outlives_its_proof() {
        let all = entries(2);
        let mut segments = log(vec![vec![copy(1, Position::default())], appends(&all), vec![]]);
        // The damage is in the second group's body; the third group's header proves that it was
        // durable.
        let at = segments[&1].windows(4).rposition(|four| four == *b"dkg\x01").unwrap() - 1;
        segments.get_mut(&1).unwrap()[at] ^= 1;
        let plan = recover(vec![], &segments);
        assert!(plan.is_damaged());
        let replaced = vec![copy(2, all[1].position())];
        let mut resume = plan.resume;
        resume.shards.get_mut(&SHARD).unwrap().extent.as_mut().unwrap().last = Seq(0);
        let later = recover(vec![], &log_after(resume.clone(), vec![vec![]]));
        assert_eq!(short(&later), (1, 0, Some((0, vec![], true)), 0));
        let state = state(2, all[1].position());
        let replaced = recover(state, &log_after(resume, vec![vec![], replaced]));
        assert_eq!(short(&replaced), (2, 1, Some((2, vec![], false)), 0));
    }

    /// The group that began the copy is bad: its first entry belongs to no copy, and the second one
    /// follows nothing. The index must not carry the first one to where a later start would find
    /// both.
    #[test]
    fn what_a_start_does_not_find_stays_lost() {
        let all = entries(2);
        let extent = CopyExtent { slots: SLOTS, base: Position::default(), last: Seq(1) };
        let checkpoint =
            ShardCheckpoint { copy: CopyNo(1), extent: Some(extent), ..ShardCheckpoint::default() };
        let restated = vec![LogRecord::Checkpoint { shard: SHARD, checkpoint }];
        let begun = vec![copy(1, Position::default())];
        let groups = vec![begun, appends(&all[..1]), restated, appends(&all[1..])];
        let mut segments = log(groups);
        let first = segments[&1].windows(4).position(|four| four == *b"dkg\x01").unwrap();
        segments.get_mut(&1).unwrap()[first + 50] ^= 1;
        let plan = recover(vec![], &segments);
        assert!(plan.is_damaged());
        let nothing = (1, 0, Some((0, vec![], true)), 0);
        assert_eq!(short(&plan), nothing);
        assert!(!is_readable(&plan, Position::default()));
        segments.extend(log_after(plan.resume, vec![vec![]]));
        assert_eq!(short(&recover(vec![], &segments)), nothing);
    }

    /// After a downgrade. The record stops the copy that would have to apply it, and is no sign of
    /// a damaged disk.
    #[test]
    fn an_entry_of_a_newer_build_is_no_damage() {
        let body = Body::Unknown { kind: 77, bytes: Bytes::from_static(b"later") };
        let entry = Entry::after(Position::default(), Epoch(1), TimeMs(7), body);
        let groups = vec![vec![copy(1, Position::default())], appends(&[entry])];
        check(vec![], groups.clone(), (1, 1, Some((0, vec![1], false)), 0));
        assert!(!recover(vec![], &log(groups)).is_damaged());
    }

    /// One flipped bit in any durable group: no copy may be trusted, and nothing panics.
    #[test]
    fn damage_anywhere_makes_every_copy_suspect() {
        let log = random_log(1, 8, 500);
        let segment = *log.segments.keys().next().unwrap();
        for at in 64..log.segments[&segment].len() {
            let mut flipped = log.segments.clone();
            flipped.get_mut(&segment).unwrap()[at] ^= 4;
            let plan = recover(vec![], &flipped);
            assert!(plan.is_damaged(), "at {at}");
            let contents = plan.replicas.iter().filter_map(|replica| replica.content.as_ref());
            assert!(contents.into_iter().all(|content| content.suspect), "at {at}");
        }
    }
}
