//! The place and the limits of a store, and the division of a node's memory.

use std::path::PathBuf;

use engine::store::table::TABLE_BYTES_MAX;

use crate::state::StateSettings;

/// The place and the limits of a store.
#[derive(Clone, Debug)]
pub struct DiskSettings {
    /// The store's own folder; created if it does not exist.
    pub folder: PathBuf,
    /// A segment of the log is full at this size (or after one group).
    pub segment_bytes: usize,
    /// The block size in which the log is read.
    pub block_bytes: usize,
    /// The length up to which the log is kept for lagging followers; beyond it, entries are kept
    /// only for this store itself.
    pub log_keep_bytes: usize,
    /// The bytes by which this store's own entries may exceed `log_keep_bytes` before it refuses
    /// writes.
    pub log_slack_bytes: usize,
    /// The store refuses writes when fewer bytes than this are free on the file system.
    pub free_bytes_min: u64,
    /// The store refuses writes when fewer files than this can be created there.
    pub free_inodes_min: u64,
    /// The limits of the state.
    pub state: StateSettings,
    /// The number of threads that load counters.
    pub readers: usize,
}

impl DiskSettings {
    /// Returns the defaults for a store in this folder with this memory plan.
    pub fn new(folder: PathBuf, memory: &MemoryPlan) -> Self {
        let segment_bytes = engine::store::log::group::SEGMENT_BYTES;
        let cores = std::thread::available_parallelism().map_or(2, |cores| cores.get());
        Self {
            folder,
            segment_bytes,
            block_bytes: engine::store::log::index::BLOCK_BYTES,
            log_keep_bytes: 1 << 30,
            log_slack_bytes: 1 << 30,
            // This leaves room for the segments being made, a flush of both tables, and one
            // compaction of them.
            free_bytes_min: 4 * (segment_bytes + memory.table_bytes_max) as u64,
            // A flush, a compaction and a snapshot make some dozens of files, and old ones go only
            // afterwards.
            free_inodes_min: 64,
            state: StateSettings {
                cache_bytes: memory.cache_bytes,
                open_files_max: memory.open_files_max,
                ..StateSettings::default()
            },
            readers: cores.clamp(2, 8),
        }
    }
}

/// The division of a storage node's memory. The disk gets its part, and the state machine gets the
/// rest by its settings (`NodeSettings::engine`).
///
/// A fixed part is for what the process takes in any case: code, threads, socket buffers, RocksDB
/// beside its cache. The rest is divided into eighteenths. Each part limits what is *held*, as the
/// allocator provides it, not the nominal size of messages:
///
/// | part | eighteenths | beyond it |
/// |---|---|---|
/// | RocksDB's blocks, indexes and filters | 4 | the oldest go |
/// | counter tables: active, sealed, the order of the flush | 5 | applying waits for the flush |
/// | ordered and not applied, decoded | 2 | batches are refused; a follower stops acknowledging |
/// | received and not handled: gateways, peers | 2 | nothing more is read from those sockets |
/// | applied log for followers that lag | 1 | the oldest go; such followers are fed from the disk |
/// | reads in flight, reads that wait for a proof | 1 | reads are refused |
/// | session rows, snapshots, log reads for followers, outgoing messages | 1 | own limits |
/// | allocator: pages freed recently or used in part; RocksDB's table readers | 2 | |
///
/// Received data may take one message of the largest size on each side, however little memory there
/// is: then the other parts are smaller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemoryPlan {
    /// The size of RocksDB's cache of blocks, indexes and filters.
    pub cache_bytes: usize,
    /// The most sorted files that RocksDB keeps open. Their readers, some kilobytes each, are
    /// outside of the cache.
    pub open_files_max: i32,
    /// The size of one counter table.
    pub table_bytes_max: usize,
    /// The size of entries ordered and not yet applied, of all shards.
    pub pending_bytes_max: usize,
    /// The size of applied log entries in memory, of all shards.
    pub log_memory_bytes: usize,
    /// The intake of gateways, and as much again of peers.
    pub intake_bytes: usize,
    /// The size of reads in flight, and as much again of reads that wait for a proof.
    pub waiting_read_bytes_max: usize,
}

/// The fixed part of the process.
const OWN_BYTES: usize = 48 << 20;
/// The least memory that is divided.
const DIVIDED_BYTES_MIN: usize = 64 << 20;
const PARTS: usize = 18;

impl MemoryPlan {
    /// Divides this many bytes.
    pub fn of(memory_bytes: usize) -> Self {
        let divided = memory_bytes.saturating_sub(OWN_BYTES).max(DIVIDED_BYTES_MIN);
        // One message of the largest size fits on each side, lest it wait for space that never
        // comes.
        let intake_bytes = (divided / PARTS).max(proto::MESSAGE_BYTES_MAX);
        let part = (divided - 2 * intake_bytes) / (PARTS - 2);
        Self {
            cache_bytes: 4 * part,
            open_files_max: i32::try_from((divided >> 20) * 4).unwrap_or(i32::MAX).min(4_000),
            table_bytes_max: (part / 4 * 9).min(TABLE_BYTES_MAX),
            pending_bytes_max: 2 * part,
            log_memory_bytes: part,
            intake_bytes,
            waiting_read_bytes_max: part / 2,
        }
    }
}
