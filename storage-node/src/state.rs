//! The state: one RocksDB that changes only by ingesting sorted files.
//!
//! Nothing is ever written through its memtable, so it needs no write-ahead log: a change is a file
//! that was fsynced, and one MANIFEST record that names it. After a crash either all of one ingest
//! took effect or nothing of it.
//!
//! **A [`StateView`] is the state as the state machine knows it.** It is a RocksDB snapshot, made
//! right after an ingest, and handed to the loop together with the event that reports the ingest.
//! Loads read the view, never the database: a load that saw an ingest before the state machine
//! knows of it would count the flushed changes twice, once from the file and once from the table.

use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use engine::codec::Malformed;
use engine::ids::{CopyNo, ShardId, Slots};
use engine::key::CounterKey;
use engine::shard::idempotency::{RecordId, TokenLimits, TokenRecord};
use engine::shard::state::ShardState;
use engine::store::layout::{self, RowChange};
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DB, DBCompressionType, DataBlockIndexType, Env,
    IngestExternalFileOptions, MergeOperands, Options, ReadOptions, SnapshotWithThreadMode,
    SstFileWriter,
};
use self_cell::self_cell;

use crate::error::{DiskError, context};
use crate::expiry_filter::{ExpiredBuckets, ExpiryFilter};
use crate::folders::make_durably;
use crate::kill;

const LEVEL0_FILES: &CStr = c"rocksdb.num-files-at-level0";

/// The limits of the state.
#[derive(Clone, Copy, Debug)]
pub struct StateSettings {
    /// The size of the one cache of blocks, indexes and filters.
    pub cache_bytes: usize,
    /// The most sorted files that are kept open. Table readers are outside of the cache; each open
    /// file costs some kilobytes.
    pub open_files_max: i32,
    /// The size at which a file of a flush or a snapshot is closed. RocksDB counts full blocks, so
    /// no file but the last is smaller than one of them (16 KiB before packing).
    pub file_bytes: u64,
    /// The number of files of level 0 at which they are compacted into the levels below.
    pub level0_files_compacted: i32,
    /// The number of files of level 0 beyond which flushes are slowed down.
    pub level0_files_slow: u64,
    /// The wait of a flush, in each of its parts, for each file of level 0 beyond that number, of
    /// which 100 count at most.
    pub level0_file_wait: Duration,
    /// The number of parts of a flush of a large table, at least 1. Each one reports its progress.
    pub flush_parts: usize,
    /// The least number of rows of such a part; 4,096 take some milliseconds.
    pub flush_part_rows_min: usize,
}

impl Default for StateSettings {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            open_files_max: 2_000,
            file_bytes: 64 << 20,
            level0_files_compacted: 8,
            level0_files_slow: 24,
            level0_file_wait: Duration::from_millis(5),
            flush_parts: 64,
            flush_part_rows_min: 4_096,
        }
    }
}

/// The RocksDB of one store's state.
pub struct StateStore {
    db: Arc<DB>,
    options: Options,
    settings: StateSettings,
    /// The folder of files that are not ingested yet. Its content at a start was never ingested and
    /// is removed.
    folder: PathBuf,
    next_file: AtomicU64,
    expiry_filter: ExpiryFilter,
}

