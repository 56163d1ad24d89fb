//! Waits until a local cluster is ready: etcd answers, every gateway's `/readyz?all` is 200, and
//! every shard is open.

use std::path::Path;
use std::time::Duration;

use client::{HttpConnection, HttpRequest, HttpResponse, Url, parse};

use crate::output::note;
use crate::status::ClusterInfo;

/// The pause between two checks.
const EVERY: Duration = Duration::from_millis(100);
/// The time-out of one request.
const WITHIN: Duration = Duration::from_secs(2);
/// After this time without success, the reason is printed.
const PATIENCE: Duration = Duration::from_secs(3);

/// Waits until etcd reports that it is healthy.
pub(crate) async fn etcd(url: Url) {
    until(|| async {
        let response = get(&url, "/health").await?;
        let healthy = String::from_utf8_lossy(&response.body).contains("\"true\"");
        if healthy { Ok(()) } else { Err("etcd has no leader".to_owned()) }
    })
    .await;
}

/// Waits until every gateway is ready and reports every shard as open.
pub(crate) async fn gateways(urls: Vec<Url>) {
    until(|| async {
        for url in &urls {
            let ready = get(url, "/readyz?all").await?;
            if ready.status != 200 {
                let why = String::from_utf8_lossy(&ready.body).trim().to_owned();
                return Err(format!("{url}/readyz?all: {why}"));
            }
            let response = get(url, "/v1/cluster").await?;
            let cluster: ClusterInfo = parse(&response)
                .map_err(|failure| format!("{url}/v1/cluster: {}", failure.why()))?;
            let closed = cluster.shards.iter().filter(|shard| !shard.is_open()).count();
            if cluster.shards.is_empty() {
                return Err("no shard is placed yet".to_owned());
            }
            if closed > 0 {
                return Err(format!("{closed} of {} shards are not open", cluster.shards.len()));
            }
        }
        Ok(())
    })
    .await;
}

/// Repeats a check until it succeeds, and prints from time to time why it fails.
async fn until<F: Future<Output = Result<(), String>>>(check: impl Fn() -> F) {
    let mut patience = PATIENCE;
    let begun = std::time::Instant::now();
    while let Err(why) = check().await {
        if begun.elapsed() > patience {
            note!("waiting: {why}");
            // The interval doubles: the wait may be long.
            patience *= 2;
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn get(url: &Url, path: &str) -> Result<HttpResponse, String> {
    let request = HttpRequest::get(url, path, WITHIN);
    let answer = HttpConnection::new(url.clone()).call(&request, WITHIN).await;
    answer.map_err(|error| format!("{url}{path}: {error}"))
}

/// The last lines of a log, to be printed with an error.
pub(crate) fn last_lines(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().rev().take(10).collect();
    lines.into_iter().rev().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
