//! The state machine of a storage node: all its replicas, peer health, reads, flushes, scrubs.
//!
//! ```text
//!   driver                                     node
//!   ──────                                     ────
//!   sockets   ── Gateway, FromFollower, ────▶  orders batches, counts acks,
//!                FromPrimary                   accepts what its primaries send
//!             ◀── Gateway, ToFollower, ──────
//!                 ToPrimary
//!   log file  ◀── Write … Write, Sync{g} ────  everything since the last Sync is group g
//!             ── Durable{g} ────────────────▶  commit moves, entries apply to the table
//!   state     ◀── Load, Flush, snapshots ────
//!             ── Loaded, Ingested, … ───────▶
//!   etcd      ◀── Propose, ReadRecord, … ────
//!             ── ShardRecord, Proposed, … ──▶
//! ```
//!
//! **The contract for drivers** is the table in docs/design.md#order-of-effects. Three kinds keep
//! their order: `Write`, `Sync` and `Trim`; what changes or copies the state (`Flush`,
//! `InstallSnapshot`, `DropRows`, the reading of `SendSnapshot`); messages of one connection and
//! its `Close`. A `Load` begins before the next event is handled. An acknowledgement waits inside
//! the state machine until the fsync that it depends on has come back as an event.
//!
//! **A turn** is any number of events and [`Event::TurnEnded`]. An event goes to its part
//! (`dispatch`), which marks what may follow from it. The end of the turn does what is due by the
//! clock (`on_time`), then the consequences of all its events at once (`settle`): every shard that
//! was marked is advanced (commit, apply, answers) and reviewed (in-sync set) until no mark is
//! left, and what there is to send is sent. So what comes together travels together: one `Append`
//! for a follower and one group of the log for all events of a turn.
//!
//! **The parts** own their state: no other part can reach it. The shards and the storage below them
//! are [`shared`]; a table there has the part that changes each field of a replica.
//!
//! ```text
//!   gateways    batches: checked, then ordered or refused
//!   peers       connections, health, feeding followers, following primaries, catching up
//!   snapshots   copies of shards: sent, received, created, deleted
//!   membership  the records in etcd, in-sync sets, which replicas can acknowledge
//!   reads       values captured, proved current or young enough, and returned
//!   audit       copies compared with each other and with the disk
//!   retention   sessions that are gone, idempotency records whose time is over
//!   reporter    reports to the coordinator, and the graceful stop
//!   shared      storage: group commit, loads, the tables, flushes, trims, memory
//!               shards: a replica and the newest record of each shard, and marks
//! ```

pub mod boot;

mod audit;
pub(crate) mod event;
mod gateways;
mod knowledge;
mod membership;
mod peers;
mod queries;
mod reads;
mod reporter;
mod retention;
pub(crate) mod settings;
mod shared;
mod snapshots;

#[cfg(test)]
mod tests;

use crate::ids::{Conn, Now, ShardId, StoreBoot, StoreId, TimeMs};
use crate::message::{
    FromFollower, GatewayMessage, ReplicaHealth, ReplicaStatus, ScrubStatus, ToFollower,
};
use crate::replica::Replica;
use crate::shard::idempotency::TokenLimits;
use crate::store::table::Tables;
use membership::HealthView;
use reads::ReadRequest;
use shared::Shared;
use snapshots::AnnouncedSnapshot;

pub use crate::replica::recovered::{RecoveredContent, RecoveredReplica};
pub use crate::replica::view::ReplicaView;
pub use event::{AuditFinding, CasOutcome, Effect, Event, ExitReason, ScrubbedShard};
pub use settings::{NodeSizes, NodeTiming, Settings, pending_beside_log};
pub use shared::TokenCounts;

/// The state machine of one storage node: all its replicas.
#[derive(Clone, Debug)]
pub struct Node {
    shared: Shared,
    next_review: Now,
    gateways: gateways::Gateways,
    peers: peers::Peers,
    snapshots: snapshots::Snapshots,
    membership: membership::Membership,
    reads: reads::Reads,
    audit: audit::Audit,
    retention: retention::Retention,
    reporter: reporter::Reporter,
}

