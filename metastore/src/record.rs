//! The kinds of records, the key of each below `/dkc/{cluster}/`, and the parsing of keys.
//!
//! The formats of keys and values never change: the tests below contain golden bytes. A key that
//! does not parse is an error and is not skipped: to skip a gateway's key would expire a session
//! that is alive.

use std::fmt::Debug;

use engine::codec::{Malformed, Reader, put_bytes};
use engine::ids::{Epoch, ShardId, StoreId};
use engine::records::{
    GatewayRecord, LossRecord, Meta, NameRecord, NodeRecord, PauseIntent, PromoteIntent,
    RemoveIntent, StoreRecord,
};
use engine::shard_record::ShardRecord;

/// A kind of record in etcd.
pub trait EtcdRecord: Clone + Debug + PartialEq + Send + Sync + 'static {
    /// The identity of a record among those of its kind.
    type Id: Clone + Debug + Ord + Send + Sync + 'static;
    /// The beginning of every key of this kind, after the cluster's prefix.
    const FOLDER: &'static str;
    /// Returns the part of the key that follows the folder.
    fn name(id: &Self::Id) -> String;
    /// Parses the part of a key that follows the folder. Returns `None` for any other spelling than
    /// that of [`name`](Self::name).
    fn id(name: &str) -> Option<Self::Id>;
    /// Returns the value that etcd holds.
    fn encode(&self) -> Vec<u8>;
    /// Decodes a value.
    fn decode(bytes: &[u8]) -> Result<Self, Malformed>;
    /// Returns whether the ids that the value contains match its key. A kind whose values contain
    /// no id always returns true.
    fn belongs_at(&self, _id: &Self::Id) -> bool {
        true
    }
}

/// `coordinator`: the leading coordinator. The key's create_revision is the leader's *term*.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CoordinatorRecord {
    /// The address that it listens on, `host:port`, for reports and for operators.
    pub address: String,
}

/// `intent/drain/{uuid}`: an operator's request to empty this store. The key is the whole request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DrainIntent;

const FORMAT: u8 = 1;

impl CoordinatorRecord {
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![FORMAT];
        put_bytes(&mut out, self.address.as_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut from = Reader::new(bytes);
        if from.u8("candidate format")? != FORMAT {
            return Err(Malformed("candidate format"));
        }
        let address = from.bytes("candidate address")?.to_vec();
        from.finish("candidate")?;
        let address = String::from_utf8(address).map_err(|_| Malformed("candidate address"))?;
        Ok(Self { address })
    }
}

impl DrainIntent {
    fn encode(&self) -> Vec<u8> {
        vec![FORMAT]
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes == [FORMAT] { Ok(Self) } else { Err(Malformed("drain intent format")) }
    }
}

/// Implements [`EtcdRecord`] for a type with `encode` and `decode`. The last expression, if there
/// is one, is `belongs_at`.
macro_rules! record {
    ($kind:ty, $folder:literal, $id:ty, $name:expr, $parse:expr $(, $belongs:expr)?) => {
        impl EtcdRecord for $kind {
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

            $(fn belongs_at(&self, id: &$id) -> bool {
                $belongs(self, id)
            })?
        }
    };
}

record!(Meta, "meta", (), |(): &()| String::new(), only);
record!(CoordinatorRecord, "coordinator", (), |(): &()| String::new(), only);
record!(StoreRecord, "store/", StoreId, StoreId::to_string, store);
record!(NodeRecord, "node/", StoreId, StoreId::to_string, store);
// The id is the node's name, 1 to 64 bytes.
record!(NameRecord, "name/", String, String::clone, named);
// The id is the worker's nonce.
record!(GatewayRecord, "gateway/", u128, |nonce: &u128| format!("{nonce:032x}"), hex);
record!(DrainIntent, "intent/drain/", StoreId, StoreId::to_string, store);
record!(PromoteIntent, "intent/promote/", ShardId, ShardId::to_string, shard);
record!(RemoveIntent, "intent/remove/", StoreId, StoreId::to_string, store);
record!(PauseIntent, "intent/pause", (), |(): &()| String::new(), only);
record!(LossRecord, "loss/", (ShardId, Epoch), epoch_name, epoch, |loss: &Self, id: &_| {
    (loss.shard, loss.epoch) == *id
});
record!(ShardRecord, "shard/", ShardId, ShardId::to_string, shard, |record: &Self, id: &_| {
    record.shard() == *id
});

