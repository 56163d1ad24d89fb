//! How a `dkc` command ends: what its exit code says.

use std::process::ExitCode;

/// DESIGN §13. When several are true the later one here wins: an unknown outcome must not hide
/// behind a refusal, which a caller may simply retry.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Exit {
    Done = 0,
    /// Something was not applied, or the command failed.
    Failed = 1,
    /// The command line or a setting is wrong.
    Usage = 2,
    /// Some outcomes are unknown.
    Unknown = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