impl Node {
    /// Creates a node at its start, with what recovery found and the number of its first group. It
    /// leads nothing, whatever the records in etcd are: a process is primary only of epochs that
    /// name its own boot.
    pub fn new(
        settings: Settings,
        me: StoreBoot,
        now: Now,
        next_group: u64,
        recovered: Vec<RecoveredReplica>,
    ) -> Self {
        let recover = |found| Replica::recover(found, settings.planted);
        let mut shards = shared::Shards::new(recovered.into_iter().map(recover));
        shards.etcd = settings.etcd.clone();
        let storage = shared::Storage::new(&settings, now, next_group, shards.iter_mut());
        Self {
            next_review: now,
            gateways: gateways::Gateways::default(),
            peers: peers::Peers::new(now),
            snapshots: snapshots::Snapshots::default(),
            membership: membership::Membership::new(now, settings.timing.copy_recheck_ms),
            reads: reads::Reads::default(),
            audit: audit::Audit::default(),
            retention: retention::Retention::new(now, &settings),
            reporter: reporter::Reporter::new(now),
            shared: Shared { settings, me, now, wall: TimeMs(0), shards, storage, last_id: 0 },
        }
    }

    /// Handles one event and appends the effects that the driver has to perform to `effects`. The
    /// consequences come with [`Event::TurnEnded`], which must follow before the driver waits.
    pub fn handle(&mut self, now: Now, event: Event, effects: &mut Vec<Effect>) {
        if now.ms_since(self.shared.now) > self.shared.settings.timing.gap_ms {
            self.peers.health_mut().reset_after_pause(now);
            let led = self.shared.shards.iter_mut().filter_map(Replica::primary_mut);
            led.for_each(|primary| primary.progress.reset_after_pause(now));
        }
        self.shared.now = self.shared.now.max(now);
        if event.shows_etcd() {
            self.peers.health_mut().note_etcd_answer(self.shared.now);
        }
        self.dispatch(event, effects);
    }

    fn end_turn(&mut self, effects: &mut Vec<Effect>) {
        let review = self.shared.now >= self.next_review;
        if review {
            let every_ms = self.shared.settings.timing.review_every_ms;
            self.next_review = self.shared.now.plus_ms(every_ms);
            self.on_time(effects);
        }
        self.settle(review, effects);
    }

    /// Returns the time at which to end a turn, even one without an event.
    pub fn next_deadline(&self) -> Option<Now> {
        [Some(self.next_review), self.reads.deadline()].into_iter().flatten().min()
    }

