//! One run: all processes, the clients, the faults, and the loop that takes what happens next.

use std::collections::BTreeMap;

use engine::ids::{Boot, Epoch, ShardId, StoreBoot, StoreId, Version};
use engine::shard_record::ShardRecord;

use super::chaos::ChaosHost;
use super::checker::{self, Violation, heals};
use super::clients::{Answered, Clients};
use super::coordinators::CoordinatorHost;
use super::core::{Core, Happening, Place, Process, Told};
use super::etcd::{Key, Value, Write};
use super::faults::Faults;
use super::gateways::GatewayHost;
use super::history::Outcome;
use super::journal::Journal;
use super::nodes::{NodeHost, store_id};
use super::plan::Plan;
use super::rng::Rng;
use super::token_clients::{self, TokenClients, Told as TokenTold};

/// A healthy run takes about a thirtieth of it.
const STEPS_MAX: u64 = 10_000_000;

pub struct World {
    pub core: Core,
    pub nodes: Vec<NodeHost>,
    pub gateways: Vec<GatewayHost>,
    pub coordinators: Vec<CoordinatorHost>,
    pub chaos: ChaosHost,
    pub clients: Clients,
    pub tokens: TokenClients,
    pub faults: Faults,
    /// An older copy of a node's folder, started on another machine.
    pub twin: Option<NodeHost>,
    stage: Stage,
    /// When a healed cluster may be helped over its waits again.
    pub next_leap: u64,
    /// How far behind each learner was when that was last asked.
    pub lags: BTreeMap<(ShardId, StoreId), u64>,
    /// When disks that stay full are looked at again.
    pub next_room: u64,
    /// At so many looks in a row every shard served that could.
    pub serves_without_room: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Faulty,
    Healed,
    Reading,
}

impl World {
    pub fn new(plan: Plan, mut rng: Rng, journal: Journal) -> Self {
        let workload = rng.fork();
        let mut core = Core::new(plan, workload, journal);
        let nodes = (0..core.plan.nodes).map(|at| NodeHost::new(at, &mut core)).collect();
        let gateways = (0..core.plan.gateways).map(GatewayHost::new).collect();
        let coordinators = (0..core.plan.coordinators).map(CoordinatorHost::new).collect();
        let mut clients = Clients::new(&mut core);
        let tokens = TokenClients::new(&mut core, &mut clients.history);
        let faults = Faults::default();
        let stage = Stage::Faulty;
        let chaos = ChaosHost::default();
        let twin = None;
        let mut world = Self {
            core,
            nodes,
            gateways,
            coordinators,
            chaos,
            clients,
            tokens,
            faults,
            twin,
            stage,
            next_leap: 0,
            lags: BTreeMap::new(),
            next_room: 0,
            serves_without_room: 0,
        };
        if !world.core.plan.bootstraps {
            world.place_shards();
        }
        world.start_all();
        world.core.at(500_000, Happening::Fault);
        if !world.core.plan.disks.faults.is_empty() {
            world.core.at(500_000, Happening::DiskFault);
        }
        if world.core.plan.operator.every.is_some() {
            world.core.at(500_000, Happening::OperatorLooks);
        }
        for (at, far) in world.core.plan.leaps.all.clone() {
            world.core.at(at, Happening::Leap { far, since: at });
        }
        world
    }

    /// The first records: every store starts with boot 1.
    fn place_shards(&mut self) {
        let mut writes = Vec::new();
        for index in 0..self.core.plan.shards {
            let mut stores: Vec<_> = (0..self.core.plan.nodes).map(store_id).collect();
            self.core.rng.shuffle(&mut stores);
            stores.truncate(self.core.plan.replicas);
            let primary = StoreBoot { store: stores[0], boot: Boot(1) };
            stores.sort();
            let config = ShardRecord {
                slots: self.core.plan.slots(index),
                epoch: Epoch(1),
                version: Version(1),
                primary,
                isr: stores.clone(),
                target: stores,
                ..ShardRecord::default()
            };
            self.core.oracle.record_written(&config);
            let key = Key::Shard(config.shard());
            writes.push(Write::Put(key, Value::Shard(config), None));
        }
        self.core.etcd.write(writes);
    }

    pub fn start_all(&mut self) {
        for node in &mut self.nodes {
            node.start(&mut self.core);
        }
        for gateway in &mut self.gateways {
            gateway.start(&mut self.core);
        }
        for coordinator in &mut self.coordinators {
            coordinator.start(&mut self.core);
        }
        if self.core.plan.chaos {
            self.chaos.start(&mut self.core);
        }
    }

