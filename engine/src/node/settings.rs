//! The settings of a node: what is tuned, and what a test makes small.
//!
//! Every limit of the state machine is a field here, so that the simulator can draw it. The default
//! is the value of a production process, except for limits that a driver computes from its memory.

use crate::batch::BATCH_BYTES_LIMIT;
use crate::etcd_memory::EtcdMemory;
use crate::planted::Planted;
use crate::shard::idempotency::{self, TokenLimits};

/// The settings of one node.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The number of in-sync members below which nothing is committed.
    pub min_in_sync: usize,
    /// Recovery found the disk damaged: a shard of which the disk contains nothing may be one that
    /// it has lost.
    pub suspect: bool,
    /// A peer that sends nothing for this long is silent.
    pub silent_after_ms: u64,
    /// The interval between heartbeats to followers.
    pub heartbeat_ms: u64,
    /// The shard of a new primary is frozen if its barrier is not committed within this time.
    pub frozen_after_ms: u64,
    /// The time that a read-index round waits for its peers. Then etcd is read instead.
    pub read_index_ms: u64,
    /// The shortest interval between two such reads of etcd.
    pub etcd_check_every_ms: u64,
    /// A read that is not proved current within this time is refused.
    pub read_give_up_ms: u64,
    /// A read of bounded staleness waits this long for a proof of its primary, and is refused then.
    /// The time suffices for a round and an etcd check after it.
    pub proof_wait_ms: u64,
    /// Bytes of applied entries, of all shards, that are kept in memory for lagging followers. The
    /// entries that were applied first are dropped first.
    pub log_memory_bytes: usize,
    /// Bytes of entries, of all shards, that are ordered and not yet applied, with all that
    /// applying needs. Beyond it batches are refused; and if so many wait for this node alone, it
    /// acknowledges nothing to its primaries. The log must have room for all of it
    /// ([`pending_beside_log`]).
    pub pending_bytes_max: usize,
    /// The size in bytes at which the active table is sealed.
    pub table_bytes_max: usize,
    /// The time after its first change at which the active table is sealed at the latest.
    pub flush_after_ms: u64,
    /// The interval at which a primary looks for dead sessions, and how long a session must be
    /// absent to be dead.
    pub collect_every_ms: u64,
    /// The validity of a client's token, and how many records are kept. The values come from the
    /// cluster's `meta`, since replicas with different values would apply one log differently.
    pub idempotency: idempotency::TokenSettings,
    /// An idle disk is probed with an fsync this often.
    pub disk_probe_every_ms: u64,
    /// The interval between scrubs of everything on the disk; `None`: on request only.
    pub scrub_every_ms: Option<u64>,
    /// The highest rate of a scrub in bytes per second, unless a request sets another one.
    pub scrub_bytes_per_s: u64,
    /// Limits in bytes and in numbers.
    pub sizes: NodeSizes,
    /// Waits and intervals.
    pub timing: NodeTiming,
    /// The store's memory of etcd, as its log has it; `None` in tests without a recovery of
    /// etcd.
    pub etcd: Option<Box<EtcdMemory>>,
    /// A bug for the tests of the tests; `None` in production.
    pub planted: Option<Planted>,
}

/// Returns how many bytes may be pending on a node with a log of `log_bytes`: `pending_bytes`, or
/// less. A log full of entries that are not applied has no room for what could commit them, not
/// even for the barrier of a new primary: its shards would stay frozen.
pub fn pending_beside_log(pending_bytes: usize, log_bytes: usize) -> usize {
    pending_bytes.min(log_bytes / 8)
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            min_in_sync: 2,
            suspect: false,
            silent_after_ms: 1_000,
            heartbeat_ms: 100,
            frozen_after_ms: 1_000,
            read_index_ms: 30,
            etcd_check_every_ms: 100,
            read_give_up_ms: 5_000,
            proof_wait_ms: 300,
            log_memory_bytes: 64 << 20,
            pending_bytes_max: 256 << 20,
            table_bytes_max: 64 << 20,
            flush_after_ms: 30_000,
            collect_every_ms: 600_000,
            idempotency: idempotency::TokenSettings::default(),
            disk_probe_every_ms: 200,
            scrub_every_ms: None,
            scrub_bytes_per_s: 20_000_000,
            sizes: NodeSizes::default(),
            timing: NodeTiming::default(),
            etcd: None,
            planted: None,
        }
    }
}

impl Settings {
    /// Returns the limits of idempotency records.
    pub fn limits(&self) -> TokenLimits {
        TokenLimits { settings: self.idempotency, planted: self.planted }
    }
}

