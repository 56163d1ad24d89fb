//! One run: all processes, the clients, the faults, and the loop that takes the next event.

use std::collections::BTreeMap;

use engine::ids::{Boot, Epoch, ShardId, StoreBoot, StoreId, Version};
use engine::shard_record::ShardRecord;

use super::chaos::ChaosHost;
use super::checker::{self, Violation, heals};
use super::clients::{ClientReply, Clients};
use super::coordinators::CoordinatorHost;
use super::core::{Core, Place, ProcessId, ProcessInput, SimEvent};
use super::etcd::{EtcdKey, EtcdValue, Write};
use super::faults::Faults;
use super::gateways::GatewayHost;
use super::history::OpOutcome;
use super::nodes::{NodeHost, store_id};
use super::plan::Plan;
use super::rng::Rng;
use super::token_clients::{self, TokenClients, TokenOpOutcome};
use super::trace::Trace;

/// The limit of steps; a healthy run takes about a thirtieth of it.
const STEPS_MAX: u64 = 10_000_000;

pub struct SimWorld {
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
    stage: RunStage,
    /// The earliest time of the next leap that helps a healed cluster over its waits.
    pub next_leap: u64,
    /// The number of entries that each learner lacked at the last leap.
    pub lags: BTreeMap<(ShardId, StoreId), u64>,
    /// The time of the next check of disks that stay full.
    pub next_room: u64,
    /// The number of checks in a row at which every shard served that could.
    pub serves_without_room: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum RunStage {
    Faulty,
    Healed,
    Reading,
}

impl SimWorld {
    pub fn new(plan: Plan, mut rng: Rng, trace: Trace) -> Self {
        let workload = rng.fork();
        let mut core = Core::new(plan, workload, trace);
        let nodes = (0..core.plan.nodes).map(|at| NodeHost::new(at, &mut core)).collect();
        let gateways = (0..core.plan.gateways).map(GatewayHost::new).collect();
        let coordinators = (0..core.plan.coordinators).map(CoordinatorHost::new).collect();
        let mut clients = Clients::new(&mut core);
        let tokens = TokenClients::new(&mut core, &mut clients.history);
        let faults = Faults::default();
        let stage = RunStage::Faulty;
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
        world.core.at(500_000, SimEvent::Fault);
        if !world.core.plan.disks.faults.is_empty() {
            world.core.at(500_000, SimEvent::DiskFault);
        }
        if world.core.plan.operator.every.is_some() {
            world.core.at(500_000, SimEvent::OperatorLooks);
        }
        for (at, far) in world.core.plan.leaps.all.clone() {
            world.core.at(at, SimEvent::Leap { far, since: at });
        }
        world
    }

    /// Writes the first records: every store starts with boot 1.
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
            let key = EtcdKey::Shard(config.shard());
            writes.push(Write::Put(key, EtcdValue::Shard(config), None));
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

    /// Runs to the end. The returned list has each broken promise at most once.
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

    /// Takes the next event.
    pub fn step(&mut self) -> Option<()> {
        let event = self.core.pop()?;
        self.take(event);
        Some(())
    }

    /// Moves the run on from faults to healing to the final reads.
    fn advance(&mut self) {
        if self.stage == RunStage::Faulty && self.core.now >= self.core.plan.faults_until {
            self.stage = RunStage::Healed;
            self.heal();
            self.next_leap = self.core.now + 10_000_000;
            // By then the others are back in sync, and a full primary has been found to be full.
            self.next_room = self.core.now + 5_000_000;
        }
        if self.stage != RunStage::Faulty {
            self.make_room();
        }
        if self.stage == RunStage::Reading {
            self.leap_to_heal();
        }
        let loaded = self.core.now >= self.core.plan.load_until;
        if self.stage == RunStage::Healed
            && loaded
            && self.clients.is_idle()
            && self.tokens.is_idle()
        {
            self.stage = RunStage::Reading;
            self.clients.read_all(&mut self.core);
        }
    }

    fn is_over(&self) -> bool {
        // Besides a full disk only unnecessary waiting for its room can be wrong.
        let has_room = !self.nodes.iter().any(|node| node.disk.stays_full);
        self.stage == RunStage::Reading
            && has_room
            && self.clients.is_done()
            && self.unequal().is_none()
    }

