//! The other records in etcd: the cluster's settings, stores, running nodes and gateways.
//!
//! Records are binary, with a format byte in front; a record of a newer format is refused, never
//! guessed at.

use bytes::Bytes;

use crate::codec::{Malformed, Reader, put_bytes, put_varint};
use crate::ids::{Boot, Epoch, Seq, ShardId, StoreBoot, StoreId, TimeMs, Version};
use crate::shard::idempotency;

const FORMAT: u8 = 1;

/// `meta`: made once by the first leading coordinator, then fixed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Meta {
    /// The cluster's uuid.
    pub cluster: u128,
    /// The number of shards.
    pub shards: u32,
    /// The number of copies of each shard.
    pub replicas: u8,
    /// The number of members below which an in-sync set commits nothing.
    pub min_in_sync: u8,
    /// The hash that places keys: 1 = xxh3-128, top 16 bits.
    pub hash: u8,
    /// Rises when etcd was restored from a backup.
    pub incarnation: u32,
    /// The idempotency settings.
    pub idempotency: idempotency::TokenSettings,
}

/// `store/{uuid}`: one per disk, for ever.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoreRecord {
    /// The name that the operator gave to the node.
    pub name: String,
    /// The address of its peer port, `host:port`.
    pub address: String,
    /// The zone, for placement; may be empty.
    pub zone: String,
    /// The machine, for placement.
    pub host: String,
    /// The number of its last start.
    pub boot: Boot,
    /// A random number, new with every boot: a disk that knows neither it nor the one before was
    /// rolled back.
    pub nonce: u128,
    /// The status.
    pub status: StoreStatus,
}

/// `name/{name}`: the store that has a name, until another takes it. The record counts while that
/// store goes by the name and is not given up.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NameRecord {
    /// The store that has the name.
    pub store: StoreId,
}

/// The status of a store.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StoreStatus {
    /// The store takes part.
    Active = 0,
    /// The planner moves its copies to other stores.
    Draining = 1,
    /// The store's disk reported or showed an error: its copies are to be filled again.
    Suspect = 2,
    /// Given up: another store has its name and gets its places.
    Lost = 3,
    /// Emptied on purpose and removed.
    Retired = 4,
    /// Given up while it was suspect.
    LostSuspect = 5,
}

impl StoreStatus {
    /// Returns whether the store is gone, so that nothing waits for it any more.
    pub fn is_gone(self) -> bool {
        matches!(self, Self::Lost | Self::Retired | Self::LostSuspect)
    }

    /// The status after the store is given up.
    pub fn given_up(self) -> Self {
        match self {
            Self::Suspect => Self::LostSuspect,
            gone if gone.is_gone() => gone,
            _ => Self::Lost,
        }
    }

    /// The status after the store is taken back. `None` if it was not given up, or was emptied on
    /// purpose.
    pub fn taken_back(self) -> Option<Self> {
        match self {
            Self::Lost => Some(Self::Active),
            Self::LostSuspect => Some(Self::Suspect),
            _ => None,
        }
    }
}

/// `node/{uuid}`: exists while the process's lease does.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeRecord {
    /// The number of this start.
    pub boot: Boot,
    /// The address of its peer port, `host:port`.
    pub address: String,
    /// The size of its disk in bytes.
    pub capacity: u64,
    /// The oldest and newest message version that it supports.
    pub versions: (u32, u32),
}

/// `intent/promote/{shard}`: an operator wants the shard to be led by this store's copy, whatever
/// it lacks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PromoteIntent {
    /// The store.
    pub store: StoreId,
    /// The version of the shard's record that the operator has seen: with any other version the
    /// intent has no effect.
    pub version: Version,
    /// The operator.
    pub from: Operator,
}

/// `intent/remove/{uuid}`: an operator wants this store out of the cluster for good.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RemoveIntent {
    /// The boot that the operator has seen: after another start the intent has no effect.
    pub boot: Boot,
    /// The operator.
    pub from: Operator,
}

/// `intent/pause`: an operator wants no moves for balance alone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PauseIntent {
    /// The operator.
    pub from: Operator,
}

/// The author of a command.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Operator {
    /// The time of the command, by the clock of the author's machine.
    pub at: TimeMs,
    /// `user@host`, for the record.
    pub name: String,
}

/// `loss/{shard}-{epoch}`: this epoch began with a copy that may lack acknowledged entries. Never
/// changed or deleted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LossRecord {
    /// The shard.
    pub shard: ShardId,
    /// The epoch.
    pub epoch: Epoch,
    /// The primary of the epoch.
    pub primary: StoreBoot,
    /// The last entry in the log of its copy. (0, 0): it held none.
    pub last: (Epoch, Seq),
    /// The copies that were given up, and the highest position that each was known to hold. `None`:
    /// nothing is known of it.
    pub given_up: Vec<(StoreId, Option<Seq>)>,
    /// The operator who accepted the loss. `None`: every trusted member of the in-sync set had
    /// answered, and all their copies were damaged.
    pub accepted_by: Option<Operator>,
}

