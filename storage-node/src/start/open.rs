//! The opening of the disk, and the write before the state machine exists.

use std::time::{Duration, Instant};

use engine::etcd_memory::EtcdMemory;
use engine::node::Event;
use engine::store::log::LogRecord;
use process::ProcessExit;
use telemetry::Health;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout_at;
use tracing::{error, warn};

use crate::disk::{Disk, DiskContents};
use crate::disk_settings::DiskSettings;
use crate::error::DiskError;
use crate::inbox::{Inbox, LoopMessage};

/// The interval in which a disk without room is opened again.
const OPEN_AGAIN_EVERY: Duration = Duration::from_secs(1);
/// The interval of log lines about a disk without room.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// The time-out of the first write, which takes milliseconds on a working disk.
const FIRST_WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// An open disk, and the messages of its threads.
pub(crate) struct OpenDisk {
    /// The disk.
    pub(crate) disk: Disk,
    /// The content that recovery found. The number of the next group grows with each write.
    pub(crate) contents: DiskContents,
    /// The messages of the disk's threads.
    pub(crate) messages: UnboundedReceiver<LoopMessage>,
    /// Events of the disk from before the state machine existed.
    pub(crate) early: Vec<Event>,
}

/// Opens the disk, retrying until there is room: a node that ended for want of room is started
/// again and waits here, its copies as they were.
pub(crate) async fn open_disk(
    settings: &DiskSettings,
    health: &Health,
    inbox: &Inbox,
    messages: UnboundedReceiver<LoopMessage>,
) -> Result<OpenDisk, ProcessExit> {
    let mut last_logged: Option<Instant> = None;
    let (disk, contents) = loop {
        let (settings, inbox) = (settings.clone(), inbox.clone());
        let opened = tokio::task::spawn_blocking(move || try_open(settings, inbox)).await;
        let error = match opened.map_err(|error| ProcessExit::Failed(error.to_string()))? {
            Ok(opened) => break opened,
            Err(error) => error,
        };
        let Some(shortage) = error.shortage() else { return Err(error.into()) };
        health.not_ready(shortage.reason());
        if last_logged.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            last_logged = Some(Instant::now());
            warn!(why = error.with_advice(), "disk can't be opened yet, retrying");
        }
        tokio::time::sleep(OPEN_AGAIN_EVERY).await;
    };
    health.not_ready("recovery");
    for damage in &contents.damage {
        error!(damage, "damage found on the disk");
    }
    Ok(OpenDisk { disk, contents, messages, early: Vec::new() })
}

fn try_open(settings: DiskSettings, inbox: Inbox) -> Result<(Disk, DiskContents), DiskError> {
    let failures = inbox.clone();
    // Once the loop has ended, events have no receiver and need none.
    Disk::open(
        settings,
        move |event| {
            inbox.send(LoopMessage::Disk(event));
        },
        move |error| {
            failures.send(LoopMessage::Exit(error.into()));
        },
    )
}

impl OpenDisk {
    /// Writes durably what is known of etcd.
    pub(crate) async fn remember(&mut self, memory: EtcdMemory) -> Result<(), ProcessExit> {
        let memory = Box::new(memory);
        self.contents.etcd = Some(memory.clone());
        self.write_durably(LogRecord::Etcd(memory)).await
    }

    /// Writes a group of one record and waits for its fsync.
    pub(crate) async fn write_durably(&mut self, record: LogRecord) -> Result<(), ProcessExit> {
        let group = self.contents.next_group;
        self.contents.next_group += 1;
        self.disk.write(record);
        self.disk.sync(group);
        let until = tokio::time::Instant::now() + FIRST_WRITE_TIMEOUT;
        loop {
            match timeout_at(until, self.messages.recv()).await {
                Ok(Some(LoopMessage::Disk(event))) => match self.disk.accept(event) {
                    Event::Durable { group: done } if done >= group => return Ok(()),
                    other => self.early.push(other),
                },
                Ok(Some(LoopMessage::Exit(exit))) => return Err(exit),
                // There are no other senders before the loop begins.
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => {
                    return Err(ProcessExit::Failed(format!(
                        "disk: no fsync within {FIRST_WRITE_TIMEOUT:?}: the disk hangs or has no \
                         room"
                    )));
                }
            }
        }
    }
}
