//! The plan of a local cluster: its settings, ports and command lines.
//!
//! Settings and ports are chosen once and stored in `DIR/dev.json`, so that the same cluster is
//! started again and the argv in an old `cluster.json` still works. A setting that was fixed when
//! the cluster was created cannot be changed by a flag later; the error is reported here, since
//! that of a coordinator would only be in a log file.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::cluster_file::{ProcessRole, ProcessSpec};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// The range of chosen ports, below Linux's range for outgoing connections (from 32768): a port of
/// that range could be taken by any client while its process restarts.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// The name of the cluster in etcd, and of the private etcd's member.
pub(crate) const CLUSTER: &str = "dkc";

/// The flags of the user; an absent value is taken from the existing cluster, or has a default.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct DevOptions {
    /// Number of storage nodes [default: 3, or that of the existing cluster]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) nodes: Option<u32>,
    /// Number of gateways [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) gateways: Option<u32>,
    /// Number of coordinators [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) coordinators: Option<u32>,
    /// Number of copies of each shard [default: 3, or the number of nodes if smaller]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) replicas: Option<u32>,
    /// Minimum number of in-sync copies for writes [default: 2, or the number of replicas if
    /// smaller]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) min_in_sync: Option<u32>,
    /// Number of shards, which cannot be changed later [default: 24]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) shards: Option<u32>,
    /// Listen address of the first gateway [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDRESS", value_parser = metastore::listened)]
    pub(crate) http: Option<SocketAddr>,
}

/// The settings of a local cluster, as stored in `DIR/dev.json`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct DevSettings {
    pub(crate) nodes: u32,
    pub(crate) gateways: u32,
    pub(crate) coordinators: u32,
    pub(crate) replicas: u32,
    pub(crate) min_in_sync: u32,
    pub(crate) shards: u32,
    pub(crate) http: SocketAddr,
    /// The ports by process name and kind, for example `node-1/grpc`.
    #[serde(default)]
    pub(crate) ports: BTreeMap<String, u16>,
    /// The numbers of nodes that were removed, which no other node gets: their data may still be in
    /// the folder.
    #[serde(default)]
    pub(crate) removed: Vec<u32>,
}

/// The most nodes of a local cluster.
const NODES_MAX: u32 = 100;

impl DevSettings {
    /// Combines the flags with the settings of the existing cluster. The error names a
    /// contradiction.
    pub(crate) fn new(options: &DevOptions, kept: Option<&Self>) -> Result<Self, String> {
        let fixed =
            |name: &str, flag: Option<u32>, kept: Option<u32>, default: u32| match (flag, kept) {
                (Some(flag), Some(kept)) if flag != kept => Err(format!(
                    "--{name} {flag}: this cluster was created with {kept}, which cannot be changed"
                )),
                _ => Ok(flag.or(kept).unwrap_or(default)),
            };
        let nodes = options.nodes.or(kept.map(|kept| kept.nodes)).unwrap_or(3);
        let replicas = kept.map(|kept| kept.replicas);
        let replicas = fixed("replicas", options.replicas, replicas, nodes.min(3))?;
        let min_in_sync = kept.map(|kept| kept.min_in_sync);
        let min_in_sync = fixed("min-in-sync", options.min_in_sync, min_in_sync, replicas.min(2))?;
        let shards = fixed("shards", options.shards, kept.map(|kept| kept.shards), 24)?;
        let gateways = options.gateways.or(kept.map(|kept| kept.gateways)).unwrap_or(1);
        let coordinators = options.coordinators.or(kept.map(|kept| kept.coordinators)).unwrap_or(1);
        if let Some(kept) = kept.filter(|kept| nodes < kept.nodes) {
            let had = kept.nodes;
            return Err(format!(
                "--nodes {nodes}: this cluster has {had} nodes, and the data of some would be \
                 missing; `dkc dev remove-node` moves them to others first"
            ));
        }
        if replicas > nodes {
            return Err(format!(
                "--replicas {replicas} needs as many nodes, but there are {nodes}"
            ));
        }
        if min_in_sync > replicas {
            return Err(format!(
                "--min-in-sync {min_in_sync} is larger than --replicas {replicas}"
            ));
        }
        let http = options.http.or(kept.map(|kept| kept.http));
        let http = http.unwrap_or_else(|| SocketAddr::new(LOCALHOST, 8080));
        let ports = kept.map(|kept| kept.ports.clone()).unwrap_or_default();
        let removed = kept.map(|kept| kept.removed.clone()).unwrap_or_default();
        Ok(Self {
            nodes,
            gateways,
            coordinators,
            replicas,
            min_in_sync,
            shards,
            http,
            ports,
            removed,
        })
    }

