//! Cross-origin requests: the web pages whose scripts may use this gateway from a browser.
//!
//! A script runs on the computer of the page's visitor, inside a network that the page's owner
//! can't reach. Therefore a request that a browser sends for a page of another origin is refused,
//! unless `--allow-origin` names that origin. The request of a browser is recognized by `Origin`
//! (every request that writes has one) or `Sec-Fetch-Site`; no page can omit these headers. A
//! request without them does not come from a page, whatever its `Host`: the requests of programs,
//! load balancers and health checks are never refused here.
//!
//! An origin that equals the `Host` is not trusted: by DNS rebinding, a page can let its own name
//! resolve to this gateway, and then both are the attacker's. Only an address or `localhost` is a
//! host that no name server can redirect.

use std::net::IpAddr;

use hyper::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, HOST,
    HeaderMap, HeaderName, HeaderValue, ORIGIN,
};
use hyper::http::request::Parts;
use hyper::{Method, Uri};

use crate::problem::{Kind, Problem};

static SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// The request headers that a script may send.
const REQUEST_HEADERS: HeaderValue = HeaderValue::from_static(
    "Accept, Content-Type, Idempotency-Key, Idempotency-Issued-At, Request-Timeout-Ms",
);
/// The response headers that a script may read.
const RESPONSE_HEADERS: HeaderValue = HeaderValue::from_static("Retry-After, Idempotent-Replayed");
const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, DELETE");
/// Seconds for which a browser may cache the answer to a preflight.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
const ANY: &str = "*";

/// The origins that `--allow-origin` names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origins(Vec<String>);

/// The origin whose scripts may read an answer. `None` if the answer needs no such header.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Allowed(Option<HeaderValue>);

/// Parses a value of `--allow-origin`: `*`, or an origin, which is returned in the form in which
/// browsers send it.
pub(crate) fn origin(text: &str) -> Result<String, String> {
    let origin = text.trim_end_matches('/').to_ascii_lowercase();
    let names_a_host = |rest: &str| {
        let is_host = rest.parse::<Uri>().is_ok_and(|uri| uri.authority().is_some());
        is_host && !rest.contains(['/', '@', '?'])
    };
    let authority = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
    if origin == ANY || authority.is_some_and(names_a_host) {
        return Ok(origin);
    }
    Err("an origin is http://HOST or https://HOST, with :PORT if it has one, and no path; or *"
        .into())
}

impl Origins {
    pub(crate) fn new(named: Vec<String>) -> Self {
        Self(named)
    }

    /// Returns whether answers depend on the origin of the request.
    pub(crate) fn vary(&self) -> bool {
        !self.0.is_empty() && !self.any()
    }

    /// Refuses a request that a browser sends for a page that is not allowed.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<Allowed, Problem> {
        let mut origins = headers.get_all(ORIGIN).iter();
        match (origins.next(), origins.next()) {
            (Some(_), Some(_)) => Err(forbidden("Origin is present twice")),
            (Some(_), None) if self.any() => Ok(Allowed(Some(HeaderValue::from_static(ANY)))),
            (Some(origin), None) if self.names(origin) => Ok(Allowed(Some(origin.clone()))),
            (Some(origin), None) if is_own(origin, headers.get(HOST)) => Ok(Allowed(None)),
            (Some(_), None) => Err(forbidden(
                "a browser sent this for a page whose origin is not allowed: --allow-origin lists \
                 the allowed ones",
            )),
            (None, _) => self.check_site(headers).map(|()| Allowed(None)),
        }
    }

    /// Checks a request without `Origin`. If it comes from a browser, it is a read.
    fn check_site(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let Some(site) = headers.get(&SEC_FETCH_SITE) else { return Ok(()) };
        // `none`: a person has typed the address.
        if self.any() || site == "none" {
            return Ok(());
        }
        if site == "cross-site" {
            return Err(forbidden("a browser sent this for a page of another site"));
        }
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let is_named = |origin: &String| origin.split("://").nth(1) == Some(host);
        if is_fixed(host) || self.0.iter().any(is_named) {
            return Ok(());
        }
        Err(forbidden("a browser sent this to a host name that --allow-origin does not name"))
    }

    fn any(&self) -> bool {
        self.0.iter().any(|origin| origin == ANY)
    }

    fn names(&self, origin: &HeaderValue) -> bool {
        self.0.iter().any(|named| origin.as_bytes().eq_ignore_ascii_case(named.as_bytes()))
    }
}

impl Allowed {
    /// Adds the headers that let the allowed origin's scripts read the answer.
    pub(crate) fn add_headers(&self, headers: &mut HeaderMap) {
        let Some(origin) = &self.0 else { return };
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, RESPONSE_HEADERS);
    }

    /// Returns whether a request is the preflight that a browser sends before a script's own
    /// request.
    pub(crate) fn is_preflight(&self, parts: &Parts) -> bool {
        self.0.is_some()
            && parts.method == Method::OPTIONS
            && parts.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
    }
}

/// Adds the headers of the answer to a preflight, except for the allowed origin.
pub(crate) fn add_preflight_headers(headers: &mut HeaderMap) {
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, REQUEST_HEADERS);
    headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
}

fn forbidden(detail: &'static str) -> Problem {
    Problem::new(Kind::ForbiddenOrigin, detail)
}

