//! The network between the processes: a namespace each, a bridge, and what is cut or lossy of it.
//!
//! ```text
//!   node-1 [eth0 10.77.0.21] ──veth──┐
//!   etcd-2 [eth0 10.77.0.12] ──veth──┤ bridge 10.77.0.1: this program, and so its clients
//!   gateway-1 …              ──veth──┘
//! ```
//!
//! A rule is one-way and stands where the packets arrive: the receiver drops what comes from the
//! sender. Several faults may cut the same way; it is open again when the last one is healed. So
//! rules are kept with the fault that made them, and the filter of a namespace is always written
//! anew from all of them.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::sandbox::{Sandbox, feed, run};

/// Private, and never routed: no namespace has a way out.
const BRIDGE: &str = "10.77.0.1/24";

/// What befalls packets of one way.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Way {
    Cut,
    /// So many of a hundred packets are lost.
    Lossy(u32),
}

/// Whose rule it is: a number that each fault gets once.
pub type Owner = u64;

#[derive(Clone, Debug)]
struct Rule {
    owner: Owner,
    from: Ipv4Addr,
    to: String,
    way: Way,
}

#[derive(Debug)]
pub struct Network {
    sandbox: Sandbox,
    rules: Vec<Rule>,
    owners: Owner,
}

impl Network {
    /// `members`: name and address of each.
    pub fn new(sandbox: Sandbox, members: &[(String, Ipv4Addr)]) -> Result<Self, String> {
        if sandbox.namespaces {
            run("ip", &["link", "add", "hub", "type", "bridge"])?;
            run("ip", &["addr", "add", BRIDGE, "dev", "hub"])?;
            run("ip", &["link", "set", "hub", "up"])?;
            for (number, (name, address)) in members.iter().enumerate() {
                let link = format!("v{number}");
                run("ip", &["netns", "add", name])?;
                let veth =
                    ["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", name];
                run("ip", &veth)?;
                run("ip", &["link", "set", &link, "master", "hub", "up"])?;
                run("ip", &["-n", name, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
                run("ip", &["-n", name, "link", "set", "eth0", "up"])?;
                run("ip", &["-n", name, "link", "set", "lo", "up"])?;
            }
        }
        Ok(Self { sandbox, rules: Vec::new(), owners: 0 })
    }

    pub fn sandbox(&self) -> Sandbox {
        self.sandbox
    }

    pub fn owner(&mut self) -> Owner {
        self.owners += 1;
        self.owners
    }

    /// Each pair is (sender's address, receiver's name).
    pub fn add(
        &mut self,
        owner: Owner,
        ways: impl IntoIterator<Item = (Ipv4Addr, String)>,
        way: Way,
    ) -> Result<(), String> {
        let mut touched = BTreeSet::new();
        for (from, to) in ways {
            touched.insert(to.clone());
            self.rules.push(Rule { owner, from, to, way });
        }
        self.write(touched)
    }

    /// Takes back what this fault has done.
    pub fn remove(&mut self, owner: Owner) -> Result<(), String> {
        let of = |rule: &&Rule| rule.owner == owner;
        let touched = self.rules.iter().filter(of).map(|rule| rule.to.clone()).collect();
        self.rules.retain(|rule| rule.owner != owner);
        self.write(touched)
    }

    fn write(&self, namespaces: BTreeSet<String>) -> Result<(), String> {
        for name in namespaces {
            let here = self.rules.iter().filter(|rule| rule.to == name);
            let rules: Vec<_> = here.map(|rule| (rule.from, rule.way)).collect();
            filter(&name, &rules)?;
        }
        Ok(())
    }

    /// Delays what a member sends, by netem or, without it, by a slow link.
    pub fn slow(&self, name: &str, millis: u64) -> Result<(), String> {
        let (delay, jitter) = (format!("{millis}ms"), format!("{}ms", millis / 2));
        let shape: &[&str] = if self.sandbox.netem {
            &["netem", "delay", &delay, &jitter]
        } else {
            &["tbf", "rate", "1mbit", "burst", "4kb", "latency", "500ms"]
        };
        run("tc", &[&["-n", name, "qdisc", "replace", "dev", "eth0", "root"], shape].concat())
    }

    pub fn fast_again(&self, name: &str) -> Result<(), String> {
        run("tc", &["-n", name, "qdisc", "del", "dev", "eth0", "root"])
    }
}

/// Writes all rules of a namespace, in one transaction.
pub(super) fn filter(namespace: &str, rules: &[(Ipv4Addr, Way)]) -> Result<(), String> {
    let mut text = "table ip chaos {}\ndelete table ip chaos\ntable ip chaos {\nchain in {\n\
                    type filter hook input priority 0;\n"
        .to_owned();
    for (from, way) in rules {
        match way {
            Way::Cut => text.push_str(&format!("ip saddr {from} drop\n")),
            Way::Lossy(percent) => {
                text.push_str(&format!("ip saddr {from} numgen random mod 100 < {percent} drop\n"))
            }
        }
    }
    text.push_str("}\n}\n");
    feed("ip", &["netns", "exec", namespace, "nft", "-f", "-"], &text)
}
