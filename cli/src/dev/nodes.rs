//! The storage nodes of a running local cluster: what `dkc dev` does when a command asks for more
//! of them, or for one to go.

use std::path::Path;

use super::cluster_file::ProcessRole;
use super::control::{DevCluster, DevNode, DevReply, DevRequest};
use super::keep;
use super::plan::{CLUSTER, DevSettings};
use super::supervisor::Supervisor;
use crate::output::note;

/// The settings of a running local cluster, and what the command lines of its processes contain.
pub(crate) struct LocalNodes<'a> {
    pub(crate) settings: DevSettings,
    pub(crate) folder: &'a Path,
    pub(crate) program: String,
    pub(crate) etcd: String,
    /// The flags after `--`.
    pub(crate) extra: &'a [String],
}

impl LocalNodes<'_> {
    /// Carries a request out.
    pub(crate) fn answer(&mut self, request: DevRequest, supervisor: &mut Supervisor) -> DevReply {
        let done = match request {
            DevRequest::Add { count } => self.add(count, supervisor),
            DevRequest::Find { name } => self.known(&name).map(|()| vec![name]),
            DevRequest::Stop { name } => self.known(&name).map(|()| {
                supervisor.stop_one(&name);
                vec![name]
            }),
            DevRequest::Forget { name } => self.forget(&name, supervisor).map(|()| vec![]),
        };
        match done {
            Ok(names) => self.reply(&names, supervisor),
            Err(why) => DevReply::Refused { why },
        }
    }

    fn reply(&self, names: &[String], supervisor: &Supervisor) -> DevReply {
        let node = |name: &String| DevNode {
            name: name.clone(),
            address: self.settings.address(name, "grpc"),
            pid: supervisor.pid(name),
        };
        let cluster = DevCluster {
            etcd: self.etcd.clone(),
            name: CLUSTER.to_owned(),
            nodes: self.settings.nodes,
            replicas: self.settings.replicas,
        };
        DevReply::Nodes { nodes: names.iter().map(node).collect(), cluster }
    }

    fn add(&mut self, count: u32, supervisor: &mut Supervisor) -> Result<Vec<String>, String> {
        let mut settings = self.settings.clone();
        let added = settings.add_nodes(count)?;
        // The settings come first: data must not be left by a node that a next start lacks.
        keep(self.folder, &settings).map_err(|error| format!("{error:#}"))?;
        self.settings = settings;
        let specs = self.settings.roles(&self.program, self.folder, &self.etcd, self.extra);
        let is_new = |name: &String| added.contains(name);
        for spec in specs.into_iter().filter(|spec| is_new(&spec.name)) {
            let name = spec.name.clone();
            note!("starting {name}");
            supervisor.start(spec).map_err(|error| format!("starting {name}: {error}"))?;
        }
        Ok(added)
    }

    fn known(&self, name: &str) -> Result<(), String> {
        if self.settings.node_names().any(|known| known == name) {
            return Ok(());
        }
        let known: Vec<String> = self.settings.node_names().collect();
        let role = ProcessRole::StorageNode.name();
        Err(format!("{name:?} is no {role} of this cluster; it has {}", known.join(" ")))
    }

    fn forget(&mut self, name: &str, supervisor: &mut Supervisor) -> Result<(), String> {
        self.known(name)?;
        if let Some(pid) = supervisor.pid(name) {
            return Err(format!("{name} still runs (pid {pid})"));
        }
        let mut settings = self.settings.clone();
        settings.remove_node(name);
        keep(self.folder, &settings).map_err(|error| format!("{error:#}"))?;
        self.settings = settings;
        supervisor.forget(name).map_err(|error| format!("cluster.json: {error}"))
    }
}