impl StateStore {
    /// Opens the database at `path`; the folder of files to be ingested is beside it.
    pub fn open(path: &Path, settings: StateSettings) -> Result<Self, DiskError> {
        let folder = path.with_extension("files");
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(|why| context("remove", &folder, why))?;
        }
        make_durably(&folder)?;
        let mut options = options(settings)?;
        let expiry_filter = ExpiryFilter::default();
        options.set_compaction_filter_factory(expiry_filter.clone());
        let db = Arc::new(DB::open(&options, path)?);
        Ok(Self { db, options, settings, folder, next_file: AtomicU64::new(0), expiry_filter })
    }

    /// Lets compactions remove, from now on, the idempotency records that have expired by the
    /// cluster's limits.
    pub fn remove_expired(&self, limits: TokenLimits) -> Result<(), DiskError> {
        let shards = self.view().shards()?;
        self.expiry_filter.set_limits(limits, shards.iter().map(|(_, state)| state));
        Ok(())
    }

    /// Makes a checkpoint: links all files, as they are now, into this folder, which must not exist
    /// yet.
    pub fn checkpoint(&self, into: &Path) -> Result<(), DiskError> {
        Ok(Checkpoint::new(&self.db)?.create_checkpoint(into)?)
    }

    /// Returns an unused path for a checkpoint; it is removed at the next start at the latest.
    pub fn fresh_folder(&self) -> PathBuf {
        self.fresh_path().with_extension("checkpoint")
    }

    /// Returns the path of the database.
    pub fn path(&self) -> &Path {
        self.db.path()
    }

    /// Returns a view of the state as it is now.
    pub fn view(&self) -> StateView {
        let expired = self.expiry_filter.pin_view();
        StateView {
            snapshot: OwnedSnapshot::new(self.db.clone(), |db| db.snapshot()),
            _expired: expired,
        }
    }

    /// Writes the rows of a flush and ingests them in one call. `advanced` is called with the
    /// number of rows written so far, some dozens of times if they are many.
    pub fn flush(
        &self,
        table: &engine::store::table::SealedTable,
        shards: &[(CopyNo, ShardState)],
        advanced: impl Fn(usize),
    ) -> Result<(), DiskError> {
        let mut files = SortedFiles::new(self);
        let StateSettings { flush_parts, flush_part_rows_min, .. } = self.settings;
        let (mut written, part) = (0, (table.len() / flush_parts).max(flush_part_rows_min));
        layout::rows(table, shards, |key, change| {
            written += 1;
            if written % part == 0 {
                self.wait_for_compaction()?;
                advanced(written);
            }
            files.add(key, change)
        })?;
        let files = files.finish()?;
        self.ingest(files, &[])?;
        self.expiry_filter.ingested(shards.iter().map(|(_, state)| state));
        Ok(())
    }

    /// Waits a little for each file of level 0 beyond the limit, so that compaction, which runs
    /// beside the flushes, keeps up with them.
    fn wait_for_compaction(&self) -> Result<(), DiskError> {
        let files = self.db.property_int_value(LEVEL0_FILES)?.unwrap_or(0);
        let excess = files.saturating_sub(self.settings.level0_files_slow);
        if excess > 0 {
            let files = u32::try_from(excess).unwrap_or(u32::MAX).min(100);
            thread::sleep(self.settings.level0_file_wait * files);
        }
        Ok(())
    }

    /// Removes all rows of a shard.
    pub fn drop_rows(&self, slots: Slots) -> Result<(), DiskError> {
        self.expiry_filter.forget(slots);
        let file = self.range_deletes(slots)?;
        self.ingest(vec![file], &[])
    }

    /// Replaces the rows of these slots, and the shard's record, by a staged snapshot: all or
    /// nothing. If it fails, the staged files are still there.
    pub fn install(
        &self,
        staged: &[PathBuf],
        copy: CopyNo,
        replaces: Slots,
        state: &ShardState,
    ) -> Result<(), DiskError> {
        // Files ingested in one call take effect in this order.
        let mut record = SortedFiles::new(self);
        let key = layout::shard_key(state.slots.shard());
        record.add(&key, RowChange::Put(&layout::encode_shard(copy, state)))?;
        let before = [self.range_deletes(replaces)?];
        let files = [&before[..], staged, &record.finish()?].concat();
        kill::point("install.files");
        self.expiry_filter.forget(replaces);
        self.ingest(files, staged)?;
        self.expiry_filter.ingested([state]);
        Ok(())
    }

    /// Begins files for rows that come in ascending order. They are not ingested.
    pub fn files(&self) -> SortedFiles<'_> {
        SortedFiles::new(self)
    }

    fn range_deletes(&self, slots: Slots) -> Result<PathBuf, DiskError> {
        let path = self.fresh_path();
        let write = || {
            let mut writer = SstFileWriter::create(&self.options);
            writer.open(&path)?;
            for (begin, end) in layout::ranges(slots) {
                writer.delete_range(begin, end)?;
            }
            writer.finish()
        };
        let written = write();
        if written.is_err() {
            remove([&path]);
        }
        written?;
        Ok(path)
    }

    /// Ingests files: either all take effect, in this order, or they are removed, except those to
    /// `keep`.
    fn ingest(&self, files: Vec<PathBuf>, keep: &[PathBuf]) -> Result<(), DiskError> {
        if files.is_empty() {
            return Ok(());
        }
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        // The memtable is always empty. If it ever is not, the ingest fails rather than flushes it.
        options.set_allow_blocking_flush(false);
        kill::point("ingest.begun");
        kill::point_during("ingest.during");
        let ingested = self.db.ingest_external_file_opts(&options, files.clone());
        kill::point("ingest.done");
        if ingested.is_err() {
            remove(files.iter().filter(|file| !keep.contains(file)));
        }
        Ok(ingested?)
    }

    fn fresh_path(&self) -> PathBuf {
        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        self.folder.join(format!("{number}.sst"))
    }
}

