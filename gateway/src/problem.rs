//! The problems (RFC 9457) that clients get, and the outcome of the request that each names.
//!
//! A problem has a *kind*, which determines its status, URI and title, and an *outcome*, which
//! determines whether the client may safely send the request again. For most kinds, the kind also
//! determines the outcome; the outcome of a passed deadline depends on the request. The URIs are
//! stable names and do not resolve.

use std::borrow::Cow;

use engine::batcher::Outcome;
use hyper::StatusCode;

/// The beginning of every `type`. The last part is [`Kind::name`].
pub const TYPE_PREFIX: &str = "https://dkc.invalid/problems/";

/// Defines [`Kind`] by a table: what each kind means, its status, the last part of its URI, and its
/// title.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = ($status:literal, $name:literal, $title:literal),)*) => {
        /// The kind of a problem. Each has a stable URI.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub enum Kind {
            $($(#[$doc])* $kind,)*
        }

        impl Kind {
            /// All kinds.
            pub const ALL: [Self; [$($status),*].len()] = [$(Self::$kind),*];

            /// The status, the last part of the URI, and the title.
            fn row(self) -> (u16, &'static str, &'static str) {
                match self {
                    $(Self::$kind => ($status, $name, $title),)*
                }
            }
        }
    };
}

kinds! {
    /// The request is invalid; `field` names the part that is wrong.
    BadInput = (400, "bad-input", "Bad input"),
    /// A browser sent the request for a page of an origin that is not allowed.
    ForbiddenOrigin = (403, "forbidden-origin", "Forbidden origin"),
    /// The path does not exist.
    NotFound = (404, "not-found", "No such path"),
    /// The path does not have this method; `Allow` lists those that it has.
    MethodNotAllowed = (405, "method-not-allowed", "Method not allowed"),
    /// A body, a batch or a single operation exceeds the limits.
    TooLarge = (413, "too-large", "Too large"),
    /// The URL exceeds the limit.
    UrlTooLong = (414, "url-too-long", "URL too long"),
    /// The media type, charset or encoding of the body is not supported.
    UnsupportedMediaType = (415, "unsupported-media-type", "Unsupported media type"),
    /// `Expect` has an expectation other than `100-continue`.
    ExpectationFailed = (417, "expectation-failed", "Expectation failed"),
    /// The idempotency key was used for another request.
    TokenReused = (422, "token-reused", "Idempotency key reused"),
    /// The request was issued longer ago than idempotency keys are kept.
    TokenTooOld = (410, "token-too-old", "Idempotency key too old"),
    /// The counter's shard keeps as many idempotency records as it may.
    Quota = (429, "quota", "Too many idempotency keys"),
    /// A queue or a memory limit of the gateway or of a node is exhausted.
    Overloaded = (429, "overloaded", "Overloaded"),
    /// The shard has too few in-sync replicas that answer to commit a write.
    Frozen = (503, "frozen", "Shard frozen"),
    /// The primary of the shard could not be reached.
    NoPrimary = (503, "no-primary", "No primary"),
    /// This gateway has no session yet, because it has not registered with etcd.
    NoSession = (503, "no-session", "No session"),
    /// The disk of a node is nearly full.
    NoSpace = (503, "no-space", "No space"),
    /// This gateway is stopping.
    Stopping = (503, "stopping", "Gateway stopping"),
    /// The deadline of the request passed.
    Deadline = (504, "deadline", "Deadline passed"),
    /// The gateway's session ended before the outcome of the request was known.
    SessionLost = (504, "session-lost", "Session lost"),
    /// A bug in dkc.
    Internal = (500, "internal", "Internal error"),
}

impl Kind {
    /// The HTTP status, except for refused reads (see [`Problem::status`]).
    pub fn status(self) -> StatusCode {
        StatusCode::from_u16(self.row().0).expect("the table has valid statuses")
    }

    /// The last part of the URI.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The title: a short summary that is the same for all problems of the kind.
    pub fn title(self) -> &'static str {
        self.row().2
    }
}

/// The `outcome` of a problem. The third outcome of a write, applied, is not a problem.
pub fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::NotApplied => "not-applied",
        Outcome::Unknown => "unknown",
    }
}

/// The reason why a request, or an item of a batch, was not answered with success.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    /// The kind of the problem.
    pub kind: Kind,
    /// The status of the kind, but 503 instead of 413 or 429 for a read whose body was taken.
    pub status: StatusCode,
    /// The effect of the request, as far as it is known.
    pub outcome: Outcome,
    /// The part of the request that is wrong: a field of the body, a part of the URL, or a header.
    pub field: Option<Cow<'static, str>>,
    /// The explanation for people.
    pub detail: Cow<'static, str>,
    /// The methods that the path has, for [`Kind::MethodNotAllowed`].
    pub allow: Option<&'static str>,
}

impl Problem {
    /// A problem of a request that had no effect and never will have one.
    pub fn new(kind: Kind, detail: impl Into<Cow<'static, str>>) -> Self {
        let outcome = Outcome::NotApplied;
        let status = kind.status();
        Self { kind, status, outcome, field: None, detail: detail.into(), allow: None }
    }

    /// Returns whether the same request may succeed later: such an answer carries `Retry-After`.
    pub fn is_retryable(&self) -> bool {
        matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
    }

    /// A problem of a request that may have had an effect, or may have one yet.
    pub fn unknown(kind: Kind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { outcome: Outcome::Unknown, ..Self::new(kind, detail) }
    }

    /// A [`Kind::BadInput`] of the given part of the request.
    pub fn bad_input(
        field: impl Into<Cow<'static, str>>,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { field: Some(field.into()), ..Self::new(Kind::BadInput, detail) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names and statuses of the kinds are a contract: clients compare them.
    #[test]
    fn kinds_are_golden() {
        let got: Vec<_> =
            Kind::ALL.iter().map(|kind| (kind.name(), kind.status().as_u16())).collect();
        let want = [
            ("bad-input", 400),
            ("forbidden-origin", 403),
            ("not-found", 404),
            ("method-not-allowed", 405),
            ("too-large", 413),
            ("url-too-long", 414),
            ("unsupported-media-type", 415),
            ("expectation-failed", 417),
            ("token-reused", 422),
            ("token-too-old", 410),
            ("quota", 429),
            ("overloaded", 429),
            ("frozen", 503),
            ("no-primary", 503),
            ("no-session", 503),
            ("no-space", 503),
            ("stopping", 503),
            ("deadline", 504),
            ("session-lost", 504),
            ("internal", 500),
        ];
        assert_eq!(got, want);
        let is_retryable = |kind: &Kind| Problem::new(*kind, "").is_retryable();
        let retryable: Vec<_> = Kind::ALL.into_iter().filter(is_retryable).collect();
        assert_eq!(retryable.len(), 7, "{retryable:?}");
    }

    /// Each kind has a row with its status.
    #[test]
    fn the_docs_name_each() {
        let docs = include_str!("../../docs/problems.md");
        for kind in Kind::ALL {
            let row = format!("| `{TYPE_PREFIX}{}` | {} |", kind.name(), kind.status().as_u16());
            assert!(docs.contains(&row), "docs/problems.md has no {row}");
        }
        assert_eq!(docs.matches(&format!("| `{TYPE_PREFIX}")).count(), Kind::ALL.len());
    }
}
