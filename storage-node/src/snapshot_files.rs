//! Snapshots of a shard: read out of the state, and staged as files until they are installed.
//!
//! Both ends verify. An incoming snapshot is refused unless every row can be decoded and belongs to
//! the shard, and all counters, and the idempotency records of each bucket, together have the
//! digests that the shard's record names: a sender with a damaged disk can't spread the damage. A
//! refused or discarded snapshot leaves nothing behind.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use engine::codec::Malformed;
use engine::ids::{Conn, Slots};
use engine::shard::digest;
use engine::shard::idempotency::{BucketCounts, RecordId};
use engine::shard::state::ShardState;
use engine::store::layout::{self, RowChange, RowKey};
use proto::SnapshotEncoder;
use proto::wire::SnapshotPart;
use self_cell::self_cell;

use crate::error::{DiskError, context};
use crate::kill;
use crate::state::{SortedFiles, StateStore, StateView};
use crate::workers::FailureReporter;

// ---- the sending end ----------------------------------------------------------------------------

/// A reader of a shard as of one moment.
pub struct SnapshotReader {
    view: StateView,
    slots: Slots,
    record: Bytes,
    reporter: FailureReporter,
}

/// The outcome of reading a snapshot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SnapshotReadEnd {
    /// All rows were handed out.
    Whole,
    /// The consumer stopped the reading.
    Stopped,
    /// The disk could not be read. The failure has been reported: the process ends.
    DiskFailed,
}

impl SnapshotReader {
    pub(crate) fn open(
        view: StateView,
        slots: Slots,
        reporter: FailureReporter,
    ) -> Result<Option<Self>, DiskError> {
        let record = view.shard_record(slots.shard())?;
        Ok(record.map(|record| Self { view, slots, record: record.into(), reporter }))
    }

    /// Returns the shard's record, for the snapshot's header.
    pub fn shard_record(&self) -> Bytes {
        self.record.clone()
    }

    /// Reads the whole snapshot, packed into chunks. `each` sends a part and returns whether to go
    /// on. Blocks: call it on a thread of its own.
    pub fn send(self, mut each: impl FnMut(SnapshotPart) -> bool) -> SnapshotReadEnd {
        let mut writer = SnapshotEncoder::default();
        let mut wanted = true;
        let read = self.view.rows(self.slots, |key, value| {
            if let Some(part) = writer.push(key, value) {
                wanted = each(part);
            }
            Ok(wanted)
        });
        if let Err(error) = read {
            self.reporter.report(error);
            return SnapshotReadEnd::DiskFailed;
        }
        match wanted && writer.finish().into_iter().all(each) {
            true => SnapshotReadEnd::Whole,
            false => SnapshotReadEnd::Stopped,
        }
    }
}

// ---- the receiving end --------------------------------------------------------------------------

/// The files of snapshots that arrived whole, by connection and transfer.
type Staged = BTreeMap<(Conn, u64), Vec<PathBuf>>;

/// The place of staged snapshots until the state machine installs or discards them.
#[derive(Clone)]
pub struct Staging {
    state: Arc<StateStore>,
    staged: Arc<Mutex<Staged>>,
    reporter: FailureReporter,
}

/// The reason why a snapshot was not staged.
#[derive(Debug, thiserror::Error)]
pub enum NotStaged {
    /// The received rows can't be the sender's state.
    #[error("snapshot refused: {0}")]
    Refused(Malformed),
    /// There is no room for it. Nothing of it is left behind.
    #[error("no room for the snapshot: {0}")]
    NoRoom(String),
    /// The disk has failed, which has been reported: the process ends.
    #[error("the disk has failed")]
    DiskFailed,
}

impl From<Malformed> for NotStaged {
    fn from(why: Malformed) -> Self {
        Self::Refused(why)
    }
}

impl Staging {
    pub(crate) fn new(state: Arc<StateStore>, reporter: FailureReporter) -> Self {
        Self { state, staged: Arc::default(), reporter }
    }

