//! The loop: what is told goes into the machine, and what the machine wants is done.
//!
//! A standby runs the same loop. The machine does nothing before it is elected, and a list made after the election tells
//! it everything.

use std::time::Duration;

use engine::coordinator::{Coordinator, Effect, Event, Story};
use engine::ids::{Now, StoreBoot};
use metastore::{Election, Leadership};
use telemetry::{Failures, Health, Vital};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::book::Book;
use crate::etcd::{Etcd, Told};
use crate::metrics::Gauges;
use crate::nodes::{Asked, Nodes};
use crate::tell::tell;
use crate::{Exit, Options};

/// What the driver works with.
pub(crate) struct Driver {
    pub(crate) options: Options,
    pub(crate) machine: Coordinator,
    pub(crate) etcd: Etcd,
    pub(crate) nodes: Nodes,
    pub(crate) health: Health,
    pub(crate) gauges: Gauges,
    /// Whether reports are taken, and of which cluster.
    pub(crate) leads: watch::Sender<Option<u128>>,
    pub(crate) vital: Vital,
    pub(crate) state: State,
}

/// Why the loop ended by itself.
enum End {
    Exit(Exit),
    WentBack,
}

/// What the driver knows by itself.
pub(crate) struct State {
    began: Instant,
    book: Book,
    elected: bool,
    /// Why etcd is of no use now.
    etcd_trouble: Option<&'static str>,
}

impl State {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), book: Book::default(), elected: false, etcd_trouble: None }
    }

    fn now(&self) -> Now {
        Now(u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn at(&self, moment: Now) -> Instant {
        self.began + Duration::from_micros(moment.0)
    }
}

impl Driver {
    /// Runs until `stop` is ready, or for as long as this process agrees with the cluster. It then gives up the lead.
    ///
    /// An etcd whose history went back is not followed any more, and not by a supervisor's restart either, which would
    /// remember nothing: the process stays, says why it is not ready, and waits to be stopped.
    pub(crate) async fn run(
        mut self,
        mut election: Election,
        mut inbox: mpsc::Receiver<Told>,
        mut failures: Failures,
        stop: impl Future<Output = ()>,
    ) -> Result<(), Exit> {
        tokio::pin!(stop);
        let ended = loop {
            let deadline = self.machine.next_deadline().map(|moment| self.state.at(moment));
            let turn = tokio::select! {
                biased;
                () = &mut stop => break Ok(()),
                why = failures.next() => Err(End::Exit(Exit::Failed(why))),
                // Before anything else, so that a deposed leader begins nothing more.
                change = election.next() => match change {
                    Some(change) => self.election(change),
                    None => Err(End::Exit(Exit::Failed("the election's task failed".into()))),
                },
                Some(told) = inbox.recv() => self.told(told),
                () = until(deadline) => self.turn(Event::Tick),
            };
            if let Err(end) = turn {
                break Err(end);
            }
        };
        if self.state.elected {
            info!("gives up the lead");
        }
        self.leads.send_replace(None);
        self.gauges.leading.set(0);
        self.health.not_ready("stopping");
        election.resign().await;
        match ended {
            Ok(()) => Ok(()),
            Err(End::Exit(exit)) => Err(exit),
            Err(End::WentBack) => {
                self.health.not_ready("etcd-went-back");
                stop.await;
                Ok(())
            }
        }
    }

    fn election(&mut self, change: Leadership) -> Result<(), End> {
        match change {
            Leadership::Leading { term, .. } => {
                info!(term, "elected");
                self.state.elected = true;
                self.gauges.elections.inc();
                self.gauges.leading.set(1);
                self.turn(Event::Elected { term })
            }
            Leadership::Standby => {
                warn!("no longer leads: stands by");
                self.state.elected = false;
                self.gauges.leading.set(0);
                self.turn(Event::Deposed)
            }
        }
    }

    fn told(&mut self, told: Told) -> Result<(), End> {
        match told {
            Told::Event(event) => self.turn(event),
            Told::Etcd(trouble) => {
                self.state.etcd_trouble = trouble;
                self.show();
                Ok(())
            }
            Told::WentBack { was, now } => {
                error!(
                    was,
                    now,
                    "etcd's history went back, so it is not followed any more: if it was restored from a backup, start \
                     nothing and read \"Back up etcd\" in docs/operations.md"
                );
                Err(End::WentBack)
            }
        }
    }

    /// One event, and all that follows from it.
    fn turn(&mut self, event: Event) -> Result<(), End> {
        self.state.book.note(&event);
        if let Some(meta) = &self.state.book.meta
            && let Some(difference) = self.options.difference(meta)
        {
            return Err(End::Exit(Exit::Usage(difference)));
        }
        let mut effects = Vec::new();
        self.machine.handle(self.state.now(), event, &mut effects);
        let mut stories = Vec::new();
        for effect in effects {
            self.perform(effect, &mut stories)?;
        }
        tell(stories, &self.state.book, &self.gauges);
        self.show();
        Ok(())
    }

    fn perform(&mut self, effect: Effect, stories: &mut Vec<Story>) -> Result<(), End> {
        let book = &self.state.book;
        let cluster = book.meta.as_ref().map_or(0, |meta| meta.cluster);
        let asked = |to: StoreBoot| Asked {
            to,
            name: book.name(to.store),
            address: book.address(to.store),
            cluster,
        };
        match effect {
            Effect::List { list } => {
                tokio::spawn(self.vital.job("a list of records", self.etcd.clone().list(list)));
            }
            Effect::Propose { proposal, term, writes } => {
                let (etcd, gauges) = (self.etcd.clone(), self.gauges.clone());
                tokio::spawn(self.vital.job("a proposal", async move {
                    gauges.proposed(etcd.propose(proposal, term, writes).await);
                }));
            }
            Effect::Probe { probe, to } => self.nodes.probe(asked(to), probe),
            Effect::Gather { gather, to, shards } => self.nodes.gather(asked(to), gather, shards),
            Effect::StepDown { to, shard, epoch } => self.nodes.step_down(asked(to), shard, epoch),
            Effect::Story(story) => stories.push(story),
            Effect::Exit { difference } => return Err(End::Exit(Exit::Usage(difference))),
        }
        Ok(())
    }

    /// Brings what others see up to date.
    fn show(&self) {
        let cluster = self.state.book.meta.as_ref().map(|meta| meta.cluster);
        let leads = cluster.filter(|_| self.state.elected);
        self.leads.send_if_modified(|shown| std::mem::replace(shown, leads) != leads);
        match self.waits_for() {
            Some(reason) => self.health.not_ready(reason),
            None => self.health.ready(),
        }
    }

    fn waits_for(&self) -> Option<String> {
        if let Some(trouble) = self.state.etcd_trouble {
            return Some(trouble.into());
        }
        if !self.state.elected {
            return None;
        }
        match self.machine.waits_for() {
            Some(waits) => Some(waits.to_string()),
            None if self.machine.is_leading() => None,
            None => Some("reading what etcd holds".into()),
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
