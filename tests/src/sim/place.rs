//! The places where processes run, the stores in them, and their names.

use engine::ids::StoreId;

/// A place where a process can run.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Place {
    Node(u8),
    Gateway(u8),
    Coordinator(u8),
    /// A second coordinator that acts at random.
    Chaos,
    /// Another machine, on which a copy of a node's folder is started.
    Twin,
    Etcd,
}

/// One start of one process. An event for an earlier incarnation never reaches a later one.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct ProcessId {
    pub place: Place,
    pub incarnation: u32,
}

pub fn store_id(index: u8) -> StoreId {
    StoreId(0xA0 + u128::from(index))
}

pub fn place_of(store: StoreId) -> Place {
    // A new disk in the same place makes another store of it.
    Place::Node((store.0 & 0xFF) as u8 - 0xA0)
}

/// The name of a place.
pub fn name_of(store: StoreId) -> String {
    format!("{:?}", place_of(store))
}

/// Two zones, so that spreading over zones and balancing conflict.
pub fn zone_of(store: StoreId) -> String {
    if store.0.is_multiple_of(2) { "even".into() } else { "odd".into() }
}