    /// Runs to the end. What is broken is in the returned list, at most once per promise.
    pub fn run(&mut self) -> Vec<Violation> {
        while self.core.oracle.violations.is_empty() {
            if self.is_over() {
                return checker::judge(&self.clients.history, &self.tokens, &self.core);
            }
            if self.core.now > self.core.plan.heals_by || self.core.step > STEPS_MAX {
                let mut violations =
                    checker::judge(&self.clients.history, &self.tokens, &self.core);
                violations.push(heals::violation(self.unfinished()));
                return violations;
            }
            self.advance();
            if self.step().is_none() {
                return vec![heals::violation("nothing happens any more".into())];
            }
        }
        std::mem::take(&mut self.core.oracle.violations)
    }

    /// Takes what happens next.
    pub fn step(&mut self) -> Option<()> {
        let happening = self.core.pop()?;
        self.take(happening);
        Some(())
    }

    /// From faults to healing to the final reads.
    fn advance(&mut self) {
        if self.stage == Stage::Faulty && self.core.now >= self.core.plan.faults_until {
            self.stage = Stage::Healed;
            self.heal();
            self.next_leap = self.core.now + 10_000_000;
            // By then the others are back in sync, and a full primary has been seen to be full.
            self.next_room = self.core.now + 5_000_000;
        }
        if self.stage != Stage::Faulty {
            self.make_room();
        }
        if self.stage == Stage::Reading {
            self.leap_to_heal();
        }
        let loaded = self.core.now >= self.core.plan.load_until;
        if self.stage == Stage::Healed && loaded && self.clients.is_idle() && self.tokens.is_idle()
        {
            self.stage = Stage::Reading;
            self.clients.read_all(&mut self.core);
        }
    }

    fn is_over(&self) -> bool {
        // A full disk hides nothing but that it is waited for where it need not be.
        let has_room = !self.nodes.iter().any(|node| node.disk.stays_full);
        self.stage == Stage::Reading
            && has_room
            && self.clients.is_done()
            && self.unequal().is_none()
    }

    /// Some shard whose replicas are not equal yet.
    fn unequal(&self) -> Option<String> {
        let node = |store| self.nodes.iter().find(|node| node.store == store)?.machine();
        let replicas = self.core.plan.replicas.min(self.nodes.len());
        let refusing = self.nodes.iter().find(|node| node.is_full());
        let refusing = refusing.map(|node| format!("{:?} takes no writes", node.place));
        let mut shards = self.core.etcd.shards();
        refusing
            .or_else(|| shards.find_map(|(config, _)| heals::unfinished(config, replicas, node)))
    }

    fn unfinished(&self) -> String {
        let waits = format!("{} operations and final reads are unanswered", self.clients.left());
        let full = self.nodes.iter().filter(|node| node.disk.stays_full).map(|node| node.store);
        let why = self.waits_beside_room(&full.collect()).or_else(|| self.unequal());
        why.map_or(waits.clone(), |why| format!("{why}; {waits}"))
    }

    fn take(&mut self, happening: Happening) {
        let core = &mut self.core;
        match happening {
            Happening::Tell(to, told) => self.tell(to, told),
            Happening::Query { to, from, query, message } => match self.listening(to) {
                Some(process) => self.tell(process, Told::Query { from, query, message }),
                None => {
                    let delay = self.core.delay();
                    let told = Told::QueryFailed { query, refused: true };
                    self.core.tell_after(delay, from, told);
                }
            },
            Happening::Report { to, from, report } => {
                if let Some(process) = self.listening(to) {
                    self.tell(process, Told::Report { from, report });
                }
            }
            Happening::Request { to, request } => match self.listening(to) {
                Some(process) => self.tell(process, Told::Request(request)),
                None => {
                    let answered = Answered { id: request.id, outcome: Outcome::NotApplied };
                    self.clients.answered(&mut self.core, answered);
                }
            },
            Happening::DialArrives { link } => {
                let to = core.dialled_place(link);
                let running = to.and_then(|to| Some((self.listening(to)?, self.says_it_is(to))));
                let told = match running {
                    Some((process, _)) if self.core.is_paused(process) => {
                        self.core.dial_hangs(link);
                        None
                    }
                    _ => self.core.dial_arrives(link, running),
                };
                self.tell_some(told);
            }
            Happening::DialEnds { link, refused } => {
                let told = core.dial_ends(link, refused);
                self.tell_some(told);
            }
            Happening::Deliver { link, to, wire } => {
                let told = core.deliver(link, to, wire);
                self.tell_some(told);
            }
            Happening::Drain { link, to } => {
                for (process, told) in core.drain(link, to) {
                    self.tell(process, told);
                }
            }
            Happening::Close { link, side } => {
                let told = core.closed(link, side);
                self.tell_some(told);
            }
            Happening::LinkTimeout { link } => core.link_timeout(link),
            Happening::EtcdArrives { from, asked } => core.etcd_arrives(from, asked),
            Happening::EtcdWatch { watcher } => {
                let told = core.etcd_watched(watcher);
                self.tell_some(told);
            }
            Happening::EtcdRelist { watcher } => {
                let told = core.etcd_relist(watcher);
                self.tell_some(told);
            }
            Happening::EtcdLeases => core.etcd_leases(),
            Happening::EtcdPutRight => self.etcd_put_right(),
            Happening::Answered(answered) => self.clients.answered(core, answered),
            Happening::Client { client } => self.clients.ask(core, client),
            Happening::FinalRead { counter } => self.clients.read_finally(core, counter),
            Happening::TokenClient { client } => {
                self.tokens.ask(core, &mut self.clients.history, client);
            }
            Happening::TokenRequest { to, send } => match self.listening(to) {
                Some(process) => self.tell(process, Told::TokenRequest(send)),
                None => {
                    let told = vec![TokenTold::NotApplied(None); send.ops.len()];
                    let answered = token_clients::Answered::of(&send, Some(told));
                    self.tokens.answered(&mut self.core, answered);
                }
            },
            Happening::TokenAnswered(answered) => self.tokens.answered(core, answered),
            Happening::Fault => self.fault(),
            Happening::DiskFault => self.disk_fault(),
            Happening::Leap { far, since } => self.leap(far, since),
            Happening::FaultEnds { fault } => self.fault_ends(fault),
            Happening::FaultStep { pair, blocks } => self.fault_step(pair, blocks),
            Happening::Resume { process } => {
                for told in core.resume(process) {
                    self.tell(process, told);
                }
            }
            Happening::Restart { place } => self.restart(place),
            Happening::PutBack { place } => self.put_back(place),
            Happening::OperatorLooks => self.operator_looks(),
            Happening::OperatorWants { shard, intent } => core.operator_wants(shard, intent),
        }
    }

