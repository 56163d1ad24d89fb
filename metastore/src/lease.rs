//! The lease of a process and the keys bound to it, which are created again when they are gone.
//!
//! Two facts are easy to miss: a renewal that etcd acknowledged does not prove that the keys exist,
//! and a lease that vanished does not mean that the process is unhealthy. So the keys themselves
//! are read, after every failed call and every few seconds; a process that finds its own key gone
//! creates it again and continues, under a new create_revision.
//!
//! A process whose disk stalls must not look alive, so it renews only while `healthy` returns true.
//!
//! ```text
//!   grant ──▶ hold the keys ──▶ renew, every TTL/5 ──▶ renew …
//!     ▲                          │ lease or key gone      │ no reply: unknown, so the keys
//!     └────────── Lost ◀─────────┴────────────────────────┘ are read when etcd is back
//! ```
//!
//! Every renewal is a call of its own, not a message on a long-lived stream: a stream that ended,
//! or that hangs on a member which was cut off, only shows as silence, and silence must not be
//! taken for success.

use std::sync::Arc;
use std::time::Duration;

use engine::ids::{Boot, StoreId};
use engine::records::{GatewayRecord, NameRecord, NodeRecord, StoreRecord, StoreStatus};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

use crate::backoff::RetryBackoff;
use crate::client::positive;
use crate::inspection::failover_bound;
use crate::task::Task;
use crate::{CasOutcome, CoordinatorRecord, Error, EtcdRecord, Metastore, Revisioned, Txn};

/// The interval at which a key that another process holds is read.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// The settings of a [`Lease`].
#[derive(Clone)]
pub struct LeaseSettings {
    /// The requested time to live, in whole seconds (etcd counts in seconds), at least 1.
    pub ttl_s: u32,
    /// The interval at which the keys are read although nothing seems wrong.
    pub verify_every: Duration,
    /// Returns whether this process is healthy: only then is the lease renewed.
    pub healthy: Arc<dyn Fn() -> bool + Send + Sync>,
}

impl Default for LeaseSettings {
    fn default() -> Self {
        Self { ttl_s: 2, verify_every: Duration::from_secs(10), healthy: Arc::new(|| true) }
    }
}

/// A change of a [`Lease`] or of its keys.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LeaseEvent {
    /// A new lease was granted. If `ttl_s` is above `asked_s`, a death is noticed that much later.
    Granted {
        /// The granted time to live, in seconds.
        ttl_s: u32,
        /// The requested time to live, in seconds.
        asked_s: u32,
    },
    /// A key is bound to the lease.
    Registered {
        /// The index of the key in the list that [`Metastore::hold`] was given.
        key: usize,
        /// The create_revision, which identifies this registration (for a gateway, its session).
        created: u64,
    },
    /// etcd has just renewed the lease, and the last read of the keys found all bound to it. This
    /// event is omitted while the receiver is busy.
    Confirmed,
    /// The lease or a key is gone; all are being created again.
    Lost,
    /// This newer boot of the store has registered: this process must end. No event follows.
    Superseded(Boot),
    /// The name of the store belongs to this other store now: this process must end. No event
    /// follows.
    NameLost(StoreId),
    /// The store was removed from the cluster while this process hung or was cut off: this process
    /// must end. No event follows.
    GivenUp,
}

/// A key to be bound to the process's lease.
#[derive(Clone, Debug)]
pub struct HeldKey {
    folder_and_name: String,
    value: Vec<u8>,
    on_conflict: KeyConflict,
}

/// The reaction to a key that exists already and is bound to another lease.
#[derive(Clone, Debug)]
enum KeyConflict {
    /// The other lease is an earlier one of this process: the key is deleted and created again, so
    /// that it gets a new create_revision.
    TakeOver,
    /// The key is taken over, but only while the store's record names this boot, and the name's
    /// record this store.
    TakeOverEarlierBoot(BootGuard),
    /// The key belongs to another process: wait until it is gone.
    Wait,
}

/// The boot of a store that may hold the store's `node/` key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BootGuard {
    /// The store.
    pub store: StoreId,
    /// The boot number that this boot wrote into the `store/` record.
    pub boot: Boot,
    /// The random number that this boot wrote into the `store/` record.
    pub nonce: u128,
}

