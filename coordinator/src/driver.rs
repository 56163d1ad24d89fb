//! The loop of the process: it feeds events to the state machine and performs its effects.
//!
//! A standby runs the same loop. The state machine does nothing before it is elected, and the list
//! of records that is read after the election contains everything it needs.

use std::time::Duration;

use engine::coordinator::{Coordinator, Decision, Effect, Event};
use engine::ids::{Now, StoreBoot};
use metastore::{Election, LeadershipChange};
use process::ProcessExit;
use telemetry::{CriticalTasks, Health, TaskFailures};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::Options;
use crate::decision_log::log_decisions;
use crate::etcd::{DriverMessage, EtcdHandle};
use crate::events::EventPublisher;
use crate::metrics::Gauges;
use crate::node_directory::NodeDirectory;
use crate::nodes::{Nodes, QueryTarget};

/// The parts that the loop works with.
pub(crate) struct Driver {
    pub(crate) options: Options,
    pub(crate) coordinator: Coordinator,
    pub(crate) etcd: EtcdHandle,
    pub(crate) events: EventPublisher,
    pub(crate) nodes: Nodes,
    pub(crate) health: Health,
    pub(crate) gauges: Gauges,
    /// The cluster that this process leads, and of which it takes reports; `None` for a standby.
    pub(crate) led_cluster: watch::Sender<Option<u128>>,
    pub(crate) tasks: CriticalTasks,
    pub(crate) state: DriverState,
}

/// The reason why the loop ended by itself.
enum DriverExit {
    /// The process ends.
    Exit(ProcessExit),
    /// etcd's history went back: the process stays, but does nothing more.
    WentBack,
}

/// The state of the loop, beside that of the state machine.
pub(crate) struct DriverState {
    began: Instant,
    directory: NodeDirectory,
    elected: bool,
    /// The reason why etcd can't be used now, as a word for `/readyz`; `None` if it can.
    etcd_problem: Option<&'static str>,
}

