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

/// The kind of a problem. Each has a stable URI.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// The request is invalid; `field` names the part that is wrong.
    BadInput,
    /// A browser sent the request for a page of an origin that is not allowed.
    ForbiddenOrigin,
    /// The path does not exist.
    NotFound,
    /// The path does not have this method; `Allow` lists those that it has.
    MethodNotAllowed,
    /// A body, a batch or a single operation exceeds the limits.
    TooLarge,
    /// The URL exceeds the limit.
    UrlTooLong,
    /// The media type, charset or encoding of the body is not supported.
    UnsupportedMediaType,
    /// `Expect` has an expectation other than `100-continue`.
    ExpectationFailed,
    /// The idempotency key was used for another request.
    TokenReused,
    /// The request was issued longer ago than idempotency keys are kept.
    TokenTooOld,
    /// The counter's shard keeps as many idempotency records as it may.
    Quota,
    /// A queue or a memory limit of the gateway or of a node is exhausted.
    Overloaded,
    /// The shard has too few in-sync replicas that answer to commit a write.
    Frozen,
    /// The primary of the shard could not be reached.
    NoPrimary,
    /// This gateway has no session yet, because it has not registered with etcd.
    NoSession,
    /// The disk of a node is nearly full.
    NoSpace,
    /// This gateway is stopping.
    Stopping,
    /// The deadline of the request passed.
    Deadline,
    /// The gateway's session ended before the outcome of the request was known.
    SessionLost,
    /// A bug in dkc.
    Internal,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 20] = [
        Self::BadInput,
        Self::ForbiddenOrigin,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::TooLarge,
        Self::UrlTooLong,
        Self::UnsupportedMediaType,
        Self::ExpectationFailed,
        Self::TokenReused,
        Self::TokenTooOld,
        Self::Quota,
        Self::Overloaded,
        Self::Frozen,
        Self::NoPrimary,
        Self::NoSession,
        Self::NoSpace,
        Self::Stopping,
        Self::Deadline,
        Self::SessionLost,
        Self::Internal,
    ];

    /// The last part of the URI.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadInput => "bad-input",
            Self::ForbiddenOrigin => "forbidden-origin",
            Self::NotFound => "not-found",
            Self::MethodNotAllowed => "method-not-allowed",
            Self::TooLarge => "too-large",
            Self::UrlTooLong => "url-too-long",
            Self::UnsupportedMediaType => "unsupported-media-type",
            Self::ExpectationFailed => "expectation-failed",
            Self::TokenReused => "token-reused",
            Self::TokenTooOld => "token-too-old",
            Self::Quota => "quota",
            Self::Overloaded => "overloaded",
            Self::Frozen => "frozen",
            Self::NoPrimary => "no-primary",
            Self::NoSession => "no-session",
            Self::NoSpace => "no-space",
            Self::Stopping => "stopping",
            Self::Deadline => "deadline",
            Self::SessionLost => "session-lost",
            Self::Internal => "internal",
        }
    }

    /// The title: a short summary that is the same for all problems of the kind.
    pub fn title(self) -> &'static str {
        match self {
            Self::BadInput => "Bad input",
            Self::ForbiddenOrigin => "Forbidden origin",
            Self::NotFound => "No such path",
            Self::MethodNotAllowed => "Method not allowed",
            Self::TooLarge => "Too large",
            Self::UrlTooLong => "URL too long",
            Self::UnsupportedMediaType => "Unsupported media type",
            Self::ExpectationFailed => "Expectation failed",
            Self::TokenReused => "Idempotency key reused",
            Self::TokenTooOld => "Idempotency key too old",
            Self::Quota => "Too many idempotency keys",
            Self::Overloaded => "Overloaded",
            Self::Frozen => "Shard frozen",
            Self::NoPrimary => "No primary",
            Self::NoSession => "No session",
            Self::NoSpace => "No space",
            Self::Stopping => "Gateway stopping",
            Self::Deadline => "Deadline passed",
            Self::SessionLost => "Session lost",
            Self::Internal => "Internal error",
        }
    }

    /// The HTTP status, except for refused reads (see [`Problem::status`]).
    pub fn status(self) -> StatusCode {
        match self {
            Self::BadInput => StatusCode::BAD_REQUEST,
            Self::ForbiddenOrigin => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UrlTooLong => StatusCode::URI_TOO_LONG,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::ExpectationFailed => StatusCode::EXPECTATION_FAILED,
            Self::TokenReused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::TokenTooOld => StatusCode::GONE,
            Self::Quota | Self::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Self::Frozen | Self::NoPrimary | Self::NoSession | Self::NoSpace | Self::Stopping => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Deadline | Self::SessionLost => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
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
    /// The status of the kind, but 503 for a read where a write has 413 or 429.
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
