//! Rows of the state of a simulated disk, as a disk keeps them and a snapshot carries them.

use std::collections::BTreeMap;

use engine::ids::Slots;
use engine::shard::idempotency::{RecordId, TokenRecord};
use engine::store::layout;

/// The rows of a shard in the state.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// The counters by name, with their values.
    pub counters: Vec<(Vec<u8>, i128)>,
    pub tokens: TokenRows,
}

/// Idempotency records. They come with a flush or a snapshot, and are never removed: it is up to
/// the `Node` to ignore one whose bucket was dropped.
#[derive(Clone, Debug, Default)]
pub struct TokenRows {
    rows: BTreeMap<RecordId, TokenRecord>,
}

impl TokenRows {
    pub fn load(&self, ids: &[RecordId]) -> Vec<Option<TokenRecord>> {
        ids.iter().map(|id| self.rows.get(id).cloned()).collect()
    }

    pub fn write(&mut self, id: RecordId, row: &[u8]) {
        self.rows.insert(id, layout::decode_record(row).expect("just encoded"));
    }

    pub fn drop(&mut self, slots: Slots) {
        self.rows.retain(|id, _| !slots.contains(id.slot));
    }

    pub fn copy_of(&self, slots: Slots) -> Self {
        let inside = self.rows.iter().filter(|(id, _)| slots.contains(id.slot));
        Self { rows: inside.map(|(&id, record)| (id, record.clone())).collect() }
    }

    /// Passes each row of these slots.
    pub fn each(&self, slots: Slots, mut row: impl FnMut(RecordId, &TokenRecord)) {
        let inside = self.rows.iter().filter(|(id, _)| slots.contains(id.slot));
        inside.for_each(|(&id, record)| row(id, record));
    }

    pub fn install(&mut self, copy: &Self) {
        self.rows.extend(copy.rows.iter().map(|(&id, record)| (id, record.clone())));
    }
}