/// Sorted files being written, each fsynced when it is full. Dropping them unfinished removes them.
pub struct SortedFiles<'a> {
    state: &'a StateStore,
    writer: Option<(SstFileWriter<'a>, PathBuf)>,
    done: Vec<PathBuf>,
}

impl<'a> SortedFiles<'a> {
    fn new(state: &'a StateStore) -> Self {
        Self { state, writer: None, done: Vec::new() }
    }

    /// Adds a row, whose key is above all keys before it.
    pub fn add(&mut self, key: &[u8], change: RowChange<'_>) -> Result<(), DiskError> {
        if self.writer.is_none() {
            let path = self.state.fresh_path();
            let writer = SstFileWriter::create(&self.state.options);
            writer.open(&path)?;
            self.writer = Some((writer, path));
        }
        let (writer, _) = self.writer.as_mut().expect("made above");
        match change {
            RowChange::Put(value) => writer.put(key, value)?,
            RowChange::Merge(operand) => writer.merge(key, operand)?,
            RowChange::Delete => writer.delete(key)?,
        }
        if writer.file_size() >= self.state.settings.file_bytes {
            self.close()?;
        }
        Ok(())
    }

    /// Finishes and returns all files, in order; the list is empty without rows.
    pub fn finish(&mut self) -> Result<Vec<PathBuf>, DiskError> {
        self.close()?;
        Ok(std::mem::take(&mut self.done))
    }

    fn close(&mut self) -> Result<(), DiskError> {
        if let Some((mut writer, path)) = self.writer.take() {
            // The path is noted first, so that the file is removed even if it can't be finished.
            self.done.push(path);
            writer.finish()?;
        }
        Ok(())
    }
}

impl Drop for SortedFiles<'_> {
    fn drop(&mut self) {
        let open = self.writer.take().map(|(_, path)| path);
        remove(self.done.iter().chain(open.as_ref()));
    }
}

fn remove<'a>(files: impl IntoIterator<Item = &'a PathBuf>) {
    for file in files {
        // A file that is left is removed at the next start.
        let _ = fs::remove_file(file);
    }
}

/// Opens a checkpoint that is read once: with hardly any memory, and past the page cache if the
/// file system supports it.
pub(crate) fn open_checkpoint(path: &Path) -> Result<StateView, DiskError> {
    let settings = StateSettings { cache_bytes: 4 << 20, open_files_max: 64, ..Default::default() };
    let mut options = options(settings)?;
    options.set_use_direct_reads(true);
    let direct = DB::open_for_read_only(&options, path, false);
    let db = direct.or_else(|_| {
        options.set_use_direct_reads(false);
        DB::open_for_read_only(&options, path, false)
    })?;
    let snapshot = OwnedSnapshot::new(Arc::new(db), |db| db.snapshot());
    // A checkpoint is never compacted.
    Ok(StateView { snapshot, _expired: Arc::default() })
}

