//! Bounded-stale reads: what a follower may tell, and how old it is (DESIGN §8, §6 rules 1 and 14).
//!
//! ```text
//!   follower                                    primary of its promised epoch
//!   ────────                                    ─────────────────────────────
//!   its clock says t ── Probe{shards} ────────▶ captures each shard's commit, then proves that it
//!                                               led at the capture (`proving`)
//!   keeps (t, commit) ◀── Proof{commit} ─────── only of what was proved; of the rest it says so
//!   applied ≥ commit: what is told now
//!   holds all that was acknowledged by t
//! ```
//!
//! Everything acknowledged by t was acknowledged before the probe arrived, so the commit captured
//! then covers it. No clocks are compared: t and the moment of the answer are readings of the
//! follower's own. t is when the probe *left*; the moment when the proof came would be too young by
//! all that was acknowledged in between.
//!
//! A proof serves every read that is content with its age, and those cost no message. A follower has
//! one probe out per primary, for all shards that somebody asks for; nobody asks, nobody probes. A
//! read that is served from a proof older than half of what it allows asks for the next one behind
//! its back: so steady reads never wait, and go on for a while when the primary falls silent.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Conn, Epoch, Now, Seq, ShardId};
use crate::memory;
use crate::message::{FromFollower, Refusal, ToFollower};
use crate::node::proving::Verdict;
use crate::node::reads::{Ask, Worth, refuse};
use crate::node::{Effect, Node, Sizes};
use crate::planted::Planted;
use crate::replica::Replica;

#[derive(Clone, Debug, Default)]
pub(super) struct Bounded {
    // -- what a follower knows
    /// The newest proof of each shard.
    proofs: BTreeMap<ShardId, Proof>,
    /// The probe that is out on each connection that a primary has made.
    probes: BTreeMap<Conn, Probe>,
    /// To be in the next probe.
    wanted: BTreeSet<ShardId>,
    waiting: BTreeMap<(ShardId, u64), Waiting>,
    /// What they take of memory.
    bytes: usize,
    /// When each of them is refused.
    deadlines: BTreeSet<(Now, ShardId, u64)>,

    // -- what a primary knows
    /// Commits captured for a probe, by claim.
    captured: BTreeMap<u64, Captured>,
    /// Proofs that leave when this event is handled, by connection and probe.
    leaving: BTreeMap<(Conn, u64), Leaving>,
}

/// What is applied up to `commit` holds everything that was acknowledged by `asked`.
#[derive(Clone, Copy, Debug)]
struct Proof {
    asked: Now,
    commit: Seq,
    /// The waiting reads have been looked at since it came; and since its commit was reached here.
    looked_at: Option<bool>,
}

#[derive(Clone, Debug)]
struct Probe {
    number: u64,
    asked: Now,
    /// Shards that nothing has been said of yet.
    open: BTreeSet<ShardId>,
}

/// A read that waits for a proof.
#[derive(Clone, Debug)]
struct Waiting {
    ask: Ask,
    max_staleness_ms: u64,
    until: Now,
}

#[derive(Clone, Copy, Debug)]
struct Captured {
    conn: Conn,
    probe: u64,
    shard: ShardId,
    epoch: Epoch,
    commit: Seq,
}

#[derive(Clone, Debug, Default)]
struct Leaving {
    proven: Vec<(ShardId, Epoch, Seq)>,
    refused: Vec<ShardId>,
}

impl Waiting {
    /// Is what was asked for then young enough now?
    fn is_content_with(&self, now: Now, asked: Now) -> bool {
        now <= asked.plus_ms(self.max_staleness_ms)
    }
}

impl Bounded {
    /// No room for another read that waits.
    fn is_full(&self, sizes: &Sizes) -> bool {
        self.waiting.len() >= sizes.waiting_reads_max || self.bytes >= sizes.waiting_read_bytes_max
    }