/// `gateway/{nonce}`: one per worker. The session id is its create_revision.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GatewayRecord {
    /// The gateway's HTTP address.
    pub address: String,
    /// The number of the worker in its gateway.
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
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        out.extend_from_slice(&self.cluster.to_le_bytes());
        put_varint(&mut out, u64::from(self.shards));
        out.extend_from_slice(&[self.replicas, self.min_in_sync, self.hash]);
        put_varint(&mut out, u64::from(self.incarnation));
        let idempotency::TokenSettings { window_ms, buckets, bytes_max, namespaces_max } =
            self.idempotency;
        put_varint(&mut out, window_ms);
        put_varint(&mut out, buckets.into());
        put_varint(&mut out, bytes_max);
        put_varint(&mut out, namespaces_max.into());
        out
    }

    /// Decodes the record. The error names the field that can't be read.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "meta record format")?;
        let meta = Self {
            cluster: from.u128_le("cluster uuid")?,
            shards: from.varint_u32("shards")?,
            replicas: from.u8("replicas")?,
            min_in_sync: from.u8("min_in_sync")?,
            hash: from.u8("hash id")?,
            incarnation: from.varint_u32("incarnation")?,
            idempotency: idempotency::TokenSettings {
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
    /// Encodes the record.
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

    /// Decodes the record. The error names the field that can't be read.
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
                5 => StoreStatus::LostSuspect,
                _ => return Err(Malformed("store status")),
            },
        };
        from.finish("store record")?;
        Ok(record)
    }
}

impl NameRecord {
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        out.extend_from_slice(&self.store.0.to_le_bytes());
        out
    }

    /// Decodes the record. The error names the field that can't be read.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "name record format")?;
        let record = Self { store: StoreId(from.u128_le("named store")?) };
        from.finish("name record")?;
        Ok(record)
    }
}

impl NodeRecord {
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_varint(&mut out, self.boot.0);
        put_bytes(&mut out, self.address.as_bytes());
        put_varint(&mut out, self.capacity);
        put_varint(&mut out, u64::from(self.versions.0));
        put_varint(&mut out, u64::from(self.versions.1));
        out
    }

    /// Decodes the record. The error names the field that can't be read.
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
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_bytes(&mut out, self.address.as_bytes());
        put_varint(&mut out, u64::from(self.worker));
        out
    }

    /// Decodes the record. The error names the field that can't be read.
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

impl PromoteIntent {
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        out.extend_from_slice(&self.store.0.to_le_bytes());
        put_varint(&mut out, self.version.0);
        put_operator(&mut out, &self.from);
        out
    }

    /// Decodes the record. The error names the field that can't be read.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "promote intent format")?;
        let intent = Self {
            store: StoreId(from.u128_le("promoted store")?),
            version: Version(from.varint("promote version")?),
            from: operator(&mut from)?,
        };
        from.finish("promote intent")?;
        Ok(intent)
    }
}

impl RemoveIntent {
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_varint(&mut out, self.boot.0);
        put_operator(&mut out, &self.from);
        out
    }

    /// Decodes the record. The error names the field that can't be read.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "remove intent format")?;
        let intent = Self { boot: Boot(from.varint("removed boot")?), from: operator(&mut from)? };
        from.finish("remove intent")?;
        Ok(intent)
    }
}

impl PauseIntent {
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_operator(&mut out, &self.from);
        out
    }

    /// Decodes the record. The error names the field that can't be read.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "pause intent format")?;
        let intent = Self { from: operator(&mut from)? };
        from.finish("pause intent")?;
        Ok(intent)
    }
}

impl LossRecord {
    /// Encodes the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_varint(&mut out, u64::from(self.shard.0));
        put_varint(&mut out, self.epoch.0);
        out.extend_from_slice(&self.primary.store.0.to_le_bytes());
        put_varint(&mut out, self.primary.boot.0);
        put_varint(&mut out, self.last.0.0);
        put_varint(&mut out, self.last.1.0);
        put_varint(&mut out, self.given_up.len() as u64);
        for (store, last) in &self.given_up {
            out.extend_from_slice(&store.0.to_le_bytes());
            put_option(&mut out, last.as_ref(), |out, last| put_varint(out, last.0));
        }
        put_option(&mut out, self.accepted_by.as_ref(), put_operator);
        out
    }

    /// Decodes the record. The error names the field that can't be read.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = begin(bytes, "loss record format")?;
        let shard = u16::try_from(from.varint_u32("lost shard")?);
        let loss = Self {
            shard: ShardId(shard.map_err(|_| Malformed("lost shard"))?),
            epoch: Epoch(from.varint("loss epoch")?),
            primary: StoreBoot {
                store: StoreId(from.u128_le("loss primary")?),
                boot: Boot(from.varint("loss primary boot")?),
            },
            last: (Epoch(from.varint("loss last epoch")?), Seq(from.varint("loss last seq")?)),
            given_up: {
                let count = from.count("given up stores")?;
                (0..count).map(|_| given_up(&mut from)).collect::<Result<_, _>>()?
            },
            accepted_by: option(&mut from, "loss author", operator)?,
        };
        from.finish("loss record")?;
        Ok(loss)
    }
}