    fn tell_some(&mut self, told: Option<(Process, Told)>) {
        if let Some((process, told)) = told {
            self.tell(process, told);
        }
    }

    /// Tells a process, unless that life of it is over.
    fn tell(&mut self, to: Process, told: Told) {
        let core = &mut self.core;
        let Some(told) = core.waits_for(to, told) else { return };
        match to.place {
            Place::Node(at) => {
                let node = &mut self.nodes[at as usize];
                if node.life == to.life {
                    node.on(core, told);
                    node.look(core);
                }
            }
            Place::Gateway(at) => {
                let gateway = &mut self.gateways[at as usize];
                if gateway.life == to.life {
                    gateway.on(core, told);
                }
            }
            Place::Coordinator(at) => {
                let coordinator = &mut self.coordinators[at as usize];
                if coordinator.life == to.life {
                    coordinator.on(core, told);
                }
            }
            Place::Chaos if self.chaos.life == to.life => self.chaos.on(core, told),
            Place::Chaos => {}
            Place::Twin => {
                if let Some(twin) = self.twin.as_mut().filter(|twin| twin.life == to.life) {
                    twin.on(core, told);
                }
            }
            Place::Etcd => unreachable!("etcd is asked, not told"),
        }
    }

    pub fn listening(&self, place: Place) -> Option<Process> {
        match place {
            Place::Node(at) => self.nodes[at as usize].listening(),
            Place::Gateway(at) => {
                let gateway = &self.gateways[at as usize];
                (!gateway.is_down()).then(|| gateway.process())
            }
            Place::Coordinator(at) => {
                let coordinator = &self.coordinators[at as usize];
                (!coordinator.is_down()).then(|| coordinator.process())
            }
            Place::Chaos | Place::Twin | Place::Etcd => None,
        }
    }

    fn says_it_is(&self, place: Place) -> Option<StoreBoot> {
        match place {
            Place::Node(at) => self.nodes[at as usize].me(),
            _ => None,
        }
    }

    fn put_back(&mut self, place: Place) {
        if let Place::Node(at) = place {
            self.nodes[at as usize].is_put_back(&mut self.core);
            self.core.after(50_000, Happening::Restart { place });
        }
    }

    fn restart(&mut self, place: Place) {
        if self.core.etcd.is_restored() {
            // It could not tell.
            return self.core.after(20_000, Happening::Restart { place });
        }
        match place {
            Place::Node(at) if self.core.now < self.nodes[at as usize].away_until => {}
            Place::Node(at) => self.nodes[at as usize].start(&mut self.core),
            Place::Gateway(at) => self.gateways[at as usize].start(&mut self.core),
            Place::Coordinator(at) => self.coordinators[at as usize].start(&mut self.core),
            Place::Chaos => self.chaos.start(&mut self.core),
            Place::Twin | Place::Etcd => {}
        }
    }
}
