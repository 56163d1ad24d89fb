//! Every order of the steps of etcd and of starts that want one name.
//!
//! A step is one call of etcd or one decision of a start. A claim may arrive at once, later, or
//! after its process has died. What must hold: no two of the registered processes have one name;
//! and a store keeps its name if no operator has consented to its replacement.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::*;

const NAME: &str = "a";
/// A start that has decided so often is abandoned: two that take one name from each other could
/// continue for ever.
const LOOKS_MAX: u128 = 4;

/// Etcd: each record with the revision at which it was changed last.
#[derive(Clone, Debug, Default)]
struct Etcd {
    revision: u64,
    stores: BTreeMap<StoreId, (StoreRecord, u64)>,
    name: Option<(StoreId, u64)>,
    /// Processes that are registered.
    nodes: BTreeSet<StoreId>,
}

/// A claim in flight.
#[derive(Clone, Debug)]
struct Flying {
    store: StoreId,
    record: StoreRecord,
    /// The revisions of the store's record and of the name's that the claim requires; 0: there is
    /// none.
    over: (u64, u64),
    replaces: Option<StoreId>,
}

/// The next step of a start.
#[derive(Clone, Debug)]
enum Next {
    ReadRecords,
    /// Reads the record of the store that has the name.
    ReadHolder(Option<(StoreRecord, u64)>, Option<(StoreId, u64)>),
    Look(Option<(StoreRecord, u64)>, Option<(StoreId, u64)>, Option<NameHolder>),
    Claim(Flying),
    /// The start may serve, and reads the records that it registers by.
    ReadGuard(Boot, u128),
    Register((u64, u64)),
    Serves,
    Ended,
}

#[derive(Clone, Debug)]
struct Process {
    start: Start,
    log: Option<Identity>,
    next: Next,
    looks: u128,
}

#[derive(Clone, Debug)]
struct World {
    etcd: Etcd,
    processes: Vec<Process>,
    late: Vec<Flying>,
    /// The number of processes that may still die while their claim is in flight.
    deaths: u32,
    /// The store that some shard has as a trusted member.
    trusted_member: Option<StoreId>,
}

impl Etcd {
    fn revision_of(&self, store: StoreId) -> u64 {
        self.stores.get(&store).map_or(0, |(_, revision)| *revision)
    }

    fn name_revision(&self) -> u64 {
        self.name.map_or(0, |(_, revision)| revision)
    }

    fn take(&mut self, claim: Flying) {
        let Flying { store, record, over, replaces } = claim;
        let runs = replaces.is_some_and(|other| self.nodes.contains(&other));
        if over != (self.revision_of(store), self.name_revision()) || runs {
            return;
        }
        self.revision += 1;
        self.stores.insert(store, (record, self.revision));
        self.name = Some((store, self.revision));
    }
}

impl World {
    /// One world after each step that can be next.
    fn steps(&self) -> Vec<Self> {
        let mut all = Vec::new();
        for (index, process) in self.processes.iter().enumerate() {
            let is_claim = matches!(process.next, Next::Claim(_));
            let is_tired = matches!(process.next, Next::Look(..)) && process.looks == LOOKS_MAX;
            if !matches!(process.next, Next::Serves | Next::Ended) && !is_tired {
                let mut next = self.clone();
                next.step(index);
                all.push(next);
            }
            if is_claim && self.deaths > 0 {
                let mut next = self.clone();
                next.deaths -= 1;
                let ended = std::mem::replace(&mut next.processes[index].next, Next::Ended);
                let Next::Claim(claim) = ended else { unreachable!("it was one above") };
                next.late.push(claim);
                // The supervisor starts it again, on the same disk.
                let process = &next.processes[index];
                let (wish, log) = (process.start.request.clone(), process.log.clone());
                let start = Start::new(1, wish, false, log, process.start.store).unwrap();
                let again = &mut next.processes[index];
                (again.start, again.next) = (start, Next::ReadRecords);
                all.push(next);
            }
        }
        for index in 0..self.late.len() {
            let mut next = self.clone();
            let claim = next.late.remove(index);
            next.etcd.take(claim);
            all.push(next);
        }
        all
    }

    fn step(&mut self, index: usize) {
        let Self { etcd, processes, trusted_member, .. } = self;
        let process = &mut processes[index];
        let store = process.start.store();
        let next = std::mem::replace(&mut process.next, Next::Serves);
        process.next = match next {
            // Both reads are one step, since nothing else changes the store's own record.
            Next::ReadRecords => Next::ReadHolder(etcd.stores.get(&store).cloned(), etcd.name),
            Next::ReadHolder(record, name) => {
                let other = name.map(|(other, _)| other).filter(|other| *other != store);
                let holder = other.and_then(|other| {
                    let (record, _) = etcd.stores.get(&other)?.clone();
                    let answers = etcd.nodes.contains(&other);
                    let trusted_member = *trusted_member == Some(other);
                    Some(NameHolder { store: other, record, answers, trusted_member })
                });
                Next::Look(record, name, holder)
            }
            Next::Look(record, name, holder) => process.look(index, record, name, holder.as_ref()),
            Next::Claim(claim) => {
                etcd.take(claim);
                Next::ReadRecords
            }
            Next::ReadGuard(boot, nonce) => {
                let record = etcd.stores.get(&store).map(|(record, _)| (record.boot, record.nonce));
                let has_name = etcd.name.is_some_and(|(holder, _)| holder == store);
                match record == Some((boot, nonce)) && has_name {
                    true => Next::Register((etcd.revision_of(store), etcd.name_revision())),
                    false => Next::Ended,
                }
            }
            Next::Register(over) if over != (etcd.revision_of(store), etcd.name_revision()) => {
                Next::Ended
            }
            Next::Register(_) => {
                etcd.nodes.insert(store);
                Next::Serves
            }
            ended @ (Next::Serves | Next::Ended) => ended,
        };
    }

