//! What can be wrong, and what it means for what was asked (DESIGN §12).
//!
//! A problem has a *kind*, which fixes its status, its URI and its title, and an *outcome*, which fixes what the client
//! may do next. Mostly the kind decides the outcome too; only a passed deadline can be either, and says which.
//! The URIs are names, stable for ever, and lead nowhere.

use std::borrow::Cow;

use hyper::StatusCode;

/// What every `type` begins with. The last part is [`Kind::name`].
pub const TYPE_PREFIX: &str = "https://dkc.invalid/problems/";

/// One per stable URI.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// Something the client said makes no sense; `field` says what.
    BadInput,
    /// A browser sent it for a page that may not talk to this gateway.
    ForbiddenOrigin,
    NotFound,
    MethodNotAllowed,
    /// A body, a batch or one operation beyond the limits.
    TooLarge,
    UrlTooLong,
    UnsupportedMediaType,
    /// `Expect` asks for what nobody here can do.
    ExpectationFailed,
    /// The token has been used for another request.
    TokenReused,
    /// The request was issued longer ago than tokens are remembered.
    TokenTooOld,
    /// The counter's shard remembers as many tokens as it may.
    Quota,
    /// The cluster has more to do than it can.
    Overloaded,
    /// The shard has as few in-sync replicas as it may, and one of them is silent.
    Frozen,
    /// Nobody who leads the shard could be reached.
    NoPrimary,
    /// This gateway has not registered with etcd yet.
    NoSession,
    /// The disks are nearly full.
    NoSpace,
    /// This gateway is being stopped.
    Stopping,
    /// The request's time is over.
    Deadline,
    /// The session under which it was sent ended before it was decided.
    SessionLost,
    /// A bug of ours.
    Internal,
}

impl Kind {
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

    /// The last part of its URI.
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

/// What became of what was asked for. The third, applied, is no problem.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Outcome {
    /// It had no effect and never will.
    NotApplied,
    /// It may have had its effect, or may yet.
    Unknown,
}

impl Outcome {
    pub fn name(self) -> &'static str {
        match self {
            Self::NotApplied => "not-applied",
            Self::Unknown => "unknown",
        }
    }
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Problem {
    pub kind: Kind,
    /// The kind's, but for reads that are turned away: those are 503 whatever the reason.
    pub status: StatusCode,
    pub outcome: Outcome,
    /// What of the request is to blame: a field of the body, a part of the URL or a header.
    pub field: Option<Cow<'static, str>>,
    pub detail: Cow<'static, str>,
    /// The methods that this path has.
    pub allow: Option<&'static str>,
}

impl Problem {
    /// With no effect, now or ever.
    pub fn new(kind: Kind, detail: impl Into<Cow<'static, str>>) -> Self {
        let outcome = Outcome::NotApplied;
        let status = kind.status();
        Self { kind, status, outcome, field: None, detail: detail.into(), allow: None }
    }

    /// It may work when tried again: such an answer carries `Retry-After`.
    pub fn mends(&self) -> bool {
        matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
    }

    pub fn unknown(kind: Kind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { outcome: Outcome::Unknown, ..Self::new(kind, detail) }
    }

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

    /// The table of DESIGN §12: which kind has which status. Names are contract: clients compare them.
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
        let mends: Vec<_> =
            Kind::ALL.into_iter().filter(|&kind| Problem::new(kind, "").mends()).collect();
        assert_eq!(mends.len(), 7, "{mends:?}");
    }

    /// In a row of its own, with its status.
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