    /// Begins to stage the snapshot that this header announces. Blocks now and then, as the
    /// stager's methods do: call them on a thread of their own.
    pub fn begin(
        &self,
        conn: Conn,
        transfer: u64,
        slots: Slots,
        shard_record: &[u8],
    ) -> Result<Stager, NotStaged> {
        let (_, shard) = layout::decode_shard(shard_record)?;
        if shard.slots != slots {
            return Err(Malformed("shard record slots").into());
        }
        Ok(Stager {
            files: OpenFiles::new(self.state.clone(), |state| state.files()),
            staging: self.clone(),
            id: (conn, transfer),
            shard: Box::new(shard),
            digest: 0,
            tokens: BucketCounts::default(),
        })
    }

    /// Takes the files of a staged snapshot; from now on they are the caller's.
    pub(crate) fn take(&self, conn: Conn, transfer: u64) -> Option<Vec<PathBuf>> {
        let mut staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
        staged.remove(&(conn, transfer))
    }

    pub(crate) fn discard(&self, conn: Conn, transfer: u64) -> Result<(), DiskError> {
        for path in self.take(conn, transfer).unwrap_or_default() {
            std::fs::remove_file(&path).map_err(|why| context("remove", &path, why))?;
        }
        Ok(())
    }
}

self_cell!(
    struct OpenFiles {
        owner: Arc<StateStore>,

        #[not_covariant]
        dependent: SortedFiles,
    }
);

/// A snapshot that is arriving. Dropping it before it is finished removes its files.
pub struct Stager {
    files: OpenFiles,
    staging: Staging,
    id: (Conn, u64),
    shard: Box<ShardState>,
    /// The digest of the counters so far.
    digest: u128,
    /// The sums of the idempotency records so far. Records of other buckets do not exist.
    tokens: BucketCounts,
}

impl Stager {
    /// Adds rows in ascending order, above all rows before them (see [`proto::SnapshotDecoder`]).
    pub fn rows(&mut self, rows: &[(Bytes, Bytes)]) -> Result<(), NotStaged> {
        for (key, value) in rows {
            self.check(key, value)?;
            let change = RowChange::Put(value);
            let added = self.files.with_dependent_mut(|_, files| files.add(key, change));
            self.or_report(added)?;
        }
        kill::point("stage.rows");
        Ok(())
    }

    /// Finishes after the last row. Returns the state for [`engine::node::Event::SnapshotStaged`].
    pub fn finish(mut self) -> Result<Box<ShardState>, NotStaged> {
        if self.digest != self.shard.counter_digest {
            return Err(Malformed("counter digest").into());
        }
        if !self.shard.tokens.matches(&self.tokens) {
            return Err(Malformed("idempotency digests").into());
        }
        let files = self.files.with_dependent_mut(|_, files| files.finish());
        let files = self.or_report(files)?;
        kill::point("stage.finished");
        let mut staged = self.staging.staged.lock().unwrap_or_else(PoisonError::into_inner);
        staged.insert(self.id, files);
        drop(staged);
        Ok(self.shard)
    }

    /// Checks that the shard may have this row, and adds its share to the digest.
    fn check(&mut self, key: &[u8], value: &[u8]) -> Result<(), Malformed> {
        let slot = match RowKey::decode(key)? {
            RowKey::Counter { slot, counter } => {
                let share =
                    digest::share(digest::weight(counter.name()), layout::decode_counter(value)?);
                self.digest = self.digest.wrapping_add(share);
                slot
            }
            RowKey::Idempotency { slot, hash } => {
                let record = layout::decode_record(value)?;
                if self.shard.tokens.is_live(record.bucket) {
                    let (share, bytes) = layout::record_share(RecordId { slot, hash }, &record);
                    self.tokens.add(record.bucket, share, bytes);
                }
                slot
            }
            RowKey::Shard(_) => return Err(Malformed("shard record among rows")),
        };
        if self.shard.slots.contains(slot) {
            Ok(())
        } else {
            Err(Malformed("row of another shard"))
        }
    }

    fn or_report<T>(&self, result: Result<T, DiskError>) -> Result<T, NotStaged> {
        result.map_err(|error| {
            if error.shortage().is_some() {
                return NotStaged::NoRoom(error.to_string());
            }
            self.staging.reporter.report(error);
            NotStaged::DiskFailed
        })
    }
}
