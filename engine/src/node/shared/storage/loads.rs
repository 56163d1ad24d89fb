//! Loads: values of the state that an entry or a read needs.
//!
//! A loaded value is added to the tables as they are when the entry is applied. That is right as
//! long as no ingest has come between: an ingest moves table content below the value that was
//! loaded. So every load records how many ingests there had been, and is repeated if there was
//! another.

use crate::ids::{Seq, ShardId};
use crate::key::CounterKey;
use crate::memory;
use crate::node::event::Effect;
use crate::node::shared::NodeTurn;
use crate::replica::log::Loading;
use crate::shard::apply::{self, Loaded, Needs, Values};
use crate::shard::idempotency::TokenRecord;

/// A load in flight: what it reads, and the entry or read that waits for it.
#[derive(Clone, Debug)]
pub(super) struct PendingLoad {
    needs: Needs,
    purpose: LoadPurpose,
}

impl PendingLoad {
    /// Returns the bytes of memory that it takes; the names are those of the entry or the read.
    pub(in crate::node) fn bytes(&self) -> usize {
        match self.purpose {
            LoadPurpose::Entry { .. } => memory::of_map::<u64, Self>(1) + self.needs.bytes(),
            LoadPurpose::Read { .. } => 0, // Counted with the read.
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum LoadPurpose {
    Entry { shard: ShardId, seq: Seq },
    Read { read: u64 },
}

/// The values that a read waited for.
pub(in crate::node) struct LoadedRead {
    /// The number of the read.
    pub read: u64,
    /// The values in the state; a counter without a row is 0.
    pub values: Values,
}

impl NodeTurn<'_> {
    /// Loads what the entries from `from` on will need, while they wait for their commit.
    pub(in crate::node) fn prefetch(&mut self, shard: ShardId, from: Seq) {
        let mut seq = from;
        while let Some(replica) = self.shards.get(shard)
            && let Some(held) = replica.log.get(seq)
        {
            let Some(work) = &held.work else { return };
            if work.loading == Loading::NotAsked {
                self.load_for_entry(shard, seq);
            }
            seq = seq.next();
        }
    }

    pub(super) fn load_for_entry(&mut self, shard: ShardId, seq: Seq) {
        let (load, ingests) = (self.fresh_id(), self.storage.ingests);
        let Some(replica) = self.shards.get_mut(shard) else { return };
        let Some(work) = replica.log.get(seq).and_then(|held| held.work.as_ref()) else { return };
        let needs = apply::needs(&work.decoded, replica.state.slots);
        replica.log.set_loading(seq, Loading::Asked { load, ingests });
        self.begin_load(load, needs, LoadPurpose::Entry { shard, seq });
    }

    /// Loads values for a read; [`NodeTurn::on_loaded`] returns them.
    pub(in crate::node) fn load_for_read(&mut self, read: u64, counters: Vec<CounterKey>) {
        let load = self.fresh_id();
        let needs = Needs { counters, records: Vec::new() };
        self.begin_load(load, needs, LoadPurpose::Read { read });
    }

    fn begin_load(&mut self, load: u64, needs: Needs, purpose: LoadPurpose) {
        let pending = PendingLoad { needs: needs.clone(), purpose };
        self.storage.memory.loads += pending.bytes();
        self.storage.loads.insert(load, pending);
        self.effects.push(Effect::Load { load, needs });
    }

    /// Handles the answer to a load. Returns the values if a read waits for them.
    pub(in crate::node) fn on_loaded(
        &mut self,
        load: u64,
        values: Vec<Option<i128>>,
        records: Vec<Option<TokenRecord>>,
    ) -> Option<LoadedRead> {
        let asked = self.storage.loads.remove(&load)?;
        self.storage.memory.loads -= asked.bytes();
        let pairs = asked.needs.counters.into_iter().zip(values);
        let values: Values = pairs.map(|(key, value)| (key, value.unwrap_or(0))).collect();
        let (shard, seq) = match asked.purpose {
            LoadPurpose::Read { read } => return Some(LoadedRead { read, values }),
            LoadPurpose::Entry { shard, seq } => (shard, seq),
        };
        let pairs = asked.needs.records.into_iter().zip(records);
        let records = pairs.filter_map(|(id, record)| Some((id, record?))).collect();
        let replica = self.shards.get_mut(shard)?;
        let work = replica.log.get(seq).and_then(|held| held.work.as_ref());
        // An entry that asked for another load was written in place of one that was cut.
        if let Some(&Loading::Asked { load: asked, ingests }) = work.map(|work| &work.loading)
            && asked == load
        {
            let loaded = Loaded { values, records };
            replica.log.set_loading(seq, Loading::Ready { loaded, ingests });
            self.count_log(shard);
            self.shards.to_advance.insert(shard);
        }
        None
    }
}
