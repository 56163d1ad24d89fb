//! The workers' sessions: one key in etcd for each, all by one lease.
//!
//! A session is where in etcd's history its key was created, so losing the lease gives every worker a new one. The
//! machines know how to change over; here they are only told.

use engine::ids::{Revision, SessionId};
use engine::records::GatewayRecord;
use metastore::{HeldKey, Lease, LeaseEvent, LeaseSettings, Metastore};
use tracing::{info, warn};

pub(crate) struct Sessions {
    store: Metastore,
    address: String,
    incarnation: u32,
    ttl_s: u32,
    lease: Lease,
    /// What each worker has.
    present: Vec<Option<SessionId>>,
}

/// Worker number so-and-so has this session now.
pub(crate) type Changed = (usize, Option<SessionId>);

impl Sessions {
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

    /// The next changes. Safe to drop and call again.
    pub(crate) async fn next(&mut self) -> Vec<Changed> {
        loop {
            match self.lease.next().await {
                Some(LeaseEvent::Registered { key, created, .. }) => {
                    let incarnation = self.incarnation;
                    let session = SessionId(Revision { incarnation, revision: created });
                    info!(worker = key, revision = created, "session begins");
                    self.present[key] = Some(session);
                    return vec![(key, Some(session))];
                }
                Some(LeaseEvent::Lost) => {
                    warn!("lease lost, registering again");
                    return self.none();
                }
                Some(LeaseEvent::Granted { .. } | LeaseEvent::Confirmed) => {}
                // Only a storage node is superseded.
                Some(LeaseEvent::Superseded { .. }) | None => {
                    warn!("the lease's task has ended, beginning another");
                    self.lease = self.hold();
                    return self.none();
                }
            }
        }
    }

    /// Gives up a session that must not be used any more, and with it, since they share a lease, all others.
    pub(crate) async fn abandon(&mut self, session: SessionId) -> Vec<Changed> {
        // Two workers may complain at once, of which the second speaks of what is gone already.
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

    fn none(&mut self) -> Vec<Changed> {
        self.present.fill(None);
        (0..self.present.len()).map(|worker| (worker, None)).collect()
    }

    /// Gives the lease back, so that the keys go at once.
    pub(crate) async fn stop(self) {
        self.lease.stop().await;
    }
}

/// Keys of names that nobody had before: a key that is there already must be this very process's.
fn hold(store: &Metastore, address: &str, ttl_s: u32, workers: usize) -> Lease {
    let key = |worker: usize| {
        let worker = u32::try_from(worker).expect("there are at most 256 workers");
        let record = GatewayRecord { address: address.to_owned(), worker };
        HeldKey::gateway(fastrand::u128(..), &record)
    };
    store.hold((0..workers).map(key).collect(), LeaseSettings { ttl_s, ..Default::default() })
}
