//! Whole copies of a shard: read out of the state, and staged as files until they are installed.
//!
//! Both ends check. A copy that arrives is refused unless every row can be read, belongs to the
//! shard, and all counters, and the idempotency records of each bucket, together give the digests that the
//! shard's record names: a sender with a damaged disk can't spread it. A refused or forgotten copy leaves nothing behind.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use engine::apply::ShardState;
use engine::codec::Malformed;
use engine::digest;
use engine::idempotency::{Counted, RecordId};
use engine::ids::{Conn, Slots};
use engine::store::layout::{self, Change, RowKey};
use proto::RowsWriter;
use proto::wire::SnapshotPart;
use self_cell::self_cell;

use crate::error::{DiskError, context};
use crate::kill;
use crate::state::{Files, State, View};
use crate::workers::Alarm;

// ---- the sending end -----------------------------------------------------------------------------

/// A shard as it stood in the state at one moment.
#[derive(Debug)]
pub struct SnapshotReader {
    view: View,
    slots: Slots,
    record: Bytes,
    alarm: Alarm,
}

/// How the reading of a copy ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sent {
    /// All of it was handed out.
    Whole,
    /// Whoever took it wanted no more.
    Stopped,
    /// The disk could not be read. That has been told: the process ends.
    DiskFailed,
}

impl SnapshotReader {
    pub(crate) fn open(view: View, slots: Slots, alarm: Alarm) -> Result<Option<Self>, DiskError> {
        let record = view.shard_record(slots.shard())?;
        Ok(record.map(|record| Self { view, slots, record: record.into(), alarm }))
    }

    /// The shard's record, for the copy's header.
    pub fn shard_record(&self) -> Bytes {
        self.record.clone()
    }

    /// Reads the copy from beginning to end, packed into chunks. It blocks: for a thread of its own.
    /// `each` sends a part and says whether to go on.
    pub fn send(self, mut each: impl FnMut(SnapshotPart) -> bool) -> Sent {
        let mut writer = RowsWriter::default();
        let mut wanted = true;
        let read = self.view.rows(self.slots, |key, value| {
            if let Some(part) = writer.push(key, value) {
                wanted = each(part);
            }
            Ok(wanted)
        });
        if let Err(error) = read {
            self.alarm.ring(error);
            return Sent::DiskFailed;
        }
        match wanted && writer.finish().into_iter().all(each) {
            true => Sent::Whole,
            false => Sent::Stopped,
        }
    }
}

// ---- the receiving end ---------------------------------------------------------------------------

/// Files of copies that came whole, by connection and transfer.
type Staged = BTreeMap<(Conn, u64), Vec<PathBuf>>;

/// Where copies are kept until the machine says what becomes of them.
#[derive(Clone, Debug)]
pub struct Staging {
    state: Arc<State>,
    staged: Arc<Mutex<Staged>>,
    alarm: Alarm,
}

/// Why a copy was not staged.
#[derive(Debug, thiserror::Error)]
pub enum NotStaged {
    /// What the sender sent can't be its state.
    #[error("the copy is refused: {0}")]
    Refused(Malformed),
    /// It does not fit. Nothing of it is left behind.
    #[error("no room for the copy: {0}")]
    NoRoom(String),
    /// That has been told: the process ends.
    #[error("the disk has failed")]
    DiskFailed,
}

impl From<Malformed> for NotStaged {
    fn from(why: Malformed) -> Self {
        Self::Refused(why)
    }
}

impl Staging {
    pub(crate) fn new(state: Arc<State>, alarm: Alarm) -> Self {
        Self { state, staged: Arc::default(), alarm }
    }

    /// Begins with what the copy's header says. Blocks now and then, as all that follows does: for
    /// a thread of its own.
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
            tokens: Counted::default(),
        })
    }

    /// The files of a staged copy; from now on they are the caller's.
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
        owner: Arc<State>,

        #[not_covariant]
        dependent: Files,
    }
);

/// A copy that is arriving. Dropped before it is finished, it leaves nothing.
pub struct Stager {
    files: OpenFiles,
    staging: Staging,
    id: (Conn, u64),
    shard: Box<ShardState>,
    /// Of the counters so far.
    digest: u128,
    /// The idempotency records so far. Those of other buckets do not exist.
    tokens: Counted,
}

impl std::fmt::Debug for Stager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stager({:?})", self.id)
    }
}

impl Stager {
    /// Takes rows, ascending, and above all rows before them (see [`proto::Rows`]).
    pub fn rows(&mut self, rows: &[(Bytes, Bytes)]) -> Result<(), NotStaged> {
        for (key, value) in rows {
            self.check(key, value)?;
            let change = Change::Put(value.to_vec());
            let added = self.files.with_dependent_mut(|_, files| files.add(key, &change));
            self.or_alarm(added)?;
        }
        kill::point("stage.rows");
        Ok(())
    }

    /// All rows came. What [`engine::node::Event::SnapshotStaged`] is to say.
    pub fn finish(mut self) -> Result<Box<ShardState>, NotStaged> {
        if self.digest != self.shard.counter_digest {
            return Err(Malformed("counter digest").into());
        }
        if !self.shard.tokens.agrees(&self.tokens) {
            return Err(Malformed("idempotency digests").into());
        }
        let files = self.files.with_dependent_mut(|_, files| files.finish());
        let files = self.or_alarm(files)?;
        kill::point("stage.finished");
        let mut staged = self.staging.staged.lock().unwrap_or_else(PoisonError::into_inner);
        staged.insert(self.id, files);
        drop(staged);
        Ok(self.shard)
    }

    /// Is the row one that the shard may have? Adds its share to the digest.
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

    fn or_alarm<T>(&self, result: Result<T, DiskError>) -> Result<T, NotStaged> {
        result.map_err(|error| {
            if error.lack().is_some() {
                return NotStaged::NoRoom(error.to_string());
            }
            self.staging.alarm.ring(error);
            NotStaged::DiskFailed
        })
    }
}
