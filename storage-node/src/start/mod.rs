//! The start of a process, up to the moment when its identity is settled.
//!
//! ```text
//!   lock the folder, recover ──▶ etcd? ──▶ meta, and not an older one?
//!     ──▶ wait until node/{uuid} is gone ──▶ read store/{uuid} and name/{name}, decide
//!     ──▶ log, fsync ──▶ CAS
//!     ──▶ read again, decide ──▶ listen, register
//! ```

mod identity;
mod open;
mod recovery;

use engine::etcd_memory::EtcdMemory;
use engine::node::Settings;
use engine::records::Meta;
use metastore::Metastore;
use process::ProcessExit;
use telemetry::Health;
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::info;

use self::identity::StartUp;
pub(crate) use self::identity::{Booted, note_suspect};
pub(crate) use self::open::OpenDisk;
use self::open::open_disk;
use crate::inbox::{Inbox, LoopMessage};
use crate::options::NodeSettings;

/// A node whose identity is settled.
pub(crate) struct Started {
    pub(crate) disk: OpenDisk,
    pub(crate) metastore: Metastore,
    pub(crate) meta: Meta,
    /// The settings of the state machine.
    pub(crate) engine: Settings,
    pub(crate) booted: Booted,
}

/// Opens the disk, joins the cluster, and settles the identity.
pub(crate) async fn start(
    settings: &NodeSettings,
    health: &Health,
    inbox: &Inbox,
    messages: UnboundedReceiver<LoopMessage>,
) -> Result<Started, ProcessExit> {
    let mut disk = open_disk(&settings.disk, health, inbox, messages).await?;
    let waits = |reason| health.not_ready(reason);
    let metastore = Metastore::join(&settings.options.cluster.settings(), waits).await?;
    let meta = recovery::await_cluster(&mut disk, settings, &metastore, health).await?;
    metastore.stay_with(&meta);
    let keys = meta.idempotency;
    info!(
        window_s = keys.window_ms / 1_000,
        bytes_max = keys.bytes_max,
        requests_per_s = keys.requests_per_s(),
        "limits of Idempotency-Keys"
    );
    let mut engine = settings.engine(&meta);
    disk.disk.remove_expired(engine.limits());
    let options = &settings.options;
    let identity = StartUp { options, metastore: &metastore, meta: &meta, health };
    let booted = identity.identify(&mut disk).await?;
    engine.suspect = booted.suspect;
    let before = disk.contents.etcd.take();
    let memory = EtcdMemory::following(meta.clone(), booted.record.clone(), before.as_deref());
    disk.remember(memory.clone()).await?;
    engine.etcd = Some(Box::new(memory));
    Ok(Started { disk, metastore, meta, engine, booted })
}