    /// What the waiting reads take of memory, as counted.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The same, by looking at every read.
    pub(super) fn walked_bytes(&self) -> usize {
        let each = memory::of_map::<(ShardId, u64), Waiting>(1)
            + memory::of_map::<(Now, ShardId, u64), ()>(1);
        self.waiting.values().map(|waiting| waiting.ask.walked_bytes() + each).sum()
    }

    /// When to look again although nothing has come.
    pub(super) fn deadline(&self) -> Option<Now> {
        self.deadlines.first().map(|&(at, _, _)| at)
    }

    /// Asks for a newer proof, unless one is on its way.
    fn want(&mut self, shard: ShardId) {
        if !self.probes.values().any(|probe| probe.open.contains(&shard)) {
            self.wanted.insert(shard);
        }
    }

    fn wait(&mut self, now: Now, read: u64, waiting: Waiting) {
        let shard = waiting.ask.slots.shard();
        // One that is young enough only has to be reached.
        let proof = self.proofs.get(&shard);
        if !proof.is_some_and(|proof| waiting.is_content_with(now, proof.asked)) {
            self.want(shard);
        }
        self.deadlines.insert((waiting.until, shard, read));
        self.bytes += waiting.ask.bytes();
        self.waiting.insert((shard, read), waiting);
    }

    fn take(&mut self, shard: ShardId, read: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&(shard, read))?;
        self.bytes -= waiting.ask.bytes();
        self.deadlines.remove(&(waiting.until, shard, read));
        Some(waiting)
    }

    /// Reads that wait for a proof.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    fn waiting_for(&self, shard: ShardId) -> Vec<u64> {
        self.waiting.range((shard, 0)..=(shard, u64::MAX)).map(|(&(_, read), _)| read).collect()
    }
}

// ---- the follower --------------------------------------------------------------------------------

impl Node {
    /// A read that is content with a value of at most this age. A primary answers it like any other.
    pub(super) fn on_bounded_read(
        &mut self,
        ask: Ask,
        max_staleness_ms: u64,
        effects: &mut Vec<Effect>,
    ) {
        let shard = ask.slots.shard();
        let replica = self.replicas.get(&shard);
        if replica.is_some_and(|replica| replica.primary().is_some()) {
            return self.on_read(ask, effects);
        }
        let Some(replica) = replica.filter(|replica| may_tell(replica)) else {
            return refuse(&ask, Refusal::Stale, effects);
        };
        if !ask.is_of(replica) {
            return refuse(&ask, Refusal::NoSuchShard, effects);
        }
        let sizes = &self.settings.sizes;
        if self.reads.is_full(sizes) || self.bounded.is_full(sizes) {
            return refuse(&ask, Refusal::Overloaded, effects);
        }
        // A probe that leaves now is of no use to it any more when it is older than that.
        let patience = self.settings.proof_wait_ms.min(max_staleness_ms);
        let waiting = Waiting { ask, max_staleness_ms, until: self.now.plus_ms(patience) };
        if let Some(waiting) = self.tell_or_return(waiting, effects) {
            let read = self.fresh_id();
            self.bounded.wait(self.now, read, waiting);
        }
    }

    /// Answers the read if what is applied here is known to be young enough. Else it is returned.
    fn tell_or_return(&mut self, waiting: Waiting, effects: &mut Vec<Effect>) -> Option<Waiting> {
        let shard = waiting.ask.slots.shard();
        let Some(&Proof { asked, commit, .. }) = self.bounded.proofs.get(&shard) else {
            return Some(waiting);
        };
        let reached = |replica: &Replica| may_tell(replica) && replica.state.applied.seq >= commit;
        let content = waiting.is_content_with(self.now, asked);
        if !content || !self.replicas.get(&shard).is_some_and(reached) {
            return Some(waiting);
        }
        if self.now.ms_since(asked) > waiting.max_staleness_ms / 2 {
            self.bounded.want(shard);
        }
        let read = self.capture(waiting.ask, Worth::AsOf(asked), effects);
        self.answer_if_ready(read, effects);
        None
    }

