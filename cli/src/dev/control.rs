//! `DIR/dev.sock`: the socket at which a running `dkc dev` takes requests of other commands.
//!
//! A connection carries one request and one reply, each a line of JSON. The folder is its user's
//! own, so no other user reaches the socket. Every request is answered at once; a command that
//! waits for something asks again.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::lock_of;
use crate::exit::UsageError;

/// The time-out of a request.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// The most bytes of a line.
const LINE_MAX: u64 = 1 << 16;

/// A request to a running `dkc dev`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DevRequest {
    /// Start this many more storage nodes.
    Add { count: u32 },
    /// Return what is known of a storage node.
    Find { name: String },
    /// Ask a storage node to stop, and do not start it again.
    Stop { name: String },
    /// Forget a storage node that has stopped and has left the cluster.
    Forget { name: String },
}

/// The reply.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DevReply {
    /// The request is carried out; these are the nodes that it concerns.
    Nodes { nodes: Vec<DevNode>, cluster: DevCluster },
    /// The request is wrong, for this reason.
    Refused { why: String },
}

/// A storage node of a local cluster.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct DevNode {
    pub(crate) name: String,
    pub(crate) address: String,
    /// The process, if it runs.
    pub(crate) pid: Option<u32>,
}

/// The facts of the local cluster that the commands need.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct DevCluster {
    /// The addresses of etcd, with commas between them.
    pub(crate) etcd: String,
    /// The name of the cluster in etcd.
    pub(crate) name: String,
    pub(crate) nodes: u32,
    pub(crate) replicas: u32,
}

/// The requests that arrive at the socket.
pub(crate) struct ControlSocket {
    requests: mpsc::Receiver<(DevRequest, oneshot::Sender<DevReply>)>,
    task: JoinHandle<()>,
    path: PathBuf,
}

impl ControlSocket {
    /// Opens the socket, in place of one that a former `dkc dev` left.
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join("dev.sock");
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let opened = File::open(folder)?;
        let listener = UnixListener::bind(short_path(&opened))?;
        let (sender, requests) = mpsc::channel(16);
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => drop(tokio::spawn(serve(stream, sender.clone()))),
                    // There may be too few open files for a moment.
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        Ok(Self { requests, task, path })
    }

    /// Waits for the next request.
    pub(crate) async fn next(&mut self) -> (DevRequest, oneshot::Sender<DevReply>) {
        match self.requests.recv().await {
            Some(request) => request,
            // The task that accepts connections ends only with this value.
            None => std::future::pending().await,
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.task.abort();
        drop(fs::remove_file(&self.path));
    }
}

/// The path of the socket by an open folder: the kernel limits it to 107 bytes.
fn short_path(folder: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/dev.sock", folder.as_raw_fd()))
}

async fn serve(
    stream: UnixStream,
    requests: mpsc::Sender<(DevRequest, oneshot::Sender<DevReply>)>,
) {
    let (read, mut write) = stream.into_split();
    let Ok(line) = tokio::time::timeout(ANSWER_WITHIN, line_of(read)).await else { return };
    let parsed = line.and_then(|line| serde_json::from_str(&line).map_err(io::Error::from));
    let reply = match parsed {
        Err(error) => DevReply::Refused { why: format!("not a request: {error}") },
        Ok(request) => {
            let (sender, answer) = oneshot::channel();
            if requests.send((request, sender)).await.is_err() {
                return;
            }
            let Ok(answer) = answer.await else { return };
            answer
        }
    };
    // The command may have gone.
    drop(send(&mut write, &reply).await);
}

async fn line_of(read: impl tokio::io::AsyncRead + Unpin) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(read.take(LINE_MAX)).read_line(&mut line).await?;
    if line.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(line) }
}

async fn send<T: Serialize>(
    write: &mut (impl tokio::io::AsyncWrite + Unpin),
    value: &T,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    write.write_all(&line).await
}

/// Sends a request to the `dkc dev` that runs on a folder. A refusal is an error of usage.
pub(crate) async fn ask(
    folder: &Path,
    request: &DevRequest,
) -> anyhow::Result<(Vec<DevNode>, DevCluster)> {
    let asked = tokio::time::timeout(ANSWER_WITHIN, exchange(folder, request)).await;
    let asked = asked.with_context(|| {
        let within = ANSWER_WITHIN.as_secs();
        format!("the dkc dev on {} does not answer within {within} s", folder.display())
    })?;
    match asked {
        Ok(DevReply::Nodes { nodes, cluster }) => Ok((nodes, cluster)),
        Ok(DevReply::Refused { why }) => Err(UsageError(why).into()),
        Err(error) if is_absent(&error) => Err(absent(folder)?),
        Err(error) => Err(error).with_context(|| format!("the dkc dev on {}", folder.display())),
    }
}

async fn exchange(folder: &Path, request: &DevRequest) -> io::Result<DevReply> {
    let opened = File::open(folder)?;
    let stream = UnixStream::connect(short_path(&opened)).await?;
    let (read, mut write) = stream.into_split();
    send(&mut write, request).await?;
    Ok(serde_json::from_str(&line_of(read).await?)?)
}

/// Returns whether nothing listens at the socket.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// The reason why nothing listens: no `dkc dev` runs, or it is not ready.
fn absent(folder: &Path) -> anyhow::Result<anyhow::Error> {
    let shown = folder.display();
    let is_running = folder.join("dev.lock").exists() && lock_of(folder)?.is_none();
    let why = match is_running {
        true => format!("the dkc dev on {shown} is starting: wait until it prints `ready`"),
        false => format!("no dkc dev runs on {shown}: start it with `dkc dev --data {shown}`"),
    };
    Ok(UsageError(why).into())
}