    /// Sends an event to the part that it belongs to.
    fn dispatch(&mut self, event: Event, effects: &mut Vec<Effect>) {
        let Self { shared, gateways, peers, snapshots, membership, reads, .. } = self;
        if let Event::WallClock(time) = event {
            shared.wall = time;
        }
        let turn = &mut shared.lend(effects);
        match event {
            Event::TurnEnded => self.end_turn(effects),
            Event::WallClock(_) | Event::LeaseConfirmed => {}

            Event::GatewayConnected { conn } => gateways.on_connected(turn, conn),
            Event::Gateway { conn, message } => self.on_gateway(conn, message, effects),
            Event::GatewayGone { conn } => {
                gateways.on_gone(turn, conn);
                reads.on_gateway_gone(conn);
            }

            Event::Dialled { conn, peer } => peers.on_dialled(turn, conn, peer),
            Event::Accepted { conn } => peers.on_accepted(conn),
            Event::FromFollower { conn, message } => self.on_from_follower(conn, message, effects),
            Event::FromPrimary { conn, message } => self.on_to_follower(conn, message, effects),
            Event::Closed { conn } => {
                peers.on_closed(turn, conn);
                self.forget_closed();
            }
            Event::DialRefused { store } => peers.on_refused(turn, store),

            Event::Query { query, message } => {
                queries::on_query(turn, peers, &mut self.audit, query, message);
            }

            Event::Durable { group } => {
                turn.on_durable(group);
                peers.send_due_acks(turn);
            }
            Event::Loaded { load, values, records } => {
                if let Some(loaded) = turn.on_loaded(load, values, records) {
                    reads.on_loaded(turn, loaded.read, loaded.values);
                }
            }
            Event::LogRead { at, parts } => peers.on_log_read(turn, at, parts),
            Event::FlushAdvanced { flush, counters } => turn.on_flush_advanced(flush, counters),
            Event::Ingested { flush } => {
                turn.on_ingested(flush, snapshots);
                for child in turn.begin_children(flush) {
                    peers.announce_copy(turn, child);
                    membership::follow_known_record(turn, peers, snapshots, child);
                    turn.shards.review_led();
                }
            }
            Event::RowsCounted { count, counts } => turn.on_rows_counted(count, &counts),
            Event::DiskFull(full) => turn.on_disk_full(full, snapshots),
            Event::Room { bytes } => turn.storage.set_room(bytes),

            Event::SnapshotStaged { conn, transfer, state } => {
                snapshots.on_staged(turn, peers, conn, transfer, *state);
            }
            Event::SnapshotInstalled { conn, transfer } => {
                if let Some(slots) = snapshots.on_installed(turn, peers, conn, transfer) {
                    membership::follow_records_in(turn, peers, snapshots, slots);
                }
            }
            Event::RowsDropped { shard } => {
                let slots = turn.shards.get(shard).map(|replica| replica.slots);
                snapshots.on_rows_dropped(turn, shard);
                if let Some(slots) = slots {
                    membership::follow_records_in(turn, peers, snapshots, slots);
                }
            }
            Event::SnapshotMeasured { transfer, bytes } => {
                snapshots.on_measured(turn, transfer, bytes);
            }
            Event::SnapshotFailed { transfer } => snapshots.on_failed(turn, transfer),
            Event::Scrubbed { scrub, found } => self.audit.on_scrubbed(turn, peers, scrub, found),

            Event::ShardRecord { record, mod_revision, read } => {
                membership::on_record(turn, peers, snapshots, record, mod_revision, read);
            }
            Event::PeersRegistered(registered) => peers.on_registered(turn, &registered),
            Event::Proposed { proposal, outcome } => {
                membership.on_proposed(turn, peers, snapshots, proposal, outcome);
            }
            // A record of an etcd that is not followed any more proves nothing.
            Event::EtcdChecked { .. } if turn.shards.fence.is_some() => {}
            Event::EtcdChecked { check, records } => reads.on_etcd_checked(turn, check, records),
            Event::SessionsListed { at, alive } => {
                self.retention.on_sessions_listed(turn, peers.health(), at, alive);
            }

            Event::Leave => self.reporter.leave(turn, peers),
            Event::LeaveNotReported => self.reporter.on_leave_not_reported(turn.now),
        }
    }

    fn on_gateway(&mut self, conn: Conn, message: GatewayMessage, effects: &mut Vec<Effect>) {
        let turn = &mut self.shared.lend(effects);
        if !self.gateways.is_connected(conn) {
            return;
        }
        match message {
            GatewayMessage::Frame { message, batches } => {
                self.gateways.on_frame(turn, self.peers.health(), conn, message, batches);
            }
            GatewayMessage::Resend { message, shard, batch } => {
                let health = self.peers.health();
                self.gateways.on_resend(turn, health, (conn, message), shard, batch);
            }
            GatewayMessage::Read { id, slots, keys, max_staleness_ms } => {
                let request = ReadRequest { conn, id, slots, keys };
                self.reads.on_read(turn, request, max_staleness_ms);
            }
        }
    }