    /// Some shard whose replicas are not equal yet.
    fn unequal(&self) -> Option<String> {
        let node = |store| self.nodes.iter().find(|node| node.store == store)?.node();
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

    fn take(&mut self, event: SimEvent) {
        let core = &mut self.core;
        match event {
            SimEvent::Input(to, input) => self.deliver(to, input),
            SimEvent::Query { to, from, query, message } => match self.listening(to) {
                Some(process) => {
                    self.deliver(process, ProcessInput::Query { from, query, message })
                }
                None => {
                    let delay = self.core.delay();
                    let input = ProcessInput::QueryFailed { query, refused: true };
                    self.core.input_after(delay, from, input);
                }
            },
            SimEvent::Report { to, from, report } => {
                if let Some(process) = self.listening(to) {
                    self.deliver(process, ProcessInput::Report { from, report });
                }
            }
            SimEvent::Request { to, request } => match self.listening(to) {
                Some(process) => self.deliver(process, ProcessInput::Request(request)),
                None => {
                    let answered = ClientReply { id: request.id, outcome: OpOutcome::NotApplied };
                    self.clients.answered(&mut self.core, answered);
                }
            },
            SimEvent::DialArrives { link } => {
                let to = core.dialled_place(link);
                let running = to.and_then(|to| Some((self.listening(to)?, self.identity_of(to))));
                let input = match running {
                    Some((process, _)) if self.core.is_paused(process) => {
                        self.core.dial_hangs(link);
                        None
                    }
                    _ => self.core.dial_arrives(link, running),
                };
                self.deliver_some(input);
            }
            SimEvent::DialEnds { link, refused } => {
                let input = core.dial_ends(link, refused);
                self.deliver_some(input);
            }
            SimEvent::Deliver { link, to, wire } => {
                let input = core.deliver(link, to, wire);
                self.deliver_some(input);
            }
            SimEvent::Drain { link, to } => {
                for (process, input) in core.drain(link, to) {
                    self.deliver(process, input);
                }
            }
            SimEvent::Close { link, side } => {
                let input = core.closed(link, side);
                self.deliver_some(input);
            }
            SimEvent::LinkTimeout { link } => core.link_timeout(link),
            SimEvent::EtcdArrives { from, asked } => core.etcd_arrives(from, asked),
            SimEvent::EtcdWatch { watcher } => {
                let input = core.etcd_watched(watcher);
                self.deliver_some(input);
            }
            SimEvent::EtcdRelist { watcher } => {
                let input = core.etcd_relist(watcher);
                self.deliver_some(input);
            }
            SimEvent::EtcdLeases => core.etcd_leases(),
            SimEvent::EtcdPutRight => self.etcd_put_right(),
            SimEvent::Answered(answered) => self.clients.answered(core, answered),
            SimEvent::Client { client } => self.clients.ask(core, client),
            SimEvent::FinalRead { counter } => self.clients.read_finally(core, counter),
            SimEvent::TokenClient { client } => {
                self.tokens.ask(core, &mut self.clients.history, client);
            }
            SimEvent::TokenRequest { to, send } => match self.listening(to) {
                Some(process) => self.deliver(process, ProcessInput::TokenRequest(send)),
                None => {
                    let outcomes = vec![TokenOpOutcome::NotApplied(None); send.ops.len()];
                    let answered = token_clients::TokenReply::of(&send, Some(outcomes));
                    self.tokens.answered(&mut self.core, answered);
                }
            },
            SimEvent::TokenAnswered(answered) => self.tokens.answered(core, answered),
            SimEvent::Fault => self.fault(),
            SimEvent::DiskFault => self.disk_fault(),
            SimEvent::Leap { far, since } => self.leap(far, since),
            SimEvent::FaultEnds { fault } => self.fault_ends(fault),
            SimEvent::FaultStep { pair, blocks } => self.fault_step(pair, blocks),
            SimEvent::Resume { process } => {
                for input in core.resume(process) {
                    self.deliver(process, input);
                }
            }
            SimEvent::Restart { place } => self.restart(place),
            SimEvent::PutBack { place } => self.put_back(place),
            SimEvent::OperatorLooks => self.operator_looks(),
            SimEvent::OperatorWants { shard, intent } => core.operator_wants(shard, intent),
        }
    }

    fn deliver_some(&mut self, input: Option<(ProcessId, ProcessInput)>) {
        if let Some((process, input)) = input {
            self.deliver(process, input);
        }
    }

    /// Delivers an input to a process, unless that incarnation of it is over.
    fn deliver(&mut self, to: ProcessId, input: ProcessInput) {
        let core = &mut self.core;
        let Some(input) = core.waits_for(to, input) else { return };
        match to.place {
            Place::Node(at) => {
                let node = &mut self.nodes[at as usize];
                if node.incarnation == to.incarnation {
                    node.on(core, input);
                    node.look(core);
                }
            }
            Place::Gateway(at) => {
                let gateway = &mut self.gateways[at as usize];
                if gateway.incarnation == to.incarnation {
                    gateway.on(core, input);
                }
            }
            Place::Coordinator(at) => {
                let coordinator = &mut self.coordinators[at as usize];
                if coordinator.incarnation == to.incarnation {
                    coordinator.on(core, input);
                }
            }
            Place::Chaos if self.chaos.incarnation == to.incarnation => self.chaos.on(core, input),
            Place::Chaos => {}
            Place::Twin => {
                if let Some(twin) =
                    self.twin.as_mut().filter(|twin| twin.incarnation == to.incarnation)
                {
                    twin.on(core, input);
                }
            }
            Place::Etcd => unreachable!("etcd receives calls, no inputs"),
        }
    }

    pub fn listening(&self, place: Place) -> Option<ProcessId> {
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

    fn identity_of(&self, place: Place) -> Option<StoreBoot> {
        match place {
            Place::Node(at) => self.nodes[at as usize].me(),
            _ => None,
        }
    }

    fn put_back(&mut self, place: Place) {
        if let Place::Node(at) = place {
            self.nodes[at as usize].is_put_back(&mut self.core);
            self.core.after(50_000, SimEvent::Restart { place });
        }
    }

    fn restart(&mut self, place: Place) {
        if self.core.etcd.is_restored() {
            // The process could not detect the restore.
            return self.core.after(20_000, SimEvent::Restart { place });
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