/// Limits in bytes and in numbers. No limit changes what an entry means, so the nodes of one
/// cluster may have different ones.
#[derive(Clone, Copy, Debug)]
pub struct NodeSizes {
    /// A group is closed at this many bytes, even if the one before it is still being written.
    pub group_bytes_max: usize,
    /// Most bytes of entries in flight on one connection to a follower.
    pub window_bytes: usize,
    /// Most bytes of entries in one message, beside one entry that may be a request with a token of
    /// 12 MiB (the limit on the wire is 16 MiB).
    pub message_bytes: usize,
    /// Most bytes of entries in one read of the log on disk, for all lagging followers together,
    /// beside one entry: more than a block contains, so that no block is read twice, and no more
    /// than a message may contain.
    pub read_log_bytes: usize,
    /// The largest payload of a batch that is ordered.
    pub batch_bytes_limit: usize,
    /// Most reads that wait for a value, over all connections; and as many may wait for a proof.
    pub waiting_reads_max: usize,
    /// Most bytes of memory of each of the two kinds: beyond it reads are refused.
    pub waiting_read_bytes_max: usize,
    /// A digest is kept at every multiple of this seq. Copies are compared at the seqs that both
    /// keep: nodes with different values compare at fewer of them.
    pub digest_every: u64,
    /// The number of digests that are kept of each shard.
    pub points_max: usize,
    /// Most digests of each shard in one heartbeat: the newest ones. A difference does not
    /// disappear.
    pub points_sent_max: usize,
    /// Most seqs at which a primary keeps the digests of its followers, until it has reached the
    /// seq itself and the other followers have reported.
    pub votes_max: usize,
}

impl Default for NodeSizes {
    fn default() -> Self {
        Self {
            group_bytes_max: 1 << 20,
            window_bytes: 16 << 20,
            message_bytes: 3 << 20,
            read_log_bytes: 3 << 20,
            batch_bytes_limit: BATCH_BYTES_LIMIT,
            waiting_reads_max: 100_000,
            waiting_read_bytes_max: 32 << 20,
            digest_every: 1_024,
            points_max: 64,
            points_sent_max: 8,
            votes_max: 64,
        }
    }
}

/// Waits and intervals, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct NodeTiming {
    /// After a pause of the process this long, peer time-outs are reset, not counted against peers.
    pub gap_ms: u64,
    /// Follower states, proposals and health are reviewed this often, and on every change.
    pub review_every_ms: u64,
    /// The time that a peer that was ejected waits before it is added again, the first time. Each
    /// time after that it waits twice as long.
    pub ejected_ms: u64,
    /// The longest wait of a peer that was ejected again and again. The wait is reset after twice
    /// this time without an ejection.
    pub ejected_ms_max: u64,
    /// The longest wait of a graceful stop for its shards: all of the stop is to take less than 10
    /// s.
    pub leave_within_ms: u64,
    /// The time for which a primary orders nothing for a hand-over before it resumes by itself.
    pub step_down_ms: u64,
    /// A shard is frozen when a member has not been able to acknowledge for this long. A member
    /// that can leave the in-sync set has left it by then.
    pub blocked_ms: u64,
    /// A shard is frozen when an ordered entry has waited this long for its commit, for any reason.
    pub stalled_ms: u64,
    /// A learner is near if it has what was committed between one and two times this long ago. The
    /// commit waits for a near learner for up to twice this time, so that it can join.
    pub near_ms: u64,
    /// After a near learner that has not caught up, the commit waits for none for this long.
    pub join_again_ms: u64,
    /// No store is added to an in-sync set when etcd has not answered for this long: an addition
    /// without an answer counts until there is one.
    pub etcd_fresh_ms: u64,
    /// After a snapshot that could not be sent or taken, the next one waits this long.
    pub copy_again_ms: u64,
    /// [`Effect::Trim`](crate::node::Effect::Trim) is repeated this often, beside the one after
    /// each flush.
    pub trim_every_ms: u64,
    /// After a proposal that etcd refused or did not answer, the next one waits this long.
    pub propose_again_ms: u64,
    /// The record of a shard that does not name a copy on this node is read this often, until the
    /// copy is deleted. Reads are numbered, so a late answer decides nothing that requires a later
    /// read.
    pub copy_recheck_ms: u64,
    /// The interval of reports to the coordinator, beside those on every change.
    pub report_every_ms: u64,
}

impl Default for NodeTiming {
    fn default() -> Self {
        Self {
            gap_ms: 500,
            review_every_ms: 50,
            ejected_ms: 1_000,
            ejected_ms_max: 60_000,
            leave_within_ms: 4_000,
            step_down_ms: 2_000,
            blocked_ms: 500,
            stalled_ms: 1_500,
            near_ms: 250,
            join_again_ms: 5_000,
            etcd_fresh_ms: 3_000,
            copy_again_ms: 1_000,
            trim_every_ms: 1_000,
            propose_again_ms: 100,
            copy_recheck_ms: 5_000,
            report_every_ms: 1_000,
        }
    }
}