    /// Something has been applied, or a proof has come: reads may be answered that waited for it.
    pub(super) fn tell_waiting(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        if self.bounded.waiting.is_empty() || !self.proof_says_more(shard) {
            return;
        }
        for read in self.bounded.waiting_for(shard) {
            let Some(waiting) = self.bounded.take(shard, read) else { continue };
            if let Some(waiting) = self.tell_or_return(waiting, effects) {
                self.bounded.wait(self.now, read, waiting);
            }
        }
    }

    /// A read that has waited until now may be answered, or must ask again: a proof has come, or what it speaks of is
    /// reached. Nothing else changes what becomes of those that wait, least of all every entry that is applied.
    fn proof_says_more(&mut self, shard: ShardId) -> bool {
        let applied = self.replicas.get(&shard).map_or(Seq(0), |replica| replica.state.applied.seq);
        let Some(proof) = self.bounded.proofs.get_mut(&shard) else { return false };
        let reached = applied >= proof.commit;
        proof.looked_at.replace(reached) != Some(reached)
    }

    fn refuse_waiting(&mut self, shard: ShardId, effects: &mut Vec<Effect>) {
        self.bounded.wanted.remove(&shard);
        for read in self.bounded.waiting_for(shard) {
            if let Some(waiting) = self.bounded.take(shard, read) {
                refuse(&waiting.ask, Refusal::Stale, effects);
            }
        }
    }

    /// Sends what is to be sent, and refuses what has waited for too long.
    pub(super) fn advance_bounded(&mut self, effects: &mut Vec<Effect>) {
        while let Some(&(at, shard, read)) = self.bounded.deadlines.first()
            && at <= self.now
        {
            if let Some(waiting) = self.bounded.take(shard, read) {
                refuse(&waiting.ask, Refusal::Stale, effects);
            }
        }
        self.send_probes(effects);
        self.send_proofs(effects);
    }

    fn send_probes(&mut self, effects: &mut Vec<Effect>) {
        let mut asks: BTreeMap<Conn, BTreeSet<ShardId>> = BTreeMap::new();
        for shard in std::mem::take(&mut self.bounded.wanted) {
            match self.leader_of(shard) {
                None => self.refuse_waiting(shard, effects),
                Some(conn) if self.bounded.probes.contains_key(&conn) => {
                    self.bounded.wanted.insert(shard);
                }
                Some(conn) => {
                    asks.entry(conn).or_default().insert(shard);
                }
            }
        }
        for (conn, open) in asks {
            let number = self.fresh_id();
            let shards = open.iter().copied().collect();
            self.bounded.probes.insert(conn, Probe { number, asked: self.now, open });
            let message = FromFollower::Probe { probe: number, shards };
            effects.push(Effect::FromFollower { conn, message });
        }
    }

    /// The connection by which the shard's primary feeds this node.
    fn leader_of(&self, shard: ShardId) -> Option<Conn> {
        let (record, _) = self.records.get(&shard)?;
        let mut newest_first = self.accepted.iter().rev();
        newest_first.find(|(_, link)| link.peer == Some(record.primary)).map(|(&conn, _)| conn)
    }

    /// The primary has answered a probe, in full or in part.
    pub(super) fn on_proof(
        &mut self,
        conn: Conn,
        number: u64,
        proven: Vec<(ShardId, Epoch, Seq)>,
        refused: Vec<ShardId>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(probe) = self.bounded.probes.get_mut(&conn) else { return };
        if probe.number != number {
            return;
        }
        let mut asked = probe.asked;
        if Planted::AgeFromAnswer.is_in(self.settings.planted) {
            asked = self.now;
        }
        for (shard, ..) in &proven {
            probe.open.remove(shard);
        }
        for shard in &refused {
            probe.open.remove(shard);
        }
        if probe.open.is_empty() {
            self.bounded.probes.remove(&conn);
        }
        for (shard, epoch, commit) in proven {
            let replica = self.replicas.get_mut(&shard);
            let Some(replica) = replica.filter(|replica| replica.promised == epoch) else {
                self.refuse_waiting(shard, effects);
                continue;
            };
            replica.hear_commit(commit);
            if self.bounded.proofs.get(&shard).is_none_or(|known| known.asked < asked) {
                self.bounded.proofs.insert(shard, Proof { asked, commit, looked_at: None });
            }
            self.dirty.insert(shard);
        }
        refused.into_iter().for_each(|shard| self.refuse_waiting(shard, effects));
    }

