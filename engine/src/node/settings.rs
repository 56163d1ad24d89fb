//! What is tuned, and what a test makes small.
//!
//! Every limit of the machine is a field here, with what a process is shipped with as its default, so that the
//! simulator can draw it.

use crate::batch::BATCH_BYTES_LIMIT;
use crate::idempotency::{self, Limits};
use crate::planted::Planted;

/// The settings of one node.
#[derive(Clone, Debug)]
pub struct Settings {
    /// No commit with fewer members than this.
    pub min_in_sync: usize,
    /// The disk was found damaged: a shard of which it knows nothing may be one that it has lost.
    pub suspect: bool,
    /// A peer that says nothing for this long is silent.
    pub silent_after_ms: u64,
    pub heartbeat_ms: u64,
    /// A new primary whose barrier is not committed by then is frozen.
    pub frozen_after_ms: u64,
    /// A peer that has not answered a read-index round by then is done without, if etcd can be
    /// asked instead …
    pub read_index_ms: u64,
    /// … which happens no more often than this.
    pub etcd_check_every_ms: u64,
    /// A read that could not be proved current by then is refused.
    pub read_give_up_ms: u64,
    /// A bounded-stale read waits so long for its primary's proof, and is refused then. Time enough
    /// for a round and an etcd check after it.
    pub proof_wait_ms: u64,
    /// Applied entries of all shards kept in memory for followers that lag. Those applied first go first.
    pub log_memory_bytes: usize,
    /// Ordered and not yet applied, of all shards, with all that applying needs: beyond it batches are refused. And
    /// beyond so much that waits for this node alone it acknowledges nothing to those that it follows. No more than fits
    /// the log ([`pending_beside_log`]).
    pub pending_bytes_max: usize,
    /// The active table is frozen at this size …
    pub table_bytes_max: usize,
    /// … or this long after its first change.
    pub flush_after_ms: u64,
    /// How often a primary looks for dead sessions, and how long one must be seen absent.
    pub collect_every_ms: u64,
    /// How long a client's token counts, and how much is kept of them: the cluster's `meta` says so,
    /// since replicas that differ in it would apply one log differently.
    pub idempotency: idempotency::Settings,
    /// An idle disk is asked for an fsync this often.
    pub disk_probe_every_ms: u64,
    /// All that is on the disk is read this often; none: only when asked for …
    pub scrub_every_ms: Option<u64>,
    /// … at no more than this rate.
    pub scrub_bytes_per_s: u64,
    /// How much of everything.
    pub sizes: Sizes,
    /// How long, and how often.
    pub timing: Timing,
    pub planted: Option<Planted>,
}

/// What may be pending on a node whose log may grow to so many bytes. A log full of entries that are not applied takes
/// nothing that could commit them, not even a new primary's barrier: its shards would stay frozen.
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
            idempotency: idempotency::Settings::default(),
            disk_probe_every_ms: 200,
            scrub_every_ms: None,
            scrub_bytes_per_s: 20_000_000,
            sizes: Sizes::default(),
            timing: Timing::default(),
            planted: None,
        }
    }
}

impl Settings {
    /// What counts for idempotency records.
    pub fn limits(&self) -> Limits {
        Limits { settings: self.idempotency, planted: self.planted }
    }
}

/// Limits in bytes and in numbers. None of them changes what an entry means, so nodes of one cluster may differ in them.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// A group is closed at this many bytes, even if the one before it is still being written.
    pub group_bytes_max: usize,
    /// Most bytes of entries under way on one connection to a follower.
    pub window_bytes: usize,
    /// Most bytes of entries in one message, beside one entry that may be a request with a token of
    /// 12 MiB (the limit on the wire is 16 MiB).
    pub message_bytes: usize,
    /// Most bytes of entries from the log on disk, for all followers that lag, at a time, beside one entry: more than a
    /// block has, so that none is read twice, and no more than a message may have.
    pub read_log_bytes: usize,
    /// The largest payload of a batch that is ordered.
    pub batch_bytes_limit: usize,
    /// Reads waiting at once, all connections together; and as many that wait for a proof.
    pub waiting_reads_max: usize,
    /// What the one kind and the other may take of memory: beyond it reads are refused.
    pub waiting_read_bytes_max: usize,
    /// A digest is kept at every seq that this divides. Copies are compared at the seqs that both keep: nodes that
    /// differ in it compare at fewer of them …
    pub digest_every: u64,
    /// … and this many of them are kept.
    pub points_max: usize,
    /// Of each shard, in one heartbeat: the newest. A difference does not go away.
    pub points_told_max: usize,
    /// Seqs at which a primary remembers what others told, waiting for itself or the rest of them.
    pub votes_max: usize,
}

impl Default for Sizes {
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
            points_told_max: 8,
            votes_max: 64,
        }
    }
}

/// Waits and intervals, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A process that stood still for this long blames itself for what it missed.
    pub gap_ms: u64,
    /// Follower states, proposals and health are looked at this often, and on every change.
    pub review_every_ms: u64,
    /// A peer that was ejected waits so long before it is added again …
    pub ejected_ms: u64,
    /// … twice as long each time, up to this. It is forgotten after twice that.
    pub ejected_ms_max: u64,
    /// A stop is to take less than 10 s in all: longer than this nobody is waited for.
    pub leave_within_ms: u64,
    /// How long a primary stops ordering for a hand-over before it goes on by itself.
    pub step_down_ms: u64,
    /// A shard is frozen when a member has not been able to acknowledge for this long; a member that
    /// can leave the in-sync set is out of it by then …
    pub blocked_ms: u64,
    /// … or when what was ordered has waited this long for its commit, whatever the reason.
    pub stalled_ms: u64,
    /// A learner that has what was committed this long ago, at least, and twice that at most, is
    /// near: the commit waits for it for so long at most, that it may join …
    pub near_ms: u64,
    /// … and if it has not caught up by then, this long not again.
    pub join_again_ms: u64,
    /// Nobody is added to an in-sync set when etcd has not answered for this long: an addition
    /// without an answer counts until there is one.
    pub etcd_fresh_ms: u64,
    /// After a whole copy that could not be sent or taken, none is begun for so long.
    pub copy_again_ms: u64,
    /// What is needed of the log is said this often, beside after each flush.
    pub trim_every_ms: u64,
    /// After a proposal that etcd refused or did not answer, none is made for so long.
    pub propose_again_ms: u64,
    /// Etcd is asked this often about a copy that it does not name, until the copy is deleted. Reads are numbered, so a
    /// late answer decides nothing that a later read is asked for.
    pub ask_again_ms: u64,
    /// The coordinator is reported to on every change, and this often without one.
    pub report_every_ms: u64,
}

impl Default for Timing {
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
            ask_again_ms: 5_000,
            report_every_ms: 1_000,
        }
    }
}
