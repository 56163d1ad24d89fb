//! `DIR/cluster.json`: which processes a local cluster consists of right now.
//!
//! It is replaced by rename, so a reader never sees half of it. `processes` lists what runs;
//! a process that died moves to `dead`, without a pid, so that nobody signals a number that may
//! belong to somebody else by then, and its argv can still be read to start it again.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What a process does.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    Etcd,
    Coordinator,
    StorageNode,
    Gateway,
}

impl Role {
    /// As it is written in the file and, but for etcd, in the subcommand.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Coordinator => "coordinator",
            Self::StorageNode => "storage-node",
            Self::Gateway => "gateway",
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct ClusterFile {
    pub(crate) processes: Vec<Process>,
    #[serde(default)]
    pub(crate) dead: Vec<Dead>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    #[serde(flatten)]
    pub(crate) spec: Spec,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Dead {
    #[serde(flatten)]
    pub(crate) spec: Spec,
}

/// A process as it is meant to be, running or not.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Spec {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) argv: Vec<String>,
    pub(crate) addresses: BTreeMap<String, String>,
}

pub(crate) fn read(path: &Path) -> io::Result<ClusterFile> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// Writes any of this folder's files whole or not at all.
pub(crate) fn replace<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let new = path.with_extension("json.new");
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path)
}
