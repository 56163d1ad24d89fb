//! What a local cluster consists of: its settings, ports and command lines.
//!
//! Settings and ports are chosen once and kept in `DIR/dev.json`, so that a resumed cluster is the
//! same one and the argv in an old `cluster.json` still works. A setting that was fixed when the
//! cluster was made can't be changed by a flag later; saying so here beats a coordinator's refusal
//! in a log file.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::cluster_file::{Role, Spec};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Below Linux's range for outgoing connections (32768 up): a port there could be taken by any
/// client while its process is down for a moment.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
const CLUSTER: &str = "dkc";

/// What the user asked for; what is absent is remembered or has a default.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    pub(crate) nodes: Option<u32>,
    pub(crate) gateways: Option<u32>,
    pub(crate) coordinators: Option<u32>,
    pub(crate) replicas: Option<u32>,
    pub(crate) min_in_sync: Option<u32>,
    pub(crate) shards: Option<u32>,
    pub(crate) http: Option<SocketAddr>,
}

/// `DIR/dev.json`
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Settings {
    pub(crate) nodes: u32,
    pub(crate) gateways: u32,
    pub(crate) coordinators: u32,
    pub(crate) replicas: u32,
    pub(crate) min_in_sync: u32,
    pub(crate) shards: u32,
    pub(crate) http: SocketAddr,
    /// By process name and what it listens for, `node-1/grpc`.
    #[serde(default)]
    pub(crate) ports: BTreeMap<String, u16>,
}

impl Settings {
    /// From what is asked for now and what the folder remembers. The error names what disagrees.
    pub(crate) fn new(wish: &Wish, kept: Option<&Self>) -> Result<Self, String> {
        let fixed =
            |name: &str, wish: Option<u32>, kept: Option<u32>, default: u32| match (wish, kept) {
                (Some(wish), Some(kept)) if wish != kept => Err(format!(
                    "--{name} {wish}: this cluster was made with {kept}, and that can't be changed"
                )),
                _ => Ok(wish.or(kept).unwrap_or(default)),
            };
        let nodes = wish.nodes.or(kept.map(|kept| kept.nodes)).unwrap_or(3);
        let replicas = kept.map(|kept| kept.replicas);
        let replicas = fixed("replicas", wish.replicas, replicas, nodes.min(3))?;
        let min_in_sync = kept.map(|kept| kept.min_in_sync);
        let min_in_sync = fixed("min-in-sync", wish.min_in_sync, min_in_sync, replicas.min(2))?;
        let shards = fixed("shards", wish.shards, kept.map(|kept| kept.shards), 24)?;
        let gateways = wish.gateways.or(kept.map(|kept| kept.gateways)).unwrap_or(1);
        let coordinators = wish.coordinators.or(kept.map(|kept| kept.coordinators)).unwrap_or(1);
        if let Some(kept) = kept.filter(|kept| nodes < kept.nodes) {
            let had = kept.nodes;
            return Err(format!(
                "--nodes {nodes}: this cluster has {had}, whose data would be missing"
            ));
        }
        if replicas > nodes {
            return Err(format!("--replicas {replicas} needs as many nodes; there are {nodes}"));
        }
        if min_in_sync > replicas {
            return Err(format!("--min-in-sync {min_in_sync} is more than --replicas {replicas}"));
        }
        let http = wish.http.or(kept.map(|kept| kept.http));
        let http = http.unwrap_or_else(|| SocketAddr::new(LOCALHOST, 8080));
        let ports = kept.map(|kept| kept.ports.clone()).unwrap_or_default();
        Ok(Self { nodes, gateways, coordinators, replicas, min_in_sync, shards, http, ports })
    }

    /// Gives every listener a port: the remembered one, unless another process has it.
    pub(crate) fn choose_ports(&mut self, private_etcd: bool) -> Result<(), String> {
        self.choose_ports_that_bind(private_etcd, TcpListener::bind)
    }

