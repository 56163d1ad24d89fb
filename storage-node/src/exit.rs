//! The reasons why a storage node ends, and their exit codes.

use engine::ids::StoreBoot;

use crate::error::DiskError;

/// The reason why a storage node ends, other than a requested stop.
#[derive(Debug, thiserror::Error)]
pub enum NodeExit {
    /// Something outside is missing or broken, including a disk without room, or there is a bug.
    #[error("{0}")]
    Failed(String),
    /// A flag or variable is invalid, or the data folder can't be used: permissions, a read-only
    /// file system.
    #[error("{0}")]
    Usage(String),
    /// This process must not run as this store, or not in this cluster.
    #[error("refused to run: {0}")]
    Refused(String),
    /// A newer boot of this store has begun.
    #[error("refused to run: boot {} of store {} has begun elsewhere", .0.boot.0, .0.store)]
    NewerBoot(StoreBoot),
    /// The content of the disk can't be trusted any more. The store is noted as suspect if etcd can
    /// be reached.
    #[error("disk: {0}")]
    Disk(String),
}

impl NodeExit {
    /// Returns the exit code of the process.
    pub fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Refused(_) | Self::NewerBoot(_) => 4,
            Self::Disk(_) => 5,
        }
    }
}

impl From<DiskError> for NodeExit {
    fn from(error: DiskError) -> Self {
        let text = error.with_advice();
        match error.exit_code() {
            1 => Self::Failed(format!("disk: {text}")),
            2 => Self::Usage(format!("disk: {text}")),
            4 => Self::Refused(text),
            _ => Self::Disk(text),
        }
    }
}
