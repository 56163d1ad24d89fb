//! What a disk can do to us. All of it ends the process: after a failed fsync, ingest or checksum
//! nobody knows what is on the disk, and going on would acknowledge what may not be there.

use std::io;
use std::path::{Path, PathBuf};

use engine::store::log::index::Gone;

/// Exit code 5, but for [`DiskError::Locked`] and [`DiskError::Foreign`] (4: not ours to use).
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{action} {path}: {why}")]
    Io { action: &'static str, path: PathBuf, why: io::Error },
    #[error("state: {0}")]
    State(#[from] rocksdb::Error),
    #[error("state: CURRENT says {0:?}, which is no MANIFEST that is there")]
    Current(String),
    #[error("state: row {key}: {why}")]
    Row { key: String, why: engine::codec::Malformed },
    #[error("log segment {segment} at byte {offset}: what was written there is not there any more")]
    Damage { segment: u64, offset: usize },
    #[error(
        "{0}: damaged so far that it no longer says whose store this is; once the shards have other \
         copies, delete the store's folder to start as a new store"
    )]
    Nameless(PathBuf),
    #[error("the {0} thread ended")]
    Thread(&'static str),
    #[error("{0} is in use by another process")]
    Locked(PathBuf),
    #[error("{0}: {1}")]
    Foreign(PathBuf, &'static str),
}

impl From<Gone> for DiskError {
    fn from(Gone { segment, offset }: Gone) -> Self {
        Self::Damage { segment, offset }
    }
}

/// How messages about the state begin.
pub(crate) const STATE: &str = "state: ";

impl DiskError {
    /// What was written is not there any more, or is something else: a disk that answers, and lies. It will say the same
    /// next time, so the store must not forget it.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::State(error) => match error.kind() {
                rocksdb::ErrorKind::Corruption | rocksdb::ErrorKind::NotFound => true,
                // RocksDB has no kind of its own for a file that is gone.
                rocksdb::ErrorKind::IOError => error.as_ref().contains("No such file"),
                _ => false,
            },
            Self::Damage { .. } | Self::Current(_) => true,
            // A row that is whole and makes no sense was written so: by a newer build, or by a bug.
            _ => false,
        }
    }

    /// The code the process exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Locked(_) | Self::Foreign(..) => 4,
            _ => 5,
        }
    }
}

pub(crate) fn context(action: &'static str, path: &Path, why: io::Error) -> DiskError {
    DiskError::Io { action, path: path.to_owned(), why }
}