impl HeldKey {
    /// Returns a storage node's `node/` key. Its `store/` record must have been written before.
    pub fn node(record: &NodeRecord, guard: BootGuard) -> Self {
        assert!(record.boot == guard.boot, "a node registers its own boot");
        Self::new(&guard.store, record, KeyConflict::TakeOverEarlierBoot(guard))
    }

    /// Returns the key of one gateway worker. The nonce is random, so a key that exists already was
    /// created by this process.
    pub fn gateway(nonce: u128, record: &GatewayRecord) -> Self {
        Self::new(&nonce, record, KeyConflict::TakeOver)
    }

    /// Returns the `coordinator` key, which one candidate at a time holds.
    pub(crate) fn coordinator(candidate: &CoordinatorRecord) -> Self {
        Self::new(&(), candidate, KeyConflict::Wait)
    }

    fn new<R: EtcdRecord>(id: &R::Id, record: &R, on_conflict: KeyConflict) -> Self {
        let folder_and_name = format!("{}{}", R::FOLDER, R::name(id));
        Self { folder_and_name, value: record.encode(), on_conflict }
    }
}

/// A lease that is renewed in the background. When this is dropped, the lease is no longer renewed
/// and expires; [`stop`](Self::stop) revokes it at once.
pub struct Lease {
    events: mpsc::Receiver<LeaseEvent>,
    stop: Option<oneshot::Sender<()>>,
    task: Task,
}

impl Lease {
    /// Waits for the next event. Returns `None` after [`LeaseEvent::Superseded`],
    /// [`LeaseEvent::NameLost`] and [`LeaseEvent::GivenUp`].
    ///
    /// The caller must keep receiving: renewal stops while the queue of events is full.
    pub async fn next(&mut self) -> Option<LeaseEvent> {
        let event = self.events.recv().await;
        if event.is_none() {
            self.task.end().await;
        }
        event
    }

    /// Revokes the lease, so that the keys vanish at once instead of when it expires.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            // If the task has ended by itself, there is nothing to revoke.
            let _ended = stop.send(());
        }
        // A task that is sending an event must find the channel closed, instead of waiting.
        self.events.close();
        self.task.end().await;
    }
}

impl Metastore {
    /// Binds these keys to one lease, from etcd's first reply until the lease is dropped or
    /// stopped.
    pub fn hold(&self, keys: Vec<HeldKey>, settings: LeaseSettings) -> Lease {
        assert!(settings.ttl_s > 0, "a lease needs a time to live");
        let (sender, events) = mpsc::channel(64);
        let (stop, stopped) = oneshot::channel();
        let held = vec![None; keys.len()];
        let task = LeaseTask { store: self.clone(), settings, keys, held, sender };
        Lease { events, stop: Some(stop), task: Task::spawn(task.run(stopped)) }
    }
}

/// The remaining lifetime of a lease that is not renewed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LeaseLeft {
    /// The time until it expires, rounded down to whole seconds, as etcd reports it.
    pub left: Duration,
    /// The time to live that was granted.
    pub granted: Duration,
}

impl Metastore {
    /// Returns the remaining lifetime of a lease, for a process that waits until another process's
    /// key is gone. Returns `None` if the lease is gone.
    pub async fn lease_left(&self, lease: i64) -> Result<Option<LeaseLeft>, Error> {
        let mut leases = self.client().lease_client();
        let asked = self.call("lease time to live", leases.time_to_live(lease, None)).await?;
        // etcd returns -1 for a lease that it does not know.
        let Ok(left) = u64::try_from(asked.ttl()) else { return Ok(None) };
        let granted = u64::try_from(asked.granted_ttl()).unwrap_or(left);
        Ok(Some(LeaseLeft {
            left: Duration::from_secs(left),
            granted: Duration::from_secs(granted),
        }))
    }
}

impl Metastore {
    /// Creates a record that does not exist yet, and that etcd deletes after `ttl_s` seconds, or a
    /// little later.
    pub async fn create_for<R: EtcdRecord>(
        &self,
        id: &R::Id,
        record: &R,
        ttl_s: u32,
    ) -> Result<CasOutcome, Error> {
        let mut leases = self.client().lease_client();
        let granted = self.call("lease grant", leases.grant(i64::from(ttl_s), None)).await?;
        let key = self.key::<R>(id);
        self.txn().create_raw(key, record.encode(), granted.id()).commit().await
    }
}