type Snapshot<'a> = SnapshotWithThreadMode<'a, DB>;

/// A consistent view of the state at one moment.
pub struct StateView {
    snapshot: OwnedSnapshot,
    /// Keeps compactions from removing rows that this view shows.
    _expired: Arc<ExpiredBuckets>,
}

self_cell!(
    struct OwnedSnapshot {
        owner: Arc<DB>,

        #[covariant]
        dependent: Snapshot,
    }
);

impl std::fmt::Debug for StateView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StateView({})", self.snapshot.borrow_dependent().sequence_number())
    }
}

impl StateView {
    /// Returns the values of these counters, in order; `None` where there is no row.
    pub fn values(&self, keys: &[CounterKey]) -> Result<Vec<Option<i128>>, DiskError> {
        let rows = keys.iter().map(|key| layout::counter_key(key.slot(), key.name()));
        self.decoded(rows.collect(), layout::decode_counter)
    }

    /// Returns the idempotency records of these ids, in order; `None` where there is no row.
    pub fn records(&self, ids: &[RecordId]) -> Result<Vec<Option<TokenRecord>>, DiskError> {
        let rows = ids.iter().map(|id| layout::idempotency_key(id.slot, id.hash));
        self.decoded(rows.collect(), layout::decode_record)
    }

    fn decoded<T>(
        &self,
        keys: Vec<Vec<u8>>,
        decode: impl Fn(&[u8]) -> Result<T, Malformed>,
    ) -> Result<Vec<Option<T>>, DiskError> {
        let found = self.snapshot.borrow_dependent().multi_get(&keys);
        let values = keys.iter().zip(found).map(|(key, found)| {
            let value = found?.map(|bytes| decode(&bytes).map_err(|why| row_error(key, why)));
            value.transpose()
        });
        values.collect()
    }

    /// Returns about how many bytes a shard's rows take on the disk, exact enough to decide whether
    /// a snapshot of them has room.
    pub fn size_of(&self, slots: Slots) -> u64 {
        let ranges = layout::ranges(slots);
        let ranges: Vec<_> =
            ranges.iter().map(|(begin, end)| rocksdb::Range::new(begin, end)).collect();
        self.snapshot.borrow_owner().get_approximate_sizes(&ranges).iter().sum()
    }

    /// Returns the encoded record of the shard.
    pub fn shard_record(&self, shard: ShardId) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.snapshot.borrow_dependent().get(layout::shard_key(shard))?)
    }

    /// Returns every shard record.
    pub fn shards(&self) -> Result<Vec<(CopyNo, ShardState)>, DiskError> {
        let [_, _, records] = layout::ranges(Slots::ALL);
        let mut shards = Vec::new();
        self.scan(records, |key, value| {
            shards.push(layout::decode_shard(value).map_err(|why| row_error(key, why))?);
            Ok(true)
        })?;
        Ok(shards)
    }

    /// Calls `each` for every row of a shard except its record, in order, until it returns `false`.
    pub fn rows(
        &self,
        slots: Slots,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, DiskError>,
    ) -> Result<(), DiskError> {
        let [counters, tokens, _] = layout::ranges(slots);
        self.scan(counters, &mut each)?;
        self.scan(tokens, &mut each)
    }

    fn scan(
        &self,
        (begin, end): layout::KeyRange,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<bool, DiskError>,
    ) -> Result<(), DiskError> {
        let mut read = ReadOptions::default();
        read.set_iterate_upper_bound(end);
        // A snapshot in transfer must not evict what reads need.
        read.fill_cache(false);
        let mut rows = self.snapshot.borrow_dependent().raw_iterator_opt(read);
        rows.seek(begin);
        while let Some((key, value)) = rows.item() {
            if !each(key, value)? {
                return Ok(());
            }
            rows.next();
        }
        Ok(rows.status()?)
    }
}

