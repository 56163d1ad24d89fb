//! A coordinator process: the crate's own `serve` in a runtime that can be killed.

use std::net::SocketAddr;

use coordinator::Options;
use process::{ClusterOptions, ListenOptions, ProcessExit, ProcessOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::CLUSTER;
use crate::etcd::free_port;

pub(crate) struct Process {
    pub(crate) options: Options,
    runtime: Option<Runtime>,
    served: Option<JoinHandle<Result<(), ProcessExit>>>,
    stop: Option<oneshot::Sender<()>>,
}

/// The flags of most tests: a small cluster, placed as soon as three nodes are registered.
pub(crate) fn flags(etcd: &str, number: u32) -> Options {
    Options {
        name: format!("coordinator-{number}"),
        cluster: ClusterOptions { etcd: vec![etcd.to_owned()], cluster: CLUSTER.into() },
        listen: ListenOptions { listen: local(), advertise: None },
        process: ProcessOptions { metrics: Some(local()), lease_ttl: 1 },
        shards: Some(12),
        replicas: Some(3),
        min_in_sync: Some(2),
        idempotency_window: None,
        idempotency_bytes: None,
        expect_nodes: Some(3),
        rebuild_delay: 600,
        stalled_after: 60,
        event_bytes: 1 << 20,
    }
}

/// The flags of a coordinator whose lease lasts this long.
pub(crate) fn flags_with_ttl(etcd: &str, number: u32, lease_ttl: u32) -> Options {
    let mut options = flags(etcd, number);
    options.process.lease_ttl = lease_ttl;
    options
}

fn local() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

impl Process {
    pub(crate) fn start(options: Options) -> Self {
        let _written = telemetry::logs("coordinator", "test", telemetry::LogOptions::default());
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().expect("a runtime");
        let (stop, stopped) = oneshot::channel();
        let serving = coordinator::serve(options.clone(), async {
            // A test that drops the sender kills the whole runtime.
            let _stopped = stopped.await;
        });
        let served = Some(runtime.spawn(serving));
        Self { options, runtime: Some(runtime), served, stop: Some(stop) }
    }

    /// Stops the process as SIGTERM does.
    pub(crate) async fn stop(mut self) -> Result<(), ProcessExit> {
        let _it_may_have_ended = self.stop.take().expect("stopped once").send(());
        self.end().await
    }

    /// Waits until the process ends by itself.
    pub(crate) async fn end(&mut self) -> Result<(), ProcessExit> {
        let served = self.served.take().expect("awaited once");
        crate::within(10, served).await.expect("it does not panic")
    }

    /// Ends the process as `kill -9` does.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    pub(crate) fn address(&self) -> String {
        self.options.listen.listen.to_string()
    }

    /// Returns the status and the body of `/readyz`; `None` while the port is closed.
    pub(crate) async fn readyz(&self) -> Option<(u16, String)> {
        let page = self.page("/readyz").await?;
        Some((page.0, page.1.trim().to_owned()))
    }

    pub(crate) async fn page(&self, path: &str) -> Option<(u16, String)> {
        let address = self.options.process.metrics.expect("every test's process has one");
        let mut stream = TcpStream::connect(address).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.ok()?;
        let (head, body) = reply.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }

    /// Waits until `/readyz` returns this.
    pub(crate) async fn readyz_is(&self, want: (u16, &str)) {
        let mut last = None;
        let polling = async {
            while last.as_ref() != Some(&(want.0, want.1.to_owned())) {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                last = self.readyz().await;
            }
        };
        let waited = tokio::time::timeout(std::time::Duration::from_secs(15), polling).await;
        assert!(waited.is_ok(), "wanted {want:?}, /readyz returns {last:?}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
