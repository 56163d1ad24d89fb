//! One process's lease and the keys that live by it, made again whenever they are gone.
//!
//! What a newcomer would get wrong: a lease that etcd says is renewed proves nothing (trap T4), and a lease that vanished
//! says nothing about the process (trap T2). So the keys themselves are looked at, after every doubt and every few
//! seconds; whoever finds its own key gone makes it again and goes on, under a new create_revision.
//!
//! A process whose disk stalls must not look alive, so it renews only while `healthy` says so.
//!
//! ```text
//!   grant ──▶ hold the keys ──▶ renew, every TTL/5 ──▶ renew …
//!     ▲                          │ lease or key gone      │ no answer: in doubt, look at the keys when etcd is back
//!     └────────── Lost ◀─────────┴────────────────────────┘
//! ```
//!
//! Every renewal is a call of its own, not a message on a long-lived stream: a stream that ended, or hangs on a member
//! that was cut off, looks like silence, and silence must not be taken for success (trap T5).

use std::sync::Arc;
use std::time::Duration;

use engine::ids::{Boot, StoreId};
use engine::records::{GatewayRecord, NodeRecord, StoreRecord};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

use crate::client::positive;
use crate::pause::Pause;
use crate::probe::failover_bound;
use crate::task::Task;
use crate::{Candidate, Error, Metastore, Outcome, Record};

/// How often a key that somebody else holds is looked at.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub struct LeaseSettings {
    /// Time to live that is asked for, in whole seconds (etcd counts in seconds).
    pub ttl_s: u32,
    /// How often the keys are looked at although nothing seems wrong.
    pub verify_every: Duration,
    /// Whether this process may look alive now.
    pub healthy: Arc<dyn Fn() -> bool + Send + Sync>,
}

impl Default for LeaseSettings {
    fn default() -> Self {
        Self { ttl_s: 2, verify_every: Duration::from_secs(10), healthy: Arc::new(|| true) }
    }
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LeaseEvent {
    /// A new lease. If `ttl_s` is above `asked_s`, a death is noticed that much later.
    Granted { ttl_s: u32, asked_s: u32 },
    /// Key number `key` stands. `created` identifies this registration (for a gateway, its session); `revision` is
    /// etcd's, at or after it.
    Registered { key: usize, created: u64, revision: u64 },
    /// etcd has just renewed the lease and the keys were last seen standing. Not sent when the receiver is busy.
    Confirmed,
    /// The lease or a key is gone; all are being made again.
    Lost,
    /// A newer run of this store has registered: this process must end. Nothing follows.
    Superseded { boot: Boot },
}

/// A key to be held by the process's lease.
#[derive(Clone, Debug)]
pub struct HeldKey {
    folder_and_name: String,
    value: Vec<u8>,
    rival: Rival,
}

/// What is done about a key that is there already, by another lease.
#[derive(Clone, Debug)]
enum Rival {
    /// It is an earlier lease of our own: the key is deleted and made anew, so that it gets a new create_revision.
    Ourselves,
    /// The same, but only while the store's record names this boot.
    EarlierBoot(BootGuard),
    /// It is somebody else, who holds it rightly: wait until it is gone.
    Other,
}

/// The run of a store that may hold its `node/` key: the boot number and nonce that it wrote into its `store/` record.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BootGuard {
    pub store: StoreId,
    pub boot: Boot,
    pub nonce: u128,
}

impl HeldKey {
    /// A storage node's `node/` key. Its `store/` record must have been written before.
    pub fn node(record: &NodeRecord, guard: BootGuard) -> Self {
        assert!(record.boot == guard.boot, "a node registers its own boot");
        Self::new(&guard.store, record, Rival::EarlierBoot(guard))
    }

    /// One gateway worker's key. The nonce is random, so whoever holds it already is this very process.
    pub fn gateway(nonce: u128, record: &GatewayRecord) -> Self {
        Self::new(&nonce, record, Rival::Ourselves)
    }

    /// The `coordinator` key, which one candidate at a time holds.
    pub(crate) fn coordinator(candidate: &Candidate) -> Self {
        Self::new(&(), candidate, Rival::Other)
    }