    fn explore(self) -> Vec<Self> {
        let (mut known, mut open, mut ends) = (BTreeSet::new(), vec![self], Vec::new());
        while let Some(world) = open.pop() {
            let mut hasher = DefaultHasher::new();
            format!("{world:?}").hash(&mut hasher);
            if !known.insert(hasher.finish()) {
                continue;
            }
            assert!(world.etcd.nodes.len() <= 1, "two serve under one name: {world:#?}");
            match world.steps() {
                none if none.is_empty() => ends.push(world),
                steps => open.extend(steps),
            }
        }
        ends
    }

    fn serves(&self) -> Option<StoreId> {
        self.etcd.nodes.first().copied()
    }
}

impl Process {
    /// `store` is the id that it takes on an empty disk.
    fn new(store: u128, replace: bool, log: Option<Identity>) -> Self {
        let wish = NameRequest { name: NAME.into(), replace };
        let start = Start::new(1, wish, false, log.clone(), StoreId(store)).unwrap();
        Self { start, log, next: Next::ReadRecords, looks: 0 }
    }

    fn look(
        &mut self,
        index: usize,
        record: Option<(StoreRecord, u64)>,
        name: Option<(StoreId, u64)>,
        holder: Option<&NameHolder>,
    ) -> Next {
        self.looks += 1;
        let fresh = 1_000 * (index as u128 + 1) + self.looks;
        let (record, revision) = record.map_or((None, 0), |(record, at)| (Some(record), at));
        let seen = EtcdState { record: record.as_ref(), holder, trusted_member: false };
        match self.start.next_step(seen, fresh) {
            Ok(StartStep::Serve { boot, nonce, .. }) => Next::ReadGuard(boot, nonce),
            Ok(StartStep::Claim(StoreClaim { log, boot, nonce, status, replaces })) => {
                self.log = log.or(self.log.take());
                let record = store_record(boot, nonce, status);
                let over = (revision, name.map_or(0, |(_, at)| at));
                Next::Claim(Flying { store: self.start.store(), record, over, replaces })
            }
            Err(_) => Next::Ended,
        }
    }
}

fn store_record(boot: Boot, nonce: u128, status: StoreStatus) -> StoreRecord {
    StoreRecord {
        name: NAME.into(),
        address: String::new(),
        zone: String::new(),
        host: String::new(),
        boot,
        nonce,
        status,
    }
}

/// Store 1 has the name, has served, and does not run now. Returns its log, too.
fn away() -> (Etcd, Option<Identity>) {
    let mut world = world(Etcd::default(), vec![Process::new(1, false, None)], 0);
    while !matches!(world.processes[0].next, Next::Serves) {
        world.step(0);
    }
    world.etcd.nodes.clear();
    (world.etcd, world.processes.remove(0).log)
}

fn world(etcd: Etcd, processes: Vec<Process>, deaths: u32) -> World {
    World { etcd, processes, late: Vec::new(), deaths, trusted_member: None }
}

/// The stores that serve at the end, over all orders.
fn winners(world: World) -> BTreeSet<Option<u128>> {
    world.explore().iter().map(|end| end.serves().map(|store| store.0)).collect()
}

/// Two empty folders, of which either may come first. A claim that came late may take the name from
/// the store that has it, when its own process was refused already: then neither serves, and either
/// can be started again.
#[track_caller]
fn check_empty(etcd: &Etcd, replace: bool) {
    let empty = |store| Process::new(store, replace, None);
    let all = |deaths| winners(world(etcd.clone(), vec![empty(2), empty(3)], deaths));
    assert_eq!(all(0), [Some(2), Some(3)].into(), "--replace: {replace}");
    assert!(all(1).is_superset(&all(0)), "--replace: {replace}");
}

#[test]
fn of_empty_folders_one_gets_a_new_name() {
    check_empty(&Etcd::default(), false);
    check_empty(&Etcd::default(), true);
}

#[test]
fn one_of_two_folders_replaces_a_store() {
    check_empty(&away().0, true);
}

#[test]
fn a_store_keeps_its_name_from_empty_folders() {
    let (etcd, log) = away();
    let own = Process::new(1, false, log);
    let empty = |store| Process::new(store, false, None);
    for deaths in [0, 1] {
        let all = winners(world(etcd.clone(), vec![own.clone(), empty(2), empty(3)], deaths));
        assert_eq!(all, [Some(1)].into(), "{deaths} deaths");
    }
}

/// The first of them keeps the name: a store that runs is not replaced.
#[test]
fn a_store_that_starts_and_one_that_replaces_it_do_not_both_serve() {
    let (etcd, log) = away();
    for trusted_member in [None, Some(StoreId(1)), Some(StoreId(2))] {
        let own = Process::new(1, false, log.clone());
        let start = world(etcd.clone(), vec![own, Process::new(2, true, None)], 1);
        let all = winners(World { trusted_member, ..start });
        assert!(all.is_superset(&[Some(1), Some(2)].into()), "{trusted_member:?}: {all:?}");
    }
}
