//! The exit codes of `dkc` commands.

use std::fmt::Display;
use std::process::ExitCode;

use crate::output::note;

/// The exit code of a command. If several apply, the last one here wins: an unknown outcome must
/// not be reported as a failure, which a caller may simply retry.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum CommandExit {
    /// The command succeeded.
    Done = 0,
    /// Something was not applied, or the command failed.
    Failed = 1,
    /// The command line or a setting is wrong.
    Usage = 2,
    /// The outcome of at least one increment or change is unknown, or moves that a command waits
    /// for have stalled.
    Unknown = 3,
}

impl CommandExit {
    /// Prints a usage error.
    pub(crate) fn usage(why: impl Display) -> anyhow::Result<Self> {
        note!("error: {why}");
        Ok(Self::Usage)
    }
}

/// An error of the command line, or of what it names.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// The outcome of a change in etcd is unknown: a caller must not take it for a failure.
#[derive(Debug, thiserror::Error)]
#[error("the answer of etcd was lost and the outcome is unknown: run the command again")]
pub(crate) struct UnknownOutcome;

impl CommandExit {
    /// The exit code of a command that ended with an error.
    pub(crate) fn of_error(error: &anyhow::Error) -> Self {
        if error.is::<UnknownOutcome>() {
            Self::Unknown
        } else if error.is::<UsageError>() {
            Self::Usage
        } else {
            Self::Failed
        }
    }
}

impl From<CommandExit> for ExitCode {
    fn from(exit: CommandExit) -> Self {
        Self::from(exit as u8)
    }
}
