//! Following the shard records in etcd: which process leads, which stores are in sync, which copies
//! this store has to have.
//!
//! A record from a watch may be outdated, and that is harmless: a primary that begins late can't
//! fill its in-sync set, and every process that reads a higher version follows it. Only the
//! deletion of a copy waits for a linearizable read.

use crate::entry::Body;
use crate::ids::{Boot, Epoch, Seq, ShardId, StoreBoot};
use crate::message::ShardAvailability;
use crate::node::{CasOutcome, Effect, ExitReason, Node, turn_of};
use crate::planted::Planted;
use crate::replica::primary::Primary;
use crate::replica::trust::Trust;
use crate::replica::{Replica, ReplicaRole};
use crate::shard_record::ShardRecord;

impl Node {
    pub(super) fn on_record(
        &mut self,
        record: ShardRecord,
        mod_revision: u64,
        read: Option<u64>,
        effects: &mut Vec<Effect>,
    ) {
        let shard = record.shard();
        let known = self.records.get(&shard).map(|(known, _)| (known.epoch, known.version));
        let was_in_sync = self.is_in_sync(shard);
        if known.is_some_and(|known| (record.epoch, record.version) < known) {
            return;
        }
        let is_new = known != Some((record.epoch, record.version));
        self.records.insert(shard, (record.clone(), mod_revision));
        if is_new {
            self.follow_record(&record, mod_revision, effects);
        }
        if !was_in_sync && self.is_in_sync(shard) {
            self.reannounce_refused_copy(shard, effects);
        }
        self.follow_assignment(&record, read, effects);
        self.to_review.insert(shard);
        self.dirty.insert(shard);
    }

    /// Returns whether this store is in the in-sync set, in the newest record that this node has
    /// seen.
    pub(super) fn is_in_sync(&self, shard: ShardId) -> bool {
        let record = self.records.get(&shard);
        record.is_some_and(|(record, _)| record.isr.contains(&self.me.store))
    }

    fn follow_record(
        &mut self,
        record: &ShardRecord,
        mod_revision: u64,
        effects: &mut Vec<Effect>,
    ) {
        let shard = record.shard();
        let (now, me) = (self.now, self.me);
        if let Some(replica) = self.replicas.get_mut(&shard)
            && let Some(primary) = replica.primary_mut()
        {
            if Planted::KeepAfterDemotion.is_in(self.settings.planted) {
                let record = ShardRecord { epoch: primary.epoch, ..record.clone() };
                let _kept = primary.adopt_record(record, mod_revision, now);
            } else if record.epoch != primary.epoch || record.primary != me {
                if Planted::RefuseOrdered.is_in(self.settings.planted) {
                    super::writes::refuse_ordered(replica, effects);
                }
                // A primary never adopts the record of a newer epoch, even if that names this store
                // again.
                replica.role = ReplicaRole::Follower;
            } else {
                for store in primary.adopt_record(record.clone(), mod_revision, now) {
                    let conn = self.dialled_to.get(&store);
                    if let Some(connection) = conn.and_then(|conn| self.dialled.get_mut(conn)) {
                        connection.forget(shard);
                    }
                }
                self.open_feeds(shard);
            }
        }
    }

    /// Follows the assignment of copies: creates a copy that the record assigns to this store,
    /// deletes one that it does not, and begins to lead if it names this process.
    pub(super) fn follow_assignment(
        &mut self,
        record: &ShardRecord,
        read: Option<u64>,
        effects: &mut Vec<Effect>,
    ) {
        let (shard, store) = (record.shard(), self.me.store);
        let exists = self.replicas.get(&shard).is_some_and(|replica| replica.trust.exists());
        let in_sync = record.isr.contains(&store);
        let wanted = in_sync || record.learners.contains(&store);
        if wanted && !exists {
            // At epoch 1 the shard is new, and an empty copy has all its content.
            let new = record.epoch == Epoch(1) && in_sync && !self.settings.suspect;
            self.create_copy(shard, new, effects);
        }
        if exists && !self.is_assigned(record) {
            // An entry that was acknowledged after the read began may count for a record after this
            // one.
            let leaving = self.replicas.get(&shard).and_then(|replica| replica.removal_read);
            let is_proof = match Planted::AnyReadDeletes.is_in(self.settings.planted) {
                true => read.is_some() && leaving.is_some(),
                false => leaving.is_some_and(|asked| read.is_some_and(|read| read >= asked)),
            };
            match leaving {
                Some(_) if is_proof => self.drop_copy(shard, effects),
                // The answer will come, or the record is read again.
                Some(_) => {}
                None => {
                    let asked = self.read_record(shard, effects);
                    if let Some(replica) = self.replicas.get_mut(&shard) {
                        replica.removal_read = Some(asked);
                    }
                }
            }
        }
        let any_boot = Planted::LeadAfterRestart.is_in(self.settings.planted);
        if record.primary == self.me || any_boot && record.primary.store == store {
            self.begin_leading(shard, effects);
        }
    }

    /// Returns whether the record assigns a copy of the shard to this store.
    pub(super) fn is_assigned(&self, record: &ShardRecord) -> bool {
        [&record.isr, &record.learners, &record.target]
            .iter()
            .any(|named| named.contains(&self.me.store))
    }

