//! The other records in etcd: the cluster's settings, stores, running nodes and gateways.
//!
//! Binary, with a format byte in front; a record of a newer format is refused, never guessed at.

use bytes::Bytes;

use crate::codec::{Malformed, Reader, put_bytes, put_varint};
use crate::idempotency;
use crate::ids::Boot;

const FORMAT: u8 = 1;

/// `meta`: made once by the first leading coordinator, then fixed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Meta {
    pub cluster: u128,
    pub shards: u32,
    pub replicas: u8,
    pub min_in_sync: u8,
    /// Which hash places keys: 1 = xxh3-128, top 16 bits.
    pub hash: u8,
    /// Rises when etcd was restored from a backup.
    pub incarnation: u32,
    pub idempotency: idempotency::Settings,
}

/// `store/{uuid}`: one per disk, for ever.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoreRecord {
    pub name: String,
    /// Where its peer port listens, `host:port`.
    pub address: String,
    pub zone: String,
    pub host: String,
    pub boot: Boot,
    /// Fresh with every boot: a disk that knows neither it nor the one before was rolled back.
    pub nonce: u128,
    pub status: StoreStatus,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StoreStatus {
    Active = 0,
    Draining = 1,
    /// Its disk reported or showed an error: its copies are to be re-seeded.
    Suspect = 2,
    /// Gone for good; another store took its name or its places.
    Lost = 3,
    Retired = 4,
}

/// `node/{uuid}`: exists while the process's lease does.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeRecord {
    pub boot: Boot,
    pub address: String,
    /// Bytes its disk holds.
    pub capacity: u64,
    /// Oldest and newest message version spoken.
    pub versions: (u32, u32),
}

/// `gateway/{nonce}`: one per worker. The session id is its create_revision.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GatewayRecord {
    pub address: String,
    pub worker: u32,
}

fn begin(bytes: &[u8], what: &'static str) -> Result<Reader, Malformed> {
    let mut from = Reader::new(Bytes::copy_from_slice(bytes));
    if from.u8(what)? == FORMAT { Ok(from) } else { Err(Malformed(what)) }
}

fn text(from: &mut Reader, what: &'static str) -> Result<String, Malformed> {
    String::from_utf8(from.bytes(what)?.to_vec()).map_err(|_| Malformed(what))
}

impl Meta {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        out.extend_from_slice(&self.cluster.to_le_bytes());
        put_varint(&mut out, u64::from(self.shards));
        out.extend_from_slice(&[self.replicas, self.min_in_sync, self.hash]);
        put_varint(&mut out, u64::from(self.incarnation));
        let idempotency::Settings { window_ms, buckets, bytes_max, namespaces_max } =
            self.idempotency;
        put_varint(&mut out, window_ms);
        put_varint(&mut out, buckets.into());
        put_varint(&mut out, bytes_max);
        put_varint(&mut out, namespaces_max.into());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "meta record format")?;
        let meta = Self {
            cluster: from.u128_le("cluster uuid")?,
            shards: from.varint_u32("shards")?,
            replicas: from.u8("replicas")?,
            min_in_sync: from.u8("min_in_sync")?,
            hash: from.u8("hash id")?,
            incarnation: from.varint_u32("incarnation")?,
            idempotency: idempotency::Settings {
                window_ms: from.varint("idempotency window")?,
                buckets: from.varint_u32("idempotency buckets")?,
                bytes_max: from.varint("idempotency bytes")?,
                namespaces_max: from.varint_u32("idempotency namespaces")?,
            },
        };
        from.finish("meta record")?;
        Ok(meta)
    }
}

impl StoreRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        for text in [&self.name, &self.address, &self.zone, &self.host] {
            put_bytes(&mut out, text.as_bytes());
        }
        put_varint(&mut out, self.boot.0);
        out.extend_from_slice(&self.nonce.to_le_bytes());
        out.push(self.status as u8);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "store record format")?;
        let record = Self {
            name: text(&mut from, "store name")?,
            address: text(&mut from, "store address")?,
            zone: text(&mut from, "store zone")?,
            host: text(&mut from, "store host")?,
            boot: Boot(from.varint("store boot")?),
            nonce: from.u128_le("store nonce")?,
            status: match from.u8("store status")? {
                0 => StoreStatus::Active,
                1 => StoreStatus::Draining,
                2 => StoreStatus::Suspect,
                3 => StoreStatus::Lost,
                4 => StoreStatus::Retired,
                _ => return Err(Malformed("store status")),
            },
        };
        from.finish("store record")?;
        Ok(record)
    }
}

impl NodeRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_varint(&mut out, self.boot.0);
        put_bytes(&mut out, self.address.as_bytes());
        put_varint(&mut out, self.capacity);
        put_varint(&mut out, u64::from(self.versions.0));
        put_varint(&mut out, u64::from(self.versions.1));
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "node record format")?;
        let record = Self {
            boot: Boot(from.varint("node boot")?),
            address: text(&mut from, "node address")?,
            capacity: from.varint("node capacity")?,
            versions: (from.varint_u32("node version")?, from.varint_u32("node version")?),
        };
        from.finish("node record")?;
        Ok(record)
    }
}

impl GatewayRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_bytes(&mut out, self.address.as_bytes());
        put_varint(&mut out, u64::from(self.worker));
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "gateway record format")?;
        let record = Self {
            address: text(&mut from, "gateway address")?,
            worker: from.varint_u32("gateway worker")?,
        };
        from.finish("gateway record")?;
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip() {
        let meta = Meta {
            cluster: 7,
            shards: 24,
            replicas: 3,
            min_in_sync: 2,
            hash: 1,
            incarnation: 1,
            idempotency: idempotency::Settings::default(),
        };
        assert_eq!(Meta::decode(&meta.encode()), Ok(meta));
        let store = StoreRecord {
            name: "node-1".into(),
            address: "127.0.0.1:7001".into(),
            zone: "a".into(),
            host: "h".into(),
            boot: Boot(3),
            nonce: 99,
            status: StoreStatus::Suspect,
        };
        assert_eq!(StoreRecord::decode(&store.encode()), Ok(store));
        let node = NodeRecord {
            boot: Boot(3),
            address: "127.0.0.1:7001".into(),
            capacity: 1 << 40,
            versions: (1, 1),
        };
        assert_eq!(NodeRecord::decode(&node.encode()), Ok(node));
        let gateway = GatewayRecord { address: "127.0.0.1:8080".into(), worker: 2 };
        assert_eq!(GatewayRecord::decode(&gateway.encode()), Ok(gateway));
    }

    #[test]
    fn a_newer_format_is_refused() {
        assert_eq!(Meta::decode(&[9, 0]), Err(Malformed("meta record format")));
    }
}
