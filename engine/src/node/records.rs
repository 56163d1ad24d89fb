//! What etcd says of the shards: who leads, who is in sync, what this store is to hold.
//!
//! A record seen by a watch may be outdated, and that is harmless: a primary that begins late can't
//! fill its in-sync set, and whoever reads a higher version follows it. Only the deletion of a copy
//! waits for a linearizable read.

use crate::config::ShardConfig;
use crate::entry::Body;
use crate::ids::{Boot, Epoch, Seq, ShardId, StoreBoot};
use crate::message::ShardAvailability;
use crate::node::{CasOutcome, Effect, ExitReason, Node, turn_of};
use crate::planted::Planted;
use crate::replica::primary::Primary;
use crate::replica::trust::Trust;
use crate::replica::{Replica, Role};

impl Node {
    pub(super) fn on_record(
        &mut self,
        record: ShardConfig,
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
            self.tell_who_was_refused(shard, effects);
        }
        self.hold_what_is_asked(&record, read, effects);
        self.to_review.insert(shard);
        self.dirty.insert(shard);
    }

    /// This store is a member of the in-sync set, as far as it knows.
    pub(super) fn is_in_sync(&self, shard: ShardId) -> bool {
        let record = self.records.get(&shard);
        record.is_some_and(|(record, _)| record.isr.contains(&self.me.store))
    }

    fn follow_record(
        &mut self,
        record: &ShardConfig,
        mod_revision: u64,
        effects: &mut Vec<Effect>,
    ) {
        let shard = record.shard();
        let (now, me) = (self.now, self.me);
        if let Some(replica) = self.replicas.get_mut(&shard)
            && let Some(primary) = replica.primary_mut()
        {
            if Planted::KeepAfterDemotion.is_in(self.settings.planted) {
                let record = ShardConfig { epoch: primary.epoch, ..record.clone() };
                let _kept = primary.read_record(record, mod_revision, now);
            } else if record.epoch != primary.epoch || record.primary != me {
                if Planted::RefuseOrdered.is_in(self.settings.planted) {
                    super::writes::refuse_ordered(replica, effects);
                }
                // Never adopted under the old epoch, even if it names this store again.
                replica.role = Role::Follower;
            } else {
                for store in primary.read_record(record.clone(), mod_revision, now) {
                    let conn = self.dialled_to.get(&store);
                    if let Some(link) = conn.and_then(|conn| self.dialled.get_mut(conn)) {
                        link.forget(shard);
                    }
                }
                self.open_feeds(shard);
            }
        }
    }

    /// Copies are made where etcd wants them, and go where it does not; the one who is named
    /// primary begins.
    pub(super) fn hold_what_is_asked(
        &mut self,
        record: &ShardConfig,
        read: Option<u64>,
        effects: &mut Vec<Effect>,
    ) {
        let (shard, store) = (record.shard(), self.me.store);
        let exists = self.replicas.get(&shard).is_some_and(|replica| replica.trust.exists());
        let in_sync = record.isr.contains(&store);
        let wanted = in_sync || record.learners.contains(&store);
        if wanted && !exists {
            // At epoch 1 the shard is new, and empty is all there is to hold.
            let new = record.epoch == Epoch(1) && in_sync && !self.settings.suspect;
            self.create_copy(shard, new, effects);
        }
        if exists && !self.may_stay(record) {
            // What was acknowledged after the read began may count for a record after this one.
            let leaving = self.replicas.get(&shard).and_then(|replica| replica.leaving);
            let is_proof = match Planted::AnyReadDeletes.is_in(self.settings.planted) {
                true => read.is_some() && leaving.is_some(),
                false => leaving.is_some_and(|asked| read.is_some_and(|read| read >= asked)),
            };
            match leaving {
                Some(_) if is_proof => self.drop_copy(shard, effects),
                // The answer comes, or etcd is asked again.
                Some(_) => {}
                None => {
                    let asked = self.read_record(shard, effects);
                    if let Some(replica) = self.replicas.get_mut(&shard) {
                        replica.leaving = Some(asked);
                    }
                }
            }
        }
        let any_boot = Planted::LeadAfterRestart.is_in(self.settings.planted);
        if record.primary == self.me || any_boot && record.primary.store == store {
            self.begin(shard, effects);
        }
    }

    /// A copy on this node is one that the shard's record knows of.
    pub(super) fn may_stay(&self, record: &ShardConfig) -> bool {
        [&record.isr, &record.learners, &record.target]
            .iter()
            .any(|named| named.contains(&self.me.store))
    }

    /// A copy that etcd does not name goes once a read of etcd says so. That read may be lost, or be answered while the
    /// copy is being replaced, and of a record that does not change nothing is heard again: so etcd is asked until it is gone.
    pub(super) fn ask_of_leftovers(&mut self, effects: &mut Vec<Effect>) {
        if self.now < self.next_ask {
            return;
        }
        self.next_ask = self.now.plus_ms(self.settings.timing.ask_again_ms);
        let is_left = |shard: &ShardId| {
            self.records.get(shard).is_some_and(|(record, _)| !self.may_stay(record))
        };
        let held = self.replicas.iter().filter(|(_, replica)| replica.trust.exists());
        let left: Vec<ShardId> = held.map(|(&shard, _)| shard).filter(is_left).collect();
        for shard in left {
            self.read_record(shard, effects);
        }
    }

    /// Asks etcd for the shard's record. Returns the number of the read.
    pub(super) fn read_record(&mut self, shard: ShardId, effects: &mut Vec<Effect>) -> u64 {
        let read = self.fresh_id();
        effects.push(Effect::ReadConfig { read, shard });
        read
    }

    /// Becomes primary: promise, then a barrier on top of its whole log. Both are in the log before
    /// anything is counted, and nothing is served before the barrier is committed.
    fn begin(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
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
        replica.trust.name();
        let mut barrier = replica.log.last().seq.next();
        let skip = Planted::SkipBarrier.is_in(self.settings.planted);
        if skip {
            barrier = Seq(0);
        }
        let mut primary = Primary::new(record, mod_revision, barrier, now);
        primary.active = skip;
        replica.role = Role::Primary(Box::new(primary));
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

    /// A proposal has an outcome, or its answer was lost. Only a record with a higher version
    /// settles anything: a failed compare does not, since an earlier proposal of this very primary
    /// may be what moved the version.
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
                let config = proposal.config.clone();
                self.on_record(config, mod_revision, None, effects);
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

    /// What gateways are told. With a full disk each write is refused for that: they are not told to say something else.
    pub(super) fn is_told_frozen(&self, replica: &Replica) -> bool {
        !self.disk_full && replica.primary().is_some_and(|primary| primary.frozen)
    }

    /// Tells every gateway when the shard takes no writes here, and when that is over: also because
    /// this node leads it no longer.
    pub(super) fn tell_gateways(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get(&shard) else { return };
        let state = match self.is_told_frozen(replica) {
            true if self.frozen_told.insert(shard) => ShardAvailability::Frozen,
            false if self.frozen_told.remove(&shard) => ShardAvailability::Open,
            _ => return,
        };
        self.next_report = self.now;
        for &conn in self.gateways.keys() {
            let reply = crate::message::NodeReply::ShardState { slots: replica.slots, state };
            effects.push(Effect::Gateway { conn, reply });
        }
    }
}
