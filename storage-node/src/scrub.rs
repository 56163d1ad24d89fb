//! Reads everything that a store has on its disk, so that rot is found while other copies are well.
//!
//! ```text
//!   state thread ── checkpoint (hard links, in its turn) ──▶ scrub thread: every row of every shard, summed up
//!   log thread ── which blocks there are ──▶ scrub thread: every group's sum
//! ```
//!
//! The state is read through a second, read-only RocksDB on a checkpoint: one moment of it, with a MANIFEST of its own made
//! from the running one's bytes, past the block cache and, where the file system allows, past the page cache. A block that
//! fails its checksum is a failure of the disk like any other; rows that don't add up are for the machine to judge.
//!
//! Not read: filters that no row leads to (their checksum is looked at by whoever uses them), and what RocksDB opens without
//! (`OPTIONS`, `IDENTITY`, its own log).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::ids::Slots;
use engine::node::audit::OnDisk;
use engine::store::layout;
use engine::store::log::group::{Owner, SEGMENT_HEADER_BYTES, SegmentHeader};
use engine::store::log::scan::{Place, first_bad};

use crate::error::{DiskError, context};
use crate::log_files::LogFolder;
use crate::state::View;

/// Sleeps are no longer, so that a process that ends is not waited for.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// Looked at the clock no more often.
const STEP_BYTES: u64 = 64 << 10;

/// Holds the scrub to its rate.
pub(crate) struct Pace {
    bytes_per_s: u64,
    began: Instant,
    read: u64,
    next_look: u64,
    stopping: Arc<AtomicBool>,
}

/// The process is about to end.
pub(crate) struct Stopped;

impl Pace {
    pub(crate) fn new(bytes_per_s: u64, stopping: Arc<AtomicBool>) -> Self {
        Self {
            bytes_per_s: bytes_per_s.max(1),
            began: Instant::now(),
            read: 0,
            next_look: 0,
            stopping,
        }
    }

    /// So much was read: waits until that is due.
    fn took(&mut self, bytes: usize) -> Result<(), Stopped> {
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

/// What each shard in the state amounts to. `only`: of these alone, unless there is none.
pub(crate) fn read_state(
    view: &View,
    only: &[Slots],
    pace: &mut Pace,
) -> Result<Result<Vec<OnDisk>, Stopped>, DiskError> {
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
            stopped = pace.took(key.len() + value.len()).is_err();
            Ok(!stopped)
        })?;
        if stopped {
            return Ok(Err(Stopped));
        }
        found.push(OnDisk { copy, point: state.digest(), counters });
    }
    Ok(Ok(found))
}

fn decoded(key: &[u8]) -> Result<layout::RowKey, DiskError> {
    layout::RowKey::decode(key).map_err(|why| crate::state::row_error(key, why))
}

/// The blocks of the log that were written when it was asked; those of segments deleted meanwhile are left out.
pub(crate) fn read_log(
    folder: &LogFolder,
    owner: Owner,
    blocks: &[(Place, usize)],
    pace: &mut Pace,
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
        if pace.took(len).is_err() {
            return Ok(Err(Stopped));
        }
    }
    Ok(Ok(()))
}

/// `CURRENT` is read at a start and never again: it must name a MANIFEST that is there.
pub(crate) fn check_current(state: &Path) -> Result<(), DiskError> {
    let mut said = String::new();
    // RocksDB may be about to put another in its place.
    for _ in 0..3 {
        let current = state.join("CURRENT");
        let read = std::fs::read(&current).map_err(|why| context("read", &current, why))?;
        said = String::from_utf8_lossy(&read).into_owned();
        let named = said.strip_suffix('\n').filter(|name| name.starts_with("MANIFEST-"));
        if named.is_some_and(|name| state.join(name).exists()) {
            return Ok(());
        }
    }
    Err(DiskError::Current(said))
}