impl DriverState {
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            directory: NodeDirectory::default(),
            elected: false,
            etcd_problem: None,
        }
    }

    fn now(&self) -> Now {
        Now(u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn at(&self, moment: Now) -> Instant {
        self.began + Duration::from_micros(moment.0)
    }
}

impl Driver {
    /// Runs until `stop` is ready, or for as long as the flags of this process match the cluster,
    /// and gives up leadership at the end.
    ///
    /// An etcd whose history went back is not followed any more. A restart by a supervisor would
    /// follow it, since the new process would not know the former history; so the process stays,
    /// reports on `/readyz` why it is not ready, and waits to be stopped.
    pub(crate) async fn run(
        mut self,
        mut election: Election,
        mut inbox: mpsc::Receiver<DriverMessage>,
        mut failures: TaskFailures,
        stop: impl Future<Output = ()>,
    ) -> Result<(), ProcessExit> {
        tokio::pin!(stop);
        let ended = loop {
            let deadline = self.coordinator.next_deadline().map(|moment| self.state.at(moment));
            let handled = tokio::select! {
                biased;
                () = &mut stop => break Ok(()),
                why = failures.next() => Err(DriverExit::Exit(ProcessExit::Failed(why))),
                // Elections come before messages, so that a deposed leader begins nothing more.
                change = election.next() => match change {
                    Some(change) => self.on_leadership_change(change),
                    None => Err(DriverExit::Exit(ProcessExit::Failed(
                        "the election's task failed".into(),
                    ))),
                },
                Some(message) = inbox.recv() => self.on_message(message),
                () = until(deadline) => self.handle(Event::Tick),
            };
            if let Err(end) = handled {
                break Err(end);
            }
        };
        if self.state.elected {
            info!("giving up leadership");
        }
        self.led_cluster.send_replace(None);
        self.gauges.leading.set(0);
        self.health.not_ready("stopping");
        election.resign().await;
        match ended {
            Ok(()) => Ok(()),
            Err(DriverExit::Exit(exit)) => Err(exit),
            Err(DriverExit::WentBack) => {
                self.health.not_ready("etcd-went-back");
                stop.await;
                Ok(())
            }
        }
    }

    fn on_leadership_change(&mut self, change: LeadershipChange) -> Result<(), DriverExit> {
        self.events.on_election(&change);
        match change {
            LeadershipChange::Leading { term } => {
                info!(term, "elected");
                self.state.elected = true;
                self.gauges.elections.inc();
                self.gauges.leading.set(1);
                self.handle(Event::Elected { term })
            }
            LeadershipChange::Standby => {
                warn!("deposed, now a standby");
                self.state.elected = false;
                self.gauges.leading.set(0);
                self.handle(Event::Deposed)
            }
        }
    }

    fn on_message(&mut self, message: DriverMessage) -> Result<(), DriverExit> {
        match message {
            DriverMessage::Event(event) => self.handle(event),
            DriverMessage::EtcdProblem(problem) => {
                self.state.etcd_problem = problem;
                self.publish_status();
                Ok(())
            }
            DriverMessage::Plan(reply) => {
                let view = self.coordinator.plan_view().zip(self.coordinator.moves());
                // The client may have gone.
                drop(reply.send(view));
                Ok(())
            }
            DriverMessage::Records(list) => {
                self.events.on_list(list);
                Ok(())
            }
            DriverMessage::Events(request) => {
                let cluster = self.state.directory.meta.as_ref().map(|meta| meta.cluster);
                let reply = cluster.map(|cluster| (cluster, self.events.reply(request.seen)));
                // The client may have gone.
                drop(request.reply.send(reply));
                Ok(())
            }
            DriverMessage::WentBack => Err(DriverExit::WentBack),
        }
    }

    /// Handles one event, and performs the effects that follow from it.
    fn handle(&mut self, event: Event) -> Result<(), DriverExit> {
        self.state.directory.update(&event);
        if let Event::Changed { revision, change } = &event {
            self.events.on_change(*revision, change);
        }
        if let Some(meta) = &self.state.directory.meta
            && let Some(difference) = self.options.difference(meta)
        {
            return Err(DriverExit::Exit(ProcessExit::Usage(difference)));
        }
        let mut effects = Vec::new();
        self.coordinator.handle(self.state.now(), event, &mut effects);
        let mut decisions = Vec::new();
        for effect in effects {
            self.perform(effect, &mut decisions)?;
        }
        self.events.on_decisions(&decisions);
        log_decisions(decisions, &self.state.directory, &self.gauges);
        self.gauges.moves(&self.coordinator.moves().unwrap_or_default());
        self.publish_status();
        Ok(())
    }

    fn perform(&mut self, effect: Effect, decisions: &mut Vec<Decision>) -> Result<(), DriverExit> {
        let directory = &self.state.directory;
        let cluster = directory.meta.as_ref().map_or(0, |meta| meta.cluster);
        let target = |to: StoreBoot| QueryTarget {
            to,
            name: directory.name(to.store),
            address: directory.address(to.store),
            cluster,
        };
        match effect {
            Effect::List { list } => {
                tokio::spawn(self.tasks.job("a list of records", self.etcd.clone().list(list)));
            }
            Effect::Propose { proposal, term, writes } => {
                let (etcd, gauges) = (self.etcd.clone(), self.gauges.clone());
                tokio::spawn(self.tasks.job("a proposal", async move {
                    gauges.proposed(etcd.propose(proposal, term, writes).await);
                }));
            }
            Effect::Probe { probe, to } => self.nodes.probe(target(to), probe),
            Effect::Gather { gather, to, shards } => self.nodes.gather(target(to), gather, shards),
            Effect::StepDown { to, shard, epoch } => self.nodes.step_down(target(to), shard, epoch),
            Effect::Decision(decision) => decisions.push(decision),
            Effect::Exit(difference) => {
                return Err(DriverExit::Exit(ProcessExit::Usage(difference)));
            }
        }
        Ok(())
    }

    /// Updates the led cluster and the readiness of the process.
    fn publish_status(&self) {
        let cluster = self.state.directory.meta.as_ref().map(|meta| meta.cluster);
        let led_cluster = cluster.filter(|_| self.state.elected);
        self.led_cluster
            .send_if_modified(|last| std::mem::replace(last, led_cluster) != led_cluster);
        match self.not_ready_reason() {
            Some(reason) => self.health.not_ready(reason),
            None => self.health.ready(),
        }
    }

    fn not_ready_reason(&self) -> Option<String> {
        if let Some(problem) = self.state.etcd_problem {
            return Some(problem.into());
        }
        if !self.state.elected {
            return None;
        }
        match self.coordinator.waits_for() {
            Some(waits) => Some(waits.to_string()),
            None if self.coordinator.is_leading() => None,
            None => Some("reading the records from etcd".into()),
        }
    }
}

/// Waits until a deadline, or forever without one.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
