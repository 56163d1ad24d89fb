//! Idempotency records in the state of a simulated disk. They come with a flush or a copy, and are
//! never looked after: that one whose bucket was dropped does not exist is the machine's business.

use std::collections::BTreeMap;

use engine::apply::ShardState;
use engine::idempotency::{Record, RecordId};
use engine::ids::{CopyNo, Slots};
use engine::store::table::Frozen;

#[derive(Clone, Debug, Default)]
pub struct TokenRows {
    rows: BTreeMap<RecordId, Record>,
}

impl TokenRows {
    pub fn load(&self, ids: &[RecordId]) -> Vec<Option<Record>> {
        ids.iter().map(|id| self.rows.get(id).cloned()).collect()
    }

    pub fn flush(&mut self, table: &Frozen, shards: &[(CopyNo, ShardState)]) {
        let owned = |id: &RecordId| shards.iter().any(|(_, state)| state.slots.contains(id.slot));
        let records = table.records().filter(|(id, _)| owned(id));
        self.rows.extend(records.map(|(id, record)| (id, record.clone())));
    }

    pub fn drop(&mut self, slots: Slots) {
        self.rows.retain(|id, _| !slots.contains(id.slot));
    }

    pub fn copy_of(&self, slots: Slots) -> Self {
        let inside = self.rows.iter().filter(|(id, _)| slots.contains(id.slot));
        Self { rows: inside.map(|(&id, record)| (id, record.clone())).collect() }
    }

    pub fn install(&mut self, copy: &Self) {
        self.rows.extend(copy.rows.iter().map(|(&id, record)| (id, record.clone())));
    }
}
