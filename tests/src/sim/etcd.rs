//! A model of etcd: what it promises, and nothing more.
//!
//! Linearizable reads and transactions, revisions, leases, watches that lag. The promises that a
//! newcomer would expect and that it does *not* give: a transaction whose answer was lost may take
//! effect much later; all leases may vanish at once though every process is well (it was stopped for
//! longer than the time to live); a watch may be arbitrarily late.

use std::collections::BTreeMap;

use engine::config::ShardConfig;
use engine::ids::{SessionId, ShardId, StoreBoot, StoreId};
use engine::records::{Meta, StoreStatus};

use super::core::{Core, Happening, Place, Process, Told};
use super::coverage::Path;

/// How long a client waits for an answer.
const CALL_TIMEOUT: u64 = 400_000;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Key {
    Meta,
    Coordinator,
    Store(StoreId),
    Node(StoreId),
    Gateway(u64),
    Shard(ShardId),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Value {
    Meta(Meta),
    Coordinator { place: u8 },
    Store { me: StoreBoot, nonce: u64, status: StoreStatus },
    Node(StoreBoot),
    Gateway,
    Shard(ShardConfig),
}

/// A value with its place in etcd's history.
#[derive(Clone, Debug)]
pub struct Versioned {
    pub value: Value,
    pub created: u64,
    pub modified: u64,
    pub lease: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub enum Compare {
    /// 0: there is no such key.
    Modified(Key, u64),
    Created(Key, u64),
}

#[derive(Clone, Debug)]
pub enum Write {
    Put(Key, Value, Option<u64>),
    Delete(Key),
}

#[derive(Clone, Debug)]
pub enum Call {
    Read(Vec<Key>),
    /// Everything there is, in one linearizable read.
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
pub struct Asked {
    number: u64,
    call: Call,
    /// Its client has heard of a time-out by then.
    gives_up_at: u64,
}

#[derive(Clone, Debug)]
pub enum Reply {
    Read {
        keys: Vec<(Key, Option<Versioned>)>,
    },
    List {
        revision: u64,
        all: Vec<(Key, Versioned)>,
    },
    Txn {
        done: bool,
        revision: u64,
    },
    Granted {
        lease: u64,
    },
    /// False: there is no such lease.
    Kept(bool),
}

#[derive(Clone, Debug)]
pub struct WatchEvent {
    pub key: Key,
    pub value: Option<Versioned>,
}

struct Lease {
    ttl: u64,
    ends: u64,
}

/// One watch of a process. It has two, as in production each kind of record is watched by itself: what is in order
/// within one may come in any order between the two, so a node can hear of a peer's new boot before it hears that
/// it leads a shard no longer.
struct Watcher {
    process: Process,
    /// Of the `shard/` keys; else of all others.
    shards: bool,
    /// Index into the history of what it has not seen.
    seen: usize,
    pending: bool,
}

/// Whether etcd answers.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Health {
    #[default]
    Up,
    /// Stopped: calls wait and take effect when it goes on.
    Stopped,
    /// Dead: calls are lost.
    Dead,
}

#[derive(Default)]
pub struct Etcd {
    pub health: Health,
    revision: u64,
    keys: BTreeMap<Key, Versioned>,
    leases: BTreeMap<u64, Lease>,
    next_lease: u64,
    watchers: Vec<Watcher>,
    history: Vec<WatchEvent>,
    waiting: Vec<(Process, Asked)>,
    next_call: u64,
}

impl Etcd {
    pub fn get(&self, key: Key) -> Option<&Versioned> {
        self.keys.get(&key)
    }

    /// The key that makes this session stands, and so has always stood since.
    pub fn has_session(&self, session: SessionId) -> bool {
        let made = |(key, value): (&Key, &Versioned)| {
            matches!(key, Key::Gateway(_)) && value.created == session.0.revision
        };
        self.keys.iter().any(made)
    }

    pub fn shards(&self) -> impl Iterator<Item = (&ShardConfig, u64)> {
        self.keys.values().filter_map(|versioned| match &versioned.value {
            Value::Shard(config) => Some((config, versioned.modified)),
            _ => None,
        })
    }

    fn perform(&mut self, now: u64, call: Call) -> Reply {
        match call {
            Call::Read(keys) => {
                let found = |key| (key, self.keys.get(&key).cloned());
                Reply::Read { keys: keys.into_iter().map(found).collect() }
            }
            Call::List => Reply::List {
                revision: self.revision,
                all: self.keys.iter().map(|(&key, value)| (key, value.clone())).collect(),
            },
            Call::Txn { compares, writes } => self.txn(&compares, writes),
            Call::Grant { ttl } => {
                self.next_lease += 1;
                self.leases.insert(self.next_lease, Lease { ttl, ends: now + ttl });
                Reply::Granted { lease: self.next_lease }
            }
            Call::KeepAlive { lease } => Reply::Kept(match self.leases.get_mut(&lease) {
                Some(lease) => {
                    lease.ends = now + lease.ttl;
                    true
                }
                None => false,
            }),
            Call::Revoke { lease } => {
                self.revoke(lease);
                Reply::Kept(false)
            }
        }
    }

    /// What setting a record up without a process does: for the first records of a run.
    pub fn write(&mut self, writes: Vec<Write>) {
        self.txn(&[], writes);
    }

    fn txn(&mut self, compares: &[Compare], writes: Vec<Write>) -> Reply {
        let holds = |compare: &Compare| match *compare {
            Compare::Modified(key, at) => self.keys.get(&key).map_or(0, |v| v.modified) == at,
            Compare::Created(key, at) => self.keys.get(&key).map_or(0, |v| v.created) == at,
        };
        let lease_lives = |write: &Write| match write {
            Write::Put(_, _, Some(lease)) => self.leases.contains_key(lease),
            _ => true,
        };
        let done = compares.iter().all(holds) && writes.iter().all(lease_lives);
        if done {
            self.revision += 1;
            for write in writes {
                self.apply(write);
            }
        }
        Reply::Txn { done, revision: self.revision }
    }

    fn apply(&mut self, write: Write) {
        let (key, value) = match write {
            Write::Put(key, value, lease) => {
                let created = self.keys.get(&key).map_or(self.revision, |old| old.created);
                let versioned = Versioned { value, created, modified: self.revision, lease };
                self.keys.insert(key, versioned.clone());
                (key, Some(versioned))
            }
            Write::Delete(key) => {
                if self.keys.remove(&key).is_none() {
                    return;
                }
                (key, None)
            }
        };
        self.history.push(WatchEvent { key, value });
    }

    fn revoke(&mut self, lease: u64) {
        if self.leases.remove(&lease).is_none() {
            return;
        }
        let attached =
            |(&key, value): (&Key, &Versioned)| (value.lease == Some(lease)).then_some(key);
        let keys: Vec<Key> = self.keys.iter().filter_map(attached).collect();
        if !keys.is_empty() {
            self.revision += 1;
            for key in keys {
                self.apply(Write::Delete(key));
            }
        }
    }
}

impl Core {
    /// Asks etcd. `Etcd` or `EtcdTimeout` comes back under the returned number; after a time-out
    /// the call may still take effect.
    pub fn etcd(&mut self, from: Process, call: Call) -> u64 {
        self.etcd.next_call += 1;
        let number = self.etcd.next_call;
        let gives_up_at = self.now + CALL_TIMEOUT;
        if !self.net.is_blocked(from.place, Place::Etcd) {
            let mut delay = self.delay() * 2 + self.lag(from.place, Place::Etcd);
            if self.plan.slow_etcd && self.rng.percent(3) {
                delay += self.rng.between(10_000, CALL_TIMEOUT * 3);
            }
            let asked = Asked { number, call, gives_up_at };
            self.after(delay, Happening::EtcdArrives { from, asked });
        }
        self.tell_after(CALL_TIMEOUT, from, Told::EtcdTimeout { call: number });
        number
    }

    pub fn etcd_arrives(&mut self, from: Process, asked: Asked) {
        match self.etcd.health {
            Health::Up => {}
            Health::Stopped => return self.etcd.waiting.push((from, asked)),
            Health::Dead => return,
        }
        let Asked { number, call, gives_up_at } = asked;
        let before = self.etcd.history.len();
        let leases = matches!(call, Call::Grant { .. });
        if let Call::Txn { writes, .. } = &call
            && self.journal.prints()
        {
            let line = format!("etcd: {from:?} writes {writes:?}");
            self.journal.note(self.now, || line);
        }
        let reply = self.etcd.perform(self.now, call);
        if matches!(reply, Reply::Txn { done: true, .. }) && self.now > gives_up_at {
            self.oracle.coverage.reached(Path::LateTxn);
        }
        if leases && let Reply::Granted { lease } = reply {
            let ends = self.etcd.leases[&lease].ends;
            self.at(ends, Happening::EtcdLeases);
        }
        self.etcd_changed(before);
        let lost = self.plan.slow_etcd && self.rng.percent(2);
        if lost || self.net.is_blocked(Place::Etcd, from.place) {
            return;
        }
        let delay = self.delay() * 2 + self.lag(Place::Etcd, from.place);
        self.tell_after(delay, from, Told::Etcd { call: number, reply });
    }

    /// Leases that nobody has kept alive end.
    pub fn etcd_leases(&mut self) {
        if self.etcd.health != Health::Up {
            return;
        }
        let before = self.etcd.history.len();
        let now = self.now;
        let ended: Vec<u64> =
            self.etcd.leases.iter().filter(|(_, l)| l.ends <= now).map(|(&id, _)| id).collect();
        for lease in ended {
            self.etcd.revoke(lease);
        }
        if let Some(next) = self.etcd.leases.values().map(|lease| lease.ends).min() {
            self.at(next, Happening::EtcdLeases);
        }
        self.etcd_changed(before);
    }

    /// Every lease is revoked though its process is well.
    pub fn etcd_wipe_leases(&mut self) {
        let before = self.etcd.history.len();
        for lease in self.etcd.leases.keys().copied().collect::<Vec<_>>() {
            self.etcd.revoke(lease);
        }
        self.etcd_changed(before);
    }

    /// Goes on: leases that ran out meanwhile end first, then what has waited takes effect.
    pub fn etcd_resume(&mut self) {
        self.etcd.health = Health::Up;
        self.etcd_leases();
        for (from, asked) in std::mem::take(&mut self.etcd.waiting) {
            self.etcd_arrives(from, asked);
        }
        for watcher in 0..self.etcd.watchers.len() {
            self.etcd_wake(watcher);
        }
    }

    /// Tells the process of every change from here on, some time later, and of all there is first.
    pub fn etcd_watch(&mut self, process: Process) {
        for shards in [false, true] {
            self.etcd.watchers.push(Watcher { process, shards, seen: 0, pending: false });
            self.etcd_wake(self.etcd.watchers.len() - 1);
        }
    }

    pub fn etcd_unwatch(&mut self, process: Process) {
        for watcher in &mut self.etcd.watchers {
            if watcher.process == process {
                watcher.pending = true;
                watcher.seen = usize::MAX;
            }
        }
    }

    fn etcd_changed(&mut self, before: usize) {
        for at in before..self.etcd.history.len() {
            if let WatchEvent {
                value: Some(Versioned { value: Value::Shard(config), .. }), ..
            } = &self.etcd.history[at]
            {
                self.oracle.record_written(config);
            }
        }
        if before < self.etcd.history.len() {
            for watcher in 0..self.etcd.watchers.len() {
                self.etcd_wake(watcher);
            }
        }
    }

    fn etcd_wake(&mut self, at: usize) {
        let watcher = &mut self.etcd.watchers[at];
        if watcher.pending || watcher.seen >= self.etcd.history.len() {
            return;
        }
        watcher.pending = true;
        let (shards, place) = (watcher.shards, watcher.process.place);
        let mut lag = self.delay() * 2 + self.lag(Place::Etcd, place);
        if self.plan.slow_etcd && self.rng.percent(10) {
            let lag_max = if shards { 2_000_000 } else { 500_000 };
            lag += self.rng.between(1_000, lag_max);
        }
        self.after(lag, Happening::EtcdWatch { watcher: at });
    }

    pub fn etcd_watched(&mut self, at: usize) -> Option<(Process, Told)> {
        let watcher = &mut self.etcd.watchers[at];
        let process = watcher.process;
        if watcher.seen == usize::MAX {
            return None;
        }
        watcher.pending = false;
        if self.net.is_blocked(Place::Etcd, process.place) {
            watcher.pending = true;
            let again = self.rng.between(10_000, 300_000);
            self.after(again, Happening::EtcdWatch { watcher: at });
            return None;
        }
        if self.etcd.health != Health::Up {
            return None;
        }
        let shards = watcher.shards;
        let events = self.etcd.history[watcher.seen..].iter();
        let events: Vec<_> =
            events.filter(|event| matches!(event.key, Key::Shard(_)) == shards).cloned().collect();
        watcher.seen = self.etcd.history.len();
        (!events.is_empty()).then_some((process, Told::Watched(events)))
    }
}
