//! Why etcd gave no answer that can be used.
//!
//! The lost answer of a *transaction* is not here: it is [`crate::Outcome::Unknown`], since the caller must treat it
//! otherwise than a call that surely did nothing.

use engine::codec::Malformed;
use engine::history::WentBack;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer in time, or no connection, or etcd has no leader. Reads may be tried again at once; the process goes on
    /// with what it knows.
    #[error("etcd gave no answer to {what}: {why}")]
    NoAnswer { what: &'static str, why: String },
    /// etcd answered that it will not do this: a setting or a programme is wrong. Nothing was changed.
    #[error("etcd refused {what}: {why}")]
    Refused { what: &'static str, why: String },
    /// The lease is gone, and with it every key that was bound to it.
    #[error("the lease is gone")]
    LeaseGone,
    /// Somebody else wrote this, or a newer build did. Never guessed at.
    #[error(
        "etcd key {key}: {malformed}: written by a newer dkc, or by another programme; update this process first"
    )]
    Malformed { key: String, malformed: Malformed },
    /// What it answers is not what it was asked about. A transaction may have taken effect there, which is of no use.
    #[error("etcd is not followed any more: {0}")]
    WentBack(WentBack),
    /// This etcd lacks what we rely on.
    #[error("etcd {found} is too old: 3.5 or newer is needed")]
    TooOld { found: String },
}

impl Error {
    /// Trying again later may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::NoAnswer { .. } | Self::WentBack(_))
    }

    /// What etcd's client reports, sorted by what the caller can do about it.
    pub(crate) fn from_client(what: &'static str, error: etcd_client::Error) -> Self {
        use etcd_client::Error as Client;
        match error {
            Client::InvalidArgs(why) => Self::Refused { what, why },
            Client::InvalidUri(why) => Self::Refused { what, why: why.to_string() },
            Client::GRpcStatus(status) if is_definite(status.code() as i32) => {
                if status.message().contains("lease not found") {
                    Self::LeaseGone
                } else {
                    Self::Refused { what, why: status.message().to_owned() }
                }
            }
            // The rest may have happened on the way there or on the way back.
            Client::GRpcStatus(status) => {
                Self::NoAnswer { what, why: format!("{} ({:?})", status.message(), status.code()) }
            }
            other => Self::NoAnswer { what, why: other.to_string() },
        }
    }
}

/// gRPC codes that only etcd itself gives, before anything took effect: invalid argument, not found (a lease),
/// permission denied, unauthenticated. Codes that the client library makes up too (such as out-of-range for an answer
/// that is too large, made *after* the effect) are not among them.
fn is_definite(code: i32) -> bool {
    matches!(code, 3 | 5 | 7 | 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(given: i32, want: bool) {
        assert_eq!(is_definite(given), want);
    }

    #[test]
    fn only_what_surely_had_no_effect_is_definite() {
        check(0, false); // ok
        check(1, false); // cancelled
        check(2, false); // unknown
        check(3, true); // invalid argument
        check(4, false); // deadline exceeded
        check(5, true); // not found (a lease)
        check(6, false); // already exists
        check(7, true); // permission denied
        check(8, false); // resource exhausted
        check(9, false); // failed precondition
        check(10, false); // aborted
        check(11, false); // out of range
        check(12, false); // unimplemented
        check(13, false); // internal
        check(14, false); // unavailable
        check(15, false); // data loss
        check(16, true); // unauthenticated
    }
}
