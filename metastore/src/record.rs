//! The kinds of records, the key of each below `/dkc/{cluster}/`, and the way back from key to name.
//!
//! Keys and values are formats for ever: the tests below hold golden bytes. A key that does not parse is an error,
//! not a stranger to be skipped: skipping a gateway's key would collect a session that is alive.

use std::fmt::Debug;

use engine::codec::{Malformed, Reader, put_bytes};
use engine::config::ShardConfig;
use engine::ids::{Epoch, ShardId, StoreId};
use engine::records::{
    GatewayRecord, LossRecord, Meta, NameRecord, NodeRecord, PromoteIntent, StoreRecord,
};

/// One kind of record.
pub trait Record: Clone + Debug + PartialEq + Send + Sync + 'static {
    /// What tells two records of this kind apart.
    type Id: Clone + Debug + Ord + Send + Sync + 'static;
    /// What every key of this kind begins with, below the cluster's prefix.
    const FOLDER: &'static str;
    /// What follows the folder.
    fn name(id: &Self::Id) -> String;
    fn id(name: &str) -> Option<Self::Id>;
    fn encode(&self) -> Vec<u8>;
    fn decode(bytes: &[u8]) -> Result<Self, Malformed>;
    /// The record says of itself what its key says. Only some kinds can tell.
    fn belongs_at(&self, _id: &Self::Id) -> bool {
        true
    }
}

/// `coordinator`: who leads, or stands for it. Its create_revision is the leader's *term*.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Candidate {
    /// Where it listens, `host:port`, for reports and for people.
    pub address: String,
}

/// `intent/drain/{uuid}`: an operator wants this store emptied. That it exists says all.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DrainIntent;

const FORMAT: u8 = 1;

impl Candidate {
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_bytes(&mut out, self.address.as_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = Reader::new(bytes.to_vec().into());
        if from.u8("candidate format")? != FORMAT {
            return Err(Malformed("candidate format"));
        }
        let address = from.bytes("candidate address")?.to_vec();
        from.finish("candidate")?;
        let address = String::from_utf8(address).map_err(|_| Malformed("candidate address"))?;
        Ok(Self { address })
    }
}

/// 32 hex digits, lower case, as `StoreId` prints: one spelling per number, so one key per record.
fn hex(name: &str) -> Option<u128> {
    let digits = name.len() == 32 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if digits { u128::from_str_radix(name, 16).ok() } else { None }
}

/// The only record of its kind.
fn only(name: &str) -> Option<()> {
    name.is_empty().then_some(())
}

macro_rules! record {
    ($kind:ty, $folder:literal, $id:ty, $name:expr, $parse:expr) => {
        impl Record for $kind {
            type Id = $id;
            const FOLDER: &'static str = $folder;

            fn name(id: &$id) -> String {
                $name(id)
            }

            fn id(name: &str) -> Option<$id> {
                $parse(name)
            }

            fn encode(&self) -> Vec<u8> {
                <$kind>::encode(self)
            }

            fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
                <$kind>::decode(bytes)
            }
        }
    };
}

record!(Meta, "meta", (), |(): &()| String::new(), only);
record!(Candidate, "coordinator", (), |(): &()| String::new(), only);
record!(StoreRecord, "store/", StoreId, StoreId::to_string, |name| hex(name).map(StoreId));
record!(NodeRecord, "node/", StoreId, StoreId::to_string, |name| hex(name).map(StoreId));
// The name as it was given, 1 to 64 bytes.
record!(NameRecord, "name/", String, String::clone, named);
// The id is the worker's nonce.
record!(GatewayRecord, "gateway/", u128, |nonce: &u128| format!("{nonce:032x}"), hex);

record!(PromoteIntent, "intent/promote/", ShardId, ShardId::to_string, shard);

fn named(name: &str) -> Option<String> {
    (!name.is_empty()).then(|| name.to_owned())
}

/// "007" and "+7" parse too, but are not how 7 is spelled.
fn shard(name: &str) -> Option<ShardId> {
    let shard = ShardId(name.parse().ok()?);
    (shard.to_string() == name).then_some(shard)
}

impl Record for LossRecord {
    type Id = (ShardId, Epoch);
    const FOLDER: &'static str = "loss/";

