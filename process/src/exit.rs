//! The reasons why a role's process ends, and their exit codes.

use telemetry::files::TooFewFiles;

/// The reason why a process ends, other than a requested stop.
#[derive(Debug, thiserror::Error)]
pub enum ProcessExit {
    /// Something outside is missing or broken, such as a port or a disk without room, or there is a
    /// bug.
    #[error("{0}")]
    Failed(String),
    /// A flag or variable is invalid, or does not match the cluster or the machine.
    #[error("{0}")]
    Usage(String),
    /// This process must not run as this store, or not in this cluster.
    #[error("refused to run: {0}")]
    Refused(String),
    /// The content of the disk can't be trusted any more. The store is noted as suspect if etcd can
    /// be reached.
    #[error("disk: {0}")]
    Disk(String),
}

impl ProcessExit {
    /// Returns the exit code of the process.
    pub fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Refused(_) => 4,
            Self::Disk(_) => 5,
        }
    }
}

impl From<std::io::Error> for ProcessExit {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// An etcd that waiting can't make usable is a setting to be changed.
impl From<metastore::Error> for ProcessExit {
    fn from(error: metastore::Error) -> Self {
        match error.is_misfit() {
            true => Self::Usage(format!("--etcd: {error}")),
            false => Self::Failed(error.to_string()),
        }
    }
}

impl From<TooFewFiles> for ProcessExit {
    fn from(few: TooFewFiles) -> Self {
        Self::Usage(few.to_string())
    }
}