    /// As [`Self::choose_ports`], of the ports that `bind` opens.
    fn choose_ports_that_bind<L>(
        &mut self,
        private_etcd: bool,
        mut bind: impl FnMut(SocketAddr) -> io::Result<L>,
    ) -> Result<(), String> {
        // Every listener is held until all are chosen, so that no port is given out twice.
        let mut held = Vec::new();
        if self.http.port() != 0 {
            let listener = bind(self.http).map_err(|error| {
                format!("can't listen on {} ({error}): name another with --http", self.http)
            })?;
            held.push(listener);
        }
        let names = self.listeners(private_etcd);
        let host = |name: &str| if name.ends_with("/http") { self.http.ip() } else { LOCALHOST };
        let mut bind = |name: &str, port: u16| bind(SocketAddr::new(host(name), port));
        // First those that are remembered: a newcomer must not push them aside.
        let mut ports = BTreeMap::new();
        for (name, &port) in self.ports.iter().filter(|(name, _)| names.contains(name)) {
            if let Ok(listener) = bind(name, port) {
                held.push(listener);
                ports.insert(name.clone(), port);
            }
        }
        let span = u32::from(PORTS.end - PORTS.start);
        // Clusters made side by side begin their search at different places.
        let start = std::process::id().wrapping_mul(97) % span;
        let mut candidates = (0..span).map(|step| PORTS.start + ((start + step) % span) as u16);
        for name in names {
            if ports.contains_key(&name) {
                continue;
            }
            let free = |port| bind(&name, port).ok().map(|listener| (port, listener));
            let found = candidates.by_ref().find_map(free);
            let (port, listener) = found.ok_or("no free port from 20000 to 31999")?;
            held.push(listener);
            ports.insert(name, port);
        }
        self.ports = ports;
        if self.http.port() == 0 {
            self.http.set_port(self.ports["gateway-1/http"]);
        }
        Ok(())
    }

    /// Everything that needs a port chosen for it.
    fn listeners(&self, private_etcd: bool) -> Vec<String> {
        let mut names = Vec::new();
        if private_etcd {
            names.extend(["etcd/grpc".to_owned(), "etcd/peer".to_owned()]);
        }
        let mut add = |role: &str, numbers: std::ops::RangeInclusive<u32>, kind: &str| {
            names.extend(numbers.map(|number| format!("{role}-{number}/{kind}")));
        };
        for kind in ["grpc", "metrics"] {
            add("coordinator", 1..=self.coordinators, kind);
            add("node", 1..=self.nodes, kind);
        }
        // The first gateway's address is the user's to choose.
        let first = if self.http.port() == 0 { 1 } else { 2 };
        add("gateway", first..=self.gateways, "http");
        for kind in ["grpc", "metrics"] {
            add("gateway", 1..=self.gateways, kind);
        }
        names
    }

    fn address(&self, process: &str, kind: &str) -> String {
        let host = if kind == "http" { self.http.ip() } else { LOCALHOST };
        SocketAddr::new(host, self.ports[&format!("{process}/{kind}")]).to_string()
    }

    /// Where the gateways listen, the first one first.
    pub(crate) fn gateway_addresses(&self) -> Vec<String> {
        let others =
            (2..=self.gateways).map(|number| self.address(&format!("gateway-{number}"), "http"));
        std::iter::once(self.http.to_string()).chain(others).collect()
    }

    /// The private etcd.
    pub(crate) fn etcd(&self, program: &str, folder: &Path) -> Spec {
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
        spec(Role::Etcd, "etcd", program, &[], &flags, &[("grpc", &client), ("http", &client)])
    }

