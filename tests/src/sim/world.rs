//! One run: all processes, the clients, the faults, and the loop that takes the next event.

use super::checker::{self, RunFacts, Violation, heals};
use super::cluster::SimCluster;
use super::core::Core;
use super::disk_faults::RoomWatch;
use super::event::{ProcessInput, SimEvent};
use super::history::OpOutcome;
use super::leaps::HealingLeaps;
use super::plan::Plan;
use super::request::{ClientReply, TokenReply};
use super::rng::Rng;
use super::token_history::TokenOpOutcome;
use super::trace::Trace;

/// The limit of steps; a healthy run takes about a thirtieth of it.
const STEPS_MAX: u64 = 10_000_000;

pub struct SimWorld {
    pub cluster: SimCluster,
    stage: RunStage,
    leaps: HealingLeaps,
    room: RoomWatch,
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
        let cluster = SimCluster::new(Core::new(plan, workload, trace));
        let (leaps, room) = (HealingLeaps::default(), RoomWatch::default());
        let mut world = Self { cluster, stage: RunStage::Faulty, leaps, room };
        let cluster = &mut world.cluster;
        if !cluster.core.plan.bootstraps {
            cluster.place_shards();
        }
        cluster.start_all();
        cluster.core.at(500_000, SimEvent::Fault);
        if !cluster.core.plan.disks.faults.is_empty() {
            cluster.core.at(500_000, SimEvent::DiskFault);
        }
        if cluster.core.plan.operator.every.is_some() {
            cluster.core.at(500_000, SimEvent::OperatorLooks);
        }
        if let Some(every) = cluster.core.plan.splits.every {
            cluster.core.at(600_000 + every, SimEvent::OperatorSplits);
        }
        if let Some(at) = cluster.core.plan.etcd_loss.at {
            cluster.core.at(at, SimEvent::EtcdLost);
        }
        for (at, far) in cluster.core.plan.leaps.all.clone() {
            cluster.core.at(at, SimEvent::Leap { far, since: at });
        }
        world
    }

    /// Runs to the end. The returned list has each broken promise at most once.
    pub fn run(&mut self) -> Vec<Violation> {
        while self.cluster.core.oracle.violations.is_empty() {
            if self.is_over() {
                return self.judge();
            }
            let core = &self.cluster.core;
            if core.now > core.plan.heals_by || core.step > STEPS_MAX {
                let mut violations = self.judge();
                violations.push(heals::violation(self.unfinished()));
                return violations;
            }
            self.advance();
            if self.step().is_none() {
                return vec![heals::violation("nothing happens any more".into())];
            }
        }
        std::mem::take(&mut self.cluster.core.oracle.violations)
    }

    /// Checks what clients have observed.
    fn judge(&self) -> Vec<Violation> {
        let SimCluster { core, clients, tokens, .. } = &self.cluster;
        checker::judge(&RunFacts {
            history: &clients.history,
            tokens: &tokens.cases,
            plan: &core.plan,
            clocks_set: &core.clocks_set,
            leapt: core.leapt > 0,
        })
    }

    /// Takes the next event.
    pub fn step(&mut self) -> Option<()> {
        let event = self.cluster.core.pop()?;
        self.take(event);
        Some(())
    }

    /// Moves the run on from faults to healing to the final reads.
    fn advance(&mut self) {
        let cluster = &mut self.cluster;
        let now = cluster.core.now;
        if self.stage == RunStage::Faulty && now >= cluster.core.plan.faults_until {
            self.stage = RunStage::Healed;
            cluster.heal();
            self.leaps.next = now + 10_000_000;
            // By then the others are back in sync, and a full primary has been found to be full.
            self.room.next = now + 5_000_000;
        }
        if self.stage != RunStage::Faulty {
            self.room.make_room(cluster);
        }
        if self.stage == RunStage::Reading {
            self.leaps.leap_to_heal(cluster);
        }
        let loaded = now >= cluster.core.plan.load_until;
        let idle = cluster.clients.is_idle() && cluster.tokens.is_idle();
        if self.stage == RunStage::Healed && loaded && idle {
            self.stage = RunStage::Reading;
            cluster.clients.read_all(&mut cluster.core);
        }
    }

    fn is_over(&self) -> bool {
        // Besides a full disk only unnecessary waiting for its room can be wrong.
        let has_room = !self.cluster.nodes.iter().any(|node| node.disk.stays_full);
        self.stage == RunStage::Reading
            && has_room
            && self.cluster.clients.is_done()
            && self.unequal().is_none()
    }

    /// Some shard whose replicas are not equal yet.
    fn unequal(&self) -> Option<String> {
        let SimCluster { core, nodes, .. } = &self.cluster;
        let node = |store| nodes.iter().find(|node| node.store == store)?.node();
        let replicas = core.plan.replicas.min(nodes.len());
        let refusing = nodes.iter().find(|node| node.is_full());
        let refusing = refusing.map(|node| format!("{:?} takes no writes", node.place));
        let mut shards = core.etcd.shards();
        let lost = core.etcd.is_lost().then(|| "etcd is not rebuilt".to_owned());
        refusing
            .or(lost)
            .or_else(|| shards.find_map(|(config, _)| heals::unfinished(config, replicas, node)))
    }

    fn unfinished(&self) -> String {
        let cluster = &self.cluster;
        let left = cluster.clients.left();
        let waits = format!("{left} operations and final reads are unanswered");
        let full = cluster.nodes.iter().filter(|node| node.disk.stays_full).map(|node| node.store);
        let why = cluster.waits_beside_room(&full.collect()).or_else(|| self.unequal());
        why.map_or(waits.clone(), |why| format!("{why}; {waits}"))
    }

    fn take(&mut self, event: SimEvent) {
        let cluster = &mut self.cluster;
        let core = &mut cluster.core;
        match event {
            SimEvent::Input(to, input) => cluster.deliver(to, input),
            SimEvent::Query { to, from, query, message } => match cluster.listening(to) {
                Some(process) => {
                    cluster.deliver(process, ProcessInput::Query { from, query, message })
                }
                None => {
                    let delay = cluster.core.delay();
                    let input = ProcessInput::QueryFailed { query, refused: true };
                    cluster.core.input_after(delay, from, input);
                }
            },
            SimEvent::Report { to, from, report } => {
                if let Some(process) = cluster.listening(to) {
                    cluster.deliver(process, ProcessInput::Report { from, report });
                }
            }
            SimEvent::Request { to, request } => match cluster.listening(to) {
                Some(process) => cluster.deliver(process, ProcessInput::Request(request)),
                None => {
                    let answered = ClientReply { id: request.id, outcome: OpOutcome::NotApplied };
                    cluster.clients.answered(&mut cluster.core, answered);
                }
            },
            SimEvent::DialArrives { link } => {
                let to = core.dialled_place(link);
                let running =
                    to.and_then(|to| Some((cluster.listening(to)?, cluster.identity_of(to))));
                let input = match running {
                    Some((process, _)) if cluster.core.is_paused(process) => {
                        cluster.core.dial_hangs(link);
                        None
                    }
                    _ => cluster.core.dial_arrives(link, running),
                };
                cluster.deliver_some(input);
            }
            SimEvent::DialEnds { link, refused } => {
                let input = core.dial_ends(link, refused);
                cluster.deliver_some(input);
            }
            SimEvent::Deliver { link, to, wire } => {
                let input = core.deliver(link, to, wire);
                cluster.deliver_some(input);
            }
            SimEvent::Drain { link, to } => {
                for (process, input) in core.drain(link, to) {
                    cluster.deliver(process, input);
                }
            }
            SimEvent::Close { link, side } => {
                let input = core.closed(link, side);
                cluster.deliver_some(input);
            }
            SimEvent::LinkTimeout { link } => core.link_timeout(link),
            SimEvent::EtcdArrives { from, asked } => core.etcd_arrives(from, asked),
            SimEvent::EtcdWatch { watcher } => {
                let input = core.etcd_watched(watcher);
                cluster.deliver_some(input);
            }
            SimEvent::EtcdRelist { watcher } => {
                let input = core.etcd_relist(watcher);
                cluster.deliver_some(input);
            }
            SimEvent::EtcdLeases => core.etcd_leases(),
            SimEvent::EtcdPutRight => cluster.etcd_put_right(),
            SimEvent::EtcdLost => cluster.etcd_is_lost(),
            SimEvent::EtcdRebuild => cluster.etcd_is_rebuilt(),
            SimEvent::LeavesOldEtcd { process } => cluster.leaves_old_etcd(process),
            SimEvent::Answered(answered) => cluster.clients.answered(core, answered),
            SimEvent::Client { client } => cluster.clients.ask(core, client),
            SimEvent::FinalRead { counter } => cluster.clients.read_finally(core, counter),
            SimEvent::TokenClient { client } => {
                cluster.tokens.ask(core, &mut cluster.clients.history, client);
            }
            SimEvent::TokenRequest { to, send } => match cluster.listening(to) {
                Some(process) => cluster.deliver(process, ProcessInput::TokenRequest(send)),
                None => {
                    let outcomes = vec![TokenOpOutcome::NotApplied(None); send.ops.len()];
                    let answered = TokenReply::of(&send, Some(outcomes));
                    cluster.tokens.answered(&mut cluster.core, answered);
                }
            },
            SimEvent::TokenAnswered(answered) => cluster.tokens.answered(core, answered),
            SimEvent::Fault => cluster.fault(),
            SimEvent::DiskFault => cluster.disk_fault(),
            SimEvent::Leap { far, since } => cluster.leap(far, since),
            SimEvent::FaultEnds { fault } => cluster.fault_ends(fault),
            SimEvent::FaultStep { pair, blocks } => cluster.fault_step(pair, blocks),
            SimEvent::Resume { process } => {
                for input in core.resume(process) {
                    cluster.deliver(process, input);
                }
            }
            SimEvent::Restart { place } => cluster.restart(place),
            SimEvent::PutBack { place } => cluster.put_back(place),
            SimEvent::OperatorLooks => cluster.operator_looks(),
            SimEvent::OperatorSplits => cluster.operator_splits(),
            SimEvent::OperatorWants { shard, intent } => core.operator_wants(shard, intent),
        }
    }
}