    /// The numbers of the nodes: 1, 2, 3 …, without those that were removed.
    fn node_numbers(&self) -> impl Iterator<Item = u32> {
        (1..).filter(|number| !self.removed.contains(number)).take(self.nodes as usize)
    }

    /// The names of the nodes.
    pub(crate) fn node_names(&self) -> impl Iterator<Item = String> {
        self.node_numbers().map(node_name)
    }

    /// Adds nodes with numbers that no node has had, and chooses their ports. Returns their names.
    pub(crate) fn add_nodes(&mut self, count: u32) -> Result<Vec<String>, String> {
        self.add_nodes_that_bind(count, TcpListener::bind)
    }

    fn add_nodes_that_bind<L>(
        &mut self,
        count: u32,
        mut bind: impl FnMut(SocketAddr) -> io::Result<L>,
    ) -> Result<Vec<String>, String> {
        let had = self.nodes;
        if had + count > NODES_MAX {
            return Err(format!("{had} nodes run, and there may be {NODES_MAX} at most"));
        }
        self.nodes = had + count;
        let added: Vec<String> = self.node_names().skip(had as usize).collect();
        let mut held = Vec::new();
        let mut candidates = candidate_ports();
        for name in &added {
            for kind in ["grpc", "metrics"] {
                // A process that is dead now gets its port again.
                let free = |port: u16| {
                    let taken = self.ports.values().any(|&other| other == port);
                    let bound = (!taken).then(|| bind(SocketAddr::new(LOCALHOST, port)).ok());
                    bound.flatten().map(|listener| (port, listener))
                };
                let (port, listener) = candidates.find_map(free).ok_or(NO_PORT)?;
                held.push(listener);
                self.ports.insert(format!("{name}/{kind}"), port);
            }
        }
        Ok(added)
    }

    /// Removes a node for good. Returns false if the cluster has no such node.
    pub(crate) fn remove_node(&mut self, name: &str) -> bool {
        let Some(number) = self.node_numbers().find(|&number| node_name(number) == name) else {
            return false;
        };
        self.removed.push(number);
        self.nodes -= 1;
        self.ports.retain(|listener, _| listener.split('/').next() != Some(name));
        true
    }

    /// Chooses a port for every listener: the stored one, unless another process uses it.
    pub(crate) fn choose_ports(&mut self, private_etcd: bool) -> Result<(), String> {
        self.choose_ports_that_bind(private_etcd, TcpListener::bind)
    }

    /// Chooses ports as [`Self::choose_ports`] does, with `bind` in place of the operating system.
    fn choose_ports_that_bind<L>(
        &mut self,
        private_etcd: bool,
        mut bind: impl FnMut(SocketAddr) -> io::Result<L>,
    ) -> Result<(), String> {
        // Every listener is kept open until all ports are chosen, so that no port is chosen twice.
        let mut held = Vec::new();
        if self.http.port() != 0 {
            let listener = bind(self.http).map_err(|error| {
                format!(
                    "cannot listen on {} ({error}): choose another address with --http",
                    self.http
                )
            })?;
            held.push(listener);
        }
        let names = self.listeners(private_etcd);
        let host = |name: &str| if name.ends_with("/http") { self.http.ip() } else { LOCALHOST };
        let mut bind = |name: &str, port: u16| bind(SocketAddr::new(host(name), port));
        // Stored ports come first: a new process must not take one of them.
        let mut ports = BTreeMap::new();
        for (name, &port) in self.ports.iter().filter(|(name, _)| names.contains(name)) {
            if let Ok(listener) = bind(name, port) {
                held.push(listener);
                ports.insert(name.clone(), port);
            }
        }
        let mut candidates = candidate_ports();
        for name in names {
            if ports.contains_key(&name) {
                continue;
            }
            let free = |port| bind(&name, port).ok().map(|listener| (port, listener));
            let found = candidates.by_ref().find_map(free);
            let (port, listener) = found.ok_or(NO_PORT)?;
            held.push(listener);
            ports.insert(name, port);
        }
        self.ports = ports;
        if self.http.port() == 0 {
            self.http.set_port(self.ports["gateway-1/http"]);
        }
        Ok(())
    }

