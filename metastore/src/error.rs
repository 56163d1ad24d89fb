//! The failures of calls to etcd, by what the caller can do about them.
//!
//! The lost reply of a *transaction* is no error: it is [`crate::CasOutcome::Unknown`], since the
//! caller must treat it differently from a call that certainly had no effect.

use engine::codec::Malformed;
use engine::history::WentBack;

/// The failure of a call to etcd. A variant with two texts has the call and the reason.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There was no reply in time, or no connection. Reads may be retried at once; the process
    /// continues with the records that it has.
    #[error("etcd gave no answer to {0}: {1}")]
    NoAnswer(&'static str, String),
    /// etcd can be reached and takes too long: a slow disk, no leader, or more calls than it can
    /// serve. The effect is the same as that of no answer.
    #[error("etcd is slow, or has no leader: {0}: {1}")]
    Slow(&'static str, String),
    /// The quota of etcd is used up: it refuses this call, as all writes and leases, until an
    /// operator makes room. Like no answer, this leaves the outcome open, since the write that used
    /// the quota up has taken effect all the same.
    #[error(
        "etcd is full (NOSPACE) and takes no {0}: compact and defragment it, then disarm the \
         alarm: \"etcd is full, slow, or not for dkc\" in docs/runbooks.md"
    )]
    Full(&'static str),
    /// The etcd member at this address requires TLS, which dkc does not support.
    #[error(
        "etcd at {0} requires TLS, which dkc can't use with etcd yet: give it an etcd \
         without TLS, in a network that only dkc is in"
    )]
    RequiresTls(String),
    /// etcd requires authentication, or denies permission. Nothing was changed.
    #[error(
        "etcd requires authentication, which dkc does not support yet: {0}: {1}: give it an \
         etcd without authentication (`etcdctl auth disable`), in a network that only dkc is in"
    )]
    RequiresAuth(&'static str, String),
    /// etcd refused the call: a setting or a program is wrong. Nothing was changed.
    #[error("etcd refused {0}: {1}")]
    Refused(&'static str, String),
    /// The lease is gone, and with it every key that was bound to it.
    #[error("the lease is gone")]
    LeaseGone,
    /// A key or value can't be decoded: another program or a newer build wrote it. No default is
    /// assumed for it.
    #[error(
        "etcd key {key}: {malformed}: written by a newer dkc, or by another program; update this \
         process first"
    )]
    Malformed {
        /// The whole key.
        key: String,
        /// The part that can't be decoded.
        malformed: Malformed,
    },
    /// etcd's revision is lower than one that it returned before: it was restored from a backup, or
    /// it is another etcd. A transaction may have taken effect there, which is of no use.
    #[error("etcd is not followed any more: {0}")]
    WentBack(WentBack),
    /// This version, which etcd reports, lacks features that dkc relies on.
    #[error("etcd {0} is too old: 3.5 or newer is needed")]
    TooOld(String),
}

impl Error {
    /// Returns whether a retry may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::NoAnswer(..) | Self::Slow(..) | Self::Full(_) | Self::WentBack(_))
    }

    /// Returns the reason as one word, for `/readyz`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Full(_) => "etcd-full",
            Self::RequiresTls(_) => "etcd-tls",
            Self::RequiresAuth(..) => "etcd-auth",
            _ => "etcd",
        }
    }

    /// Returns whether the settings are wrong, or dkc can't use this etcd: waiting does not help.
    pub fn is_misfit(&self) -> bool {
        matches!(
            self,
            Self::Refused(..) | Self::TooOld(_) | Self::RequiresTls(_) | Self::RequiresAuth(..)
        )
    }

    /// Converts an error of etcd's client library.
    pub(crate) fn from_client(what: &'static str, error: etcd_client::Error) -> Self {
        use etcd_client::Error as Client;
        match error {
            Client::InvalidArgs(why) => Self::Refused(what, why),
            Client::InvalidUri(why) => Self::Refused(what, why.to_string()),
            Client::GRpcStatus(status) => {
                Self::of_status(what, status.code() as i32, status.message())
            }
            other => Self::NoAnswer(what, other.to_string()),
        }
    }

    /// Converts a gRPC status, by its code and by etcd's text.
    fn of_status(what: &'static str, code: i32, words: &str) -> Self {
        let why = || words.to_owned();
        match code {
            RESOURCE_EXHAUSTED if words.contains("space exceeded") => Self::Full(what),
            RESOURCE_EXHAUSTED | UNAVAILABLE if words.starts_with("etcdserver: ") => {
                Self::Slow(what, why())
            }
            PERMISSION_DENIED | UNAUTHENTICATED if words.starts_with("etcdserver: ") => {
                Self::RequiresAuth(what, why())
            }
            INVALID_ARGUMENT if words.contains("user name is empty") => {
                Self::RequiresAuth(what, why())
            }
            NOT_FOUND if words.contains("lease not found") => Self::LeaseGone,
            // The last two, without etcd's prefix, come from a proxy before etcd, which may only
            // not be ready yet.
            INVALID_ARGUMENT | NOT_FOUND | PERMISSION_DENIED | UNAUTHENTICATED => {
                Self::Refused(what, why())
            }
            // Any other error may have occurred on the way there or on the way back.
            _ => Self::NoAnswer(what, format!("{words} (code {code})")),
        }
    }
}

// The codes of gRPC. Only etcd itself returns invalid-argument, not-found (a lease),
// permission-denied and unauthenticated, and before the call took effect. Codes that the client
// library creates, too (such as out-of-range for a reply that is too large, *after* the effect),
// leave the effect open.
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: i32, words: &str) -> Error {
        Error::of_status("txn", code, words)
    }

    #[test]
    fn only_a_call_that_certainly_had_no_effect_is_refused() {
        for code in 0..=16 {
            let refused =
                matches!(code, INVALID_ARGUMENT | NOT_FOUND | PERMISSION_DENIED | UNAUTHENTICATED);
            assert_eq!(error(code, "words").is_transient(), !refused, "{code}");
            assert_eq!(error(code, "words").is_misfit(), refused, "{code}");
        }
        assert!(matches!(error(5, "etcdserver: requested lease not found"), Error::LeaseGone));
    }

    #[test]
    fn the_problems_of_an_etcd_are_distinguished() {
        #[track_caller]
        fn check(code: i32, words: &str, reason: &str, text: &str) {
            let error = error(code, words);
            assert_eq!(error.reason(), reason, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        check(8, "etcdserver: mvcc: database space exceeded", "etcd-full", "disarm");
        check(8, "etcdserver: too many requests", "etcd", "is slow");
        check(14, "etcdserver: request timed out", "etcd", "request timed out");
        check(14, "etcdserver: no leader", "etcd", "no leader");
        check(14, "error trying to connect", "etcd", "gave no answer");
        check(8, "grpc: received message larger than max", "etcd", "gave no answer");
        check(3, "etcdserver: user name is empty", "etcd-auth", "auth disable");
        check(16, "etcdserver: invalid auth token", "etcd-auth", "auth disable");
        check(7, "etcdserver: permission denied", "etcd-auth", "auth disable");
        check(7, "RBAC: access denied", "etcd", "etcd refused txn: RBAC");
        // The write that used the quota up has taken effect, and gets this reply, too.
        assert!(error(8, "etcdserver: mvcc: database space exceeded").is_transient());
    }
}