pub(crate) fn row_error(key: &[u8], why: Malformed) -> DiskError {
    DiskError::Row { key: key.escape_ascii().to_string(), why }
}

fn options(settings: StateSettings) -> Result<Options, DiskError> {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(settings.cache_bytes));
    table.set_block_size(16 << 10);
    table.set_metadata_block_size(4 << 10);
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    table.set_cache_index_and_filter_blocks(true);
    table.set_cache_index_and_filter_blocks_with_high_priority(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_pin_top_level_index_and_filter(true);
    // A ribbon filter would be smaller, and takes several times as long to make. Most rows are in
    // the last level, which has none.
    table.set_bloom_filter(10.0, false);
    table.set_data_block_index_type(DataBlockIndexType::BinaryAndHash);

    let mut env = Env::new()?;
    env.lower_thread_pool_cpu_priority();

    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_env(&env);
    options.set_block_based_table_factory(&table);
    options.set_compression_type(DBCompressionType::Lz4);
    // Reads mostly find a row: no filter is kept for the last level, which holds nine rows in ten.
    options.set_optimize_filters_for_hits(true);
    options.set_level_compaction_dynamic_level_bytes(true);
    // A compaction of a flushed file rewrites the level below, which has rows everywhere: the more
    // files it takes, the fewer rows are rewritten for each that is new.
    options.set_level_zero_file_num_compaction_trigger(settings.level0_files_compacted);
    options.set_max_open_files(settings.open_files_max);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(1 << 20);
    // The write buffer is never filled: every change is an ingested file.
    options.set_write_buffer_size(64 << 10);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(4 << 20);
    options.set_stats_dump_period_sec(0);
    options.set_merge_operator("dkc counter 1", full_merge, partial_merge);
    Ok(options)
}

/// The merge operator is total: bytes that are not a counter give `None`, which RocksDB reports as
/// corruption.
fn full_merge(_key: &[u8], existing: Option<&[u8]>, operands: &MergeOperands) -> Option<Vec<u8>> {
    layout::merge(existing, operands).ok()
}

fn partial_merge(
    _key: &[u8],
    _existing: Option<&[u8]>,
    operands: &MergeOperands,
) -> Option<Vec<u8>> {
    layout::merge_operands(operands).ok()
}

#[cfg(test)]
mod tests {
    use engine::entry::Position;
    use engine::ids::{Slot, TimeMs};
    use engine::shard::idempotency::TokenSettings;
    use engine::store::table::Table;

    use super::*;

    /// A bucket is a second.
    const LIMITS: TokenLimits = TokenLimits { settings: SETTINGS, planted: None };
    const SETTINGS: TokenSettings =
        TokenSettings { window_ms: 6_000, buckets: 6, bytes_max: 1 << 20, namespaces_max: 4 };

    struct Bench {
        state: StateStore,
        folder: tempfile::TempDir,
    }

    impl Bench {
        fn open() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let state =
                StateStore::open(&folder.path().join("state"), StateSettings::default()).unwrap();
            state.remove_expired(LIMITS).unwrap();
            Self { state, folder }
        }

        fn state_at(time_ms: u64, live: &[u64]) -> ShardState {
            let mut state = ShardState { slots: Slots::ALL, ..ShardState::default() };
            state.applied = Position { time: TimeMs(time_ms), ..Position::default() };
            live.iter().for_each(|&bucket| state.tokens.add(&LIMITS, b"n", bucket, (0, 40)));
            state
        }

        /// Flushes a record of each written bucket, with the bucket's number as its hash.
        fn flush(&self, time_ms: u64, live: &[u64], written: &[u64]) {
            let mut table = Table::new();
            for &bucket in written {
                let id = RecordId { slot: Slot(7), hash: bucket.into() };
                table.put_record(id, TokenRecord { bucket, fingerprint: 0, values: vec![] });
            }
            let shards = [(CopyNo(1), Self::state_at(time_ms, live))];
            self.state.flush(&table.seal(), &shards, |_| {}).unwrap();
        }