    /// The names of all listeners that need a port.
    fn listeners(&self, private_etcd: bool) -> Vec<String> {
        let mut names = Vec::new();
        if private_etcd {
            names.extend(["etcd/grpc".to_owned(), "etcd/peer".to_owned()]);
        }
        for kind in ["grpc", "metrics"] {
            names.extend(self.node_names().map(|name| format!("{name}/{kind}")));
        }
        let mut add = |role: &str, numbers: std::ops::RangeInclusive<u32>, kind: &str| {
            names.extend(numbers.map(|number| format!("{role}-{number}/{kind}")));
        };
        for kind in ["grpc", "metrics"] {
            add("coordinator", 1..=self.coordinators, kind);
        }
        // The user chooses the address of the first gateway, unless its port is 0.
        let first = if self.http.port() == 0 { 1 } else { 2 };
        add("gateway", first..=self.gateways, "http");
        for kind in ["grpc", "metrics"] {
            add("gateway", 1..=self.gateways, kind);
        }
        names
    }

    pub(crate) fn address(&self, process: &str, kind: &str) -> String {
        let host = if kind == "http" { self.http.ip() } else { LOCALHOST };
        SocketAddr::new(host, self.ports[&format!("{process}/{kind}")]).to_string()
    }

    /// The listen addresses of the gateways in order.
    pub(crate) fn gateway_addresses(&self) -> Vec<String> {
        let others =
            (2..=self.gateways).map(|number| self.address(&format!("gateway-{number}"), "http"));
        std::iter::once(self.http.to_string()).chain(others).collect()
    }

    /// The definition of the private etcd.
    pub(crate) fn etcd(&self, program: &str, folder: &Path) -> ProcessSpec {
        let client = self.address("etcd", "grpc");
        let (client_url, peer_url) =
            (format!("http://{client}"), format!("http://{}", self.address("etcd", "peer")));
        let data = folder.join("etcd").display().to_string();
        let cluster = format!("{CLUSTER}={peer_url}");
        let flags = [
            ("--name", CLUSTER),
            ("--data-dir", &data),
            ("--listen-client-urls", &client_url),
            ("--advertise-client-urls", &client_url),
            ("--listen-peer-urls", &peer_url),
            ("--initial-advertise-peer-urls", &peer_url),
            ("--initial-cluster", &cluster),
            ("--log-level", "warn"),
        ];
        spec(
            ProcessRole::Etcd,
            "etcd",
            program,
            &[],
            &flags,
            &[("grpc", &client), ("http", &client)],
        )
    }

    /// The definitions of all processes except etcd, in the order of their start. `extra` are the
    /// words after `--`.
    pub(crate) fn roles(
        &self,
        program: &str,
        folder: &Path,
        etcd: &str,
        extra: &[String],
    ) -> Vec<ProcessSpec> {
        let extra = ExtraFlags::share_out(extra);
        let spec = |role, name: &str, listen: &str, own: &[(&str, &str)], extra: &[String]| {
            let (grpc, metrics) = (self.address(name, "grpc"), self.address(name, "metrics"));
            let common = [
                ("--name", name),
                ("--etcd", etcd),
                ("--cluster", CLUSTER),
                (listen, grpc.as_str()),
                ("--metrics", &metrics),
            ];
            let addresses = [("grpc", grpc.as_str()), ("metrics", &metrics)];
            spec(role, name, program, extra, &[&common, own].concat(), &addresses)
        };
        let numbers = [self.shards, self.replicas, self.min_in_sync, self.nodes];
        let [shards, replicas, min_in_sync, nodes] = numbers.map(|number| number.to_string());
        let of_cluster = [
            ("--shards", shards.as_str()),
            ("--replicas", &replicas),
            ("--min-in-sync", &min_in_sync),
            ("--expect-nodes", &nodes),
        ];
        let mut specs = Vec::new();
        for number in 1..=self.coordinators {
            let (role, name) = (ProcessRole::Coordinator, format!("coordinator-{number}"));
            specs.push(spec(role, &name, "--listen", &of_cluster, &extra.coordinators));
        }
        for name in self.node_names() {
            let role = ProcessRole::StorageNode;
            let data = folder.join(&name).display().to_string();
            specs.push(spec(role, &name, "--listen", &[("--data", &data)], &extra.nodes));
        }
        for (number, http) in (1..).zip(self.gateway_addresses()) {
            let (role, name) = (ProcessRole::Gateway, format!("gateway-{number}"));
            let mut spec = spec(role, &name, "--grpc", &[("--http", &http)], &extra.gateways);
            spec.addresses.insert("http".to_owned(), http);
            specs.push(spec);
        }
        specs
    }
}

const NO_PORT: &str = "no free port from 20000 to 31999";

