//! Browsers: which pages of others may have theirs talk to this gateway.
//!
//! A script runs on the machine of whoever opened its page, inside a network that the page's owner can't reach. So what a
//! browser sends for a page from elsewhere is refused, unless `--allow-origin` names that page's origin. That a browser has
//! sent it shows by `Origin` (every request that writes has one) or `Sec-Fetch-Site`; no page can leave those out. A
//! request without them is nobody's page's, whatever host it names: programs, balancers and probes are never judged.
//!
//! What a newcomer would trust is an origin that equals the `Host`. But by DNS rebinding a page can have its own name lead
//! here, and then both are the attacker's. Only an address, or `localhost`, is a host that no name server can redirect.

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
/// What a script may send, and may read of an answer.
const SENT: HeaderValue = HeaderValue::from_static(
    "Accept, Content-Type, Idempotency-Key, Idempotency-Issued-At, Request-Timeout-Ms",
);
const READ: HeaderValue = HeaderValue::from_static("Retry-After, Idempotent-Replayed");
const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, DELETE");
/// Seconds for which a browser need not ask again.
const ASKED_FOR: HeaderValue = HeaderValue::from_static("600");
const ANY: &str = "*";

/// The origins that `--allow-origin` names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origins(Vec<String>);

/// What an answer tells the browser: for which origin's scripts it is. None: there is nothing to tell.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Allowed(Option<HeaderValue>);

/// One origin, as `--allow-origin` takes it, in the form in which browsers send it; or `*`.
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

    /// Whether answers differ by who asks for them.
    pub(crate) fn vary(&self) -> bool {
        !self.0.is_empty() && !self.any()
    }

    /// Refuses what a browser sends for a page that may not.
    pub(crate) fn judge(&self, headers: &HeaderMap) -> Result<Allowed, Problem> {
        let mut origins = headers.get_all(ORIGIN).iter();
        match (origins.next(), origins.next()) {
            (Some(_), Some(_)) => Err(forbidden("Origin is there twice")),
            (Some(_), None) if self.any() => Ok(Allowed(Some(HeaderValue::from_static(ANY)))),
            (Some(origin), None) if self.names(origin) => Ok(Allowed(Some(origin.clone()))),
            (Some(origin), None) if is_own(origin, headers.get(HOST)) => Ok(Allowed(None)),
            (Some(_), None) => Err(forbidden(
                "a browser sent this for a page whose origin may not talk to this gateway: --allow-origin names those that may",
            )),
            (None, _) => self.judge_site(headers).map(|()| Allowed(None)),
        }
    }

    /// A browser's request without an origin reads something.
    fn judge_site(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let Some(site) = headers.get(&SEC_FETCH_SITE) else { return Ok(()) };
        // Somebody has typed the address.
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
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        let Some(origin) = &self.0 else { return };
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, READ);
    }

    /// What a browser asks before it lets a script send the request itself.
    pub(crate) fn answers_preflight(&self, parts: &Parts) -> bool {
        self.0.is_some()
            && parts.method == Method::OPTIONS
            && parts.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
    }
}

/// The answer to a preflight, beside for whom it is.
pub(crate) fn tell_preflight(headers: &mut HeaderMap) {
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, SENT);
    headers.insert(ACCESS_CONTROL_MAX_AGE, ASKED_FOR);
}

fn forbidden(detail: &'static str) -> Problem {
    Problem::new(Kind::ForbiddenOrigin, detail)
}

/// The page came from this very address.
fn is_own(origin: &HeaderValue, host: Option<&HeaderValue>) -> bool {
    let (Ok(origin), Some(Ok(host))) = (origin.to_str(), host.map(HeaderValue::to_str)) else {
        return false;
    };
    let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    is_fixed(host) && authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host))
}

/// An address, or a name that no name server is asked for.
fn is_fixed(host: &str) -> bool {
    let Ok(uri) = host.parse::<Uri>() else { return false };
    let name = uri.host().unwrap_or_default();
    let address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(name);
    address.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(allow: &[&str], lines: &[(&str, &str)]) -> Option<Option<String>> {
        let named = allow.iter().map(|named| origin(named).unwrap()).collect();
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers
                .append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
        }
        let judged = Origins::new(named).judge(&headers);
        judged.ok().map(|Allowed(origin)| origin.map(|it| it.to_str().unwrap().to_owned()))
    }

    #[track_caller]
    fn free(allow: &[&str], lines: &[(&str, &str)]) {
        assert_eq!(judged(allow, lines), Some(None), "{lines:?}");
    }

    #[track_caller]
    fn told(allow: &[&str], lines: &[(&str, &str)], want: &str) {
        assert_eq!(judged(allow, lines), Some(Some(want.to_owned())), "{lines:?}");
    }

    #[track_caller]
    fn refused(allow: &[&str], lines: &[(&str, &str)]) {
        assert_eq!(judged(allow, lines), None, "{lines:?}");
    }

    const SITE: &str = "sec-fetch-site";
    const SHOP: &str = "https://shop.example";

    /// Programs name any host, and some say how they fetch.
    #[test]
    fn what_no_browser_sends_is_not_judged() {
        for host in ["127.0.0.1:8080", "[::1]:8080", "dkc-gateway.ns.svc:8080", "evil.example"] {
            free(&[], &[("host", host)]);
            // Node's own fetch.
            free(&[], &[("host", host), ("sec-fetch-mode", "cors")]);
            free(&[SHOP], &[("host", host)]);
        }
        free(&[], &[]);
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
        // Rebound: the attacker's name leads here, and so everything seems to be of one origin.
        let rebound = ("host", "evil.example:8080");
        refused(&[], &[rebound, ("origin", "http://evil.example:8080")]);
        refused(&[], &[rebound, (SITE, "same-origin")]);
        refused(&[SHOP], &[rebound, (SITE, "same-site")]);
    }

    #[test]
    fn its_own_pages_and_those_that_are_named_may() {
        for host in ["127.0.0.1:8080", "[::1]:8080", "localhost:8080", "10.0.0.7"] {
            free(&[], &[("host", host), ("origin", &format!("http://{host}"))]);
            free(&[], &[("host", host), (SITE, "same-origin")]);
        }
        // Typed by a person.
        free(&[], &[("host", "dkc.example"), (SITE, "none")]);
        told(&[SHOP], &[("host", "dkc.example"), ("origin", SHOP), (SITE, "cross-site")], SHOP);
        told(&["HTTPS://Shop.Example/"], &[("origin", SHOP)], SHOP);
        free(&[SHOP], &[("host", "shop.example"), (SITE, "same-origin")]);
        told(&["*"], &[("origin", "null")], "*");
        free(&["*"], &[(SITE, "cross-site")]);
    }

    #[test]
    fn what_is_no_origin_is_no_setting() {
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
