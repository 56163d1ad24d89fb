//! The scrub: reads everything that a store has on its disk, so that bit rot is found while other
//! copies are intact.
//!
//! ```text
//!   state thread ── checkpoint (hard links), when its turn comes ──▶ scrub thread: sum of all rows
//!   log thread ──── the list of written blocks ──────────────────▶ scrub thread: sum of each group
//! ```
//!
//! The state is read through a second, read-only RocksDB on a checkpoint: a consistent view with a
//! MANIFEST of its own, made from the running one's bytes, past the block cache and, where the file
//! system supports it, past the page cache. A block that fails its checksum is a disk failure like
//! any other; the state machine judges rows whose sum is wrong.
//!
//! The scrub does not read filters that no row leads to (their readers verify their checksums) and
//! files that RocksDB opens without (`OPTIONS`, `IDENTITY`, its own log).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::ids::Slots;
use engine::node::ScrubbedShard;
use engine::store::layout;
use engine::store::log::group::{Owner, SEGMENT_HEADER_BYTES, SegmentHeader};
use engine::store::log::scan::{LogLocation, first_bad};

use crate::error::{DiskError, context};
use crate::log_files::LogFolder;
use crate::state::StateView;

/// The longest sleep, so that the end of the process does not have to wait.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// The bytes read between two looks at the clock.
const STEP_BYTES: u64 = 64 << 10;

/// Holds the scrub to its rate.
pub(crate) struct ScrubPacer {
    bytes_per_s: u64,
    began: Instant,
    read: u64,
    next_look: u64,
    stopping: Arc<AtomicBool>,
}

/// The scrub gave up because the process is about to end.
pub(crate) struct Stopped;

impl ScrubPacer {
    pub(crate) fn new(bytes_per_s: u64, stopping: Arc<AtomicBool>) -> Self {
        Self {
            bytes_per_s: bytes_per_s.max(1),
            began: Instant::now(),
            read: 0,
            next_look: 0,
            stopping,
        }
    }

    /// Waits until reading so many more bytes is within the rate.
    fn wait(&mut self, bytes: usize) -> Result<(), Stopped> {
        self.read += bytes as u64;
        if self.read < self.next_look {
            return Ok(());
        }
        self.next_look = self.read + STEP_BYTES;
        let due = Duration::from_secs_f64(self.read as f64 / self.bytes_per_s as f64);
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return Err(Stopped);
            }
            let Some(early) = due.checked_sub(self.began.elapsed()) else { return Ok(()) };
            std::thread::sleep(early.min(SLEEP_MAX));
        }
    }
}

/// Returns the digest of each shard in the state. `only` restricts it to these shards, unless it is
/// empty.
pub(crate) fn read_state(
    view: &StateView,
    only: &[Slots],
    pacer: &mut ScrubPacer,
) -> Result<Result<Vec<ScrubbedShard>, Stopped>, DiskError> {
    let mut found = Vec::new();
    for (copy, state) in view.shards()? {
        if !only.is_empty() && !only.contains(&state.slots) {
            continue;
        }
        let (mut counters, mut stopped) = (0_u128, false);
        view.rows(state.slots, |key, value| {
            if let layout::RowKey::Counter { .. } = decoded(key)? {
                let share = layout::scrub([(key, value)]);
                let share = share.map_err(|why| crate::state::row_error(key, why))?;
                counters = counters.wrapping_add(share);
            }
            stopped = pacer.wait(key.len() + value.len()).is_err();
            Ok(!stopped)
        })?;
        if stopped {
            return Ok(Err(Stopped));
        }
        found.push(ScrubbedShard { copy, point: state.digest(), counters });
    }
    Ok(Ok(found))
}

fn decoded(key: &[u8]) -> Result<layout::RowKey, DiskError> {
    layout::RowKey::decode(key).map_err(|why| crate::state::row_error(key, why))
}

/// Reads and verifies the blocks of the log that were written when the scrub began; blocks of
/// segments deleted meanwhile are skipped.
pub(crate) fn read_log(
    folder: &LogFolder,
    owner: Owner,
    blocks: &[(LogLocation, usize)],
    pacer: &mut ScrubPacer,
) -> Result<Result<(), Stopped>, DiskError> {
    let mut segment = None;
    for &(place, len) in blocks {
        if segment != Some(place.segment) {
            segment = Some(place.segment);
            folder.forget_cached(place.segment)?;
            let Some(head) = folder.read_at(place.segment, 0, SEGMENT_HEADER_BYTES)? else {
                continue;
            };
            let header = SegmentHeader::decode(&head.into()).ok();
            if header.is_none_or(|header| (header.owner, header.segment) != (owner, place.segment))
            {
                return Err(DiskError::Damage { segment: place.segment, offset: 0 });
            }
        }
        let Some(bytes) = folder.read_at(place.segment, place.offset, len)? else { continue };
        if let Some(bad) = first_bad(owner, place, len, &bytes) {
            return Err(DiskError::Damage { segment: bad.segment, offset: bad.offset });
        }
        if pacer.wait(len).is_err() {
            return Ok(Err(Stopped));
        }
    }
    Ok(Ok(()))
}

/// Checks that `CURRENT`, which RocksDB reads only when it opens, names a MANIFEST that exists.
pub(crate) fn check_current(state: &Path) -> Result<(), DiskError> {
    let mut content = String::new();
    // RocksDB may be replacing the file at this moment.
    for _ in 0..3 {
        let current = state.join("CURRENT");
        let read = std::fs::read(&current).map_err(|why| context("read", &current, why))?;
        content = String::from_utf8_lossy(&read).into_owned();
        let named = content.strip_suffix('\n').filter(|name| name.starts_with("MANIFEST-"));
        if named.is_some_and(|name| state.join(name).exists()) {
            return Ok(());
        }
    }
    Err(DiskError::Current(content))
}
