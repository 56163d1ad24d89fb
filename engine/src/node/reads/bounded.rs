//! Reads of bounded staleness: which values a follower may return, and how old they are.
//!
//! ```text
//!   follower                                    primary of its promised epoch
//!   ────────                                    ─────────────────────────────
//!   its clock is t ── ProofRequest{shards} ───▶ captures each shard's commit, then proves that it
//!                                               led at the capture (`read_index`)
//!   keeps (t, commit) ◀── Proof{commit} ─────── the commits that were proved; refused shards
//!   applied ≥ commit: its values
//!   contain all that was acknowledged by t
//! ```
//!
//! Everything acknowledged by t was acknowledged before the request arrived, so the commit captured
//! then covers it. No clocks are compared: t and the time of the answer are readings of the
//! follower's own clock. t is when the request *left*; with the time when the proof came, values
//! would seem younger than they are by all that was acknowledged in between.
//!
//! A proof serves every read that accepts its age, without a message. A follower has one request in
//! flight to each primary, for all shards that clients read; without reads it sends none. A read
//! that is served from a proof older than half of the age that it accepts requests the next proof
//! in the background: so steady reads never wait, and continue for a while when the primary is
//! silent.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Conn, Epoch, Now, Seq, ShardId};
use crate::memory;
use crate::message::{FromFollower, Refusal, ToFollower};
use crate::node::event::Effect;
use crate::node::peers::Peers;
use crate::node::reads::Reads;
use crate::node::reads::captured::{ReadBasis, ReadRequest, refuse};
use crate::node::reads::read_index::ClaimOutcome;
use crate::node::settings::NodeSizes;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::Replica;

#[derive(Clone, Debug, Default)]
pub(super) struct Bounded {
    // -- what a follower knows
    /// The newest proof of each shard.
    proofs: BTreeMap<ShardId, Proof>,
    /// The request in flight on each connection of a primary.
    proof_requests: BTreeMap<Conn, ProofRequest>,
    /// Shards of the next request.
    wanted: BTreeSet<ShardId>,
    waiting: BTreeMap<(ShardId, u64), BoundedRead>,
    /// The bytes of memory of the waiting reads.
    bytes: usize,
    /// When each waiting read is refused.
    deadlines: BTreeSet<(Now, ShardId, u64)>,

    // -- what a primary knows
    /// Commits captured for a request, by claim.
    captured: BTreeMap<u64, CapturedCommit>,
    /// Proofs that are sent at the end of this turn, by connection and request.
    outgoing: BTreeMap<(Conn, u64), OutgoingProof>,
}

/// A proof: what is applied up to `commit` contains everything that was acknowledged by `asked`.
#[derive(Clone, Copy, Debug)]
struct Proof {
    asked: Now,
    commit: Seq,
    /// True if `commit` was reached here when the waiting reads were last checked; `None` if they
    /// were not checked since the proof came.
    reached_at_last_check: Option<bool>,
}

#[derive(Clone, Debug)]
struct ProofRequest {
    number: u64,
    asked: Now,
    /// Shards that the primary has not answered yet.
    open: BTreeSet<ShardId>,
}

/// A read that waits for a proof.
#[derive(Clone, Debug)]
struct BoundedRead {
    request: ReadRequest,
    max_staleness_ms: u64,
    until: Now,
}

#[derive(Clone, Copy, Debug)]
struct CapturedCommit {
    conn: Conn,
    request: u64,
    shard: ShardId,
    epoch: Epoch,
    commit: Seq,
}

#[derive(Clone, Debug, Default)]
struct OutgoingProof {
    proven: Vec<(ShardId, Epoch, Seq)>,
    refused: Vec<ShardId>,
}

impl BoundedRead {
    /// Returns whether a proof requested at `asked` is young enough now.
    fn accepts(&self, now: Now, asked: Now) -> bool {
        now <= asked.plus_ms(self.max_staleness_ms)
    }
}

impl Bounded {
    /// Returns whether there is no room for another waiting read.
    fn is_full(&self, sizes: &NodeSizes) -> bool {
        self.waiting.len() >= sizes.waiting_reads_max || self.bytes >= sizes.waiting_read_bytes_max
    }