/// Parses the empty name of a kind that has only one record.
fn only(name: &str) -> Option<()> {
    name.is_empty().then_some(())
}

fn named(name: &str) -> Option<String> {
    (!name.is_empty()).then(|| name.to_owned())
}

/// Parses 32 hex digits in lower case, as `StoreId` prints them: one spelling per number, so one
/// key per record.
fn hex(name: &str) -> Option<u128> {
    let digits = name.len() == 32 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if digits { u128::from_str_radix(name, 16).ok() } else { None }
}

fn store(name: &str) -> Option<StoreId> {
    hex(name).map(StoreId)
}

/// Parses a shard's number. "007" and "+7" would parse, too, but only "7" is the name of a key.
fn shard(name: &str) -> Option<ShardId> {
    let shard = ShardId(name.parse().ok()?);
    (shard.to_string() == name).then_some(shard)
}

fn epoch_name((shard, epoch): &(ShardId, Epoch)) -> String {
    format!("{shard}-{}", epoch.0)
}

/// Parses a shard's number and an epoch, in the spelling of [`epoch_name`].
fn epoch(name: &str) -> Option<(ShardId, Epoch)> {
    let (shard_name, epoch) = name.split_once('-')?;
    let id = (shard(shard_name)?, Epoch(epoch.parse().ok()?));
    (epoch_name(&id) == name).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check<R: EtcdRecord>(given: &R::Id, want: &str) {
        let name = R::name(given);
        assert_eq!(format!("{}{name}", R::FOLDER), want);
        assert_eq!(R::id(&name).as_ref(), Some(given));
    }

    #[test]
    fn keys_are_golden() {
        check::<Meta>(&(), "meta");
        check::<CoordinatorRecord>(&(), "coordinator");
        check::<StoreRecord>(&StoreId(0xab), "store/000000000000000000000000000000ab");
        check::<NameRecord>(&"node-1".into(), "name/node-1");
        check::<NodeRecord>(&StoreId(0xab), "node/000000000000000000000000000000ab");
        check::<GatewayRecord>(&u128::MAX, "gateway/ffffffffffffffffffffffffffffffff");
        check::<ShardRecord>(&ShardId(2730), "shard/2730");
        check::<ShardRecord>(&ShardId(0), "shard/0");
        check::<DrainIntent>(&StoreId(1), "intent/drain/00000000000000000000000000000001");
        check::<PromoteIntent>(&ShardId(2730), "intent/promote/2730");
        check::<PauseIntent>(&(), "intent/pause");
        check::<RemoveIntent>(&StoreId(1), "intent/remove/00000000000000000000000000000001");
        check::<LossRecord>(&(ShardId(2730), Epoch(5)), "loss/2730-5");
    }

    #[track_caller]
    fn refused<R: EtcdRecord>(name: &str) {
        assert_eq!(R::id(name), None);
    }

    #[test]
    fn other_spellings_are_refused() {
        refused::<Meta>("2");
        refused::<StoreRecord>("ab");
        refused::<StoreRecord>("000000000000000000000000000000AB");
        refused::<StoreRecord>("+00000000000000000000000000000ab");
        refused::<ShardRecord>("007");
        refused::<ShardRecord>("+7");
        refused::<ShardRecord>("65536");
        refused::<ShardRecord>("");
        refused::<PromoteIntent>("07");
        refused::<LossRecord>("7");
        refused::<LossRecord>("7-05");
        refused::<LossRecord>("7-5-5");
    }

    #[test]
    fn candidates_are_golden() {
        let candidate = CoordinatorRecord { address: "[::1]:7".into() };
        assert_eq!(EtcdRecord::encode(&candidate), b"\x01\x07[::1]:7");
        assert_eq!(<CoordinatorRecord as EtcdRecord>::decode(b"\x01\x07[::1]:7"), Ok(candidate));
        assert!(<CoordinatorRecord as EtcdRecord>::decode(b"\x01\x07[::1]:").is_err());
        assert!(<CoordinatorRecord as EtcdRecord>::decode(b"\x02\x07[::1]:7").is_err());
        assert!(<CoordinatorRecord as EtcdRecord>::decode(b"\x01\x01\xff").is_err());
        assert!(<DrainIntent as EtcdRecord>::decode(&[2]).is_err());
    }
}