fn put_operator(out: &mut Vec<u8>, operator: &Operator) {
    put_varint(out, operator.at.0);
    put_bytes(out, operator.name.as_bytes());
}

fn operator(from: &mut Reader) -> Result<Operator, Malformed> {
    Ok(Operator { at: TimeMs(from.varint("operator time")?), name: text(from, "operator name")? })
}

fn put_option<V>(out: &mut Vec<u8>, value: Option<&V>, put: impl FnOnce(&mut Vec<u8>, &V)) {
    out.push(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

fn option<V>(
    from: &mut Reader,
    what: &'static str,
    read: impl FnOnce(&mut Reader) -> Result<V, Malformed>,
) -> Result<Option<V>, Malformed> {
    match from.u8(what)? {
        0 => Ok(None),
        1 => read(from).map(Some),
        _ => Err(Malformed(what)),
    }
}

fn given_up(from: &mut Reader) -> Result<(StoreId, Option<Seq>), Malformed> {
    let store = StoreId(from.u128_le("given up store")?);
    let last = option(from, "given up position", |from| from.varint("given up seq").map(Seq))?;
    Ok((store, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operators_records_are_golden() {
        let me = Operator { at: TimeMs(300), name: "a@b".into() };
        let intent = PromoteIntent { store: StoreId(2), version: Version(9), from: me.clone() };
        let mut bytes = vec![1, 2];
        bytes.resize(17, 0);
        bytes.extend([9, 0xAC, 2, 3, b'a', b'@', b'b']);
        assert_eq!(intent.encode(), bytes);
        assert_eq!(PromoteIntent::decode(&bytes), Ok(intent));
        let remove = RemoveIntent { boot: Boot(3), from: me.clone() };
        let bytes = [1, 3, 0xAC, 2, 3, b'a', b'@', b'b'];
        assert_eq!(remove.encode(), bytes);
        assert_eq!(RemoveIntent::decode(&bytes), Ok(remove));
        assert!(RemoveIntent::decode(&[1, 3, 2, 5]).is_err());
        let pause = PauseIntent { from: me.clone() };
        let bytes = [1, 0xAC, 2, 3, b'a', b'@', b'b'];
        assert_eq!(pause.encode(), bytes);
        assert_eq!(PauseIntent::decode(&bytes), Ok(pause));
        let loss = LossRecord {
            shard: ShardId(300),
            epoch: Epoch(5),
            primary: StoreBoot { store: StoreId(2), boot: Boot(3) },
            last: (Epoch(4), Seq(20)),
            given_up: vec![(StoreId(1), Some(Seq(25))), (StoreId(3), None)],
            accepted_by: Some(me),
        };
        let store = |id: u8| [vec![id], vec![0; 15]].concat();
        let parts: [&[u8]; 8] = [
            &[1, 0xAC, 2, 5],
            &store(2),
            &[3, 4, 20, 2],
            &store(1),
            &[1, 25],
            &store(3),
            &[0],
            &[1, 0xAC, 2, 3, b'a', b'@', b'b'],
        ];
        let bytes = parts.concat();
        assert_eq!(loss.encode(), bytes);
        assert_eq!(LossRecord::decode(&bytes), Ok(loss.clone()));
        for len in 0..bytes.len() {
            assert!(LossRecord::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        let by_itself = LossRecord { accepted_by: None, ..loss };
        assert_eq!(LossRecord::decode(&by_itself.encode()), Ok(by_itself));
    }

    #[test]
    fn a_store_that_is_given_up_and_taken_back_stays_suspect() {
        for status in [StoreStatus::Active, StoreStatus::Suspect] {
            assert!(status.given_up().is_gone());
            assert_eq!(status.given_up().taken_back(), Some(status));
        }
        assert_eq!(StoreStatus::Retired.taken_back(), None);
    }

    #[test]
    fn records_round_trip() {
        let meta = Meta {
            cluster: 7,
            shards: 24,
            replicas: 3,
            min_in_sync: 2,
            hash: 1,
            incarnation: 1,
            idempotency: idempotency::TokenSettings::default(),
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
        let name = NameRecord { store: StoreId(7) };
        assert_eq!(name.encode(), [&[1, 7][..], &[0; 15]].concat());
        assert_eq!(NameRecord::decode(&name.encode()), Ok(name));
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
