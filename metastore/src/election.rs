//! The leader election of the coordinators: the holder of the `coordinator` key leads.
//!
//! The key's create_revision is the leader's *term*. Leadership is a hint like every lease: two
//! processes may both believe that they lead. Their writes are safe all the same, because every
//! write of a coordinator compares its term in the same transaction, and etcd holds only one term.

use crate::lease::{HeldKey, Lease, LeaseEvent, LeaseSettings};
use crate::{CoordinatorRecord, Metastore};

/// A change of the role of this process in the election.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LeadershipChange {
    /// This process was elected.
    Leading {
        /// The create_revision of its key.
        term: u64,
    },
    /// This process no longer leads, and is a candidate again.
    Standby,
}

/// A candidacy, which lasts until it is dropped or resigned.
pub struct Election {
    lease: Lease,
    leads: bool,
}

impl Metastore {
    /// Enters `candidate` into the election. A candidate that is not healthy (see
    /// [`LeaseSettings::healthy`]) neither stays the leader nor becomes it.
    pub fn stand_for_election(
        &self,
        candidate: &CoordinatorRecord,
        settings: LeaseSettings,
    ) -> Election {
        let lease = self.hold(vec![HeldKey::coordinator(candidate)], settings);
        Election { lease, leads: false }
    }
}

impl Election {
    /// Waits for the next change; a candidate begins as a standby. Returns `None` if the task of
    /// the lease has failed.
    pub async fn next(&mut self) -> Option<LeadershipChange> {
        loop {
            match self.lease.next().await? {
                LeaseEvent::Registered { created, .. } => {
                    self.leads = true;
                    return Some(LeadershipChange::Leading { term: created });
                }
                LeaseEvent::Lost if std::mem::take(&mut self.leads) => {
                    return Some(LeadershipChange::Standby);
                }
                LeaseEvent::Lost | LeaseEvent::Granted { .. } | LeaseEvent::Confirmed => {}
                LeaseEvent::Superseded(_) | LeaseEvent::NameLost(_) | LeaseEvent::GivenUp => {
                    return None;
                }
            }
        }
    }

    /// Ends the candidacy, and gives up leadership at once.
    pub async fn resign(self) {
        self.lease.stop().await;
    }
}
