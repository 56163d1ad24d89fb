//! An etcd of a test's own, which can be stopped, frozen and thawed.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use metastore::{Metastore, Settings};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) const CLUSTER: &str = "test";

pub(crate) struct Etcd {
    folder: tempfile::TempDir,
    port: u16,
    peer_port: u16,
    child: Option<Child>,
}

impl Etcd {
    /// One that does not run yet.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { folder, port: free_port(), peer_port: free_port(), child: None }
    }

    pub(crate) async fn start() -> Self {
        let mut etcd = Self::new();
        etcd.run().await;
        etcd
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) async fn metastore(&self) -> Metastore {
        self.try_metastore().await.expect("etcd answers")
    }

    async fn try_metastore(&self) -> Result<Metastore, metastore::Error> {
        Metastore::connect(&Settings::new(vec![self.endpoint()], CLUSTER)).await
    }

    pub(crate) async fn run(&mut self) {
        let binary = std::env::var_os("ETCD").filter(|path| !path.is_empty());
        let binary = binary.expect("$ETCD names the binary: source scripts/env first");
        let client = format!("http://127.0.0.1:{}", self.port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let child = Command::new(binary)
            .arg("--data-dir")
            .arg(self.folder.path().join("data"))
            .args(["--name", "one", "--log-level", "fatal", "--unsafe-no-fsync"])
            // So that it grants leases of 1 s: its least is 1.5 times the election time.
            .args(["--heartbeat-interval", "10", "--election-timeout", "100"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(child.expect("etcd starts"));
        let began = Instant::now();
        while self.try_metastore().await.is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "etcd does not answer");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// SIGSTOP: connections stay and nothing answers.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        send(self.child.as_ref().expect("it runs"), signal);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

/// kill -9, and waits.
pub(crate) fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ended = child.kill();
    let _ended = child.wait();
}

pub(crate) fn send(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, signal).expect("our own child");
}

pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("it is bound").port()
}
