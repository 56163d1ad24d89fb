//! Why a message that came in is none.

use engine::codec::Malformed;

/// The message is not what the format says. The connection it came on is closed: its sender is
/// broken, or newer than it should be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Invalid {
    /// A field that must be there is not, or a `oneof` holds a kind this build does not know.
    #[error("{0} is missing, or of a kind unknown to this build")]
    Missing(&'static str),
    /// A number or a length beyond its range.
    #[error("{0} is out of range")]
    Range(&'static str),
    /// Bytes that the engine's codec refuses.
    #[error("{field} can't be read: {why}")]
    Malformed { field: &'static str, why: Malformed },
    /// `open` belongs at the beginning of a stream and nowhere else.
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