    fn name((shard, epoch): &(ShardId, Epoch)) -> String {
        format!("{shard}-{}", epoch.0)
    }

    fn id(name: &str) -> Option<(ShardId, Epoch)> {
        let (shard_name, epoch_name) = name.split_once('-')?;
        let id = (shard(shard_name)?, Epoch(epoch_name.parse().ok()?));
        (Self::name(&id) == name).then_some(id)
    }

    fn encode(&self) -> Vec<u8> {
        Self::encode(self)
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::decode(bytes)
    }

    fn belongs_at(&self, id: &(ShardId, Epoch)) -> bool {
        (self.shard, self.epoch) == *id
    }
}

impl Record for ShardConfig {
    type Id = ShardId;
    const FOLDER: &'static str = "shard/";

    fn name(id: &ShardId) -> String {
        id.to_string()
    }

    fn id(name: &str) -> Option<ShardId> {
        shard(name)
    }

    fn encode(&self) -> Vec<u8> {
        Self::encode(self)
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::decode(bytes)
    }

    fn belongs_at(&self, id: &ShardId) -> bool {
        self.shard() == *id
    }
}

impl Record for DrainIntent {
    type Id = StoreId;
    const FOLDER: &'static str = "intent/drain/";

    fn name(id: &StoreId) -> String {
        id.to_string()
    }

    fn id(name: &str) -> Option<StoreId> {
        hex(name).map(StoreId)
    }

    fn encode(&self) -> Vec<u8> {
        vec![FORMAT]
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes == [FORMAT] { Ok(Self) } else { Err(Malformed("drain intent format")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check<R: Record>(given: &R::Id, want: &str) {
        let name = R::name(given);
        assert_eq!(format!("{}{name}", R::FOLDER), want);
        assert_eq!(R::id(&name).as_ref(), Some(given));
    }

    #[test]
    fn keys_are_golden() {
        check::<Meta>(&(), "meta");
        check::<Candidate>(&(), "coordinator");
        check::<StoreRecord>(&StoreId(0xab), "store/000000000000000000000000000000ab");
        check::<NameRecord>(&"node-1".into(), "name/node-1");
        check::<NodeRecord>(&StoreId(0xab), "node/000000000000000000000000000000ab");
        check::<GatewayRecord>(&u128::MAX, "gateway/ffffffffffffffffffffffffffffffff");
        check::<ShardConfig>(&ShardId(2730), "shard/2730");
        check::<ShardConfig>(&ShardId(0), "shard/0");
        check::<DrainIntent>(&StoreId(1), "intent/drain/00000000000000000000000000000001");
        check::<PromoteIntent>(&ShardId(2730), "intent/promote/2730");
        check::<LossRecord>(&(ShardId(2730), Epoch(5)), "loss/2730-5");
    }

    #[track_caller]
    fn refused<R: Record>(name: &str) {
        assert_eq!(R::id(name), None);
    }

    #[test]
    fn other_spellings_are_refused() {
        refused::<Meta>("2");
        refused::<StoreRecord>("ab");
        refused::<StoreRecord>("000000000000000000000000000000AB");
        refused::<StoreRecord>("+00000000000000000000000000000ab");
        refused::<ShardConfig>("007");
        refused::<ShardConfig>("+7");
        refused::<ShardConfig>("65536");
        refused::<ShardConfig>("");
        refused::<PromoteIntent>("07");
        refused::<LossRecord>("7");
        refused::<LossRecord>("7-05");
        refused::<LossRecord>("7-5-5");
    }

    #[test]
    fn candidates_are_golden() {
        let candidate = Candidate { address: "[::1]:7".into() };
        assert_eq!(Record::encode(&candidate), b"\x01\x07[::1]:7");
        assert_eq!(<Candidate as Record>::decode(b"\x01\x07[::1]:7"), Ok(candidate));
        assert!(<Candidate as Record>::decode(b"\x01\x07[::1]:").is_err());
        assert!(<Candidate as Record>::decode(b"\x02\x07[::1]:7").is_err());
        assert!(<Candidate as Record>::decode(b"\x01\x01\xff").is_err());
        assert!(<DrainIntent as Record>::decode(&[2]).is_err());
    }
}