    /// Returns the bytes of memory of the waiting reads, as counted.
    pub(in crate::node) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the same, computed from every read.
    pub(in crate::node) fn walked_bytes(&self) -> usize {
        let each = memory::of_map::<(ShardId, u64), BoundedRead>(1)
            + memory::of_map::<(Now, ShardId, u64), ()>(1);
        self.waiting.values().map(|waiting| waiting.request.walked_bytes() + each).sum()
    }

    /// Returns when to handle a tick although no event has come.
    pub(in crate::node) fn deadline(&self) -> Option<Now> {
        self.deadlines.first().map(|&(at, _, _)| at)
    }

    /// Requests a newer proof, unless a request is in flight.
    fn want(&mut self, shard: ShardId) {
        if !self.proof_requests.values().any(|request| request.open.contains(&shard)) {
            self.wanted.insert(shard);
        }
    }

    fn wait(&mut self, now: Now, read: u64, waiting: BoundedRead) {
        let shard = waiting.request.slots.shard();
        // If the known proof is young enough, its commit only has to be reached.
        let proof = self.proofs.get(&shard);
        if !proof.is_some_and(|proof| waiting.accepts(now, proof.asked)) {
            self.want(shard);
        }
        self.deadlines.insert((waiting.until, shard, read));
        self.bytes += waiting.request.bytes();
        self.waiting.insert((shard, read), waiting);
    }

    fn take(&mut self, shard: ShardId, read: u64) -> Option<BoundedRead> {
        let waiting = self.waiting.remove(&(shard, read))?;
        self.bytes -= waiting.request.bytes();
        self.deadlines.remove(&(waiting.until, shard, read));
        Some(waiting)
    }

    /// Returns the number of reads that wait for a proof.
    pub(in crate::node) fn len(&self) -> usize {
        self.waiting.len()
    }

    fn waiting_for(&self, shard: ShardId) -> Vec<u64> {
        self.waiting.range((shard, 0)..=(shard, u64::MAX)).map(|(&(_, read), _)| read).collect()
    }
}

// ---- the follower ------------------------------------------------------------------------------

impl Reads {
    /// Handles a read that accepts values of at most this age. A primary answers it like any other.
    pub(super) fn on_bounded_read(
        &mut self,
        turn: &mut NodeTurn<'_>,
        request: ReadRequest,
        max_staleness_ms: u64,
    ) {
        let shard = request.slots.shard();
        let replica = turn.shards.get(shard);
        if replica.is_some_and(|replica| replica.primary().is_some()) {
            return self.on_linearizable_read(turn, request);
        }
        let Some(replica) = replica.filter(|replica| may_serve(replica)) else {
            return refuse(turn, &request, Refusal::Stale);
        };
        if !request.is_of(replica) {
            return refuse(turn, &request, Refusal::NoSuchShard);
        }
        let sizes = &turn.settings.sizes;
        if self.captured.is_full(sizes) || self.bounded.is_full(sizes) {
            return refuse(turn, &request, Refusal::Overloaded);
        }
        // A request that is sent now is of no use to the read once it is older than that.
        let patience = turn.settings.proof_wait_ms.min(max_staleness_ms);
        let waiting = BoundedRead { request, max_staleness_ms, until: turn.now.plus_ms(patience) };
        if let Some(waiting) = self.answer_or_return(turn, waiting) {
            let read = turn.fresh_id();
            self.bounded.wait(turn.now, read, waiting);
        }
    }

    /// Answers the read if what is applied here is proved to be young enough. Otherwise returns it.
    fn answer_or_return(
        &mut self,
        turn: &mut NodeTurn<'_>,
        waiting: BoundedRead,
    ) -> Option<BoundedRead> {
        let shard = waiting.request.slots.shard();
        let Some(&Proof { asked, commit, .. }) = self.bounded.proofs.get(&shard) else {
            return Some(waiting);
        };
        let slots = waiting.request.slots;
        let reached = |replica: &Replica| {
            may_serve(replica) && replica.slots == slots && replica.state.applied.seq >= commit
        };
        let content = waiting.accepts(turn.now, asked);
        if !content || !turn.shards.get(shard).is_some_and(reached) {
            return Some(waiting);
        }
        if turn.now.ms_since(asked) > waiting.max_staleness_ms / 2 {
            self.bounded.want(shard);
        }
        let read = self.capture(turn, waiting.request, ReadBasis::AsOf(asked));
        self.answer_if_ready(turn, read);
        None
    }

