//! A real etcd for one test, which can be stopped, paused and replaced; and a relay that loses its
//! replies.
//!
//! The election timeout is 0.1 s instead of 1 s, so that etcd grants leases of 1 s (its shortest
//! lease is 1.5 times the election timeout, rounded up). The tests of all roles use this file.
#![allow(dead_code, reason = "each test binary that includes this uses a part of it")]

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use engine::records::Meta;
use metastore::{Metastore, Settings};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

pub(crate) struct Etcd {
    folder: tempfile::TempDir,
    port: u16,
    peer_port: u16,
    election_ms: u32,
    /// More flags of etcd's command line.
    flags: &'static [&'static str],
    /// The number of the history, which increases when an empty one replaces it.
    generation: u32,
    child: Option<Child>,
}

impl Etcd {
    pub(crate) async fn start() -> Self {
        Self::start_electing_within(100).await
    }

    /// Returns an etcd that [`run`](Self::run) starts.
    pub(crate) fn not_running() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (port, peer_port) = (free_port(), free_port());
        let flags = &[];
        Self { folder, port, peer_port, election_ms: 100, flags, generation: 0, child: None }
    }

    pub(crate) async fn start_electing_within(election_ms: u32) -> Self {
        let mut etcd = Self::not_running();
        etcd.election_ms = election_ms;
        etcd.started().await
    }

    pub(crate) async fn start_with(flags: &'static [&'static str]) -> Self {
        let mut etcd = Self::not_running();
        etcd.flags = flags;
        etcd.started().await
    }

    async fn started(mut self) -> Self {
        // Another test may have bound the port after it was chosen and before etcd bound it.
        while !self.try_run().await {
            (self.port, self.peer_port) = (free_port(), free_port());
        }
        self
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Starts etcd again, with the same port and data.
    pub(crate) async fn run(&mut self) {
        let began = Instant::now();
        while !self.try_run().await {
            assert!(began.elapsed() < Duration::from_secs(20), "etcd does not start again");
        }
    }

    async fn try_run(&mut self) -> bool {
        assert!(self.child.is_none(), "it is running");
        let etcd = std::env::var_os("ETCD").filter(|path| !path.is_empty());
        let etcd = etcd.expect("$ETCD names the binary: source scripts/env first");
        let client = format!("http://127.0.0.1:{}", self.port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let data = self.folder.path().join(format!("data-{}", self.generation));
        let child = Command::new(etcd)
            .arg("--data-dir")
            .arg(data)
            .args(["--name", "one", "--log-level", "fatal", "--unsafe-no-fsync"])
            .args(["--heartbeat-interval", &(self.election_ms / 10).to_string()])
            .args(["--election-timeout", &self.election_ms.to_string()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}")])
            .args(self.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd starts");
        self.child = Some(child);
        while !self.answers().await {
            let child = self.child.as_mut().expect("set above");
            if child.try_wait().expect("our own child").is_some() {
                self.child = None;
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        true
    }

    async fn answers(&self) -> bool {
        let settings = Settings::new(vec![self.endpoint()], "is-it-there");
        let Ok(store) = Metastore::connect(&settings).await else { return false };
        // A linearizable read also shows that etcd has a leader.
        store.get::<Meta>(&()).await.is_ok()
    }

    /// Kills etcd with SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("our own child");
            child.wait().expect("our own child");
        }
    }

    /// Pauses etcd with SIGSTOP: connections stay open without replies.
    ///
    /// The signal reaches a running thread only when that thread enters the kernel, so a call that
    /// follows at once could still get a reply: this returns when every thread has stopped.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.all_threads_stopped() {
            assert!(Instant::now() < deadline, "SIGSTOP stops every thread");
            std::thread::yield_now();
        }
    }

    fn all_threads_stopped(&self) -> bool {
        let child = self.child.as_ref().expect("it is running");
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).expect("our own child");
        tasks.flatten().all(|task| {
            // The format is "pid (name) state …"; the name may contain any bytes, also brackets.
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
        })
    }

    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Replaces etcd by an empty one on the same port, whose history begins again.
    pub(crate) async fn replace_by_empty(&mut self) {
        self.kill();
        self.generation += 1;
        self.run().await;
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it is running");
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("our own child");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port on which nothing listens. The system gives ports from 32768 up to connections that go out, so one of those could be
/// taken by a client before its server binds it; these are below.
pub(crate) fn free_port() -> u16 {
    static CHOSEN: AtomicU32 = AtomicU32::new(0);
    loop {
        // Test processes side by side begin at different places.
        let nth = CHOSEN
            .fetch_add(1, Ordering::Relaxed)
            .wrapping_add(std::process::id().wrapping_mul(61));
        let port = 10_000 + (nth % 10_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Passes bytes on between a client and an etcd, and can lose the replies.
pub(crate) struct Relay {
    port: u16,
    deaf: Arc<AtomicBool>,
    closed: Arc<AtomicBool>,
    /// Connections that were made before the last increase of this number pass nothing.
    silenced: watch::Sender<u32>,
    /// Every connection ends when this changes.
    cut: watch::Sender<u32>,
}

impl Relay {
    pub(crate) async fn start(to: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let (deaf, closed): (Arc<AtomicBool>, Arc<AtomicBool>) = Default::default();
        let (cut, cuts) = watch::channel(0);
        let (silenced, silences) = watch::channel(0);
        let (swallows, ends) = (Arc::clone(&deaf), Arc::clone(&closed));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if ends.load(Ordering::SeqCst) {
                    continue;
                }
                let (to, deaf, mut cuts) = (to.clone(), Arc::clone(&swallows), cuts.clone());
                let mut silences = silences.clone();
                cuts.mark_unchanged();
                silences.mark_unchanged();
                tokio::spawn(async move {
                    tokio::select! {
                        () = pass(client, to, deaf, silences) => {}
                        _ = cuts.changed() => {}
                    }
                });
            }
        });
        Self { port, deaf, closed, silenced, cut }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Loses all replies from now on, while requests still arrive.
    pub(crate) fn lose_answers(&self) {
        self.deaf.store(true, Ordering::SeqCst);
    }

    /// Passes nothing more in either direction on the open connections, without closing them. New
    /// connections work.
    pub(crate) fn silence(&self) {
        self.silenced.send_modify(|times| *times += 1);
    }

    /// Cuts every connection, and ends each new one as soon as it is made.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.cut.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts every connection; new ones work.
    pub(crate) fn mend(&self) {
        self.deaf.store(false, Ordering::SeqCst);
        self.closed.store(false, Ordering::SeqCst);
        self.cut.send_modify(|cuts| *cuts += 1);
    }
}

async fn pass(
    client: TcpStream,
    to: String,
    deaf: Arc<AtomicBool>,
    mut silenced: watch::Receiver<u32>,
) {
    let Ok(etcd) = TcpStream::connect(to).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_etcd, mut to_etcd) = etcd.into_split();
    let asked = async {
        let _ended = tokio::io::copy(&mut from_client, &mut to_etcd).await;
    };
    let answered = async {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from_etcd.read(&mut bytes).await {
            if !deaf.load(Ordering::SeqCst) && to_client.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = asked => {}
        () = answered => {}
        // The sockets stay open and are not read.
        Ok(()) = silenced.changed() => std::future::pending().await,
    }
}
