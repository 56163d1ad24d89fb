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
    /// It can be reached and takes too long: a slow disk, no leader, more calls than it can serve. As above.
    #[error("etcd is slow, or has no leader: {what}: {why}")]
    Slow { what: &'static str, why: String },
    /// Its quota is used up: it takes no writes and grants no leases until somebody makes room. As above, since the write that
    /// used it up has taken effect all the same.
    #[error(
        "etcd is full (NOSPACE) and takes no {what}: compact and defragment it, then disarm the alarm: \"etcd is full\" in \
         docs/operations.md"
    )]
    Full { what: &'static str },
    /// It speaks TLS, and so can't be spoken to.
    #[error(
        "etcd at {endpoint} speaks TLS, which dkc does not speak with etcd yet: it needs an etcd without, in a network that \
         only dkc is in"
    )]
    SpeaksTls { endpoint: String },
    /// It wants to know who asks, or does not allow it. Nothing was changed.
    #[error(
        "etcd wants a user, which dkc can't be yet: {what}: {why}: it needs an etcd without authentication (`etcdctl auth \
         disable`), in a network that only dkc is in"
    )]
    WantsUser { what: &'static str, why: String },
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
        matches!(
            self,
            Self::NoAnswer { .. } | Self::Slow { .. } | Self::Full { .. } | Self::WentBack(_)
        )
    }

    /// In a word, for `/readyz`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Full { .. } => "etcd-full",
            Self::SpeaksTls { .. } => "etcd-tls",
            Self::WantsUser { .. } => "etcd-auth",
            _ => "etcd",
        }
    }

    /// The settings are wrong, or this etcd is none for dkc: no use waiting for it.
    pub fn is_misfit(&self) -> bool {
        matches!(
            self,
            Self::Refused { .. }
                | Self::TooOld { .. }
                | Self::SpeaksTls { .. }
                | Self::WantsUser { .. }
        )
    }

    /// What etcd's client reports, sorted by what the caller can do about it.
    pub(crate) fn from_client(what: &'static str, error: etcd_client::Error) -> Self {
        use etcd_client::Error as Client;
        match error {
            Client::InvalidArgs(why) => Self::Refused { what, why },
            Client::InvalidUri(why) => Self::Refused { what, why: why.to_string() },
            Client::GRpcStatus(status) => {
                Self::of_status(what, status.code() as i32, status.message())
            }
            other => Self::NoAnswer { what, why: other.to_string() },
        }
    }

    /// By gRPC's code and etcd's words.
    fn of_status(what: &'static str, code: i32, words: &str) -> Self {
        let why = || words.to_owned();
        match code {
            RESOURCE_EXHAUSTED if words.contains("space exceeded") => Self::Full { what },
            RESOURCE_EXHAUSTED | UNAVAILABLE if words.starts_with("etcdserver: ") => {
                Self::Slow { what, why: why() }
            }
            PERMISSION_DENIED | UNAUTHENTICATED if words.starts_with("etcdserver: ") => {
                Self::WantsUser { what, why: why() }
            }
            INVALID_ARGUMENT if words.contains("user name is empty") => {
                Self::WantsUser { what, why: why() }
            }
            NOT_FOUND if words.contains("lease not found") => Self::LeaseGone,
            // Of the last two: a proxy before it, which may just not be ready.
            INVALID_ARGUMENT | NOT_FOUND | PERMISSION_DENIED | UNAUTHENTICATED => {
                Self::Refused { what, why: why() }
            }
            // The rest may have happened on the way there or on the way back.
            _ => Self::NoAnswer { what, why: format!("{words} (code {code})") },
        }
    }
}

// gRPC's codes. Only etcd itself gives invalid-argument, not-found (a lease), permission-denied and unauthenticated, and
// before anything took effect. Codes that the client library makes up too (such as out-of-range for an answer that is too
// large, made *after* the effect) say nothing of the effect.
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
    fn only_what_surely_had_no_effect_is_definite() {
        for code in 0..=16 {
            let definite =
                matches!(code, INVALID_ARGUMENT | NOT_FOUND | PERMISSION_DENIED | UNAUTHENTICATED);
            assert_eq!(error(code, "words").is_transient(), !definite, "{code}");
            assert_eq!(error(code, "words").is_misfit(), definite, "{code}");
        }
        assert!(matches!(error(5, "etcdserver: requested lease not found"), Error::LeaseGone));
    }

    #[test]
    fn what_is_wrong_with_an_etcd_is_told_apart() {
        #[track_caller]
        fn check(code: i32, words: &str, reason: &str, said: &str) {
            let error = error(code, words);
            assert_eq!(error.reason(), reason, "{error}");
            assert!(error.to_string().contains(said), "{error}");
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
        // The write that used the room up has taken effect, and is answered so too.
        assert!(error(8, "etcdserver: mvcc: database space exceeded").is_transient());
    }
}