    /// Every process but etcd, in the order to start them. `extra` is what stood after `--`.
    pub(crate) fn roles(
        &self,
        program: &str,
        folder: &Path,
        etcd: &str,
        extra: &[String],
    ) -> Vec<Spec> {
        let extra = Extra::share_out(extra);
        let mut specs = Vec::new();
        for number in 1..=self.coordinators {
            let name = format!("coordinator-{number}");
            let (grpc, metrics) = (self.address(&name, "grpc"), self.address(&name, "metrics"));
            let flags = [
                ("--name", name.as_str()),
                ("--etcd", etcd),
                ("--cluster", CLUSTER),
                ("--listen", &grpc),
                ("--metrics", &metrics),
                ("--shards", &self.shards.to_string()),
                ("--replicas", &self.replicas.to_string()),
                ("--min-in-sync", &self.min_in_sync.to_string()),
                ("--expect-nodes", &self.nodes.to_string()),
            ];
            let addresses = [("grpc", grpc.as_str()), ("metrics", &metrics)];
            let role = Role::Coordinator;
            specs.push(spec(role, &name, program, &extra.coordinators, &flags, &addresses));
        }
        for number in 1..=self.nodes {
            let name = format!("node-{number}");
            let (grpc, metrics) = (self.address(&name, "grpc"), self.address(&name, "metrics"));
            let data = folder.join(&name).display().to_string();
            let flags = [
                ("--name", name.as_str()),
                ("--data", &data),
                ("--etcd", etcd),
                ("--cluster", CLUSTER),
                ("--listen", &grpc),
                ("--metrics", &metrics),
            ];
            let addresses = [("grpc", grpc.as_str()), ("metrics", &metrics)];
            specs.push(spec(Role::StorageNode, &name, program, &extra.nodes, &flags, &addresses));
        }
        for (number, http) in (1..).zip(self.gateway_addresses()) {
            let name = format!("gateway-{number}");
            let (grpc, metrics) = (self.address(&name, "grpc"), self.address(&name, "metrics"));
            let flags = [
                ("--name", name.as_str()),
                ("--http", &http),
                ("--etcd", etcd),
                ("--cluster", CLUSTER),
                ("--grpc", &grpc),
                ("--metrics", &metrics),
            ];
            let addresses = [("http", http.as_str()), ("grpc", &grpc), ("metrics", &metrics)];
            specs.push(spec(Role::Gateway, &name, program, &extra.gateways, &flags, &addresses));
        }
        specs
    }
}

fn spec(
    role: Role,
    name: &str,
    program: &str,
    extra: &[String],
    flags: &[(&str, &str)],
    addresses: &[(&str, &str)],
) -> Spec {
    let mut argv = vec![program.to_owned()];
    if role != Role::Etcd {
        argv.push(role.name().to_owned());
    }
    argv.extend(flags.iter().flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]));
    argv.extend_from_slice(extra);
    let pair = |&(kind, address): &(&str, &str)| (kind.to_owned(), address.to_owned());
    Spec { role, name: name.to_owned(), argv, addresses: addresses.iter().map(pair).collect() }
}

/// Flags after `--`, for each role.
#[derive(Debug, Default, Eq, PartialEq)]
struct Extra {
    coordinators: Vec<String>,
    nodes: Vec<String>,
    gateways: Vec<String>,
}

