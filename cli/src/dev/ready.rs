//! When a local cluster is ready: etcd answers, every gateway's `/readyz?all` is 200, and every shard is
//! open.

use std::path::Path;
use std::time::Duration;

use bench::http::{Connection, Request, Response, Url};

use crate::answer::parse;
use crate::output;
use crate::status::Cluster;

const EVERY: Duration = Duration::from_millis(100);
const WITHIN: Duration = Duration::from_secs(2);
/// Waiting longer than this for one thing is worth a word.
const PATIENCE: Duration = Duration::from_secs(3);

/// Waits until etcd says it is well.
pub(crate) async fn etcd(url: Url) {
    until(|| async {
        let response = get(&url, "/health").await?;
        let healthy = String::from_utf8_lossy(&response.body).contains("\"true\"");
        if healthy { Ok(()) } else { Err("etcd has no leader".to_owned()) }
    })
    .await;
}

/// Waits until every gateway is ready and sees every shard open.
pub(crate) async fn gateways(urls: Vec<Url>) {
    until(|| async {
        for url in &urls {
            let ready = get(url, "/readyz?all").await?;
            if ready.status != 200 {
                let why = String::from_utf8_lossy(&ready.body).trim().to_owned();
                return Err(format!("{url}/readyz?all: {why}"));
            }
            let told = get(url, "/v1/cluster").await?;
            let cluster: Cluster =
                parse(&told).map_err(|refusal| format!("{url}/v1/cluster: {}", refusal.why()))?;
            let closed = cluster.shards.iter().filter(|shard| !shard.is_open()).count();
            if cluster.shards.is_empty() {
                return Err("no shards are placed yet".to_owned());
            }
            if closed > 0 {
                return Err(format!("{closed} of {} shards are not open", cluster.shards.len()));
            }
        }
        Ok(())
    })
    .await;
}

async fn until<F: Future<Output = Result<(), String>>>(check: impl Fn() -> F) {
    let mut patience = PATIENCE;
    let begun = std::time::Instant::now();
    while let Err(why) = check().await {
        if begun.elapsed() > patience {
            output::note(&format!("waiting: {why}"));
            // Less and less often: somebody may leave it to wait.
            patience *= 2;
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn get(url: &Url, path: &str) -> Result<Response, String> {
    let request = Request::get(url, path, WITHIN);
    let answer = Connection::new(url.clone()).call(&request, WITHIN).await;
    answer.map_err(|error| format!("{url}{path}: {error}"))
}

/// The last lines of a log, to show with bad news.
pub(crate) fn last_lines(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().rev().take(10).collect();
    lines.into_iter().rev().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