    fn new<R: Record>(id: &R::Id, record: &R, rival: Rival) -> Self {
        let folder_and_name = format!("{}{}", R::FOLDER, R::name(id));
        Self { folder_and_name, value: record.encode(), rival }
    }
}

/// A supervised lease. Dropped, it is no longer renewed and runs out; stopped, it is given back at once.
pub struct Lease {
    events: mpsc::Receiver<LeaseEvent>,
    stop: Option<oneshot::Sender<()>>,
    task: Task,
}

impl Lease {
    /// The next event. Keep taking them: a process that has stopped listening is not renewed any more once
    /// it has an event to hear. None after [`LeaseEvent::Superseded`].
    pub async fn next(&mut self) -> Option<LeaseEvent> {
        let event = self.events.recv().await;
        if event.is_none() {
            self.task.end().await;
        }
        event
    }

    /// Gives the lease back, so that the keys go at once instead of when it runs out.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            // If the task has ended by itself there is nothing to give back.
            let _ended = stop.send(());
        }
        // A task that still wants to tell something must find that nobody listens, instead of waiting.
        self.events.close();
        self.task.end().await;
    }
}

impl Metastore {
    /// Holds these keys by one lease, from when etcd first answers until dropped or stopped.
    pub fn hold(&self, keys: Vec<HeldKey>, settings: LeaseSettings) -> Lease {
        assert!(settings.ttl_s > 0, "a lease of no time is none");
        let (sender, events) = mpsc::channel(64);
        let (stop, stopped) = oneshot::channel();
        let held = vec![None; keys.len()];
        let holder = Holder { store: self.clone(), settings, keys, held, sender };
        Lease { events, stop: Some(stop), task: Task::spawn(holder.run(stopped)) }
    }
}

/// How long a lease lives on if nobody renews it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LeaseLeft {
    /// Rounded down to whole seconds, as etcd tells it.
    pub left: Duration,
    pub granted: Duration,
}

impl Metastore {
    /// How long a lease has left: for whoever waits for another process's key to go. None: it is gone.
    pub async fn lease_left(&self, lease: i64) -> Result<Option<LeaseLeft>, Error> {
        let mut leases = self.client().lease_client();
        let asked = self.call("lease time to live", leases.time_to_live(lease, None)).await?;
        // etcd says -1 of a lease that it does not know.
        let Ok(left) = u64::try_from(asked.ttl()) else { return Ok(None) };
        let granted = u64::try_from(asked.granted_ttl()).unwrap_or(left);
        Ok(Some(LeaseLeft {
            left: Duration::from_secs(left),
            granted: Duration::from_secs(granted),
        }))
    }
}

/// The task behind a [`Lease`].
struct Holder {
    store: Metastore,
    settings: LeaseSettings,
    keys: Vec<HeldKey>,
    /// create_revision of each key that was last seen standing by the present lease.
    held: Vec<Option<u64>>,
    sender: mpsc::Sender<LeaseEvent>,
}

/// Why a lease's life ended.
enum End {
    /// It or a key of it is gone.
    Lost,
    Superseded(Boot),
    /// The receiver has gone.
    Unheard,
}

/// What is known about the keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Known {
    /// They have not been looked at yet, or etcd gave no answer since: what it said before may no longer hold.
    Nothing,
    /// One of them is somebody else's so far.
    Awaited,
    /// All stood by the present lease.
    Stood { at: Instant },
}

impl Known {
    fn is_old(self, limit: Duration) -> bool {
        match self {
            Self::Nothing | Self::Awaited => true,
            Self::Stood { at } => at.elapsed() >= limit,
        }
    }

    /// Said aloud once per doubt, and always when waiting will not help.
    fn doubt(&mut self, lease: i64, error: &Error) {
        if *self == Self::Nothing && error.is_transient() {
            debug!(lease, %error, "lease still in doubt");
        } else {
            warn!(lease, %error, "lease in doubt");
        }
        *self = Self::Nothing;
    }
}

/// How the keys were found.
enum Keys {
    /// All stand by this lease.
    Stand,
    /// Not yet: somebody else holds one, or two changes crossed. Look again at the next turn.
    NotYet,
}

