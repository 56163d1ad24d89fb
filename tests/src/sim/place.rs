//! The places where processes run, the stores in them, and their names.

use engine::ids::StoreId;

/// A place where a process can run.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Place {
    Node(u16),
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

/// The id of the first store of a place.
pub fn store_id(index: u16) -> StoreId {
    StoreId(FIRST_STORE + u128::from(index))
}

/// The place of a store.
pub fn place_of(store: StoreId) -> Place {
    Place::Node(index_of(store))
}

/// The number of the place of a store.
pub fn index_of(store: StoreId) -> u16 {
    (store.0 % NEXT_DISK - FIRST_STORE) as u16
}

const FIRST_STORE: u128 = 0xA0;
/// A new disk in the same place makes another store of it, whose id is higher by this.
pub const NEXT_DISK: u128 = 0x10_0000;

/// The name of a place.
pub fn name_of(store: StoreId) -> String {
    format!("{:?}", place_of(store))
}

/// The zone of a place, if there are so many zones.
pub fn zone_of(index: u16, zones: u16) -> String {
    format!("zone-{}", index % zones)
}
