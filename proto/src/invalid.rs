//! The reason why a received message is invalid.

use engine::codec::Malformed;

/// A received message that does not have the specified format. Its stream is ended: the sender has
/// a bug, or is newer than it should be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Invalid {
    /// A required field is absent, or a `oneof` has a kind that this build does not know.
    #[error("{0} is missing, or of a kind unknown to this build")]
    Missing(&'static str),
    /// A number or a length is out of its range.
    #[error("{0} is out of range")]
    Range(&'static str),
    /// The engine's codec refuses the bytes of a field.
    #[error("{field} can't be read: {why}")]
    Malformed {
        /// The field.
        field: &'static str,
        /// The codec's reason.
        why: Malformed,
    },
    /// An `open` that is not the first message of its stream.
    #[error("open came twice, or not first")]
    Open,
}

impl Invalid {
    pub(crate) fn entry(why: Malformed) -> Self {
        Self::Malformed { field: "slice.entries", why }
    }
}

impl From<Invalid> for tonic::Status {
    fn from(invalid: Invalid) -> Self {
        Self::invalid_argument(invalid.to_string())
    }
}