        /// Compacts everything and returns the buckets of the records that are left.
        fn left(&self) -> Vec<u64> {
            let mut all = rocksdb::CompactOptions::default();
            all.set_bottommost_level_compaction(rocksdb::BottommostLevelCompaction::Force);
            self.state.db.compact_range_opt(None::<&[u8]>, None::<&[u8]>, &all);
            buckets(&self.state.view())
        }
    }

    fn buckets(view: &StateView) -> Vec<u64> {
        let mut buckets = Vec::new();
        view.rows(Slots::ALL, |key, value| {
            buckets.extend(layout::bucket_of(key, value).map(|(_, bucket)| bucket));
            Ok(true)
        })
        .unwrap();
        buckets
    }

    #[test]
    fn records_that_are_over_go_and_all_others_stay() {
        let bench = Bench::open();
        bench.flush(4_000, &[1, 2, 3, 4, 9], &[1, 2, 3, 4, 9]);
        assert_eq!(bench.left(), [1, 2, 3, 4, 9]);
        bench.flush(20_000, &[3, 9], &[]);
        assert_eq!(bench.left(), [3, 9]);
        // One more bucket has expired; one that is younger than any before has not.
        bench.flush(21_000, &[9, 21], &[21]);
        assert_eq!(bench.left(), [9, 21]);
    }

    /// Shard records found at a start count at once: a shard without writes is never flushed again.
    #[test]
    fn a_start_knows_what_is_over_from_the_shard_records() {
        let Bench { state, folder } = {
            let bench = Bench::open();
            bench.flush(4_000, &[1, 2], &[1, 2]);
            bench.flush(20_000, &[2], &[]);
            bench
        };
        drop(state);
        let state =
            StateStore::open(&folder.path().join("state"), StateSettings::default()).unwrap();
        let bench = Bench { state, folder };
        assert_eq!(bench.left(), [1, 2], "nothing is over before the cluster's settings are known");
        bench.state.remove_expired(LIMITS).unwrap();
        assert_eq!(bench.left(), [2]);
    }

    /// A copy that is read for another node is checked against the digests of its shard record.
    #[test]
    fn what_a_live_view_shows_stays() {
        let bench = Bench::open();
        bench.flush(4_000, &[1, 2], &[1, 2]);
        let view = bench.state.view();
        bench.flush(20_000, &[2], &[]);
        let later = bench.state.view();
        bench.flush(21_000, &[], &[]);
        assert_eq!(bench.left(), [1, 2]);
        assert_eq!(buckets(&view), [1, 2]);
        drop(view);
        assert_eq!(bench.left(), [2]);
        drop(later);
        assert_eq!(bench.left(), Vec::<u64>::new());
    }

    /// The copy that replaces another may be of an earlier state of the shard.
    #[test]
    fn a_new_copy_is_judged_by_its_own_record() {
        let bench = Bench::open();
        bench.flush(4_000, &[1, 2], &[1, 2]);
        bench.flush(20_000, &[], &[]);
        let view = bench.state.view();
        // The view is older than the state that the copy replaces: expired buckets are kept for
        // each.
        bench.flush(20_001, &[], &[]);
        let mut files = bench.state.files();
        let id = RecordId { slot: Slot(7), hash: 1 };
        let row = layout::encode_record(&TokenRecord { bucket: 1, fingerprint: 0, values: vec![] });
        files.add(&layout::idempotency_key(id.slot, id.hash), RowChange::Put(&row)).unwrap();
        let staged = files.finish().unwrap();
        let state = Bench::state_at(4_000, &[1]);
        bench.state.install(&staged, CopyNo(2), state.slots, &state).unwrap();
        assert_eq!(bench.left(), [1]);
        drop(view);
        assert_eq!(bench.left(), [1]);
        bench.flush(20_000, &[], &[]);
        assert_eq!(bench.left(), Vec::<u64>::new());
    }
}
