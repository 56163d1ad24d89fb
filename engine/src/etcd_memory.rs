//! The part of etcd that a store keeps in its own log, so that a lost etcd can be rebuilt.
//!
//! A start writes it once the identity is settled, and a recovery of etcd changes it by asking for
//! a promise. The records of shards are kept apart, one by one, as the store acts on them
//! ([`LogRecord::ActedOn`](crate::store::log::LogRecord::ActedOn)). How they are put together:
//! [`recovery_plan`](crate::recovery_plan).

use crate::codec::{Malformed, Reader, put_bytes, put_varint};
use crate::records::{Meta, StoreRecord};

const FORMAT: u8 = 1;

/// The part of etcd that concerns a store as a whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EtcdMemory {
    /// The settings of the cluster, with the incarnation that the store last followed.
    pub meta: Meta,
    /// The store's own record, as its last start claimed it.
    pub store: StoreRecord,
    /// The store follows no etcd of a lower incarnation. Never falls.
    pub promised: u32,
}

impl EtcdMemory {
    /// The memory of a store that follows the etcd of these settings, after `before`.
    pub fn following(meta: Meta, store: StoreRecord, before: Option<&Self>) -> Self {
        let promised = before.map_or(0, |before| before.promised).max(meta.incarnation);
        Self { meta, store, promised }
    }

    /// Returns this memory, which came after `before` in the log: the promise never falls.
    pub fn after(mut self: Box<Self>, before: Option<Box<Self>>) -> Box<Self> {
        self.promised = self.promised.max(before.map_or(0, |before| before.promised));
        self
    }

    /// Encodes the memory, in a record of the log.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(FORMAT);
        put_bytes(out, &self.meta.encode());
        put_bytes(out, &self.store.encode());
        put_varint(out, u64::from(self.promised));
    }

    /// Decodes the memory. The error names the field that can't be read.
    pub fn decode(from: &mut Reader) -> Result<Self, Malformed> {
        if from.u8("etcd memory format")? != FORMAT {
            return Err(Malformed("etcd memory format: a newer build wrote it"));
        }
        Ok(Self {
            meta: Meta::decode(&from.bytes("remembered meta")?)?,
            store: StoreRecord::decode(&from.bytes("remembered store")?)?,
            promised: from.varint_u32("promised incarnation")?,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ids::Boot;
    use crate::records::StoreStatus;
    use crate::shard::idempotency;

    pub(crate) fn memory(store: u8, incarnation: u32) -> EtcdMemory {
        let meta = Meta {
            cluster: 7,
            shards: 4,
            replicas: 3,
            min_in_sync: 2,
            hash: 1,
            incarnation,
            idempotency: idempotency::TokenSettings::default(),
        };
        let store = StoreRecord {
            name: format!("node-{store}"),
            address: format!("127.0.0.1:700{store}"),
            zone: "a".into(),
            host: "h".into(),
            boot: Boot(3),
            nonce: 99,
            status: StoreStatus::Active,
        };
        EtcdMemory { meta, store, promised: incarnation }
    }

    #[test]
    fn round_trips_and_a_cut_one_is_refused() {
        let mut bytes = Vec::new();
        memory(1, 2).encode(&mut bytes);
        let decode = |bytes: &[u8]| {
            let mut from = Reader::new(bytes::Bytes::copy_from_slice(bytes));
            EtcdMemory::decode(&mut from)
        };
        assert_eq!(decode(&bytes), Ok(memory(1, 2)));
        (0..bytes.len()).for_each(|len| assert!(decode(&bytes[..len]).is_err(), "{len} bytes"));
    }

    #[test]
    fn the_promise_never_falls() {
        let promised = EtcdMemory { promised: 5, ..memory(1, 2) };
        let later = Box::new(memory(1, 3)).after(Some(Box::new(promised.clone())));
        assert_eq!((later.meta.incarnation, later.promised), (3, 5));
        let store = promised.store.clone();
        assert_eq!(EtcdMemory::following(memory(1, 6).meta, store, Some(&promised)).promised, 6);
    }
}
