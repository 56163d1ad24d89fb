//! Why a process ends, and the code that it ends with (DESIGN §13).

use engine::ids::StoreBoot;

use crate::error::DiskError;

/// What ends a storage node, other than being asked to stop.
#[derive(Debug, thiserror::Error)]
pub enum Exit {
    /// Something outside is missing or broken, a disk without room among it, or there is a bug.
    #[error("{0}")]
    Failed(String),
    /// A flag or variable makes no sense, or the data folder can't be used: rights, a read-only file system.
    #[error("{0}")]
    Usage(String),
    /// This process must not be this store, or not in this cluster.
    #[error("refused to run: {0}")]
    Refused(String),
    /// A newer run of this store has begun.
    #[error("refused to run: boot {} of store {} has begun elsewhere", .0.boot.0, .0.store)]
    NewerBoot(StoreBoot),
    /// What is on the disk can't be trusted any more. The store is noted as suspect, if etcd can be reached.
    #[error("disk: {0}")]
    Disk(String),
}

impl Exit {
    /// The exit code of the process.
    pub fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Refused(_) | Self::NewerBoot(_) => 4,
            Self::Disk(_) => 5,
        }
    }
}

impl From<DiskError> for Exit {
    fn from(error: DiskError) -> Self {
        let said = error.with_advice();
        match error.exit_code() {
            1 => Self::Failed(format!("disk: {said}")),
            2 => Self::Usage(format!("disk: {said}")),
            4 => Self::Refused(said),
            _ => Self::Disk(said),
        }
    }
}