    /// Answers the reads that waited for what has been applied, or for a proof that has come.
    pub(in crate::node) fn answer_waiting(&mut self, turn: &mut NodeTurn<'_>, shard: ShardId) {
        if self.bounded.waiting.is_empty() || !self.proof_has_advanced(turn, shard) {
            return;
        }
        for read in self.bounded.waiting_for(shard) {
            let Some(waiting) = self.bounded.take(shard, read) else { continue };
            if let Some(waiting) = self.answer_or_return(turn, waiting) {
                self.bounded.wait(turn.now, read, waiting);
            }
        }
    }

    /// Returns whether waiting reads must be checked again: a proof has come, or its commit was
    /// reached. Nothing else changes their outcome, in particular not every entry that is applied.
    fn proof_has_advanced(&mut self, turn: &NodeTurn<'_>, shard: ShardId) -> bool {
        let applied = turn.shards.get(shard).map_or(Seq(0), |replica| replica.state.applied.seq);
        let Some(proof) = self.bounded.proofs.get_mut(&shard) else { return false };
        let reached = applied >= proof.commit;
        proof.reached_at_last_check.replace(reached) != Some(reached)
    }

    fn refuse_waiting(&mut self, turn: &mut NodeTurn<'_>, shard: ShardId) {
        self.bounded.wanted.remove(&shard);
        for read in self.bounded.waiting_for(shard) {
            if let Some(waiting) = self.bounded.take(shard, read) {
                refuse(turn, &waiting.request, Refusal::Stale);
            }
        }
    }

    /// Refuses the reads that have waited for too long, and sends requests and proofs.
    pub(in crate::node) fn advance_bounded(&mut self, turn: &mut NodeTurn<'_>, peers: &Peers) {
        while let Some(&(at, shard, read)) = self.bounded.deadlines.first()
            && at <= turn.now
        {
            if let Some(waiting) = self.bounded.take(shard, read) {
                refuse(turn, &waiting.request, Refusal::Stale);
            }
        }
        self.send_proof_requests(turn, peers);
        self.send_proofs(turn);
    }

    fn send_proof_requests(&mut self, turn: &mut NodeTurn<'_>, peers: &Peers) {
        let mut asks: BTreeMap<Conn, BTreeSet<ShardId>> = BTreeMap::new();
        for shard in std::mem::take(&mut self.bounded.wanted) {
            let primary = turn.shards.recorded_primary(shard);
            match primary.and_then(|primary| peers.connection_from(primary)) {
                None => self.refuse_waiting(turn, shard),
                Some(conn) if self.bounded.proof_requests.contains_key(&conn) => {
                    self.bounded.wanted.insert(shard);
                }
                Some(conn) => {
                    asks.entry(conn).or_default().insert(shard);
                }
            }
        }
        for (conn, open) in asks {
            let number = turn.fresh_id();
            let shards = open.iter().copied().collect();
            self.bounded
                .proof_requests
                .insert(conn, ProofRequest { number, asked: turn.now, open });
            let message = FromFollower::ProofRequest { request: number, shards };
            turn.effects.push(Effect::ToPrimary { conn, message });
        }
    }

    /// Handles the primary's answer to a request, for all of its shards or for some.
    pub(in crate::node) fn on_proof(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        number: u64,
        proven: Vec<(ShardId, Epoch, Seq)>,
        refused: Vec<ShardId>,
    ) {
        let Some(request) = self.bounded.proof_requests.get_mut(&conn) else { return };
        if request.number != number {
            return;
        }
        let mut asked = request.asked;
        if turn.planted(Planted::AgeFromAnswer) {
            asked = turn.now;
        }
        for (shard, ..) in &proven {
            request.open.remove(shard);
        }
        for shard in &refused {
            request.open.remove(shard);
        }
        if request.open.is_empty() {
            self.bounded.proof_requests.remove(&conn);
        }
        for (shard, epoch, commit) in proven {
            let replica = turn.shards.get_mut(shard);
            let Some(replica) = replica.filter(|replica| replica.promised == epoch) else {
                self.refuse_waiting(turn, shard);
                continue;
            };
            replica.learn_commit(commit);
            if self.bounded.proofs.get(&shard).is_none_or(|known| known.asked < asked) {
                self.bounded
                    .proofs
                    .insert(shard, Proof { asked, commit, reached_at_last_check: None });
            }
            turn.shards.to_advance.insert(shard);
        }
        refused.into_iter().for_each(|shard| self.refuse_waiting(turn, shard));
    }