    /// A primary's connection is gone: what it was asked is asked by the next one.
    pub(super) fn forget_probe(&mut self, conn: Conn) {
        let Some(probe) = self.bounded.probes.remove(&conn) else { return };
        let waited_for = |shard: &ShardId| !self.bounded.waiting_for(*shard).is_empty();
        let again: Vec<ShardId> = probe.open.into_iter().filter(waited_for).collect();
        self.bounded.wanted.extend(again);
    }

    /// A gateway is gone: nobody waits for what it asked.
    pub(super) fn forget_bounded_reads(&mut self, gateway: Conn) {
        let of_it = |waiting: &Waiting| waiting.ask.conn == gateway;
        let gone = self.bounded.waiting.iter().filter(|(_, waiting)| of_it(waiting));
        let gone: Vec<_> = gone.map(|(&key, _)| key).collect();
        for (shard, read) in gone {
            self.bounded.take(shard, read);
        }
    }
}

/// There is a copy, and nothing is wrong with it.
fn may_tell(replica: &Replica) -> bool {
    replica.trust.is_working()
}

// ---- the primary ---------------------------------------------------------------------------------

impl Node {
    /// A follower asks how far its shards must be applied to hold all that is acknowledged by now.
    pub(super) fn on_probe(&mut self, conn: Conn, probe: u64, shards: Vec<ShardId>) {
        for shard in shards {
            let Some((epoch, commit)) = self.commit_to_tell(shard) else {
                self.bounded.leaving.entry((conn, probe)).or_default().refused.push(shard);
                continue;
            };
            if Planted::ProbeUnproven.is_in(self.settings.planted) {
                let leaving = self.bounded.leaving.entry((conn, probe)).or_default();
                leaving.proven.push((shard, epoch, commit));
                continue;
            }
            let claim = self.fresh_id();
            self.bounded.captured.insert(claim, Captured { conn, probe, shard, epoch, commit });
            self.claim(claim, shard, epoch);
        }
    }

    /// What is committed, if this node leads the shard and its barrier is committed: below it the
    /// primary does not know what its predecessors have acknowledged.
    fn commit_to_tell(&self, shard: ShardId) -> Option<(Epoch, Seq)> {
        let replica = self.replicas.get(&shard).filter(|replica| replica.trust.is_working())?;
        let primary = replica.primary().filter(|primary| primary.active)?;
        Some((primary.epoch, replica.commit))
    }

    pub(super) fn on_probe_judged(&mut self, claim: u64, verdict: Verdict) {
        let Some(captured) = self.bounded.captured.remove(&claim) else { return };
        let Captured { conn, probe, shard, epoch, commit } = captured;
        let proven = verdict == Verdict::Current && self.leads(shard, epoch);
        let leaving = self.bounded.leaving.entry((conn, probe)).or_default();
        match proven {
            true => leaving.proven.push((shard, epoch, commit)),
            false => leaving.refused.push(shard),
        }
    }

    fn send_proofs(&mut self, effects: &mut Vec<Effect>) {
        for ((conn, probe), leaving) in std::mem::take(&mut self.bounded.leaving) {
            let Leaving { proven, refused } = leaving;
            let message = ToFollower::Proof { probe, proven, refused };
            effects.push(Effect::ToFollower { conn, message });
        }
    }

    /// The follower's connection is gone.
    pub(super) fn forget_captured(&mut self, conn: Conn) {
        self.bounded.leaving.retain(|&(leaving, _), _| leaving != conn);
        let gone = self.bounded.captured.extract_if(.., |_, captured| captured.conn == conn);
        for claim in gone.map(|(claim, _)| claim).collect::<Vec<_>>() {
            self.proving.forget(claim);
        }
    }
}
