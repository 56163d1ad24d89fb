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
use engine::ids::{Epoch, SessionId, ShardId, StoreBoot, StoreId};
use engine::records::{LossRecord, Meta, PromoteIntent, StoreStatus};
use engine::shard_record::ShardRecord;

use super::core::{Core, Place, ProcessId, ProcessInput, SimEvent};
use super::coverage::Path;

/// The time that a client waits for an answer.
const CALL_TIMEOUT: u64 = 400_000;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum EtcdKey {
    Meta,
    Coordinator,
    Store(StoreId),
    /// The name of a place.
    Name(u8),
    Node(StoreId),
    Gateway(u64),
    Shard(ShardId),
    Promote(ShardId),
    Loss(ShardId, Epoch),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum EtcdValue {
    Meta(Meta),
    Coordinator { place: u8 },
    Store { me: StoreBoot, nonce: u64, status: StoreStatus },
    Name(StoreId),
    Node(StoreBoot),
    Gateway,
    Shard(ShardRecord),
    Promote(PromoteIntent),
    Loss(LossRecord),
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
    number: u64,
    call: Call,
    /// The revision that its process had seen, where the answer is linearizable.
    history: Option<u64>,
    /// The time at which its client reports a time-out.
    gives_up_at: u64,
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
struct EtcdLease {
    ttl: u64,
    ends: u64,
}

/// The contents of a snapshot of etcd.
#[derive(Clone, Default)]
pub struct EtcdSnapshot {
    revision: u64,
    keys: BTreeMap<EtcdKey, Versioned>,
    leases: BTreeMap<u64, EtcdLease>,
}

/// One watch of a process. A process has two, as in production each kind of record is watched by
/// itself: events are in order within one watch and in any order between the two, so a node can
/// learn of a peer's new boot before it learns that it leads a shard no longer.
struct Watcher {
    process: ProcessId,
    /// A watch of the `shard/` keys; `false`: of all others.
    shards: bool,
    /// The index of the next event in the history.
    seen: usize,
    pending: bool,
    /// The watch has missed events since this index, and is to read everything again.
    missed: Option<usize>,
    /// The watch delivers nothing until it is made again.
    broken: bool,
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
    kept: EtcdSnapshot,
    /// While an old snapshot answers: the contents that it replaced.
    real: Option<EtcdSnapshot>,
    /// The history that each process has seen.
    histories: BTreeMap<ProcessId, History>,
    next_lease: u64,
    watchers: Vec<Watcher>,
    history: Vec<EtcdWatchEvent>,
    waiting: Vec<(ProcessId, PendingCall)>,
    next_call: u64,
}

impl Etcd {
    pub fn get(&self, key: EtcdKey) -> Option<&Versioned> {
        self.truth().keys.get(&key)
    }

    /// Returns whether the key that makes this session exists, and so has existed since.
    pub fn has_session(&self, session: SessionId) -> bool {
        let made = |(key, value): (&EtcdKey, &Versioned)| {
            matches!(key, EtcdKey::Gateway(_)) && value.created == session.0.revision
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
        asks.is_ok_and(|newest| newest <= image.revision)
    }

    /// Returns whether this process has stopped following etcd because its history went back.
    pub fn is_left_by(&self, process: ProcessId) -> bool {
        self.histories.get(&process).is_some_and(|history| history.before_call().is_err())
    }

    fn perform(&mut self, now: u64, call: Call) -> Reply {
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

    fn revoke(&mut self, lease: u64) {
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

impl Core {
    /// Calls etcd. `Etcd` or `EtcdTimeout` comes back under the returned number; after a time-out
    /// the call may still take effect.
    pub fn etcd(&mut self, from: ProcessId, call: Call) -> u64 {
        self.etcd.next_call += 1;
        let number = self.etcd.next_call;
        let gives_up_at = self.now + CALL_TIMEOUT;
        let compared = matches!(call, Call::Read(_) | Call::List | Call::Txn { .. });
        let asks = self.etcd.histories.entry(from).or_default().before_call();
        let history = asks.ok().filter(|_| compared);
        if compared && history.is_none() {
            self.input_after(CALL_TIMEOUT, from, ProcessInput::EtcdTimeout { call: number });
            return number;
        }
        if !self.net.is_blocked(from.place, Place::Etcd) {
            let mut delay = self.delay() * 2 + self.lag(from.place, Place::Etcd);
            if self.plan.slow_etcd && self.rng.percent(3) {
                delay += self.rng.between(10_000, CALL_TIMEOUT * 3);
            }
            delay += self.etcd_takes_its_time();
            let asked = PendingCall { number, call, history, gives_up_at };
            self.after(delay, SimEvent::EtcdArrives { from, asked });
        }
        self.input_after(CALL_TIMEOUT, from, ProcessInput::EtcdTimeout { call: number });
        number
    }

    pub fn etcd_arrives(&mut self, from: ProcessId, asked: PendingCall) {
        match self.etcd.health {
            EtcdHealth::Up => {}
            EtcdHealth::Stopped => return self.etcd.waiting.push((from, asked)),
            EtcdHealth::Dead => return,
        }
        let PendingCall { number, call, history, gives_up_at } = asked;
        if let Some(asked) = history {
            self.etcd_is_right_for(asked);
        }
        let before = self.etcd.history.len();
        let leases = matches!(call, Call::Grant { .. });
        if let Call::Txn { writes, .. } = &call
            && self.trace.prints()
        {
            let line = format!("etcd: {from:?} writes {writes:?}");
            self.trace.note(self.now, || line);
        }
        let reply = self.etcd.perform(self.now, call);
        if matches!(reply, Reply::Txn { done: true, .. }) && self.now > gives_up_at {
            self.oracle.coverage.reached(Path::LateTxn);
        }
        if leases && let Reply::Granted { lease } = reply {
            let ends = self.etcd.kept.leases[&lease].ends;
            self.at(ends, SimEvent::EtcdLeases);
        }
        self.etcd_changed(before);
        let seen = self.etcd.histories.entry(from).or_default();
        let revision = self.etcd.kept.revision;
        let goes_on = history.is_none_or(|asked| match reply {
            Reply::Txn { done: true, .. } => seen.check_write(asked, revision).is_ok(),
            _ => seen.check_answer(asked, revision).is_ok(),
        });
        if !goes_on {
            self.oracle.coverage.reached(Path::EtcdWentBack);
            return;
        }
        let lost = self.plan.slow_etcd && self.rng.percent(2);
        if lost || self.net.is_blocked(Place::Etcd, from.place) {
            return;
        }
        let delay = self.delay() * 2 + self.lag(Place::Etcd, from.place);
        let delay = delay + self.etcd_takes_its_time();
        self.input_after(delay, from, ProcessInput::Etcd { call: number, reply });
    }

    /// Often about as long as a client waits: some calls take effect after that, and some answers
    /// come too late.
    fn etcd_takes_its_time(&mut self) -> u64 {
        match self.etcd.slow && self.rng.percent(40) {
            true => self.rng.between(10_000, CALL_TIMEOUT * 2),
            false => 0,
        }
    }

    /// An operator writes, if etcd answers.
    pub fn etcd_write(&mut self, write: Write) {
        if self.etcd.health == EtcdHealth::Up && !self.etcd.is_restored() {
            let before = self.etcd.history.len();
            self.etcd.write(vec![write]);
            self.etcd_changed(before);
        }
    }

    /// Ends the leases that were not kept alive.
    pub fn etcd_leases(&mut self) {
        if self.etcd.health != EtcdHealth::Up {
            return;
        }
        let before = self.etcd.history.len();
        let now = self.now;
        let ended: Vec<u64> = self
            .etcd
            .kept
            .leases
            .iter()
            .filter(|(_, l)| l.ends <= now)
            .map(|(&id, _)| id)
            .collect();
        for lease in ended {
            self.etcd.revoke(lease);
        }
        if let Some(next) = self.etcd.kept.leases.values().map(|lease| lease.ends).min() {
            self.at(next, SimEvent::EtcdLeases);
        }
        self.etcd_changed(before);
    }

    /// Revokes every lease though its process is well.
    pub fn etcd_wipe_leases(&mut self) {
        let before = self.etcd.history.len();
        for lease in self.etcd.kept.leases.keys().copied().collect::<Vec<_>>() {
            self.etcd.revoke(lease);
        }
        self.etcd_changed(before);
    }

    /// Revokes one lease though its process is well.
    pub fn etcd_revoke_one(&mut self) {
        let leases: Vec<u64> = self.etcd.kept.leases.keys().copied().collect();
        if let Some(lease) = self.rng.pick(&leases) {
            self.etcd_revoke(lease);
        }
    }

    pub fn etcd_revoke(&mut self, lease: u64) {
        let before = self.etcd.history.len();
        self.etcd.revoke(lease);
        self.etcd_changed(before);
    }

    /// Another of etcd's members leads: the time to live of every lease starts again, and some have
    /// got longer.
    pub fn etcd_prolong_leases(&mut self) {
        let now = self.now;
        let longer = self.rng.between(0, 3_000_000);
        for lease in self.etcd.kept.leases.values_mut() {
            lease.ends = lease.ends.max(now + lease.ttl + longer);
        }
    }

    /// The watches of these places end, and are made again some time later with the contents of
    /// that time: the changes in between are not delivered.
    pub fn etcd_break_watches(&mut self, of: impl Fn(Place) -> bool) {
        for at in 0..self.etcd.watchers.len() {
            let watcher = &mut self.etcd.watchers[at];
            if watcher.seen != usize::MAX && of(watcher.process.place) {
                watcher.broken = true;
                self.etcd_relist_later(at);
            }
        }
    }

    fn etcd_relist_later(&mut self, at: usize) {
        let watcher = &mut self.etcd.watchers[at];
        let waits = watcher.missed.is_some();
        watcher.missed.get_or_insert(watcher.seen);
        if !waits {
            let after = self.rng.between(10_000, 1_500_000);
            self.after(after, SimEvent::EtcdRelist { watcher: at });
        }
    }

    /// Reads everything again: delivers the current state of all that was missed.
    pub fn etcd_relist(&mut self, at: usize) -> Option<(ProcessId, ProcessInput)> {
        let process = self.etcd.watchers[at].process;
        let cut_off = self.net.is_blocked(Place::Etcd, process.place)
            || self.net.is_blocked(process.place, Place::Etcd);
        let watcher = &mut self.etcd.watchers[at];
        if watcher.seen == usize::MAX {
            return None;
        }
        if cut_off || self.etcd.health != EtcdHealth::Up || self.etcd.deaf.contains(&process.place)
        {
            let again = self.rng.between(10_000, 300_000);
            self.after(again, SimEvent::EtcdRelist { watcher: at });
            return None;
        }
        let asks = self.etcd.histories.entry(process).or_default().before_call();
        if let Ok(asked) = asks {
            self.etcd_is_right_for(asked);
        }
        let revision = self.etcd.kept.revision;
        let history = self.etcd.histories.entry(process).or_default();
        if asks.and_then(|asked| history.check_answer(asked, revision)).is_err() {
            self.oracle.coverage.reached(Path::EtcdWentBack);
            self.etcd.watchers[at].seen = usize::MAX;
            return None;
        }
        let watcher = &mut self.etcd.watchers[at];
        watcher.broken = false;
        let from = watcher.missed.take().unwrap_or(watcher.seen);
        watcher.seen = self.etcd.history.len();
        let shards = watcher.shards;
        let mut newest = BTreeMap::new();
        for event in &self.etcd.history[from..] {
            if matches!(event.key, EtcdKey::Shard(_)) == shards {
                newest.insert(event.key, event.clone());
            }
        }
        let events: Vec<_> = newest.into_values().collect();
        (!events.is_empty()).then_some((process, ProcessInput::Watched(events)))
    }

    /// Etcd continues: leases that ran out meanwhile end first, then waiting calls take effect.
    pub fn etcd_resume(&mut self) {
        self.etcd.health = EtcdHealth::Up;
        self.etcd_leases();
        for (from, asked) in std::mem::take(&mut self.etcd.waiting) {
            self.etcd_arrives(from, asked);
        }
        for watcher in 0..self.etcd.watchers.len() {
            self.etcd_wake(watcher);
        }
    }

    /// Ends a restore before etcd answers a process that has seen nothing newer than the snapshot,
    /// and so could not detect it: the operator has put etcd right by then.
    fn etcd_is_right_for(&mut self, asked: u64) {
        if asked <= self.etcd.kept.revision {
            self.etcd_put_right();
        }
    }

    fn etcd_observed(&mut self, process: ProcessId) {
        let revision = self.etcd.kept.revision;
        self.etcd.histories.entry(process).or_default().observe(revision);
    }

    /// An operator restores etcd from this snapshot: later changes are gone, for as long as no
    /// process notices.
    pub fn etcd_restore(&mut self, mut image: EtcdSnapshot) {
        for lease in image.leases.values_mut() {
            lease.ends = self.now + lease.ttl;
        }
        self.etcd.real = Some(std::mem::replace(&mut self.etcd.kept, image));
        self.etcd_break_watches(|_| true);
        self.after(0, SimEvent::EtcdLeases);
    }

    /// Etcd has its real contents again, and the answers of the snapshot in between were never part
    /// of them.
    pub fn etcd_put_right(&mut self) {
        if let Some(real) = self.etcd.real.take() {
            self.etcd.kept = real;
            self.after(0, SimEvent::EtcdLeases);
            self.after(0, SimEvent::EtcdPutRight);
        }
    }

    /// Delivers to the process all that exists first, and every change from here on, some time
    /// later.
    pub fn etcd_watch(&mut self, process: ProcessId) {
        for shards in [false, true] {
            let (seen, pending, missed, broken) = (0, false, None, false);
            let watcher = Watcher { process, shards, seen, pending, missed, broken };
            self.etcd.watchers.push(watcher);
            self.etcd_wake(self.etcd.watchers.len() - 1);
        }
    }

    pub fn etcd_unwatch(&mut self, process: ProcessId) {
        for watcher in &mut self.etcd.watchers {
            if watcher.process == process {
                watcher.pending = true;
                watcher.seen = usize::MAX;
            }
        }
    }

    fn etcd_changed(&mut self, before: usize) {
        for at in before..self.etcd.history.len() {
            match self.etcd.history[at].value.as_ref().map(|versioned| &versioned.value) {
                Some(EtcdValue::Shard(config)) => self.oracle.record_written(config),
                Some(EtcdValue::Loss(_)) => self.oracle.coverage.reached(Path::LossAccepted),
                _ => {}
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
        self.after(lag, SimEvent::EtcdWatch { watcher: at });
    }

    pub fn etcd_watched(&mut self, at: usize) -> Option<(ProcessId, ProcessInput)> {
        let watcher = &mut self.etcd.watchers[at];
        let process = watcher.process;
        if watcher.seen == usize::MAX {
            return None;
        }
        watcher.pending = false;
        if watcher.broken {
            return None;
        }
        if self.net.is_blocked(Place::Etcd, process.place) {
            watcher.pending = true;
            let again = self.rng.between(10_000, 300_000);
            self.after(again, SimEvent::EtcdWatch { watcher: at });
            return None;
        }
        if self.etcd.health != EtcdHealth::Up {
            return None;
        }
        if self.etcd.forgets && self.rng.percent(30) {
            self.etcd_relist_later(at);
            self.etcd.watchers[at].seen = self.etcd.history.len();
            return None;
        }
        self.etcd_observed(process);
        let watcher = &mut self.etcd.watchers[at];
        let shards = watcher.shards;
        let events = self.etcd.history[watcher.seen..].iter();
        let events: Vec<_> = events
            .filter(|event| matches!(event.key, EtcdKey::Shard(_)) == shards)
            .cloned()
            .collect();
        watcher.seen = self.etcd.history.len();
        (!events.is_empty()).then_some((process, ProcessInput::Watched(events)))
    }
}
