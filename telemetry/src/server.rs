//! `/livez`, `/readyz` and `/metrics` over plain HTTP, for monitoring.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::files::ConnectionLimit;
use crate::{Health, Metrics};

const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// The most connections at once: a few people and programs watch a process, and they must not use
/// up its files.
const CONNECTIONS_MAX: usize = 64;
const TEXT: &str = "text/plain; charset=utf-8";

/// The answer of one of the three paths.
#[derive(Debug, Eq, PartialEq)]
pub struct TextPage {
    /// The HTTP status.
    pub status: StatusCode,
    /// The value of `content-type`.
    pub content_type: &'static str,
    /// The text of the page.
    pub body: String,
}

/// Returns the page of a path, or `None` if the path is not one of the three. A gateway serves
/// these pages on its data port too.
pub fn page(path: &str, health: &Health, metrics: &Metrics) -> Option<TextPage> {
    let text = |status, body| TextPage { status, content_type: TEXT, body };
    match path {
        "/livez" => Some(text(StatusCode::OK, "ok\n".to_owned())),
        "/readyz" => Some(match health.reason() {
            None => text(StatusCode::OK, "ok\n".to_owned()),
            Some(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
        }),
        "/metrics" => {
            Some(TextPage { status: StatusCode::OK, content_type: METRICS, body: metrics.text() })
        }
        _ => None,
    }
}

/// Serves the three pages on this listener until the future is dropped.
pub async fn serve(listener: TcpListener, health: Health, metrics: Arc<Metrics>) {
    let connections = ConnectionLimit::new(CONNECTIONS_MAX);
    loop {
        let (stream, place) = connections.accept(&listener).await;
        let (health, metrics) = (health.clone(), metrics.clone());
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let response = respond(&request, &health, &metrics);
                async move { Ok::<_, Infallible>(response) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(30))
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "metrics: connection ended");
            }
        });
    }
}

fn respond<B>(
    request: &hyper::Request<B>,
    health: &Health,
    metrics: &Metrics,
) -> Response<Full<Bytes>> {
    let plain = |status, body: &str| TextPage { status, content_type: TEXT, body: body.to_owned() };
    let path = request.uri().path();
    // HAProxy's health check sends OPTIONS and looks at nothing but the status.
    let allowed = match path {
        "/metrics" => "GET, HEAD",
        _ => "GET, HEAD, OPTIONS",
    };
    let method = request.method().as_str();
    let page = match page(path, health, metrics) {
        Some(page) if allowed.split(", ").any(|known| known == method) => page,
        Some(_) => plain(StatusCode::METHOD_NOT_ALLOWED, &format!("{allowed} are answered here\n")),
        None => plain(StatusCode::NOT_FOUND, "/livez, /readyz and /metrics are served here\n"),
    };
    let body = if request.method() == Method::OPTIONS { String::new() } else { page.body };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = page.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if page.status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, HeaderValue::from_static(allowed));
    }
    response
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    fn ask(method: Method, path: &str, health: &Health) -> (u16, String) {
        let response = answer(method, path, health);
        (response.status().as_u16(), format!("{:?}", response.body()))
    }

    fn answer(method: Method, path: &str, health: &Health) -> Response<Full<Bytes>> {
        let counter = Counter::<u64>::default();
        counter.inc_by(3);
        let (metrics, ()) =
            Metrics::new(|registry| registry.register("batches", "Batches", counter));
        let request = hyper::Request::builder().method(method).uri(path).body(()).unwrap();
        respond(&request, health, &metrics)
    }

    #[test]
    fn a_process_that_waits_reports_its_reason() {
        let health = Health::new("etcd");
        let (status, body) = ask(Method::GET, "/readyz", &health);
        assert_eq!(status, 503);
        assert!(body.contains("etcd"), "{body}");
        assert_eq!(ask(Method::GET, "/livez", &health).0, 200);
        health.ready();
        assert_eq!(ask(Method::GET, "/readyz", &health).0, 200);
    }

    #[test]
    fn metrics_carry_the_prefix() {
        let (status, body) = ask(Method::GET, "/metrics", &Health::new("x"));
        assert_eq!(status, 200);
        assert!(
            body.contains("# TYPE dkc_batches_total counter\\ndkc_batches_total 3\\n"),
            "{body}"
        );
        assert!(!body.contains("EOF"), "{body}");
    }

    #[test]
    fn other_paths_and_methods_are_refused() {
        let health = Health::new("x");
        assert_eq!(ask(Method::GET, "/", &health).0, 404);
        for (method, path, allowed) in [
            (Method::POST, "/livez", "GET, HEAD, OPTIONS"),
            (Method::POST, "/metrics", "GET, HEAD"),
            (Method::OPTIONS, "/metrics", "GET, HEAD"),
        ] {
            let refused = answer(method, path, &health);
            assert_eq!(refused.status(), StatusCode::METHOD_NOT_ALLOWED, "{path}");
            assert_eq!(refused.headers()["allow"], allowed);
        }
    }

    #[test]
    fn balancers_may_ask_with_options() {
        let health = Health::new("etcd");
        let empty = format!("{:?}", Full::<Bytes>::default());
        assert_eq!(ask(Method::OPTIONS, "/readyz", &health), (503, empty.clone()));
        assert_eq!(ask(Method::OPTIONS, "/livez", &health), (200, empty));
    }

    #[test]
    fn no_cache_keeps_a_page() {
        for path in ["/livez", "/readyz", "/metrics", "/"] {
            let answer = answer(Method::GET, path, &Health::new("x"));
            assert_eq!(answer.headers()["cache-control"], "no-store", "{path}");
        }
    }
}