    /// Handles a message of a follower that this node feeds.
    fn on_from_follower(&mut self, conn: Conn, message: FromFollower, effects: &mut Vec<Effect>) {
        let Self { shared, peers, snapshots, reads, audit, .. } = self;
        let turn = &mut shared.lend(effects);
        let admitted = peers.admit_from_follower(turn, conn, message);
        let Some((StoreBoot { store, .. }, message)) = admitted else {
            return self.forget_closed();
        };
        match message {
            FromFollower::Welcome { .. } => {}
            FromFollower::Copy { shard, copy } => peers.on_copy(turn, conn, shard, copy),
            FromFollower::Ack { n } => peers.on_ack(turn, conn, n),
            FromFollower::Reject { n, shard, reason } => {
                peers.on_rejected(turn, conn, n, shard, reason);
            }
            FromFollower::Alive { sent: _, fsync_age_ms, full, room_bytes, wall, digests } => {
                let health = peers.health_mut();
                health.note_wall(store, wall, turn.now);
                health.note_disk(store, fsync_age_ms, full, room_bytes);
                digests.into_iter().for_each(|point| audit.on_digest(turn, peers, store, point));
            }
            FromFollower::ReadIndex { round, newer } => {
                for &(shard, epoch) in &newer {
                    turn.shards.step_down_below(shard, epoch);
                }
                reads.on_round_answered(turn, peers, store, round, &newer);
            }
            FromFollower::ProofRequest { request, shards } => {
                reads.on_proof_request(turn, conn, request, shards);
            }
            FromFollower::Snapshot { transfer, shard: _, outcome } => {
                snapshots.on_answer(turn, transfer, outcome);
            }
        }
    }

    /// Handles a message of a primary that feeds this node.
    fn on_to_follower(&mut self, conn: Conn, message: ToFollower, effects: &mut Vec<Effect>) {
        let Self { shared, peers, snapshots, reads, .. } = self;
        let turn = &mut shared.lend(effects);
        let admitted = peers.admit_to_follower(turn, conn, message);
        let Some((StoreBoot { store, .. }, message)) = admitted else {
            return self.forget_closed();
        };
        match message {
            ToFollower::Hello { .. } => {}
            ToFollower::Append { n, slices } => {
                peers.on_append(turn, conn, n, slices);
                self.forget_closed();
            }
            ToFollower::Heartbeat { sent, commits } => {
                peers.on_heartbeat(turn, snapshots, conn, sent, commits);
            }
            ToFollower::ReadIndex { round, shards } => {
                reads::answer_round(turn, conn, round, &shards);
            }
            ToFollower::Proof { request, proven, refused } => {
                reads.on_proof(turn, conn, request, proven, refused);
            }
            ToFollower::Damaged { epoch, copy, point } => {
                audit::on_marked_corrupt(turn, peers, store, epoch, copy, point);
            }
            ToFollower::Snapshot { transfer, shard, epoch, copy, bytes } => {
                let announced = AnnouncedSnapshot { shard, epoch, copy, bytes };
                snapshots.on_announced(turn, conn, transfer, announced);
            }
        }
    }

    /// Discards what belongs to connections between nodes that were closed in this event.
    fn forget_closed(&mut self) {
        for conn in self.peers.take_closed() {
            self.reads.on_closed(conn);
            self.snapshots.on_closed(conn);
        }
    }

    /// Does what is due by the clock.
    fn on_time(&mut self, effects: &mut Vec<Effect>) {
        let Self { shared, peers, snapshots, membership, audit, retention, reporter, .. } = self;
        let turn = &mut shared.lend(effects);
        peers.send_heartbeats_if_due(turn);
        turn.probe_disk_if_due();
        peers.note_unacked();
        snapshots::retry(turn);
        turn.flush_if_due();
        turn.trim_if_due(snapshots);
        membership.recheck_unassigned_copies(turn);
        retention.collect_if_due(turn);
        retention.expire_if_due(turn, peers.health());
        audit.scrub_if_due(turn);
        reporter.report(turn, peers);
    }

    /// Processes the consequences of the turn's events until nothing is left to do. `review`: the
    /// shards that this node leads are due for a review.
    fn settle(&mut self, mut review: bool, effects: &mut Vec<Effect>) {
        let Self { shared, gateways, peers, snapshots, membership, reads, audit, .. } = self;
        let turn = &mut shared.lend(effects);
        loop {
            while let Some(shard) = turn.next_to_advance() {
                let before = turn.advance(shard);
                audit.compare_if_reached(turn, peers, shard, before);
                gateways.announce_availability(turn, shard);
                reads.answer_waiting(turn, shard);
                turn.count_log(shard);
            }
            if std::mem::take(&mut review) {
                membership::review_by_clock(turn, peers);
            }
            let Some(shard) = turn.shards.to_review.pop_first() else { break };
            membership.review(turn, peers, shard);
            gateways.announce_availability(turn, shard);
        }
        turn.shrink_logs();
        reads.advance_claims(turn, peers);
        reads.advance_bounded(turn, peers);
        peers.send_slices(turn, snapshots);
        peers.read_log_if_due(turn);
        turn.sync_if_idle();
        peers.send_due_acks(turn);
        self.reporter.finish_leaving(turn, peers);
    }