    /// Reads the records of copies that etcd does not assign to this store. Such a copy is deleted
    /// once a read of etcd confirms it. That read may be lost, or be answered while the copy is
    /// being replaced, and a record that does not change causes no other event: so the read is
    /// repeated until the copy is gone.
    pub(super) fn recheck_unassigned_copies(&mut self, effects: &mut Vec<Effect>) {
        if self.now < self.next_copy_recheck {
            return;
        }
        self.next_copy_recheck = self.now.plus_ms(self.settings.timing.copy_recheck_ms);
        let is_left = |shard: &ShardId| {
            self.records.get(shard).is_some_and(|(record, _)| !self.is_assigned(record))
        };
        let held = self.replicas.iter().filter(|(_, replica)| replica.trust.exists());
        let left: Vec<ShardId> = held.map(|(&shard, _)| shard).filter(is_left).collect();
        for shard in left {
            self.read_record(shard, effects);
        }
    }

    /// Reads the shard's record from etcd. Returns the number of the read.
    pub(super) fn read_record(&mut self, shard: ShardId, effects: &mut Vec<Effect>) -> u64 {
        let read = self.fresh_id();
        effects.push(Effect::ReadRecord { read, shard });
        read
    }

    /// Begins to lead: a promise, then a barrier on top of the whole log. Both are in the log
    /// before anything is counted, and nothing is served before the barrier is committed.
    fn begin_leading(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some((record, mod_revision)) = self.records.get(&shard).cloned() else { return };
        let now = self.now;
        let Some(replica) = self.replicas.get_mut(&shard) else { return };
        let epoch = record.epoch;
        let held = !matches!(replica.trust, Trust::Absent { .. } | Trust::Replacing { .. });
        let may_begin = held && replica.begun < epoch && replica.promised <= epoch;
        if !may_begin {
            return;
        }
        if replica.promised < epoch {
            replica.promise(&mut turn_of!(self, effects), epoch);
        }
        replica.begun = epoch;
        replica.trust.on_named_primary();
        let mut barrier = replica.log.last().seq.next();
        let skip = Planted::SkipBarrier.is_in(self.settings.planted);
        if skip {
            barrier = Seq(0);
        }
        let mut primary = Primary::new(record, mod_revision, barrier, now);
        primary.active = skip;
        replica.role = ReplicaRole::Primary(Box::new(primary));
        if !skip {
            self.order(shard, Body::Barrier, effects);
        }
        self.open_feeds(shard);
        self.dirty.insert(shard);
        self.to_review.insert(shard);
    }

    pub(super) fn on_peers(&mut self, peers: Vec<(StoreBoot, u64)>, effects: &mut Vec<Effect>) {
        self.peers =
            peers.iter().map(|(peer, revision)| (peer.store, (peer.boot, *revision))).collect();
        let newest = self.peers.get(&self.me.store).map_or(Boot(0), |(boot, _)| *boot);
        if newest > self.me.boot {
            let newer = StoreBoot { store: self.me.store, boot: newest };
            effects.push(Effect::Exit(ExitReason::NewerBoot(newer)));
        }
    }

    /// Handles the outcome of a proposal. Only a record with a higher version settles anything: a
    /// failed compare does not, since an earlier proposal of this very primary may be what moved
    /// the version.
    pub(super) fn on_proposed(&mut self, id: u64, outcome: CasOutcome, effects: &mut Vec<Effect>) {
        let Some(shard) = self.proposals.remove(&id) else { return };
        let retry_at = self.now.plus_ms(self.settings.timing.propose_again_ms);
        let Some(primary) = self.replicas.get_mut(&shard).and_then(Replica::primary_mut) else {
            return;
        };
        let Some(proposal) = primary.proposals.iter_mut().find(|proposal| proposal.id == id) else {
            return;
        };
        proposal.pending = false;
        primary.propose_after = retry_at;
        match outcome {
            CasOutcome::Done { mod_revision } => {
                let record = proposal.record.clone();
                self.on_record(record, mod_revision, None, effects);
            }
            CasOutcome::Failed | CasOutcome::Unknown => {
                if outcome == CasOutcome::Failed
                    && Planted::FailureSettles.is_in(self.settings.planted)
                {
                    primary.proposals.clear();
                }
                self.read_record(shard, effects);
            }
        }
    }

    /// Returns whether gateways are informed that the shard is frozen. With a full disk they are
    /// not: each write is refused for that reason, and no other one is announced.
    pub(super) fn is_announced_frozen(&self, replica: &Replica) -> bool {
        !self.disk_full && replica.primary().is_some_and(|primary| primary.frozen)
    }

    /// Announces to every gateway that the shard takes no writes here, and that it does again, also
    /// because this node no longer leads it.
    pub(super) fn announce_availability(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get(&shard) else { return };
        let state = match self.is_announced_frozen(replica) {
            true if self.frozen_announced.insert(shard) => ShardAvailability::Frozen,
            false if self.frozen_announced.remove(&shard) => ShardAvailability::Open,
            _ => return,
        };
        self.next_report = self.now;
        for &conn in self.gateways.keys() {
            let reply = crate::message::NodeReply::ShardState { slots: replica.slots, state };
            effects.push(Effect::Gateway { conn, reply });
        }
    }
}
