//! Who leads the coordinators: whoever holds the `coordinator` key.
//!
//! The key's create_revision is the leader's *term*. Leading is a hint like every lease (trap T1): two processes may both
//! think that they lead. What they do is safe all the same, because every change that a coordinator makes compares its
//! term in the same transaction, and of two terms only one stands in etcd.

use crate::lease::{HeldKey, Lease, LeaseEvent, LeaseSettings};
use crate::{Candidate, Metastore};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Leadership {
    /// Leads from `term` on. `revision` is etcd's, at or after the election.
    Leading { term: u64, revision: u64 },
    /// No longer leads, and stands for election again.
    Standby,
}

/// Stands for election until dropped or resigned.
pub struct Election {
    lease: Lease,
    leads: bool,
}

impl Metastore {
    /// Stands for election. A candidate that is not healthy neither leads nor takes over.
    pub fn stand_for_election(&self, candidate: &Candidate, settings: LeaseSettings) -> Election {
        let lease = self.hold(vec![HeldKey::coordinator(candidate)], settings);
        Election { lease, leads: false }
    }
}

impl Election {
    /// The next change. It begins as a standby. None: the task behind it has failed.
    pub async fn next(&mut self) -> Option<Leadership> {
        loop {
            match self.lease.next().await? {
                LeaseEvent::Registered { created, revision, .. } => {
                    self.leads = true;
                    return Some(Leadership::Leading { term: created, revision });
                }
                LeaseEvent::Lost if std::mem::take(&mut self.leads) => {
                    return Some(Leadership::Standby);
                }
                LeaseEvent::Lost | LeaseEvent::Granted { .. } | LeaseEvent::Confirmed => {}
                LeaseEvent::Superseded { .. } | LeaseEvent::NameLost { .. } => return None,
            }
        }
    }

    /// Gives the lead up at once, if it has it, and stands no more.
    pub async fn resign(self) {
        self.lease.stop().await;
    }
}
