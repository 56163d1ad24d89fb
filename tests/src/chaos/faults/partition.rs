//! Cut networks: packets from one process to another are dropped, one way or both.
//!
//! Nothing is refused or reset: whoever waits for an answer has to find out by itself.

use std::time::{Duration, Instant};

use super::{Fault, Field};
use crate::chaos::fleet::Role;
use crate::chaos::network::{Owner, Way};

/// Who is cut off from whom: `from` no longer reaches `to`.
type Ways = Vec<(String, String)>;

pub struct Cut {
    draw: fn(&mut Field) -> (Ways, String),
    owner: Owner,
}

impl Cut {
    const fn new(draw: fn(&mut Field) -> (Ways, String)) -> Self {
        Self { draw, owner: 0 }
    }

    /// One pair of nodes, or one node from all others: etcd and gateways still reach it.
    pub const fn nodes() -> Self {
        Self::new(|field| {
            let mut nodes = field.some(Role::Node, 5);
            let Some(one) = nodes.pop() else { return Default::default() };
            let count = if field.rng.percent(50) { 1 } else { nodes.len() };
            let others = &nodes[..count];
            (both(&one, others), format!("{one} | {}", others.join(", ")))
        })
    }

    /// What one node sends reaches some others no more; what they send still comes.
    pub const fn one_way() -> Self {
        Self::new(|field| {
            let mut nodes = field.some(Role::Node, 5);
            let Some(one) = nodes.pop() else { return Default::default() };
            let count = field.rng.between(1, nodes.len() as u64) as usize;
            let others = &nodes[..count];
            let ways = others.iter().map(|other| (one.clone(), other.clone())).collect();
            (ways, format!("{one} -/-> {}", others.join(", ")))
        })
    }

    /// Two or three nodes, a gateway and a coordinator from the rest of the cluster and from etcd.
    pub const fn halves() -> Self {
        Self::new(|field| {
            let count = field.rng.between(2, 3) as usize;
            let mut here = field.some(Role::Node, count);
            here.extend(field.some(Role::Gateway, 1));
            here.extend(field.some(Role::Coordinator, 1));
            here.extend(field.some(Role::Etcd, 1));
            let all = field.fleet.members.iter().map(|one| one.name.clone());
            let there: Vec<_> = all.filter(|name| !here.contains(name)).collect();
            let ways = here.iter().flat_map(|one| both(one, &there)).collect();
            (ways, format!("{} | the rest", here.join(", ")))
        })
    }

    /// One to all nodes can't reach etcd.
    pub const fn from_etcd() -> Self {
        Self::new(|field| {
            let count = field.rng.between(1, 5) as usize;
            let nodes = field.some(Role::Node, count);
            let etcd = field.fleet.names(Role::Etcd);
            let ways = nodes.iter().flat_map(|one| both(one, &etcd)).collect();
            (ways, format!("{} | etcd", nodes.join(", ")))
        })
    }

    /// A gateway from some nodes, or from etcd.
    pub const fn gateway() -> Self {
        Self::new(|field| {
            let one = field.any(&[Role::Gateway]);
            let others = if field.rng.percent(30) {
                field.fleet.names(Role::Etcd)
            } else {
                let count = field.rng.between(1, 5) as usize;
                field.some(Role::Node, count)
            };
            (both(&one, &others), format!("{one} | {}", others.join(", ")))
        })
    }

    /// A coordinator from all nodes, or from everything.
    pub const fn coordinator() -> Self {
        Self::new(|field| {
            let one = field.any(&[Role::Coordinator]);
            let mut others = field.fleet.names(Role::Node);
            if field.rng.percent(50) {
                others.extend(field.fleet.names(Role::Etcd));
                others.extend(field.fleet.names(Role::Gateway));
            }
            (both(&one, &others), format!("{one} | {}", others.join(", ")))
        })
    }
}

impl Fault for Cut {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let (ways, what) = (self.draw)(field);
        self.owner = field.network.owner();
        cut(field, self.owner, ways)?;
        Ok(what)
    }

    fn heal(&mut self, field: &mut Field) {
        heal(field, self.owner);
    }
}

/// Cut and healed several times a second: no connection stays, none is plainly dead.
#[derive(Default)]
pub struct Flap {
    ways: Ways,
    owner: Owner,
    is_cut: bool,
    next: Option<Instant>,
}

impl Fault for Flap {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let mut nodes = field.some(Role::Node, 3);
        let Some(one) = nodes.pop() else { return Err("no nodes".to_owned()) };
        self.ways = both(&one, &nodes);
        self.owner = field.network.owner();
        self.next = Some(Instant::now());
        Ok(format!("{one} | {}, on and off", nodes.join(", ")))
    }

    fn tick(&mut self, field: &mut Field) {
        if self.next.is_none_or(|next| next > Instant::now()) {
            return;
        }
        self.is_cut = !self.is_cut;
        if self.is_cut {
            if let Err(why) = cut(field, self.owner, self.ways.clone()) {
                crate::note(&why);
            }
        } else {
            heal(field, self.owner);
        }
        self.next = Some(Instant::now() + Duration::from_millis(field.rng.between(100, 900)));
    }

    fn heal(&mut self, field: &mut Field) {
        heal(field, self.owner);
    }
}

fn both(one: &str, others: &[String]) -> Ways {
    let there = others.iter().map(|other| (one.to_owned(), other.clone()));
    let back = others.iter().map(|other| (other.clone(), one.to_owned()));
    there.chain(back).collect()
}

fn cut(field: &mut Field, owner: Owner, ways: Ways) -> Result<(), String> {
    let addressed = |(from, to): (String, String)| (field.fleet.member(&from).address, to);
    let ways: Vec<_> = ways.into_iter().map(addressed).collect();
    field.network.add(owner, ways, Way::Cut)
}

fn heal(field: &mut Field, owner: Owner) {
    if let Err(why) = field.network.remove(owner) {
        field.broken.push(format!("a cut network could not be healed: {why}"));
    }
}
