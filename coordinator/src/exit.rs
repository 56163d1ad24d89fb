//! Why a coordinator ends, and the code that it ends with (DESIGN §13).

/// What ends a coordinator, other than being asked to stop.
#[derive(Debug, thiserror::Error)]
pub enum Exit {
    /// Something outside is missing or broken, such as a port that is taken.
    #[error("{0}")]
    Failed(String),
    /// A flag makes no sense, or the cluster is another one than the flags say.
    #[error("{0}")]
    Usage(String),
}

impl Exit {
    /// The exit code of the process.
    pub fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
        }
    }
}
