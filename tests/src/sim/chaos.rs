//! A second coordinator that promotes, recruits and moves at random, always by compare-and-set, and
//! knows nothing of logs. All of its actions must be safe; and it interferes with the real
//! coordinator, which must cope with records that change concurrently.
//!
//! This coordinator stops when the faults do: healing is the task of the real one alone.

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::{Epoch, StoreBoot, StoreId, Version};
use engine::records::StoreStatus;
use engine::shard_record::{ShardRecord, insert, remove};

use super::core::Core;
use super::etcd::{Call, Compare, EtcdKey, EtcdValue, Reply, Versioned, Write};
use super::event::ProcessInput;
use super::place::{Place, ProcessId};

const TOCK: u64 = 50_000;

#[derive(Debug)]
pub struct ChaosHost {
    pub place: Place,
    pub incarnation: u32,
    running: Option<Option<u64>>,
}

impl Default for ChaosHost {
    fn default() -> Self {
        Self { place: Place::Chaos, incarnation: 0, running: None }
    }
}

impl ChaosHost {
    pub fn process(&self) -> ProcessId {
        ProcessId { place: self.place, incarnation: self.incarnation }
    }

    pub fn is_down(&self) -> bool {
        self.running.is_none()
    }

    pub fn crash(&mut self) {
        self.running = None;
    }

    pub fn start(&mut self, core: &mut Core) {
        if self.is_down() && core.is_faulty() {
            self.incarnation += 1;
            self.running = Some(None);
            core.input_after(TOCK, self.process(), ProcessInput::Tock);
        }
    }

    pub fn on(&mut self, core: &mut Core, input: ProcessInput) {
        let process = self.process();
        let Some(waiting) = &mut self.running else { return };
        match input {
            ProcessInput::Tock if !core.is_faulty() => self.running = None,
            ProcessInput::Tock => {
                core.input_after(TOCK, process, ProcessInput::Tock);
                if waiting.is_none() {
                    *waiting = Some(core.etcd(process, Call::List));
                }
            }
            ProcessInput::EtcdTimeout { call } if *waiting == Some(call) => *waiting = None,
            ProcessInput::Etcd { call, reply } if *waiting == Some(call) => {
                *waiting = None;
                if let Reply::List { all, .. } = reply {
                    self.look(core, all);
                }
            }
            _ => {}
        }
    }

    fn look(&self, core: &mut Core, all: Vec<(EtcdKey, Versioned)>) {
        let mut alive = BTreeMap::new();
        let mut shards = Vec::new();
        let mut suspect = BTreeSet::new();
        for (_, versioned) in all {
            match versioned.value {
                EtcdValue::Node(me) => {
                    alive.insert(me.store, me);
                }
                EtcdValue::Shard(config) => shards.push((config, versioned.modified)),
                EtcdValue::Store { me, status: StoreStatus::Suspect, .. } => {
                    suspect.insert(me.store);
                }
                _ => {}
            }
        }
        let mut writes = Vec::new();
        for (config, at) in shards {
            let change =
                promote(core, &config, &alive, &suspect).or_else(|| place(core, &config, &alive));
            if let Some(mut config) = change {
                config.version = Version(config.version.0 + 1);
                writes.push((at, config));
            }
        }
        for (at, config) in writes {
            let key = EtcdKey::Shard(config.shard());
            let compares = vec![Compare::Modified(key, at)];
            let writes = vec![Write::Put(key, EtcdValue::Shard(config), None)];
            core.etcd(self.process(), Call::Txn { compares, writes });
        }
    }
}

type LiveStores = BTreeMap<StoreId, StoreBoot>;

/// The copies of a suspect store are not for a coordinator to promote that knows nothing of logs.
fn promote(
    core: &mut Core,
    config: &ShardRecord,
    alive: &LiveStores,
    suspect: &BTreeSet<StoreId>,
) -> Option<ShardRecord> {
    let lives = alive.get(&config.primary.store) == Some(&config.primary);
    let spurious = core.is_faulty() && core.rng.below(1_000) < core.plan.spurious_permille;
    if lives && !spurious {
        return None;
    }
    let passed = |store: &StoreId| config.tainted.contains(store) || suspect.contains(store);
    let fit = |store: &&StoreId| alive.contains_key(store) && !passed(store);
    let fit: Vec<StoreId> = config.isr.iter().filter(fit).copied().collect();
    let primary = alive[&core.rng.pick(&fit)?];
    let mut next = ShardRecord { primary, epoch: Epoch(config.epoch.0 + 1), ..config.clone() };
    for store in config.isr.iter().copied() {
        let gone = !alive.contains_key(&store);
        let drops = gone || (store != primary.store && core.rng.percent(10));
        if drops && next.isr.len() > core.plan.min_in_sync {
            remove(&mut next.isr, store);
            remove(&mut next.tainted, store);
        }
    }
    Some(next)
}

/// Recruits missing members, removes surplus ones.
fn place(core: &mut Core, config: &ShardRecord, alive: &LiveStores) -> Option<ShardRecord> {
    let mut next = config.clone();
    if config.isr.len() > core.plan.replicas {
        let others: Vec<StoreId> =
            config.isr.iter().copied().filter(|&store| store != config.primary.store).collect();
        let gone = core.rng.pick(&others)?;
        remove(&mut next.isr, gone);
        remove(&mut next.tainted, gone);
        return Some(next);
    }
    let dead = config.learners.iter().find(|store| !alive.contains_key(store));
    if let Some(&store) = dead
        && core.rng.percent(20)
    {
        remove(&mut next.learners, store);
        return Some(next);
    }
    let in_sync = config.isr.iter().filter(|store| alive.contains_key(store)).count();
    let missing = in_sync + config.learners.len() < core.plan.replicas;
    let moves = core.is_faulty() && core.rng.percent(1);
    if (!missing && !moves) || config.learners.len() > 1 || !core.rng.percent(40) {
        return None;
    }
    let free = |store: &StoreId| !config.isr.contains(store) && !config.learners.contains(store);
    let free: Vec<StoreId> = alive.keys().copied().filter(free).collect();
    insert(&mut next.learners, core.rng.pick(&free)?);
    Some(next)
}
