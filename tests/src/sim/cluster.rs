//! The cluster of a run: all processes and clients, and what they share.

use engine::ids::{Boot, Epoch, StoreBoot, Version};
use engine::shard_record::ShardRecord;

use super::chaos::ChaosHost;
use super::clients::Clients;
use super::coordinators::CoordinatorHost;
use super::core::Core;
use super::etcd::{EtcdKey, EtcdValue, Write};
use super::event::{ProcessInput, SimEvent};
use super::gateways::GatewayHost;
use super::nodes::NodeHost;
use super::place::{Place, ProcessId, store_id};
use super::struck::Faults;
use super::token_clients::TokenClients;

pub struct SimCluster {
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
}

impl SimCluster {
    pub fn new(mut core: Core) -> Self {
        let nodes = (0..core.plan.nodes).map(|at| NodeHost::new(at, &mut core)).collect();
        let gateways = (0..core.plan.gateways).map(GatewayHost::new).collect();
        let coordinators = (0..core.plan.coordinators).map(CoordinatorHost::new).collect();
        let mut clients = Clients::new(&mut core);
        let tokens = TokenClients::new(&mut core, &mut clients.history);
        let (faults, chaos, twin) = (Faults::default(), ChaosHost::default(), None);
        Self { core, nodes, gateways, coordinators, chaos, clients, tokens, faults, twin }
    }

    /// Writes the first records: every store starts with boot 1.
    pub fn place_shards(&mut self) {
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
        let first = usize::from(self.core.plan.first_nodes);
        for node in self.nodes.iter_mut().take(first) {
            node.start(&mut self.core);
        }
        for gateway in &mut self.gateways {
            gateway.start(&mut self.core);
        }
        if self.core.etcd.is_lost() {
            return; // A coordinator would make a new cluster.
        }
        for coordinator in &mut self.coordinators {
            coordinator.start(&mut self.core);
        }
        if self.core.plan.chaos {
            self.chaos.start(&mut self.core);
        }
    }

    pub fn restart(&mut self, place: Place) {
        let leads = matches!(place, Place::Coordinator(_) | Place::Chaos);
        if self.core.etcd.is_restored() || (leads && self.core.etcd.is_lost()) {
            // The process could not detect the restore, or that the cluster is not new.
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

    pub fn put_back(&mut self, place: Place) {
        if let Place::Node(at) = place {
            self.nodes[at as usize].is_put_back(&mut self.core);
            self.core.after(50_000, SimEvent::Restart { place });
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

    pub fn identity_of(&self, place: Place) -> Option<StoreBoot> {
        match place {
            Place::Node(at) => self.nodes[at as usize].me(),
            _ => None,
        }
    }

    pub fn deliver_some(&mut self, input: Option<(ProcessId, ProcessInput)>) {
        if let Some((process, input)) = input {
            self.deliver(process, input);
        }
    }

    /// Delivers an input to a process, unless that incarnation of it is over.
    pub fn deliver(&mut self, to: ProcessId, input: ProcessInput) {
        let core = &mut self.core;
        let Some(input) = core.waits_for(to, input) else { return };
        if matches!(input, ProcessInput::Etcd { .. }) && core.etcd.is_left_behind(to) {
            return; // The answer of an etcd that is gone.
        }
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
}
