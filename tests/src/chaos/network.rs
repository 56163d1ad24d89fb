//! The network between the processes: one namespace each, a bridge, and rules that drop packets.
//!
//! ```text
//!   node-1 [eth0 10.77.0.31] ──veth──┐
//!   etcd-2 [eth0 10.77.0.12] ──veth──┤ bridge 10.77.0.1: this program, with its clients
//!   gateway-1 …              ──veth──┘
//! ```
//!
//! A rule has one direction and is installed at the receiver, which drops the packets of the
//! sender. Several faults may cut the same direction, which is open again when the last of them is
//! healed. Therefore each rule is stored with the fault that made it, and the filter of a namespace
//! is always rewritten from all rules.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::sandbox::{Sandbox, filter, run};

/// A private address that is never routed: no namespace has a route to the outside.
const BRIDGE: &str = "10.77.0.1/24";

/// The effect of a rule on the packets of one direction.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum RuleEffect {
    Cut,
    /// The percentage of packets that are lost.
    Lossy(u32),
}

/// The owner of a rule: a number that each fault gets once.
pub type RuleOwner = u64;

#[derive(Clone, Debug)]
struct Rule {
    owner: RuleOwner,
    from: Ipv4Addr,
    to: String,
    effect: RuleEffect,
}

impl Rule {
    /// The rule as `nft` reads it.
    fn text(&self) -> String {
        let from = self.from;
        match self.effect {
            RuleEffect::Cut => format!("ip saddr {from} drop"),
            RuleEffect::Lossy(percent) => {
                format!("ip saddr {from} numgen random mod 100 < {percent} drop")
            }
        }
    }
}

#[derive(Debug)]
pub struct BridgedNetwork {
    sandbox: Sandbox,
    rules: Vec<Rule>,
    owners: RuleOwner,
}

impl BridgedNetwork {
    /// Creates the bridge and a namespace for each member, given by name and address.
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

    pub fn owner(&mut self) -> RuleOwner {
        self.owners += 1;
        self.owners
    }

    /// Adds a rule for each route, which is a pair (address of the sender, name of the receiver).
    pub fn add(
        &mut self,
        owner: RuleOwner,
        routes: impl IntoIterator<Item = (Ipv4Addr, String)>,
        effect: RuleEffect,
    ) -> Result<(), String> {
        let mut touched = BTreeSet::new();
        for (from, to) in routes {
            touched.insert(to.clone());
            self.rules.push(Rule { owner, from, to, effect });
        }
        self.write(touched)
    }

    /// Removes all rules of this fault.
    pub fn remove(&mut self, owner: RuleOwner) -> Result<(), String> {
        let of = |rule: &&Rule| rule.owner == owner;
        let touched = self.rules.iter().filter(of).map(|rule| rule.to.clone()).collect();
        self.rules.retain(|rule| rule.owner != owner);
        self.write(touched)
    }

    fn write(&self, namespaces: BTreeSet<String>) -> Result<(), String> {
        for name in namespaces {
            let here = self.rules.iter().filter(|rule| rule.to == name);
            let rules: Vec<_> = here.map(Rule::text).collect();
            filter(&name, &rules)?;
        }
        Ok(())
    }

    /// Delays the packets that a member sends: by netem or, without it, by a low bandwidth.
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