    // ---- for status, and for the checkers of the simulator -------------------------------------

    /// Returns the store and the boot that this node is.
    pub fn me(&self) -> StoreBoot {
        self.shared.me
    }

    /// Returns a view of every replica.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaView<'_>> {
        self.shared.shards.iter().map(Replica::view)
    }

    /// Returns the status of all copies on this node.
    pub fn status(&self) -> Vec<ReplicaStatus> {
        queries::status(&self.shared.shards, self.health(), &self.shared.settings)
    }

    /// Returns the replicas that hold up the shard, or would if they counted.
    pub fn hindered_by(&self, shard: ShardId) -> Vec<(StoreId, ReplicaHealth)> {
        self.health().hindered_by(shard)
    }

    fn health(&self) -> HealthView<'_> {
        HealthView::at_rest(&self.shared, &self.peers)
    }

    /// Returns whether the disk is full: writes are refused, reads are served.
    pub fn is_disk_full(&self) -> bool {
        self.shared.storage.is_disk_full()
    }

    /// Returns the tables, as reads see them now.
    pub fn tables(&self) -> &Tables {
        self.shared.storage.tables()
    }

    /// Returns whether the active table has grown to its limit.
    pub fn has_full_table(&self) -> bool {
        self.shared.storage.has_full_table(self.shared.settings.table_bytes_max)
    }

    /// Returns whether more entries wait for this node's own work than it may keep: it acknowledges
    /// nothing to the primaries that it follows.
    pub fn is_behind(&self) -> bool {
        self.shared.storage.is_behind(self.shared.settings.pending_bytes_max)
    }

    /// Returns the counted bytes of what grows with the node's work; its limits refer to this
    /// number. (Session rows are counted by the shard, and some kilobytes that each shard and each
    /// connection always takes are not counted.)
    pub fn counted_bytes(&self) -> usize {
        self.shared.storage.counted_bytes() + self.reads.counted_bytes()
    }

    /// Returns the same number, computed from everything in memory.
    pub fn held_bytes(&self) -> usize {
        self.shared.storage.walked_bytes(&self.shared.shards) + self.reads.walked_bytes()
    }

    /// Returns the limits of idempotency records.
    pub fn limits(&self) -> TokenLimits {
        self.shared.settings.limits()
    }

    /// Returns the counts of requests with a token.
    pub fn token_counts(&self) -> TokenCounts {
        self.shared.storage.token_counts()
    }

    /// Returns the number of in-sync members that were found to have lost acknowledged entries.
    pub fn durability_violations(&self) -> u64 {
        self.peers.durability_violations()
    }

    /// Returns the number of follower digests that differed from this node's own at the same seq.
    pub fn digest_mismatches(&self) -> u64 {
        self.audit.digest_mismatches()
    }

    /// Returns the number of scrubs that have ended, and of copies that they found damaged.
    pub fn scrubs(&self) -> (u64, u64) {
        self.audit.scrubs()
    }

    /// Returns the number of reads that wait for a value or for a proof.
    pub fn waiting_reads(&self) -> usize {
        self.reads.waiting()
    }

    /// Returns the status of the last scrub.
    pub fn last_scrub(&self) -> ScrubStatus {
        self.audit.scrub_status()
    }

    /// Panics if an invariant is broken. The simulator calls it after every event.
    pub fn check_invariants(&self) {
        self.shared.shards.iter().for_each(Replica::check_invariants);
        if self.shared.shards.to_advance.is_empty() {
            self.shared.storage.check_memory(&self.shared.shards);
        }
    }
}