/// The task behind a [`Lease`].
struct LeaseTask {
    store: Metastore,
    settings: LeaseSettings,
    keys: Vec<HeldKey>,
    /// The create_revision of each key that was last read as bound to the current lease.
    held: Vec<Option<u64>>,
    sender: mpsc::Sender<LeaseEvent>,
}

/// The reason why a lease is no longer held.
enum LeaseEnd {
    /// The lease or one of its keys is gone.
    Lost,
    /// Another process has replaced this one for good.
    Replaced(LeaseEvent),
    /// The receiver of the events was dropped.
    ReceiverGone,
}

/// The result of the last read of the keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum KeysStatus {
    /// The keys were not read yet, or a call has failed since then, so that an earlier result may
    /// no longer hold.
    Unknown,
    /// Another process holds one of the keys.
    Awaited,
    /// All keys were bound to the current lease.
    Held { at: Instant },
}

impl KeysStatus {
    fn is_old(self, limit: Duration) -> bool {
        match self {
            Self::Unknown | Self::Awaited => true,
            Self::Held { at } => at.elapsed() >= limit,
        }
    }

    /// Records a failed call. The first failure in a row is logged as a warning, and so is every
    /// one that waiting does not cure.
    fn on_failure(&mut self, lease: i64, error: &Error) {
        if *self == Self::Unknown && error.is_transient() {
            debug!(lease, %error, "state of the lease is still unknown");
        } else {
            warn!(lease, %error, "state of the lease is unknown");
        }
        *self = Self::Unknown;
    }
}

/// The result of binding a key, or all keys, to the lease.
enum HoldOutcome {
    /// All are bound to this lease.
    Held,
    /// Another process holds a key, or another write came between: try again at the next turn.
    NotYet,
}

impl From<mpsc::error::SendError<LeaseEvent>> for LeaseEnd {
    fn from(_: mpsc::error::SendError<LeaseEvent>) -> Self {
        Self::ReceiverGone
    }
}