/// The ports to try, each once. Clusters that are created at the same time begin their search at
/// different ports.
fn candidate_ports() -> impl Iterator<Item = u16> {
    let span = u32::from(PORTS.end - PORTS.start);
    let start = std::process::id().wrapping_mul(97) % span;
    (0..span).map(move |step| PORTS.start + ((start + step) % span) as u16)
}

fn node_name(number: u32) -> String {
    format!("node-{number}")
}

fn spec(
    role: ProcessRole,
    name: &str,
    program: &str,
    extra: &[String],
    flags: &[(&str, &str)],
    addresses: &[(&str, &str)],
) -> ProcessSpec {
    let mut argv = vec![program.to_owned()];
    if role != ProcessRole::Etcd {
        argv.push(role.name().to_owned());
    }
    argv.extend(flags.iter().flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]));
    argv.extend_from_slice(extra);
    let pair = |&(kind, address): &(&str, &str)| (kind.to_owned(), address.to_owned());
    ProcessSpec {
        role,
        name: name.to_owned(),
        argv,
        addresses: addresses.iter().map(pair).collect(),
    }
}

/// The flags after `--`, by role.
#[derive(Debug, Default, Eq, PartialEq)]
struct ExtraFlags {
    coordinators: Vec<String>,
    nodes: Vec<String>,
    gateways: Vec<String>,
}

impl ExtraFlags {
    /// Assigns each flag to the roles that have it. Unknown flags go to the storage nodes, which
    /// report them.
    fn share_out(words: &[String]) -> Self {
        let mut extra = Self::default();
        let mut flag = "";
        for word in words {
            // A word that is no flag is the value of the flag before it.
            if let Some(text) = word.strip_prefix("--") {
                flag = text.split('=').next().unwrap_or_default();
            }
            let Self { coordinators, nodes, gateways } = &mut extra;
            let heaps = match flag {
                "rebuild-delay" | "stalled-after" | "idempotency-window" | "idempotency-bytes" => {
                    vec![coordinators]
                }
                "workers" | "linger-us" => vec![gateways],
                "lease-ttl" => vec![coordinators, nodes, gateways],
                _ => vec![nodes],
            };
            heaps.into_iter().for_each(|heap| heap.push(word.clone()));
        }
        extra
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn made(options: &DevOptions) -> DevSettings {
        DevSettings::new(options, None).unwrap()
    }

    #[test]
    fn defaults_follow_the_number_of_nodes() {
        #[track_caller]
        fn check(nodes: Option<u32>, want: (u32, u32, u32)) {
            let got = made(&DevOptions { nodes, ..DevOptions::default() });
            assert_eq!((got.nodes, got.replicas, got.min_in_sync), want);
        }
        check(None, (3, 3, 2));
        check(Some(1), (1, 1, 1));
        check(Some(2), (2, 2, 2));
        check(Some(5), (5, 3, 2));
    }

    #[test]
    fn fixed_settings_stay() {
        let kept = made(&DevOptions { nodes: Some(1), shards: Some(8), ..DevOptions::default() });
        #[track_caller]
        fn check(options: DevOptions, kept: &DevSettings, want: Result<(u32, u32), &str>) {
            let got = DevSettings::new(&options, Some(kept));
            let got = got.map(|got| (got.nodes, got.shards));
            match (got, want) {
                (Err(got), Err(want)) => assert!(got.contains(want), "{got}"),
                (got, want) => assert_eq!(got, want.map_err(str::to_owned)),
            }
        }
        check(DevOptions::default(), &kept, Ok((1, 8)));
        check(DevOptions { shards: Some(8), ..DevOptions::default() }, &kept, Ok((1, 8)));
        check(DevOptions { nodes: Some(2), ..DevOptions::default() }, &kept, Ok((2, 8)));
        check(DevOptions { shards: Some(9), ..DevOptions::default() }, &kept, Err("--shards 9"));
        check(DevOptions { nodes: Some(0), ..DevOptions::default() }, &kept, Err("--nodes 0"));
        check(
            DevOptions { replicas: Some(2), ..DevOptions::default() },
            &kept,
            Err("--replicas 2"),
        );
    }

    #[test]
    fn impossible_settings_are_rejected() {
        let options = DevOptions { nodes: Some(2), replicas: Some(3), ..DevOptions::default() };
        assert!(DevSettings::new(&options, None).unwrap_err().contains("--replicas 3"));
        let options = DevOptions { min_in_sync: Some(4), ..DevOptions::default() };
        assert!(DevSettings::new(&options, None).unwrap_err().contains("--min-in-sync 4"));
    }

    #[test]
    fn ports_stay_unless_taken() {
        let options = DevOptions { http: "127.0.0.1:0".parse().ok(), ..DevOptions::default() };
        let mut first = made(&options);
        first.choose_ports_that_bind(true, free_but(None)).unwrap();
        let mut distinct: Vec<_> = first.ports.values().collect();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), first.ports.len());
        // 2 each of etcd, a coordinator and three nodes, and 3 of a gateway.
        assert_eq!(distinct.len(), 13);
        assert_eq!(first.http.port(), first.ports["gateway-1/http"]);