impl From<mpsc::error::SendError<LeaseEvent>> for End {
    fn from(_: mpsc::error::SendError<LeaseEvent>) -> Self {
        Self::Unheard
    }
}

impl Holder {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        loop {
            let lease = tokio::select! {
                lease = self.grant() => lease,
                _ = &mut stopped => return,
            };
            let end = tokio::select! {
                end = self.live(lease) => end,
                _ = &mut stopped => {
                    self.revoke(lease).await;
                    return;
                }
            };
            self.held.fill(None);
            // Told before anything that takes time: a leader that was deposed must stop at once.
            let goes_on = match end {
                End::Lost => {
                    info!(lease, "lease lost, making another");
                    self.sender.send(LeaseEvent::Lost).await.is_ok()
                }
                End::Superseded(boot) => {
                    let _nobody_listens = self.sender.send(LeaseEvent::Superseded { boot }).await;
                    false
                }
                End::Unheard => false,
            };
            // What is left of it goes at once, instead of standing in the way of the next.
            self.revoke(lease).await;
            if !goes_on {
                return;
            }
        }
    }

    /// A new lease, however long etcd is away. A grant whose answer is lost leaves a lease without keys, which runs out.
    async fn grant(&self) -> i64 {
        let asked_s = self.settings.ttl_s;
        let mut pause = Pause::new(Duration::from_millis(50), Duration::from_secs(1));
        let mut said = false;
        loop {
            // A process that may not look alive does not register either.
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
                                "etcd grants no lease shorter than 1.5 times its election timeout: a process that stops \
                                 without a word is replaced later than asked for"
                            );
                        }
                        let event = LeaseEvent::Granted { ttl_s, asked_s };
                        // If nobody listens, the first registration notices.
                        let _nobody_listens = self.sender.send(event).await;
                        return granted.id();
                    }
                    Err(error) if said => debug!(%error, "still no lease"),
                    Err(error) => {
                        warn!(%error, "no lease yet");
                        said = true;
                    }
                }
            }
            pause.wait().await;
        }
    }

    /// Gives a lease back. If that fails it runs out by itself.
    async fn revoke(&self, lease: i64) {
        let mut leases = self.store.client().lease_client();
        if let Err(error) = self.store.call("lease revoke", leases.revoke(lease)).await {
            debug!(lease, %error, "not revoked");
        }
    }

    /// Renews until the lease or a key is gone.
    async fn live(&mut self, lease: i64) -> End {
        let ttl = Duration::from_secs(u64::from(self.settings.ttl_s));
        let mut turns = tokio::time::interval(ttl / 5);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut known = Known::Nothing;
        loop {
            let renews = tokio::select! {
                _ = turns.tick() => true,
                // Between two renewals, so that a standby takes over as soon as it may.
                () = tokio::time::sleep(LOOK_AGAIN_AFTER), if known == Known::Awaited => false,
            };
            if !(self.settings.healthy)() {
                debug!(lease, "not renewed: this process is not healthy");
                continue;
            }
            if renews {
                match self.renew(lease, ttl / 2).await {
                    Ok(()) => {}
                    Err(Error::LeaseGone) => return End::Lost,
                    Err(error) => {
                        known.doubt(lease, &error);
                        continue;
                    }
                }
            }
            if known.is_old(self.settings.verify_every) {
                match self.hold_all(lease).await {
                    Ok(Ok(Keys::Stand)) => known = Known::Stood { at: Instant::now() },
                    Ok(Ok(Keys::NotYet)) => known = Known::Awaited,
                    Ok(Err(error)) => known.doubt(lease, &error),
                    Err(end) => return end,
                }
            }
            if matches!(known, Known::Stood { .. }) && self.confirm().is_err() {
                return End::Unheard;
            }
        }
    }

    /// Tells that etcd answered, unless something else waits to be heard: an old confirmation confirms nothing.
    fn confirm(&self) -> Result<(), End> {
        if self.sender.is_closed() {
            return Err(End::Unheard);
        }
        if self.sender.capacity() == self.sender.max_capacity() {
            let _receiver_went_just_now = self.sender.try_send(LeaseEvent::Confirmed);
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
        // The client library says "not found" in words only; etcd is asked for a plain answer.
        let asking = leases.time_to_live(lease, None);
        let left = self.store.call_within(limit, "lease time to live", asking).await?;
        if left.ttl() <= 0 {
            return Err(Error::LeaseGone);
        }
        Err(Error::NoAnswer { what: "lease renewal", why: "not renewed, not gone".into() })
    }

    /// Sees to it that each key stands by this lease.
    async fn hold_all(&mut self, lease: i64) -> Result<Result<Keys, Error>, End> {
        let mut all = Keys::Stand;
        for key in 0..self.keys.len() {
            match self.hold(key, lease).await {
                Ok(Keys::Stand) => {}
                Ok(Keys::NotYet) => all = Keys::NotYet,
                Err(Trouble::End(end)) => return Err(end),
                Err(Trouble::Error(Error::LeaseGone)) => return Err(End::Lost),
                Err(Trouble::Error(error)) => return Ok(Err(error)),
            }
        }
        Ok(Ok(all))
    }

    async fn hold(&mut self, key: usize, lease: i64) -> Result<Keys, Trouble> {
        let name = format!("{}{}", self.store.prefix(), self.keys[key].folder_and_name);
        let (reply, revision) = self.store.range("get", name.clone(), None).await?;
        let seen = reply.kvs().first().map(|kv| (positive(kv.create_revision()), kv.lease()));
        match seen {
            Some((created, by)) if by == lease => {
                self.stands(key, created, revision).await?;
                return Ok(Keys::Stand);
            }
            _ if self.held[key].is_some() => return Err(Trouble::End(End::Lost)),
            _ => {}
        }
        let mut txn = self.store.txn();
        match &self.keys[key].rival {
            Rival::Other if seen.is_some() => return Ok(Keys::NotYet),
            Rival::Other | Rival::Ourselves => {}
            Rival::EarlierBoot(guard) => {
                let modified = self.check_boot(*guard).await?;
                txn = txn.if_modified_at::<StoreRecord>(&guard.store, modified);
            }
        }
        if let Some((created, by)) = seen {
            // Not put over: that would keep the create_revision, and with it the identity, of the one before.
            info!(key = name, lease = by, "taking over the key of an earlier lease");
            txn.delete_raw(name, created).commit().await?;
            // Made at once, not at the next turn: a restarted node should be seen soon.
            return Box::pin(self.hold(key, lease)).await;
        }
        let value = self.keys[key].value.clone();
        match txn.create_raw(name, value, lease).commit().await? {
            Outcome::Done { revision } => {
                self.stands(key, revision, revision).await?;
                Ok(Keys::Stand)
            }
            // Unknown too: making it is safe to try again, since it compares for absence, and if the lost one takes effect
            // the key is seen to stand by this lease.
            Outcome::Failed | Outcome::Unknown => Ok(Keys::NotYet),
        }
    }

    /// The store's record still names this boot; returns its mod_revision, for the guard of a transaction.
    async fn check_boot(&self, guard: BootGuard) -> Result<u64, Trouble> {
        let Some(kept) = self.store.get::<StoreRecord>(&guard.store).await? else {
            let why = format!("no record of store {}", guard.store);
            return Err(Trouble::Error(Error::Refused { what: "registration", why }));
        };
        if kept.record.boot != guard.boot || kept.record.nonce != guard.nonce {
            return Err(Trouble::End(End::Superseded(kept.record.boot)));
        }
        Ok(kept.modified)
    }

    /// Notes that a key stands, and tells it if this is news.
    async fn stands(&mut self, key: usize, created: u64, revision: u64) -> Result<(), Trouble> {
        if self.held[key] == Some(created) {
            return Ok(());
        }
        self.held[key] = Some(created);
        let event = LeaseEvent::Registered { key, created, revision };
        self.sender.send(event).await.map_err(|closed| Trouble::End(closed.into()))
    }
}

/// Why a key could not be held.
enum Trouble {
    /// Perhaps at the next turn.
    Error(Error),
    End(End),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}
