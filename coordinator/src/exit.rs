//! The reasons for which a coordinator ends, and its exit codes.

/// The reason for which a coordinator ends other than by a signal.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorExit {
    /// Something outside is missing or broken, such as a port that is taken.
    #[error("{0}")]
    Failed(String),
    /// A flag is invalid, or the cluster was made with other settings than the flags.
    #[error("{0}")]
    Usage(String),
}

impl CoordinatorExit {
    /// Returns the exit code of the process: 1 or 2.
    pub fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
        }
    }
}