        let mut second = DevSettings::new(&DevOptions::default(), Some(&first)).unwrap();
        let taken = first.ports["node-2/grpc"];
        second.choose_ports_that_bind(true, free_but(Some(taken))).unwrap();
        let moved =
            |(name, port): (&String, &u16)| (first.ports[name] != *port).then(|| name.clone());
        assert_eq!(second.ports.iter().filter_map(moved).collect::<Vec<_>>(), ["node-2/grpc"]);

        let mut third = DevSettings::new(&DevOptions::default(), Some(&first)).unwrap();
        let refused = third.choose_ports_that_bind(true, free_but(Some(first.http.port())));
        assert!(refused.unwrap_err().contains("--http"));
    }

    #[test]
    fn a_removed_node_leaves_its_number_and_the_others_their_ports() {
        let mut settings = made(&DevOptions::default());
        settings.choose_ports_that_bind(true, free_but(None)).unwrap();
        let before = settings.ports.clone();
        let names = |settings: &DevSettings| settings.node_names().collect::<Vec<_>>();
        assert_eq!(settings.add_nodes_that_bind(2, free_but(None)).unwrap(), ["node-4", "node-5"]);
        assert!(before.iter().all(|(name, port)| settings.ports[name] == *port));
        let mut distinct: Vec<_> = settings.ports.values().collect();
        distinct.sort();
        distinct.dedup();
        assert_eq!((distinct.len(), settings.ports.len()), (before.len() + 4, before.len() + 4));

        assert!(settings.remove_node("node-4") && !settings.remove_node("node-4"));
        assert_eq!(names(&settings), ["node-1", "node-2", "node-3", "node-5"]);
        assert!(!settings.ports.keys().any(|name| name.starts_with("node-4/")));
        assert_eq!(settings.add_nodes_that_bind(1, free_but(None)).unwrap(), ["node-6"]);
        // The same cluster is started again, also with a number of nodes.
        let resumed = DevSettings::new(&DevOptions::default(), Some(&settings)).unwrap();
        assert_eq!(resumed, settings);
        let more = DevOptions { nodes: Some(6), ..DevOptions::default() };
        let more = DevSettings::new(&more, Some(&settings)).unwrap();
        assert_eq!(names(&more)[4..], ["node-6", "node-7"]);
        assert!(settings.add_nodes_that_bind(96, free_but(None)).is_err());
    }

    /// A machine on which each port can be bound once, and `taken` never. The real machine runs
    /// other processes.
    fn free_but(taken: Option<u16>) -> impl FnMut(SocketAddr) -> io::Result<()> {
        let mut bound: BTreeSet<u16> = taken.into_iter().collect();
        move |address| match bound.insert(address.port()) {
            true => Ok(()),
            false => Err(io::ErrorKind::AddrInUse.into()),
        }
    }

    #[test]
    fn flags_after_the_dashes_go_where_they_fit() {
        #[track_caller]
        fn check(words: &str, coordinators: &str, nodes: &str, gateways: &str) {
            let split = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            let want = ExtraFlags {
                coordinators: split(coordinators),
                nodes: split(nodes),
                gateways: split(gateways),
            };
            assert_eq!(ExtraFlags::share_out(&split(words)), want);
        }
        check("", "", "", "");
        check(
            "--segment-bytes 9 --rebuild-delay 5 --flush-after-ms=7",
            "--rebuild-delay 5",
            "--segment-bytes 9 --flush-after-ms=7",
            "",
        );
        check(
            "--rebuild-delay=5 --log-keep-bytes 1",
            "--rebuild-delay=5",
            "--log-keep-bytes 1",
            "",
        );
        check("--idempotency-window 60", "--idempotency-window 60", "", "");
        check("--idempotency-bytes 9", "--idempotency-bytes 9", "", "");
        check("--linger-us 200 --segment-bytes 9", "", "--segment-bytes 9", "--linger-us 200");
        check(
            "--workers 2 --lease-ttl 3",
            "--lease-ttl 3",
            "--lease-ttl 3",
            "--workers 2 --lease-ttl 3",
        );
    }
}