impl Extra {
    /// Most flags are the storage nodes'; they refuse what they don't know either.
    fn share_out(words: &[String]) -> Self {
        let mut extra = Self::default();
        let mut flag = "";
        for word in words {
            // A word that is no flag is the value of the flag before it.
            if let Some(text) = word.strip_prefix("--") {
                flag = text.split('=').next().unwrap_or_default();
            }
            let (coordinators, nodes, gateways) = match flag {
                "rebuild-delay" | "idempotency-window" | "idempotency-bytes" => {
                    (true, false, false)
                }
                "workers" | "linger-us" => (false, false, true),
                "lease-ttl" => (true, true, true),
                _ => (false, true, false),
            };
            let those = [
                (coordinators, &mut extra.coordinators),
                (nodes, &mut extra.nodes),
                (gateways, &mut extra.gateways),
            ];
            for (_, heap) in those.into_iter().filter(|(wanted, _)| *wanted) {
                heap.push(word.clone());
            }
        }
        extra
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn made(wish: &Wish) -> Settings {
        Settings::new(wish, None).unwrap()
    }

    #[test]
    fn defaults_follow_the_number_of_nodes() {
        #[track_caller]
        fn check(nodes: Option<u32>, want: (u32, u32, u32)) {
            let got = made(&Wish { nodes, ..Wish::default() });
            assert_eq!((got.nodes, got.replicas, got.min_in_sync), want);
        }
        check(None, (3, 3, 2));
        check(Some(1), (1, 1, 1));
        check(Some(2), (2, 2, 2));
        check(Some(5), (5, 3, 2));
    }

    #[test]
    fn what_was_made_stays() {
        let kept = made(&Wish { nodes: Some(1), shards: Some(8), ..Wish::default() });
        #[track_caller]
        fn check(wish: Wish, kept: &Settings, want: Result<(u32, u32), &str>) {
            let got = Settings::new(&wish, Some(kept));
            let got = got.map(|got| (got.nodes, got.shards));
            match (got, want) {
                (Err(got), Err(want)) => assert!(got.contains(want), "{got}"),
                (got, want) => assert_eq!(got, want.map_err(str::to_owned)),
            }
        }
        check(Wish::default(), &kept, Ok((1, 8)));
        check(Wish { shards: Some(8), ..Wish::default() }, &kept, Ok((1, 8)));
        check(Wish { nodes: Some(2), ..Wish::default() }, &kept, Ok((2, 8)));
        check(Wish { shards: Some(9), ..Wish::default() }, &kept, Err("--shards 9"));
        check(Wish { nodes: Some(0), ..Wish::default() }, &kept, Err("--nodes 0"));
        check(Wish { replicas: Some(2), ..Wish::default() }, &kept, Err("--replicas 2"));
    }

    #[test]
    fn impossible_wishes_are_refused() {
        let wish = Wish { nodes: Some(2), replicas: Some(3), ..Wish::default() };
        assert!(Settings::new(&wish, None).unwrap_err().contains("--replicas 3"));
        let wish = Wish { min_in_sync: Some(4), ..Wish::default() };
        assert!(Settings::new(&wish, None).unwrap_err().contains("--min-in-sync 4"));
    }

    #[test]
    fn ports_stay_unless_taken() {
        let wish = Wish { http: "127.0.0.1:0".parse().ok(), ..Wish::default() };
        let mut first = made(&wish);
        first.choose_ports_that_bind(true, free_but(None)).unwrap();
        let mut distinct: Vec<_> = first.ports.values().collect();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), first.ports.len());
        // 2 each of etcd, a coordinator and three nodes, and 3 of a gateway.
        assert_eq!(distinct.len(), 13);
        assert_eq!(first.http.port(), first.ports["gateway-1/http"]);

        let mut second = Settings::new(&Wish::default(), Some(&first)).unwrap();
        let taken = first.ports["node-2/grpc"];
        second.choose_ports_that_bind(true, free_but(Some(taken))).unwrap();
        let moved =
            |(name, port): (&String, &u16)| (first.ports[name] != *port).then(|| name.clone());
        assert_eq!(second.ports.iter().filter_map(moved).collect::<Vec<_>>(), ["node-2/grpc"]);

        let mut third = Settings::new(&Wish::default(), Some(&first)).unwrap();
        let refused = third.choose_ports_that_bind(true, free_but(Some(first.http.port())));
        assert!(refused.unwrap_err().contains("--http"));
    }

    /// A machine on which each port can be bound once, and `taken` never. The real one has other processes on it.
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
            let want = Extra {
                coordinators: split(coordinators),
                nodes: split(nodes),
                gateways: split(gateways),
            };
            assert_eq!(Extra::share_out(&split(words)), want);
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
