//! Network partitions: packets between two processes are dropped, in one direction or both.
//!
//! No connection is refused or reset: a process that waits for an answer must detect the cut by a
//! time-out.

use std::time::{Duration, Instant};

use super::{Environment, Fault};
use crate::chaos::fleet::Role;
use crate::chaos::network::{RuleEffect, RuleOwner};

/// The directions that are cut: each pair is (sender, receiver).
type DirectedPairs = Vec<(String, String)>;

pub struct NetworkPartition {
    draw: fn(&mut Environment) -> (DirectedPairs, String),
    owner: RuleOwner,
}

impl NetworkPartition {
    const fn new(draw: fn(&mut Environment) -> (DirectedPairs, String)) -> Self {
        Self { draw, owner: 0 }
    }

    /// Separates a pair of nodes, or one node from all others. etcd and gateways still reach it.
    pub const fn nodes() -> Self {
        Self::new(|env| {
            let mut nodes = env.some(Role::Node, 5);
            let Some(one) = nodes.pop() else { return Default::default() };
            let count = if env.rng.percent(50) { 1 } else { nodes.len() };
            let others = &nodes[..count];
            (both(&one, others), format!("{one} | {}", others.join(", ")))
        })
    }

    /// Drops the packets from one node to some others, but not those in the other direction.
    pub const fn one_way() -> Self {
        Self::new(|env| {
            let mut nodes = env.some(Role::Node, 5);
            let Some(one) = nodes.pop() else { return Default::default() };
            let count = env.rng.between(1, nodes.len() as u64) as usize;
            let others = &nodes[..count];
            let routes = others.iter().map(|other| (one.clone(), other.clone())).collect();
            (routes, format!("{one} -/-> {}", others.join(", ")))
        })
    }

    /// Separates two or three nodes, a gateway, a coordinator and an etcd member from the rest.
    pub const fn halves() -> Self {
        Self::new(|env| {
            let count = env.rng.between(2, 3) as usize;
            let mut here = env.some(Role::Node, count);
            here.extend(env.some(Role::Gateway, 1));
            here.extend(env.some(Role::Coordinator, 1));
            here.extend(env.some(Role::Etcd, 1));
            let all = env.fleet.members.iter().map(|one| one.name.clone());
            let there: Vec<_> = all.filter(|name| !here.contains(name)).collect();
            let routes = here.iter().flat_map(|one| both(one, &there)).collect();
            (routes, format!("{} | the rest", here.join(", ")))
        })
    }

    /// Separates one or more nodes, up to all, from etcd.
    pub const fn from_etcd() -> Self {
        Self::new(|env| {
            let count = env.rng.between(1, 5) as usize;
            let nodes = env.some(Role::Node, count);
            let etcd = env.fleet.names(Role::Etcd);
            let routes = nodes.iter().flat_map(|one| both(one, &etcd)).collect();
            (routes, format!("{} | etcd", nodes.join(", ")))
        })
    }

    /// Separates a gateway from some nodes, or from etcd.
    pub const fn gateway() -> Self {
        Self::new(|env| {
            let one = env.any(&[Role::Gateway]);
            let others = if env.rng.percent(30) {
                env.fleet.names(Role::Etcd)
            } else {
                let count = env.rng.between(1, 5) as usize;
                env.some(Role::Node, count)
            };
            (both(&one, &others), format!("{one} | {}", others.join(", ")))
        })
    }

    /// Separates a coordinator from all nodes, or from all other processes.
    pub const fn coordinator() -> Self {
        Self::new(|env| {
            let one = env.any(&[Role::Coordinator]);
            let mut others = env.fleet.names(Role::Node);
            if env.rng.percent(50) {
                others.extend(env.fleet.names(Role::Etcd));
                others.extend(env.fleet.names(Role::Gateway));
            }
            (both(&one, &others), format!("{one} | {}", others.join(", ")))
        })
    }
}

impl Fault for NetworkPartition {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let (routes, what) = (self.draw)(env);
        self.owner = env.network.owner();
        cut(env, self.owner, routes)?;
        Ok(what)
    }

    fn heal(&mut self, env: &mut Environment) {
        heal(env, self.owner);
    }
}

/// The network between some nodes is cut and healed several times a second: no connection lasts,
/// and no peer looks dead for long.
#[derive(Default)]
pub struct Flap {
    routes: DirectedPairs,
    owner: RuleOwner,
    is_cut: bool,
    next: Option<Instant>,
}

impl Fault for Flap {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let mut nodes = env.some(Role::Node, 3);
        let Some(one) = nodes.pop() else { return Err("no nodes".to_owned()) };
        self.routes = both(&one, &nodes);
        self.owner = env.network.owner();
        self.next = Some(Instant::now());
        Ok(format!("{one} | {}, on and off", nodes.join(", ")))
    }

    fn tick(&mut self, env: &mut Environment) {
        if self.next.is_none_or(|next| next > Instant::now()) {
            return;
        }
        self.is_cut = !self.is_cut;
        if self.is_cut {
            if let Err(why) = cut(env, self.owner, self.routes.clone()) {
                crate::note(&why);
            }
        } else {
            heal(env, self.owner);
        }
        self.next = Some(Instant::now() + Duration::from_millis(env.rng.between(100, 900)));
    }

    fn heal(&mut self, env: &mut Environment) {
        heal(env, self.owner);
    }
}

fn both(one: &str, others: &[String]) -> DirectedPairs {
    let there = others.iter().map(|other| (one.to_owned(), other.clone()));
    let back = others.iter().map(|other| (other.clone(), one.to_owned()));
    there.chain(back).collect()
}

fn cut(env: &mut Environment, owner: RuleOwner, routes: DirectedPairs) -> Result<(), String> {
    let addressed = |(from, to): (String, String)| (env.fleet.member(&from).address, to);
    let routes: Vec<_> = routes.into_iter().map(addressed).collect();
    env.network.add(owner, routes, RuleEffect::Cut)
}

fn heal(env: &mut Environment, owner: RuleOwner) {
    if let Err(why) = env.network.remove(owner) {
        env.broken.push(format!("a cut network could not be healed: {why}"));
    }
}