impl LeaseTask {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        loop {
            let lease = tokio::select! {
                lease = self.grant() => lease,
                _ = &mut stopped => return,
            };
            let end = tokio::select! {
                end = self.keep(lease) => end,
                _ = &mut stopped => {
                    self.revoke(lease).await;
                    return;
                }
            };
            self.held.fill(None);
            // The event comes before anything that takes time: a leader that was deposed must stop
            // at once.
            let goes_on = match end {
                LeaseEnd::Lost => {
                    info!(lease, "lease lost, requesting another");
                    self.sender.send(LeaseEvent::Lost).await.is_ok()
                }
                LeaseEnd::Replaced(event) => {
                    let _receiver_gone = self.sender.send(event).await;
                    false
                }
                LeaseEnd::ReceiverGone => false,
            };
            // The remaining keys are deleted at once, so that they don't delay the next lease.
            self.revoke(lease).await;
            if !goes_on {
                return;
            }
        }
    }

    /// Requests a lease until etcd grants one. A grant whose reply is lost leaves a lease without
    /// keys, which expires.
    async fn grant(&self) -> i64 {
        let asked_s = self.settings.ttl_s;
        let mut backoff = RetryBackoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let mut warned = false;
        loop {
            // A process that is not healthy does not register.
            if (self.settings.healthy)() {
                let mut leases = self.store.client().lease_client();
                let granting = leases.grant(i64::from(asked_s), None);
                match self.store.call("lease grant", granting).await {
                    Ok(granted) => {
                        let ttl_s = u32::try_from(granted.ttl()).unwrap_or(asked_s);
                        if ttl_s > asked_s {
                            let replaced_within_s = failover_bound(ttl_s).as_secs();
                            warn!(
                                asked_s,
                                granted_s = ttl_s,
                                replaced_within_s,
                                "etcd grants no lease shorter than 1.5 times its election timeout, \
                                 so a process that stops silently is replaced later than requested"
                            );
                        }
                        let event = LeaseEvent::Granted { ttl_s, asked_s };
                        // If the receiver is gone, the first registration finds out.
                        let _receiver_gone = self.sender.send(event).await;
                        return granted.id();
                    }
                    Err(error) if warned => debug!(%error, "lease not granted yet"),
                    Err(error) => {
                        warn!(%error, "lease not granted, trying again");
                        warned = true;
                    }
                }
            }
            backoff.wait().await;
        }
    }

    /// Revokes a lease. If that fails, the lease expires by itself.
    async fn revoke(&self, lease: i64) {
        let mut leases = self.store.client().lease_client();
        if let Err(error) = self.store.call("lease revoke", leases.revoke(lease)).await {
            debug!(lease, %error, "lease not revoked");
        }
    }

    /// Renews until the lease or a key is gone.
    async fn keep(&mut self, lease: i64) -> LeaseEnd {
        let ttl = Duration::from_secs(u64::from(self.settings.ttl_s));
        let mut turns = tokio::time::interval(ttl / 5);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut keys = KeysStatus::Unknown;
        loop {
            let renews = tokio::select! {
                _ = turns.tick() => true,
                // Between two renewals, so that a standby takes over as soon as it may.
                () = tokio::time::sleep(LOOK_AGAIN_AFTER), if keys == KeysStatus::Awaited => false,
            };
            if !(self.settings.healthy)() {
                debug!(lease, "lease not renewed: this process is not healthy");
                continue;
            }
            if renews {
                match self.renew(lease, ttl / 2).await {
                    Ok(()) => {}
                    Err(Error::LeaseGone) => return LeaseEnd::Lost,
                    Err(error) => {
                        keys.on_failure(lease, &error);
                        continue;
                    }
                }
            }
            if keys.is_old(self.settings.verify_every) {
                match self.hold_all(lease).await {
                    Ok(HoldOutcome::Held) => keys = KeysStatus::Held { at: Instant::now() },
                    Ok(HoldOutcome::NotYet) => keys = KeysStatus::Awaited,
                    Err(HoldError::Error(error)) => keys.on_failure(lease, &error),
                    Err(HoldError::LeaseEnd(end)) => return end,
                }
            }
            if matches!(keys, KeysStatus::Held { .. }) && self.confirm().is_err() {
                return LeaseEnd::ReceiverGone;
            }
        }
    }

    /// Sends a confirmation, unless other events are in the queue: an old confirmation is
    /// worthless.
    fn confirm(&self) -> Result<(), LeaseEnd> {
        if self.sender.is_closed() {
            return Err(LeaseEnd::ReceiverGone);
        }
        if self.sender.capacity() == self.sender.max_capacity() {
            let _receiver_just_gone = self.sender.try_send(LeaseEvent::Confirmed);
        }
        Ok(())
    }

    async fn renew(&self, lease: i64, limit: Duration) -> Result<(), Error> {
        let mut leases = self.store.client().lease_client();
        let renewing = leases.keep_alive(lease);
        match self.store.call_within(limit, "lease renewal", renewing).await {
            // The stream is dropped: the next renewal opens its own.
            Ok((_, _)) => return Ok(()),
            Err(error @ Error::LeaseGone) => return Err(error),
            Err(error) => debug!(lease, %error, "asking whether the lease is gone"),
        }
        // The client library reports "not found" as text only, so etcd is queried for the lease.
        let asking = leases.time_to_live(lease, None);
        let left = self.store.call_within(limit, "lease time to live", asking).await?;
        if left.ttl() <= 0 {
            return Err(Error::LeaseGone);
        }
        Err(Error::NoAnswer("lease renewal", "not renewed, but not gone".into()))
    }

    /// Binds each key to this lease, unless it is bound already.
    async fn hold_all(&mut self, lease: i64) -> Result<HoldOutcome, HoldError> {
        let mut all = HoldOutcome::Held;
        for key in 0..self.keys.len() {
            if let HoldOutcome::NotYet = self.hold(key, lease).await? {
                all = HoldOutcome::NotYet;
            }
        }
        Ok(all)
    }

    async fn hold(&mut self, key: usize, lease: i64) -> Result<HoldOutcome, HoldError> {
        let name = format!("{}{}", self.store.prefix(), self.keys[key].folder_and_name);
        let (reply, _) = self.store.range("get", name.clone(), None).await?;
        let found = reply.kvs().first().map(|kv| (positive(kv.create_revision()), kv.lease()));
        match found {
            Some((created, by)) if by == lease => {
                self.on_held(key, created).await?;
                return Ok(HoldOutcome::Held);
            }
            _ if self.held[key].is_some() => return Err(HoldError::LeaseEnd(LeaseEnd::Lost)),
            _ => {}
        }
        let mut txn = self.store.txn();
        match &self.keys[key].on_conflict {
            KeyConflict::Wait if found.is_some() => return Ok(HoldOutcome::NotYet),
            KeyConflict::Wait | KeyConflict::TakeOver => {}
            KeyConflict::TakeOverEarlierBoot(guard) => {
                txn = self.guarded(txn, *guard).await?;
            }
        }
        if let Some((created, by)) = found {
            // The key is deleted, not overwritten: that would keep its create_revision, and with it
            // the identity of the earlier registration.
            info!(key = name, lease = by, "taking over the key of an earlier lease");
            txn.delete_raw(name, created).commit().await?;
            // The key is created at once, not at the next turn: a restarted node should be visible
            // soon.
            return Box::pin(self.hold(key, lease)).await;
        }
        let value = self.keys[key].value.clone();
        match txn.create_raw(name, value, lease).commit().await? {
            CasOutcome::Done { mod_revision: created } => {
                self.on_held(key, created).await?;
                Ok(HoldOutcome::Held)
            }
            // An unknown outcome is tried again, too: the transaction compares for absence, and if
            // the lost one takes effect, the next read finds the key bound to this lease.
            CasOutcome::Failed | CasOutcome::Unknown => Ok(HoldOutcome::NotYet),
        }
    }

    /// Adds comparisons to a transaction, so that it takes effect only while the store's record
    /// names this boot, and the name's record this store.
    async fn guarded(&self, txn: Txn, guard: BootGuard) -> Result<Txn, HoldError> {
        let Some(store) = self.store.get::<StoreRecord>(&guard.store).await? else {
            let why = format!("no record of store {}", guard.store);
            return Err(HoldError::Error(Error::Refused("registration", why)));
        };
        if store.record.boot != guard.boot || store.record.nonce != guard.nonce {
            let superseded = LeaseEvent::Superseded(store.record.boot);
            return Err(HoldError::LeaseEnd(LeaseEnd::Replaced(superseded)));
        }
        let txn = txn.if_modified_at::<StoreRecord>(&guard.store, store.modified);
        let is_removed = store.record.status == StoreStatus::Retired;
        let name = store.record.name;
        match self.store.get::<NameRecord>(&name).await? {
            Some(Revisioned { record: NameRecord { store }, .. }) if store != guard.store => {
                Err(HoldError::LeaseEnd(LeaseEnd::Replaced(LeaseEvent::NameLost(store))))
            }
            // A process that hung while its store was removed does not come back.
            _ if is_removed => Err(HoldError::LeaseEnd(LeaseEnd::Replaced(LeaseEvent::GivenUp))),
            Some(stored) => Ok(txn.if_modified_at::<NameRecord>(&name, stored.modified)),
            None => Ok(txn.if_absent::<NameRecord>(&name)),
        }
    }

    /// Records that a key is bound to the lease, and sends an event if it was not before.
    async fn on_held(&mut self, key: usize, created: u64) -> Result<(), HoldError> {
        if self.held[key] == Some(created) {
            return Ok(());
        }
        self.held[key] = Some(created);
        let event = LeaseEvent::Registered { key, created };
        self.sender.send(event).await.map_err(|closed| HoldError::LeaseEnd(closed.into()))
    }
}

/// The reason why a key could not be bound to the lease.
enum HoldError {
    /// A call failed; the next turn tries again.
    Error(Error),
    /// The lease is no longer held.
    LeaseEnd(LeaseEnd),
}

impl From<Error> for HoldError {
    fn from(error: Error) -> Self {
        match error {
            Error::LeaseGone => Self::LeaseEnd(LeaseEnd::Lost),
            error => Self::Error(error),
        }
    }
}
