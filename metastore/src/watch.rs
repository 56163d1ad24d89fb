//! Follows one kind of record: first the complete list, then the changes.
//!
//! A watch is level-triggered. etcd's watches end without notice, stall, and have lost events
//! around compaction, so every failure has the same remedy: read everything again and continue from
//! there. The receiver gets a new [`WatchEvent::All`] that replaces what it knew; it never has to
//! find out what it missed. Everything is also read again every few minutes without a failure.
//!
//! A watch is still only a hint: it may be arbitrarily late.

use std::collections::VecDeque;
use std::time::Duration;

use engine::history::WentBack;
use etcd_client::{EventType, WatchOptions, WatchStream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::backoff::RetryBackoff;
use crate::client::{Listed, Revisioned, positive};
use crate::task::Task;
use crate::{Error, EtcdRecord, Metastore};

/// The settings of a [`Watch`].
#[derive(Clone, Debug)]
pub struct WatchSettings {
    /// The interval at which everything is read again although nothing seems wrong. It is shortened
    /// at random by up to a quarter, so that many processes do not read at once.
    pub relist_every: Duration,
    /// A stream without a message for so long, although progress was requested, is dead.
    pub silent_after: Duration,
}

impl Default for WatchSettings {
    fn default() -> Self {
        Self { relist_every: Duration::from_secs(300), silent_after: Duration::from_secs(30) }
    }
}

/// A message of a [`Watch`].
#[derive(Clone, Debug, PartialEq)]
pub enum WatchEvent<R: EtcdRecord> {
    /// The complete list, which replaces everything known so far.
    All(Listed<R>),
    /// One record changed.
    Change(WatchChange<R>),
    /// etcd's history is shorter than it was: it was restored from a backup, or it is another etcd.
    /// No process may follow it before an operator has decided so; the watch has ended.
    WentBack(WentBack),
}

/// A watch of one kind of record, which ends when it is dropped.
pub struct Watch<R: EtcdRecord> {
    events: mpsc::Receiver<WatchEvent<R>>,
    task: Task,
}

impl<R: EtcdRecord> Watch<R> {
    /// Waits for the next event. Returns `None` after [`WatchEvent::WentBack`].
    pub async fn next(&mut self) -> Option<WatchEvent<R>> {
        let event = self.events.recv().await;
        if event.is_none() {
            self.task.end().await;
        }
        event
    }
}

impl Metastore {
    /// Follows one kind of record. The first event is the complete list, as soon as etcd replies.
    pub fn watch<R: EtcdRecord>(&self, settings: WatchSettings) -> Watch<R> {
        // A slow receiver holds the stream up; once it has caught up, it may get everything again.
        let (sender, events) = mpsc::channel(256);
        let task = WatchTask { store: self.clone(), settings, sender };
        Watch { events, task: Task::spawn(task.run()) }
    }

    /// Opens the stream of changes of one kind of record from revision `from` on.
    /// [`Metastore::watch`] is built on it.
    pub async fn changes<R: EtcdRecord>(
        &self,
        from: u64,
        silent_after: Duration,
    ) -> Result<ChangeStream<R>, Error> {
        let start = i64::try_from(from).unwrap_or(i64::MAX);
        let options =
            WatchOptions::new().with_prefix().with_start_revision(start).with_progress_notify();
        let mut client = self.watcher();
        let opening = client.watch(self.folder::<R>(), Some(options));
        let stream = self.call("watch", opening).await?;
        Ok(ChangeStream { store: self.clone(), stream, silent_after, ready: VecDeque::new() })
    }
}

/// A change of one record.
#[derive(Clone, Debug, PartialEq)]
pub enum WatchChange<R: EtcdRecord> {
    /// A record was created or changed.
    Changed(Revisioned<R>),
    /// A record was deleted.
    Deleted {
        /// The id of the record.
        id: R::Id,
        /// The revision of the deletion.
        revision: u64,
    },
}

/// The reason why a stream of changes ended.
#[derive(Debug)]
pub enum WatchFailure {
    /// etcd ended it, or the connection broke.
    Ended(String),
    /// etcd no longer has the changes from the requested revision on.
    Compacted,
    /// No message came for too long.
    Silent,
    /// A record can't be decoded.
    Malformed(Error),
}

/// A stream of changes, from one revision on.
pub struct ChangeStream<R: EtcdRecord> {
    store: Metastore,
    stream: WatchStream,
    silent_after: Duration,
    ready: VecDeque<WatchChange<R>>,
}

impl<R: EtcdRecord> ChangeStream<R> {
    /// Waits for the next change, in the order of etcd's revisions. Safe to cancel and call again.
    pub async fn next(&mut self) -> Result<WatchChange<R>, WatchFailure> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Ok(change);
            }
            self.receive().await?;
        }
    }

    /// Receives one message. After half of the allowed silence it requests progress from etcd,
    /// since a stream without changes and a dead one look alike.
    async fn receive(&mut self) -> Result<(), WatchFailure> {
        let half = self.silent_after / 2;
        let message = match tokio::time::timeout(half, self.stream.message()).await {
            Ok(message) => message,
            Err(_) => {
                let asked = self.stream.request_progress().await;
                asked.map_err(|error| WatchFailure::Ended(error.to_string()))?;
                let waited = tokio::time::timeout(half, self.stream.message()).await;
                waited.map_err(|_| WatchFailure::Silent)?
            }
        };
        let message = message.map_err(|error| WatchFailure::Ended(error.to_string()))?;
        let message = message.ok_or_else(|| WatchFailure::Ended("end of stream".into()))?;
        if message.compact_revision() > 0 {
            return Err(WatchFailure::Compacted);
        }
        if message.canceled() {
            return Err(WatchFailure::Ended(message.cancel_reason().to_owned()));
        }
        let revision = message.header().map_or(0, |header| positive(header.revision()));
        self.store.history().observe(revision);
        for event in message.events() {
            let kv =
                event.kv().ok_or_else(|| WatchFailure::Ended("an event without a key".into()))?;
            let change = match event.event_type() {
                EventType::Put => self.store.read(kv).map(WatchChange::Changed),
                EventType::Delete => self
                    .store
                    .id_of::<R>(kv.key())
                    .map(|id| WatchChange::Deleted { id, revision: positive(kv.mod_revision()) }),
            };
            self.ready.push_back(change.map_err(WatchFailure::Malformed)?);
        }
        Ok(())
    }
}

