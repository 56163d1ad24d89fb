//! `DIR/cluster.json`: the processes of a local cluster and their state.
//!
//! The file is replaced by rename, so a reader never sees half of it. `processes` lists the running
//! processes. A process that died moves to `dead`, without its pid, which the kernel may give to
//! another process, and with its argv, so that a test can start it again.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The role of a process.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ProcessRole {
    /// The private etcd.
    Etcd,
    Coordinator,
    StorageNode,
    Gateway,
}

impl ProcessRole {
    /// The name in the file, which is also the subcommand, except for etcd.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Coordinator => "coordinator",
            Self::StorageNode => "storage-node",
            Self::Gateway => "gateway",
        }
    }
}

/// The content of the file.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct ClusterFile {
    pub(crate) processes: Vec<ListedProcess>,
    /// The processes that died and were not started again.
    #[serde(default)]
    pub(crate) dead: Vec<ProcessSpec>,
}

/// A running process.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct ListedProcess {
    pub(crate) pid: u32,
    #[serde(flatten)]
    pub(crate) spec: ProcessSpec,
}

/// The definition of a process, running or not.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct ProcessSpec {
    pub(crate) role: ProcessRole,
    /// The name, which is unique in the cluster.
    pub(crate) name: String,
    pub(crate) argv: Vec<String>,
    /// The addresses on which it listens, by kind: `grpc`, `http`, `metrics`.
    pub(crate) addresses: BTreeMap<String, String>,
}

/// Reads a cluster file.
pub(crate) fn read(path: &Path) -> io::Result<ClusterFile> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// Replaces one of the folder's files atomically.
pub(crate) fn replace<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let new = path.with_extension("json.new");
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path)
}
