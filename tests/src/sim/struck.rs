//! The faults that have struck, and what undoes each.

use std::collections::BTreeMap;

use super::etcd::EtcdSnapshot;
use super::place::Place;
use super::plan::faults::FaultKind;

/// The faults that have struck, and those that are still to be undone.
#[derive(Default)]
pub struct Faults {
    pub counts: BTreeMap<FaultKind, u64>,
    /// The number of each fault of disks.
    pub disks: BTreeMap<String, u64>,
    /// Faults that struck while no operation was in flight.
    pub idle: u64,
    pub(super) next: u64,
    pub(super) running: BTreeMap<u64, Undo>,
}

pub enum Undo {
    Unblock(Vec<(Place, Place)>),
    /// As `Unblock`, and the watches of these places may be made again.
    Island(Vec<(Place, Place)>, Vec<Place>),
    /// These directions are fast again.
    Slow(Vec<(Place, Place)>),
    /// The first half of an exile ends: these directions open now, those later.
    Exile {
        node: Place,
        opens: Vec<(Place, Place)>,
        later: Vec<(Place, Place)>,
    },
    Disk(usize),
    Etcd,
    EtcdSlow,
    EtcdLies,
    EtcdForgets,
    /// The snapshot is old enough to be restored.
    Snapshot(Box<EtcdSnapshot>),
    EtcdRestored,
}
