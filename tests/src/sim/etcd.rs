//! A model of etcd: what it promises, and nothing more.
//!
//! Linearizable reads and transactions, revisions, leases, watches that lag. The promises that a
//! reader might expect and that etcd does *not* give: a transaction whose answer was lost may take
//! effect much later; a lease may vanish though its process is well, all of them at once even (etcd
//! was stopped for longer than the time to live), or live on much longer than it should (its leader
//! changed); a keep-alive may be answered "kept" for a lease that is gone; a watch may be
//! arbitrarily late, break, or miss events, so that only reading everything again gives the current
//! state.

use std::collections::{BTreeMap, BTreeSet};

use engine::history::History;
use engine::ids::{Epoch, Revision, SessionId, ShardId, StoreBoot, StoreId};
use engine::records::{LossRecord, Meta, PromoteIntent, StoreRecord, StoreStatus};
use engine::shard_record::ShardRecord;

use super::place::{Place, ProcessId, index_of, name_of};

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum EtcdKey {
    Meta,
    Coordinator,
    Store(StoreId),
    /// The name of a place.
    Name(u16),
    Node(StoreId),
    Gateway(u64),
    Shard(ShardId),
    Promote(ShardId),
    Loss(ShardId, Epoch),
    Drain(StoreId),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum EtcdValue {
    Meta(Meta),
    Coordinator { place: u8 },
    Store { me: StoreBoot, nonce: u64, status: StoreStatus, zone: String },
    Name(StoreId),
    Node(StoreBoot),
    Gateway,
    Shard(ShardRecord),
    Promote(PromoteIntent),
    Loss(LossRecord),
    Drain,
}

/// A value with its place in etcd's history.
#[derive(Clone, Debug)]
pub struct Versioned {
    pub value: EtcdValue,
    pub created: u64,
    pub modified: u64,
    pub lease: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub enum Compare {
    /// The revision of the last change; 0: there is no such key.
    Modified(EtcdKey, u64),
    Created(EtcdKey, u64),
}

#[derive(Clone, Debug)]
pub enum Write {
    Put(EtcdKey, EtcdValue, Option<u64>),
    Delete(EtcdKey),
}

#[derive(Clone, Debug)]
pub enum Call {
    Read(Vec<EtcdKey>),
    /// All keys and values, in one linearizable read.
    List,
    Txn {
        compares: Vec<Compare>,
        writes: Vec<Write>,
    },
    Grant {
        ttl: u64,
    },
    KeepAlive {
        lease: u64,
    },
    Revoke {
        lease: u64,
    },
}

/// A call on its way.
#[derive(Debug)]
pub struct PendingCall {
    pub(super) number: u64,
    pub(super) call: Call,
    /// The revision that its process had seen, where the answer is linearizable.
    pub(super) history: Option<u64>,
    /// The time at which its client reports a time-out.
    pub(super) gives_up_at: u64,
    /// The etcd that it was sent to.
    pub(super) era: u32,
}

#[derive(Clone, Debug)]
pub enum Reply {
    Read {
        keys: Vec<(EtcdKey, Option<Versioned>)>,
    },
    List {
        revision: u64,
        all: Vec<(EtcdKey, Versioned)>,
    },
    Txn {
        done: bool,
        revision: u64,
    },
    Granted {
        lease: u64,
    },
    /// `false`: there is no such lease.
    Kept(bool),
}

#[derive(Clone, Debug)]
pub struct EtcdWatchEvent {
    pub key: EtcdKey,
    pub value: Option<Versioned>,
}

#[derive(Clone)]
pub(super) struct EtcdLease {
    pub(super) ttl: u64,
    pub(super) ends: u64,
}

/// The contents of a snapshot of etcd.
#[derive(Clone, Default)]
pub struct EtcdSnapshot {
    /// The number of times that all of etcd was lost before.
    pub(super) era: u32,
    pub(super) revision: u64,
    pub(super) keys: BTreeMap<EtcdKey, Versioned>,
    pub(super) leases: BTreeMap<u64, EtcdLease>,
}

/// One watch of a process. A process has two, as in production each kind of record is watched by
/// itself: events are in order within one watch and in any order between the two, so a node can
/// learn of a peer's new boot before it learns that it leads a shard no longer.
pub(super) struct Watcher {
    pub(super) process: ProcessId,
    /// A watch of the `shard/` keys; `false`: of all others.
    pub(super) shards: bool,
    /// The index of the next event in the history.
    pub(super) seen: usize,
    pub(super) pending: bool,
    /// The watch has missed events since this index, and is to read everything again.
    pub(super) missed: Option<usize>,
    /// The watch delivers nothing until it is made again.
    pub(super) broken: bool,
}

/// The availability of etcd.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum EtcdHealth {
    #[default]
    Up,
    /// Calls wait and take effect when etcd continues.
    Stopped,
    /// Calls are lost.
    Dead,
}

#[derive(Default)]
pub struct Etcd {
    pub health: EtcdHealth,
    /// Faults of the moment: calls and their answers are slow; a keep-alive always succeeds;
    /// watches miss events.
    pub slow: bool,
    pub lies: bool,
    pub forgets: bool,
    /// Ended watches of these places are not made again yet.
    pub deaf: BTreeSet<Place>,
    pub(super) kept: EtcdSnapshot,
    /// While an old snapshot answers: the contents that it replaced.
    pub(super) real: Option<EtcdSnapshot>,
    /// The history that each process has seen.
    pub(super) histories: BTreeMap<ProcessId, History>,
    pub(super) next_lease: u64,
    pub(super) watchers: Vec<Watcher>,
    pub(super) history: Vec<EtcdWatchEvent>,
    pub(super) waiting: Vec<(ProcessId, PendingCall)>,
    pub(super) next_call: u64,
    /// All is lost, and not rebuilt yet.
    lost: bool,
    /// The settings of the cluster that were lost.
    lost_meta: Option<Meta>,
    /// The processes that ran when etcd was lost: they follow no etcd any more.
    left: BTreeSet<ProcessId>,
}

impl Etcd {
    /// All contents are lost, and every call that is on its way. `left`: the processes that run.
    pub(super) fn lose(&mut self, left: Vec<ProcessId>) {
        self.lost = true;
        self.lost_meta = match self.kept.keys.get(&EtcdKey::Meta).map(|kept| &kept.value) {
            Some(EtcdValue::Meta(meta)) => Some(meta.clone()),
            _ => None,
        };
        self.kept = EtcdSnapshot { era: self.kept.era + 1, ..EtcdSnapshot::default() };
        for watcher in &mut self.watchers {
            (watcher.pending, watcher.seen) = (true, usize::MAX);
        }
        self.history.clear();
        self.waiting.clear();
        self.left.extend(left);
    }

    /// A new etcd begins with these contents.
    pub(super) fn begin_again(&mut self, revision: u64, writes: Vec<Write>) {
        self.kept.revision = revision;
        self.lost = false;
        self.txn(&[], writes);
    }

    pub(super) fn lost_meta(&self) -> Option<Meta> {
        self.lost_meta.clone()
    }

    /// Returns whether all is lost, and not rebuilt yet.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// The processes that follow no etcd any more since one was lost.
    pub fn left_behind(&self) -> impl Iterator<Item = ProcessId> + use<> {
        self.left.clone().into_iter()
    }

    /// Returns whether the process has run when etcd was lost.
    pub fn is_left_behind(&self, process: ProcessId) -> bool {
        self.left.contains(&process)
    }

    /// The incarnation of the cluster's settings: each rebuild raises it.
    pub fn incarnation(&self) -> u32 {
        1 + self.kept.era
    }

    pub fn session_id(&self, created: u64) -> SessionId {
        SessionId(Revision { incarnation: self.incarnation(), revision: created })
    }

    /// The number of changes so far.
    pub fn revision(&self) -> u64 {
        self.kept.revision
    }

    pub fn get(&self, key: EtcdKey) -> Option<&Versioned> {
        self.truth().keys.get(&key)
    }

    /// Returns whether the key that makes this session exists, and so has existed since.
    pub fn has_session(&self, session: SessionId) -> bool {
        let made = |(key, value): (&EtcdKey, &Versioned)| {
            matches!(key, EtcdKey::Gateway(_)) && self.session_id(value.created) == session
        };
        self.truth().keys.iter().any(made)
    }

    pub fn shards(&self) -> impl Iterator<Item = (&ShardRecord, u64)> {
        self.truth().keys.values().filter_map(|versioned| match &versioned.value {
            EtcdValue::Shard(config) => Some((config, versioned.modified)),
            _ => None,
        })
    }

    pub fn snapshot(&self) -> EtcdSnapshot {
        self.kept.clone()
    }

    /// Returns whether an old snapshot answers in place of the real contents.
    pub fn is_restored(&self) -> bool {
        self.real.is_some()
    }

    /// The real contents, also while a snapshot is in their place.
    fn truth(&self) -> &EtcdSnapshot {
        self.real.as_ref().unwrap_or(&self.kept)
    }

    /// Returns whether this process has seen nothing newer than the snapshot.
    pub fn could_follow(&self, process: ProcessId, image: &EtcdSnapshot) -> bool {
        let asks = self.histories.get(&process).map_or(Ok(0), History::before_call);
        asks.is_ok_and(|newest| newest <= image.revision) || image.era != self.kept.era
    }

    /// Returns whether this process has stopped following etcd because its history went back.
    pub fn is_left_by(&self, process: ProcessId) -> bool {
        self.histories.get(&process).is_some_and(|history| history.before_call().is_err())
    }

    pub(super) fn perform(&mut self, now: u64, call: Call) -> Reply {
        match call {
            Call::Read(keys) => {
                let found = |key| (key, self.kept.keys.get(&key).cloned());
                Reply::Read { keys: keys.into_iter().map(found).collect() }
            }
            Call::List => Reply::List {
                revision: self.kept.revision,
                all: self.kept.keys.iter().map(|(&key, value)| (key, value.clone())).collect(),
            },
            Call::Txn { compares, writes } => self.txn(&compares, writes),
            Call::Grant { ttl } => {
                self.next_lease += 1;
                self.kept.leases.insert(self.next_lease, EtcdLease { ttl, ends: now + ttl });
                Reply::Granted { lease: self.next_lease }
            }
            Call::KeepAlive { lease } => Reply::Kept(match self.kept.leases.get_mut(&lease) {
                Some(lease) => {
                    lease.ends = now + lease.ttl;
                    true
                }
                None => self.lies,
            }),
            Call::Revoke { lease } => {
                self.revoke(lease);
                Reply::Kept(false)
            }
        }
    }

    /// Writes the first records of a run, for which there is no process.
    pub fn write(&mut self, writes: Vec<Write>) {
        self.txn(&[], writes);
    }

    fn txn(&mut self, compares: &[Compare], writes: Vec<Write>) -> Reply {
        let holds = |compare: &Compare| match *compare {
            Compare::Modified(key, at) => self.kept.keys.get(&key).map_or(0, |v| v.modified) == at,
            Compare::Created(key, at) => self.kept.keys.get(&key).map_or(0, |v| v.created) == at,
        };
        let lease_lives = |write: &Write| match write {
            Write::Put(_, _, Some(lease)) => self.kept.leases.contains_key(lease),
            _ => true,
        };
        let done = compares.iter().all(holds) && writes.iter().all(lease_lives);
        if done {
            self.kept.revision += 1;
            for write in writes {
                self.apply(write);
            }
        }
        Reply::Txn { done, revision: self.kept.revision }
    }

    fn apply(&mut self, write: Write) {
        let (key, value) = match write {
            Write::Put(key, value, lease) => {
                let created =
                    self.kept.keys.get(&key).map_or(self.kept.revision, |old| old.created);
                let versioned = Versioned { value, created, modified: self.kept.revision, lease };
                self.kept.keys.insert(key, versioned.clone());
                (key, Some(versioned))
            }
            Write::Delete(key) => {
                if self.kept.keys.remove(&key).is_none() {
                    return;
                }
                (key, None)
            }
        };
        // Events of a history that no process may follow are not delivered.
        if self.real.is_none() {
            self.history.push(EtcdWatchEvent { key, value });
        }
    }

    pub(super) fn revoke(&mut self, lease: u64) {
        if self.kept.leases.remove(&lease).is_none() {
            return;
        }
        let attached =
            |(&key, value): (&EtcdKey, &Versioned)| (value.lease == Some(lease)).then_some(key);
        let keys: Vec<EtcdKey> = self.kept.keys.iter().filter_map(attached).collect();
        if !keys.is_empty() {
            self.kept.revision += 1;
            for key in keys {
                self.apply(Write::Delete(key));
            }
        }
    }
}

pub fn store_of(versioned: &Versioned) -> Option<StoreRecord> {
    let EtcdValue::Store { me, nonce, status, zone } = &versioned.value else { return None };
    Some(StoreRecord {
        name: name_of(me.store),
        address: String::new(),
        zone: zone.clone(),
        host: String::new(),
        boot: me.boot,
        nonce: u128::from(*nonce),
        status: *status,
    })
}

pub fn name_key(store: StoreId) -> EtcdKey {
    EtcdKey::Name(index_of(store))
}