    /// Discards the request on a closed connection: the next primary is asked again.
    pub(super) fn forget_proof_request(&mut self, conn: Conn) {
        let Some(request) = self.bounded.proof_requests.remove(&conn) else { return };
        let waited_for = |shard: &ShardId| !self.bounded.waiting_for(*shard).is_empty();
        let again: Vec<ShardId> = request.open.into_iter().filter(waited_for).collect();
        self.bounded.wanted.extend(again);
    }

    /// Discards the waiting reads of a gateway whose connection is closed.
    pub(super) fn forget_bounded_reads(&mut self, gateway: Conn) {
        let of_it = |waiting: &BoundedRead| waiting.request.conn == gateway;
        let gone = self.bounded.waiting.iter().filter(|(_, waiting)| of_it(waiting));
        let gone: Vec<_> = gone.map(|(&key, _)| key).collect();
        for (shard, read) in gone {
            self.bounded.take(shard, read);
        }
    }
}

/// Returns the commit, if this node leads the shard and its barrier is committed: before that the
/// primary does not know what its predecessors have acknowledged.
fn provable_commit(turn: &NodeTurn<'_>, shard: ShardId) -> Option<(Epoch, Seq)> {
    let replica = turn.shards.get(shard).filter(|replica| replica.trust.is_working())?;
    let primary = replica.primary().filter(|primary| primary.active)?;
    Some((primary.epoch, replica.commit))
}

/// Returns whether there is a good copy to read from.
fn may_serve(replica: &Replica) -> bool {
    replica.trust.is_working()
}

// ---- the primary -------------------------------------------------------------------------------

impl Reads {
    /// Handles the request of a follower for proofs: up to which commit must its shards be applied
    /// to contain all that is acknowledged by now?
    pub(in crate::node) fn on_proof_request(
        &mut self,
        turn: &mut NodeTurn<'_>,
        conn: Conn,
        request: u64,
        shards: Vec<ShardId>,
    ) {
        for shard in shards {
            let Some((epoch, commit)) = provable_commit(turn, shard) else {
                self.bounded.outgoing.entry((conn, request)).or_default().refused.push(shard);
                continue;
            };
            if turn.planted(Planted::ProbeUnproven) {
                let outgoing = self.bounded.outgoing.entry((conn, request)).or_default();
                outgoing.proven.push((shard, epoch, commit));
                continue;
            }
            let claim = turn.fresh_id();
            self.bounded
                .captured
                .insert(claim, CapturedCommit { conn, request, shard, epoch, commit });
            self.prove_leadership(turn, claim, shard, epoch);
        }
    }

    pub(super) fn on_commit_claim_settled(
        &mut self,
        turn: &NodeTurn<'_>,
        claim: u64,
        outcome: ClaimOutcome,
    ) {
        let Some(captured) = self.bounded.captured.remove(&claim) else { return };
        let CapturedCommit { conn, request, shard, epoch, commit } = captured;
        let proven = outcome == ClaimOutcome::Current && turn.shards.leads(shard, epoch);
        let outgoing = self.bounded.outgoing.entry((conn, request)).or_default();
        match proven {
            true => outgoing.proven.push((shard, epoch, commit)),
            false => outgoing.refused.push(shard),
        }
    }

    fn send_proofs(&mut self, turn: &mut NodeTurn<'_>) {
        for ((conn, request), outgoing) in std::mem::take(&mut self.bounded.outgoing) {
            let OutgoingProof { proven, refused } = outgoing;
            let message = ToFollower::Proof { request, proven, refused };
            turn.effects.push(Effect::ToFollower { conn, message });
        }
    }

    /// Discards the captured commits for a follower whose connection is closed.
    pub(super) fn forget_captured_commits(&mut self, conn: Conn) {
        self.bounded.outgoing.retain(|&(outgoing, _), _| outgoing != conn);
        let gone = self.bounded.captured.extract_if(.., |_, captured| captured.conn == conn);
        for claim in gone.map(|(claim, _)| claim).collect::<Vec<_>>() {
            self.read_index.forget(claim);
        }
    }
}