/// The task behind a [`Watch`].
struct WatchTask<R: EtcdRecord> {
    store: Metastore,
    settings: WatchSettings,
    sender: mpsc::Sender<WatchEvent<R>>,
}

/// The receiver is gone, or etcd must not be followed any more.
struct WatchEnded;

impl<R: EtcdRecord> WatchTask<R> {
    async fn run(mut self) {
        let mut backoff = RetryBackoff::new(Duration::from_millis(50), Duration::from_secs(2));
        while self.follow(&mut backoff).await.is_ok() {
            backoff.wait().await;
        }
    }

    /// Reads everything, then follows the changes until a failure, or until it is time to read
    /// everything again.
    async fn follow(&mut self, backoff: &mut RetryBackoff) -> Result<(), WatchEnded> {
        let listed = match self.store.list::<R>().await {
            Ok(listed) => listed,
            Err(Error::WentBack(went_back)) => {
                let _receiver_gone = self.send(WatchEvent::WentBack(went_back)).await;
                return Err(WatchEnded);
            }
            Err(error) if error.is_transient() => {
                debug!(folder = R::FOLDER, %error, "records not read");
                return Ok(());
            }
            Err(error) => {
                error!(folder = R::FOLDER, %error, "records can't be read");
                return Ok(());
            }
        };
        let revision = listed.revision;
        self.send(WatchEvent::All(listed)).await?;
        backoff.reset();
        let changes = self.store.changes::<R>(revision + 1, self.settings.silent_after).await;
        let mut changes = match changes {
            Ok(changes) => changes,
            Err(error) => {
                debug!(folder = R::FOLDER, %error, "watch not opened");
                return Ok(());
            }
        };
        let jitter = 0.75 + fastrand::f64() / 4.0;
        let relist_at = Instant::now() + self.settings.relist_every.mul_f64(jitter);
        let why = loop {
            let change = tokio::select! {
                change = changes.next() => change,
                () = tokio::time::sleep_until(relist_at) => return Ok(()),
            };
            match change {
                Ok(change) => self.send(WatchEvent::Change(change)).await?,
                Err(why) => break why,
            }
        };
        warn!(folder = R::FOLDER, ?why, "watch broken, reading everything again");
        Ok(())
    }

    async fn send(&self, event: WatchEvent<R>) -> Result<(), WatchEnded> {
        self.sender.send(event).await.map_err(|_| WatchEnded)
    }
}
