//! `/livez`, `/readyz` and `/metrics` over plain HTTP, for whoever watches the process.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::files::Connections;
use crate::{Health, Metrics};

const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Open at once: a few people and a few programs look at a process, and they must not use up its files.
const CONNECTIONS_MAX: usize = 64;
const TEXT: &str = "text/plain; charset=utf-8";

/// What is answered on one of the three paths.
#[derive(Debug, Eq, PartialEq)]
pub struct Page {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub body: String,
}

/// The page of a path; none if it is not one of the three. A gateway serves them on its data port too.
pub fn page(path: &str, health: &Health, metrics: &Metrics) -> Option<Page> {
    let text = |status, body| Page { status, content_type: TEXT, body };
    match path {
        "/livez" => Some(text(StatusCode::OK, "ok\n".to_owned())),
        "/readyz" => Some(match health.reason() {
            None => text(StatusCode::OK, "ok\n".to_owned()),
            Some(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
        }),
        "/metrics" => {
            Some(Page { status: StatusCode::OK, content_type: METRICS, body: metrics.text() })
        }
        _ => None,
    }
}

/// Serves until dropped.
pub async fn serve(listener: TcpListener, health: Health, metrics: Arc<Metrics>) {
    let connections = Connections::new(CONNECTIONS_MAX);
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
    let plain = |status, body: &str| Page { status, content_type: TEXT, body: body.to_owned() };
    let page = match page(request.uri().path(), health, metrics) {
        Some(page) if matches!(*request.method(), Method::GET | Method::HEAD) => page,
        Some(_) => plain(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n"),
        None => plain(StatusCode::NOT_FOUND, "/livez, /readyz and /metrics are served here\n"),
    };
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    let content_type = header::HeaderValue::from_static(page.content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    if page.status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    fn ask(method: Method, path: &str, health: &Health) -> (u16, String) {
        let counter = Counter::<u64>::default();
        counter.inc_by(3);
        let metrics = Metrics::new(|registry| registry.register("batches", "Batches", counter));
        let request = hyper::Request::builder().method(method).uri(path).body(()).unwrap();
        let response = respond(&request, health, &metrics);
        (response.status().as_u16(), format!("{:?}", response.body()))
    }

    #[test]
    fn a_process_that_waits_says_for_what() {
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
        assert_eq!(ask(Method::POST, "/livez", &health).0, 405);
    }
}
