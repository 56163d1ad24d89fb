//! A kind of record, followed: everything there is, then what changes.
//!
//! Level-triggered. etcd's watches end without notice, stall, and have lost events around compaction (traps T5, T8), so
//! whatever goes wrong leads to the same place: read everything again and go on from there. The receiver gets
//! a new [`WatchEvent::All`] that replaces what it knew; it never has to ask what it missed. A full re-read also happens
//! every few minutes with nothing wrong at all.
//!
//! It is still a hint: a watch may be arbitrarily late (trap T6).

use std::collections::VecDeque;
use std::time::Duration;

use engine::history::WentBack;
use etcd_client::{EventType, WatchOptions, WatchStream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::client::{Kept, Listed, positive};
use crate::pause::Pause;
use crate::task::Task;
use crate::{Error, Metastore, Record};

#[derive(Clone, Debug)]
pub struct WatchSettings {
    /// How often everything is read again although nothing seems wrong. Up to a quarter is taken off by chance, so that
    /// many processes do not ask at once.
    pub relist_every: Duration,
    /// A stream that says nothing for so long, even when asked, is taken for dead.
    pub silent_after: Duration,
}

impl Default for WatchSettings {
    fn default() -> Self {
        Self { relist_every: Duration::from_secs(300), silent_after: Duration::from_secs(30) }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum WatchEvent<R: Record> {
    /// Replaces everything known so far.
    All(Listed<R>),
    Changed(Kept<R>),
    Deleted {
        id: R::Id,
        /// Revision of the deletion.
        revision: u64,
    },
    /// etcd's history is shorter than it was: it was restored from a backup, or it is another etcd. Nobody may follow
    /// it before an operator said so; the watch has ended.
    WentBack {
        was: u64,
        now: u64,
    },
}

/// Follows one kind of record until dropped.
pub struct Watch<R: Record> {
    events: mpsc::Receiver<WatchEvent<R>>,
    task: Task,
}

impl<R: Record> Watch<R> {
    /// The next event; none after [`WatchEvent::WentBack`].
    pub async fn next(&mut self) -> Option<WatchEvent<R>> {
        let event = self.events.recv().await;
        if event.is_none() {
            self.task.end().await;
        }
        event
    }
}

impl Metastore {
    /// Follows one kind of record. Begins with everything, as soon as etcd answers.
    pub fn watch<R: Record>(&self, settings: WatchSettings) -> Watch<R> {
        // A receiver that is slow holds the stream up; when it has caught up it may get everything anew.
        let (sender, events) = mpsc::channel(256);
        let follower = Follower { store: self.clone(), settings, sender };
        Watch { events, task: Task::spawn(follower.run()) }
    }

    /// The changes of one kind of record from a revision on, until the stream breaks. [`Metastore::watch`] is made
    /// of it.
    pub async fn changes<R: Record>(
        &self,
        from: u64,
        silent_after: Duration,
    ) -> Result<Changes<R>, Error> {
        let start = i64::try_from(from).unwrap_or(i64::MAX);
        let options =
            WatchOptions::new().with_prefix().with_start_revision(start).with_progress_notify();
        let mut client = self.watcher();
        let opening = client.watch(self.folder::<R>(), Some(options));
        let stream = self.call("watch", opening).await?;
        Ok(Changes { store: self.clone(), stream, silent_after, ready: VecDeque::new() })
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Change<R: Record> {
    Changed(Kept<R>),
    Deleted { id: R::Id, revision: u64 },
}

/// Why a stream of changes ended.
#[derive(Debug)]
pub enum Broken {
    /// etcd ended it, or the connection broke.
    Ended(String),
    /// etcd no longer has the changes from that revision on.
    Compacted,
    /// Nothing was heard for too long.
    Silent,
    Malformed(Error),
}

/// A stream of changes, from one revision on.
pub struct Changes<R: Record> {
    store: Metastore,
    stream: WatchStream,
    silent_after: Duration,
    ready: VecDeque<Change<R>>,
}

impl<R: Record> Changes<R> {
    /// The next change, in etcd's order. Safe to drop and call again.
    pub async fn next(&mut self) -> Result<Change<R>, Broken> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Ok(change);
            }
            self.hear().await?;
        }
    }

    /// Takes one message off the stream. Half way through the silence that is allowed it asks etcd to say something,
    /// since a quiet stream and a dead one look alike.
    async fn hear(&mut self) -> Result<(), Broken> {
        let half = self.silent_after / 2;
        let message = match tokio::time::timeout(half, self.stream.message()).await {
            Ok(message) => message,
            Err(_) => {
                let asked = self.stream.request_progress().await;
                asked.map_err(|error| Broken::Ended(error.to_string()))?;
                let waited = tokio::time::timeout(half, self.stream.message()).await;
                waited.map_err(|_| Broken::Silent)?
            }
        };
        let message = message.map_err(|error| Broken::Ended(error.to_string()))?;
        let message = message.ok_or_else(|| Broken::Ended("end of stream".into()))?;
        if message.compact_revision() > 0 {
            return Err(Broken::Compacted);
        }
        if message.canceled() {
            return Err(Broken::Ended(message.cancel_reason().to_owned()));
        }
        let heard = message.header().map_or(0, |header| positive(header.revision()));
        self.store.history().heard(heard);
        for event in message.events() {
            let kv = event.kv().ok_or_else(|| Broken::Ended("an event without a key".into()))?;
            let change = match event.event_type() {
                EventType::Put => self.store.read(kv).map(Change::Changed),
                EventType::Delete => self
                    .store
                    .id_of::<R>(kv.key())
                    .map(|id| Change::Deleted { id, revision: positive(kv.mod_revision()) }),
            };
            self.ready.push_back(change.map_err(Broken::Malformed)?);
        }
        Ok(())
    }
}

/// The task behind a [`Watch`].
struct Follower<R: Record> {
    store: Metastore,
    settings: WatchSettings,
    sender: mpsc::Sender<WatchEvent<R>>,
}

/// The receiver is gone, or must not follow any more.
struct Finished;

impl<R: Record> Follower<R> {
    async fn run(mut self) {
        let mut pause = Pause::new(Duration::from_millis(50), Duration::from_secs(2));
        while self.follow(&mut pause).await.is_ok() {
            pause.wait().await;
        }
    }

    /// Reads everything, then follows the changes until something is wrong or it is time to read everything again.
    async fn follow(&mut self, pause: &mut Pause) -> Result<(), Finished> {
        let listed = match self.store.list::<R>().await {
            Ok(listed) => listed,
            Err(Error::WentBack(WentBack { was, now })) => {
                error!(folder = R::FOLDER, was, now, "etcd's history went back");
                let _nobody_listens = self.send(WatchEvent::WentBack { was, now }).await;
                return Err(Finished);
            }
            Err(error) if error.is_transient() => {
                debug!(folder = R::FOLDER, %error, "not read");
                return Ok(());
            }
            Err(error) => {
                error!(folder = R::FOLDER, %error, "can't be read");
                return Ok(());
            }
        };
        let revision = listed.revision;
        self.send(WatchEvent::All(listed)).await?;
        pause.reset();
        let changes = self.store.changes::<R>(revision + 1, self.settings.silent_after).await;
        let mut changes = match changes {
            Ok(changes) => changes,
            Err(error) => {
                debug!(folder = R::FOLDER, %error, "not watched");
                return Ok(());
            }
        };
        let part = 0.75 + fastrand::f64() / 4.0;
        let relist_at = Instant::now() + self.settings.relist_every.mul_f64(part);
        let why = loop {
            let change = tokio::select! {
                change = changes.next() => change,
                () = tokio::time::sleep_until(relist_at) => return Ok(()),
            };
            match change {
                Ok(Change::Changed(kept)) => self.send(WatchEvent::Changed(kept)).await?,
                Ok(Change::Deleted { id, revision }) => {
                    self.send(WatchEvent::Deleted { id, revision }).await?;
                }
                Err(why) => break why,
            }
        };
        warn!(folder = R::FOLDER, ?why, "watch broken, reading everything again");
        Ok(())
    }

    async fn send(&self, event: WatchEvent<R>) -> Result<(), Finished> {
        self.sender.send(event).await.map_err(|_| Finished)
    }
}
