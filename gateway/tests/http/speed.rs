//! The CPU time of the gateway per request. This is a measurement, not a check:
//! `cargo test -p gateway --test http -- --ignored --nocapture speed`.
//!
//! A closed loop of connections on one thread sends requests to a gateway whose nodes count in
//! memory. The CPU time is that of the gateway's worker threads, by their names, so neither the
//! generator nor the nodes are included. `/livez` shows the cost of HTTP alone. `DKC_SPEED=1000`
//! runs only the measurements with that text in their names.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cluster::Cluster;

#[test]
#[ignore = "a measurement"]
fn speed() {
    let cluster = Cluster::start(3);
    let address = cluster.address();
    let text = |line: &str, headers: &str, body: &str| {
        format!(
            "{line} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let increment = |number: usize, body: &str| {
        text(&format!("POST /v1/counters/ns/key-{number}/increment"), "", body)
    };
    let lines = |number: usize| {
        let keys: String = (0..1000)
            .map(|key| format!("key-{}\n", (number * 7919 + key * 104_729) % 1_000_000))
            .collect();
        text("POST /v1/counters/ns/increment", "Content-Type: text/plain\r\n", &keys)
    };
    let json = |number: usize| {
        let keys: Vec<_> = (0..1000)
            .map(|key| {
                format!(
                    "{{\"key\":\"key-{}\",\"delta\":1}}",
                    (number * 7919 + key * 104_729) % 1_000_000
                )
            })
            .collect();
        text(
            "POST /v1/counters/ns/increment",
            "",
            &format!("{{\"increments\":[{}]}}", keys.join(",")),
        )
    };
    for clients in [1, 64, 256] {
        measure(address, clients, "livez", |_| "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n".to_owned());
        measure(address, clients, "increment", |number| increment(number, ""));
        measure(address, clients, "increment with a body", |number| {
            increment(number, "{\"delta\":1}")
        });
        measure(address, clients, "get", |number| {
            text(&format!("GET /v1/counters/ns/key-{number}"), "", "")
        });
    }
    measure(address, 16, "1000 lines", lines);
    measure(address, 16, "1000 of JSON", json);
}

fn measure(address: SocketAddr, clients: usize, what: &str, request: impl Fn(usize) -> String) {
    let wanted = std::env::var("DKC_SPEED").unwrap_or_default();
    if !format!("{what} {clients}").contains(&wanted) {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (count, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let measured = runtime.block_on(async {
        let clients: Vec<_> = (0..clients)
            .map(|number| {
                let (count, over) = (count.clone(), over.clone());
                tokio::spawn(client(address, request(number), count, over))
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let (before, spent, began) = (count.load(Ordering::Relaxed), spent(), Instant::now());
        tokio::time::sleep(Duration::from_secs(3)).await;
        let requests = count.load(Ordering::Relaxed) - before;
        let measured = (requests, began.elapsed(), self::spent() - spent);
        over.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.unwrap();
        }
        measured
    });
    let (requests, elapsed, spent) = measured;
    let rate = requests as f64 / elapsed.as_secs_f64();
    let cost = spent.as_secs_f64() * 1e6 / requests as f64;
    let mut out = std::io::stderr();
    writeln!(out, "{what:<24} {clients:>4} clients {rate:>9.0}/s {cost:>8.2} us of gateway CPU")
        .unwrap();
}

async fn client(
    address: SocketAddr,
    request: String,
    count: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut answer = vec![0; 64 << 10];
    while !over.load(Ordering::Relaxed) {
        stream.write_all(request.as_bytes()).await.unwrap();
        // The answer is small enough to arrive in one piece.
        let read = stream.read(&mut answer).await.unwrap();
        assert!(answer[..read].starts_with(b"HTTP/1.1 200"), "{}", answer[..read].escape_ascii());
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// The CPU time of the gateway's workers so far.
fn spent() -> Duration {
    let mut nanos = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let folder = task.unwrap().path();
        let name = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
        if name.starts_with("worker-") {
            let stat = std::fs::read_to_string(folder.join("schedstat")).unwrap_or_default();
            nanos += stat.split(' ').next().unwrap().parse::<u64>().unwrap_or(0);
        }
    }
    Duration::from_nanos(nanos)
}
