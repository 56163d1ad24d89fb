//! The workers' sessions: one key in etcd for each worker, all held by one lease.
//!
//! A session is the revision at which its key was created, so the loss of the lease gives every
//! worker a new session. The batchers know how to change over to it.

use engine::ids::{Revision, SessionId};
use engine::records::GatewayRecord;
use metastore::{HeldKey, Lease, LeaseEvent, LeaseSettings, Metastore};
use tracing::{info, warn};

/// The lease of this gateway, and the session of each worker.
pub(crate) struct WorkerSessions {
    store: Metastore,
    address: String,
    incarnation: u32,
    ttl_s: u32,
    lease: Lease,
    /// The session of each worker.
    present: Vec<Option<SessionId>>,
}

/// The number of a worker, and the session that it has now.
pub(crate) type SessionChange = (usize, Option<SessionId>);

impl WorkerSessions {
    pub(crate) fn new(
        store: Metastore,
        address: String,
        incarnation: u32,
        ttl_s: u32,
        workers: usize,
    ) -> Self {
        let lease = hold(&store, &address, ttl_s, workers);
        Self { store, address, incarnation, ttl_s, lease, present: vec![None; workers] }
    }

    /// Waits for the next changes. The future may be dropped and requested again.
    pub(crate) async fn next(&mut self) -> Vec<SessionChange> {
        loop {
            match self.lease.next().await {
                Some(LeaseEvent::Registered { key, created, .. }) => {
                    let incarnation = self.incarnation;
                    let session = SessionId(Revision { incarnation, revision: created });
                    info!(worker = key, revision = created, "session registered");
                    self.present[key] = Some(session);
                    return vec![(key, Some(session))];
                }
                Some(LeaseEvent::Lost) => {
                    warn!("lease lost, registering again");
                    return self.none();
                }
                Some(LeaseEvent::Granted { .. } | LeaseEvent::Confirmed) => {}
                // The lease of a gateway is not superseded and has no name to lose: a storage
                // node's can.
                Some(LeaseEvent::Superseded(_) | LeaseEvent::NameLost(_) | LeaseEvent::GivenUp)
                | None => {
                    warn!("lease task ended, starting another");
                    self.lease = self.hold();
                    return self.none();
                }
            }
        }
    }

    /// Gives up a session that must not be used any more, and with it all others, since all keys
    /// share one lease.
    pub(crate) async fn abandon(&mut self, session: SessionId) -> Vec<SessionChange> {
        // Two workers may abandon their sessions at once: the second names one that is gone
        // already.
        if !self.present.contains(&Some(session)) {
            return Vec::new();
        }
        let lease = self.hold();
        std::mem::replace(&mut self.lease, lease).stop().await;
        self.none()
    }

    fn hold(&self) -> Lease {
        hold(&self.store, &self.address, self.ttl_s, self.present.len())
    }

    fn none(&mut self) -> Vec<SessionChange> {
        self.present.fill(None);
        (0..self.present.len()).map(|worker| (worker, None)).collect()
    }

    /// Revokes the lease, so that etcd deletes the keys at once.
    pub(crate) async fn stop(self) {
        self.lease.stop().await;
    }
}

/// Registers one key per worker, under names that are new: a key that exists already can only be
/// from an earlier attempt of this process.
fn hold(store: &Metastore, address: &str, ttl_s: u32, workers: usize) -> Lease {
    let key = |worker: usize| {
        let worker = u32::try_from(worker).expect("there are at most 256 workers");
        let record = GatewayRecord { address: address.to_owned(), worker };
        HeldKey::gateway(fastrand::u128(..), &record)
    };
    store.hold((0..workers).map(key).collect(), LeaseSettings { ttl_s, ..Default::default() })
}