/// Returns whether the page came from this gateway, by its address.
fn is_own(origin: &HeaderValue, host: Option<&HeaderValue>) -> bool {
    let (Ok(origin), Some(Ok(host))) = (origin.to_str(), host.map(HeaderValue::to_str)) else {
        return false;
    };
    let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    is_fixed(host) && authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host))
}

/// Returns whether a host is an address or `localhost`, which no name server resolves.
fn is_fixed(host: &str) -> bool {
    let Ok(uri) = host.parse::<Uri>() else { return false };
    let name = uri.host().unwrap_or_default();
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name);
    address.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(allow: &[&str], lines: &[(&str, &str)]) -> Option<Option<String>> {
        let named = allow.iter().map(|named| origin(named).unwrap()).collect();
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers
                .append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        let checked = Origins::new(named).check(&headers);
        checked.ok().map(|Allowed(origin)| origin.map(|it| it.to_str().unwrap().to_owned()))
    }

    #[track_caller]
    fn unrestricted(allow: &[&str], lines: &[(&str, &str)]) {
        assert_eq!(checked(allow, lines), Some(None), "{lines:?}");
    }

    #[track_caller]
    fn allowed(allow: &[&str], lines: &[(&str, &str)], want: &str) {
        assert_eq!(checked(allow, lines), Some(Some(want.to_owned())), "{lines:?}");
    }

    #[track_caller]
    fn refused(allow: &[&str], lines: &[(&str, &str)]) {
        assert_eq!(checked(allow, lines), None, "{lines:?}");
    }

    const SITE: &str = "sec-fetch-site";
    const SHOP: &str = "https://shop.example";

    /// Programs send any host, and some send `Sec-Fetch-Mode`.
    #[test]
    fn requests_of_programs_are_not_restricted() {
        for host in ["127.0.0.1:8080", "[::1]:8080", "dkc-gateway.ns.svc:8080", "evil.example"] {
            unrestricted(&[], &[("host", host)]);
            // The `fetch` of Node.js.
            unrestricted(&[], &[("host", host), ("sec-fetch-mode", "cors")]);
            unrestricted(&[SHOP], &[("host", host)]);
        }
        unrestricted(&[], &[]);
    }

    #[test]
    fn pages_from_elsewhere_are_refused() {
        let local = ("host", "127.0.0.1:8080");
        for origin in [SHOP, "http://127.0.0.1:3000", "http://localhost:8080", "null", ""] {
            refused(&[], &[local, ("origin", origin)]);
        }
        refused(&[], &[local, (SITE, "cross-site")]);
        refused(&[SHOP], &[local, ("origin", "https://shop.example:444")]);
        refused(&[SHOP], &[local, ("origin", "http://shop.example")]);
        refused(&[SHOP], &[local, ("origin", SHOP), ("origin", SHOP)]);
        refused(&[SHOP], &[local, (SITE, "cross-site")]);
        // DNS rebinding: the attacker's name resolves to this gateway, so the origin seems the
        // same.
        let rebound = ("host", "evil.example:8080");
        refused(&[], &[rebound, ("origin", "http://evil.example:8080")]);
        refused(&[], &[rebound, (SITE, "same-origin")]);
        refused(&[SHOP], &[rebound, (SITE, "same-site")]);
    }

    #[test]
    fn a_host_or_an_origin_that_is_no_text_is_not_its_own() {
        let value = |bytes: &[u8]| HeaderValue::from_bytes(bytes).unwrap();
        let host = value(b"127.0.0.1:8080");
        assert!(is_own(&value(b"http://127.0.0.1:8080"), Some(&host)));
        assert!(!is_own(&value(b"http://127.0.0.1:8080\xff"), Some(&host)));
        assert!(!is_own(&value(b"http://127.0.0.1:8080"), Some(&value(b"\xff"))));
        assert!(!is_own(&value(b"http://127.0.0.1:8080"), None));
        refused(&[], &[("host", "a b"), ("origin", "http://a b")]);
    }

    #[test]
    fn own_pages_and_those_of_named_origins_are_allowed() {
        for host in ["127.0.0.1:8080", "[::1]:8080", "localhost:8080", "10.0.0.7"] {
            unrestricted(&[], &[("host", host), ("origin", &format!("http://{host}"))]);
            unrestricted(&[], &[("host", host), (SITE, "same-origin")]);
        }
        // A person typed the address.
        unrestricted(&[], &[("host", "dkc.example"), (SITE, "none")]);
        allowed(&[SHOP], &[("host", "dkc.example"), ("origin", SHOP), (SITE, "cross-site")], SHOP);
        allowed(&["HTTPS://Shop.Example/"], &[("origin", SHOP)], SHOP);
        unrestricted(&[SHOP], &[("host", "shop.example"), (SITE, "same-origin")]);
        allowed(&["*"], &[("origin", "null")], "*");
        unrestricted(&["*"], &[(SITE, "cross-site")]);
    }

    #[test]
    fn invalid_origins_are_refused_as_settings() {
        for good in ["https://a.example", "http://127.0.0.1:3000", "http://[::1]:80", "*"] {
            assert_eq!(origin(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "a.example",
            "ftp://a",
            "https://",
            "https://a/b",
            "https://a b",
            "https://u@a",
            "null",
            "**",
        ] {
            assert!(origin(bad).is_err(), "{bad}");
        }
    }
}
