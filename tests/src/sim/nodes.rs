//! A storage node: the engine's `Node`, driven as production drives it.
//!
//! Like every driver it decides nothing about replication. It performs effects in order, dials
//! every store that it knows of, keeps its lease alive while its disk answers, and passes etcd's
//! answers to the `Node`. A start reads its disk, waits until the key of the process before
//! it is gone, and asks the engine for its identity (docs/design.md#identity).

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::{Boot, Conn, Now, Revision, StoreBoot, StoreId, TimeMs};
use engine::message::{
    FromFollower, NodeQuery, NodeQueryReply, SnapshotOutcome, StoreKnowledge, ToFollower,
};
use engine::node::boot::{
    self, EtcdState, NameHolder, NameRequest, Start, StartRefusal, StartStep, StoreClaim,
};
use engine::node::{CasOutcome, Effect, Event, Node, Settings};
use engine::planted::Planted;
use engine::records::{StoreRecord, StoreStatus};
use engine::shard::state::ShardState;
use engine::store::log::LogRecord;

use super::checker::Violation;
use super::core::{Core, since};
use super::coverage::Path;
use super::disk::{DiskSpace, Ingest, Opened, SimDisk};
use super::etcd::{
    Call, Compare, EtcdKey, EtcdValue, EtcdWatchEvent, Reply, Versioned, Write, name_key, store_of,
};
use super::event::{DiskDone, ProcessInput, SimEvent};
use super::late::{Late, LateItems, Stream, shuffle};
use super::node_freedom::{changes_the_view, late_answer, late_effect, stream_of};
use super::place::{NEXT_DISK, Place, ProcessId, index_of, name_of, place_of, store_id, zone_of};
use super::plan::NodeClock;
use super::rng::Rng;
use super::rows::Rows;
use super::wire::WireMessage;

const TOCK: u64 = 100_000;
const WALL_CLOCK_START: u64 = 1_700_000_000_000;

/// The time that a node's wall clock shows.
fn wall_clock(core: &Core, clock: NodeClock) -> u64 {
    let passed = (core.clock() / 1_000) as i64;
    let drift = passed.saturating_mul(clock.drift_ppm) / 1_000_000;
    WALL_CLOCK_START.saturating_add_signed(passed + drift + clock.skew_ms)
}

/// A refused dial is repeated after this time; a second refusal is no accident.
const REDIAL: u64 = 50_000;
/// The cluster of all stores.
const CLUSTER: u128 = 1;

/// A place for a storage node: its disk outlives its processes.
pub struct NodeHost {
    pub place: Place,
    pub store: StoreId,
    pub incarnation: u32,
    pub disk: SimDisk,
    /// The store whose disk was harmed last.
    pub harmed: Option<StoreId>,
    /// The stores whose disks were ever harmed in this place: the one that is set aside may be
    /// another (seed 3056).
    ever_harmed: BTreeSet<StoreId>,
    /// The incarnation of the node when that happened.
    harmed_in: u32,
    /// The disk that was in this place before, and its store: it may be put back.
    aside: Option<UnmountedDisk>,
    /// The last store number given to a disk here.
    newest: StoreId,
    /// An operator has decided that this store is to replace the one of its name.
    replaces: bool,
    /// The node is not started before this time.
    pub away_until: u64,
    clock: NodeClock,
    phase: Phase,
}

enum Phase {
    Down,
    Booting(Box<Booting>),
    Up(Box<RunningNode>),
}

/// The progress of a start.
#[derive(Default)]
struct Booting {
    /// `None` until the disk is read.
    found: Option<(Start, Opened)>,
    call: Option<u64>,
    /// The claim that is made once this group is durable.
    logging: Option<(u64, Claimed)>,
    /// The claimed boot, and the lease of the key that will announce it.
    serves: Option<(Boot, Option<u64>)>,
    /// Etcd has recorded that none of the copies is to be trusted.
    suspect: bool,
}

/// A store's record to be claimed, and the versions of it and of its name's record that it
/// replaces.
struct Claimed {
    value: EtcdValue,
    over: u64,
    name_over: u64,
}

struct RunningNode {
    node: Node,
    me: StoreBoot,
    started: u64,
    wake_at: Option<u64>,
    /// Events were handled since the last turn ended.
    in_turn: bool,
    /// The deadline for which it wakes, and the sum of leaps by then.
    wakes_for: Option<(Now, u64)>,
    effects: Vec<Effect>,
    /// The effects that it was about to perform when it was paused.
    held_back: Vec<Effect>,
    late: LateItems<Late<Effect, Event>>,
    /// The last group that was requested, and the last one that contains anything.
    last_group: u64,
    issued: u64,
    left: bool,
    /// Established connections; those that this node dialled name their peer.
    conns: BTreeMap<Conn, Option<StoreId>>,
    gateways: BTreeMap<Conn, ()>,
    peers: BTreeMap<StoreId, PeerStore>,
    keys: BTreeMap<StoreId, (StoreBoot, u64)>,
    calls: BTreeMap<u64, NodeCallPurpose>,
    lease: Option<u64>,
    queries: BTreeMap<u64, (ProcessId, u64)>,
    query: u64,
    /// The last answer to a recovery of etcd.
    knowledge: Option<Box<StoreKnowledge>>,
    staged: BTreeMap<(Conn, u64), Rows>,
    /// The sizes of the snapshots that were announced.
    announced: BTreeMap<(Conn, u64), u64>,
    full: FullCauses,
}

/// The causes of a full disk: the `Node` is notified of the first one, and of the end of the
/// last.
#[derive(Clone, Copy, Debug, Default)]
struct FullCauses {
    space: bool,
    log: bool,
}

impl FullCauses {
    fn any(self) -> bool {
        self.space || self.log
    }
}

/// A disk that is not mounted, its store, and whether its store may take the name of another.
struct UnmountedDisk {
    disk: SimDisk,
    store: StoreId,
    replaces: bool,
}

/// A store that this node knows of.
struct PeerStore {
    me: StoreBoot,
    dial: Option<u64>,
    conn: Option<Conn>,
    refused: u32,
    next_dial: u64,
    dialled_at: u64,
}

/// The purpose of a call of etcd.
enum NodeCallPurpose {
    Config(u64),
    Propose(u64),
    Check(u64),
    Sessions,
    KeepAlive,
    Grant,
    Register,
}

impl NodeHost {
    pub fn new(index: u16, core: &mut Core) -> Self {
        Self {
            place: Place::Node(index),
            store: store_id(index),
            incarnation: 0,
            disk: SimDisk::new(
                Rng::new(core.plan.seed.rotate_left(20) ^ (0xD15C_0000 + u64::from(index))),
                core.plan.log,
                core.plan.slowness[usize::from(index)],
            ),
            harmed: None,
            ever_harmed: BTreeSet::new(),
            harmed_in: 0,
            aside: None,
            newest: store_id(index),
            replaces: false,
            away_until: 0,
            clock: core.plan.clocks[usize::from(index)],
            phase: Phase::Down,
        }
    }

    /// A copy of its folder from before it last served, on another machine. `None`: there is no
    /// such copy.
    pub fn twin(&self, incarnation: u32) -> Option<Self> {
        let disk = self.disk.older_copy()?;
        let (place, store) = (Place::Twin, self.store);
        let (clock, phase) = (self.clock, Phase::Down);
        let (harmed, harmed_in, aside, newest, replaces) = (None, 0, None, store, false);
        Some(Self {
            place,
            store,
            incarnation,
            disk,
            harmed,
            ever_harmed: BTreeSet::new(),
            harmed_in,
            aside,
            newest,
            replaces,
            away_until: 0,
            clock,
            phase,
        })
    }

    pub fn process(&self) -> ProcessId {
        ProcessId { place: self.place, incarnation: self.incarnation }
    }

    /// The process, if it listens.
    pub fn listening(&self) -> Option<ProcessId> {
        matches!(self.phase, Phase::Up(_)).then(|| self.process())
    }

    /// The store and boot of the process, if it listens.
    pub fn me(&self) -> Option<StoreBoot> {
        match &self.phase {
            Phase::Up(running) => Some(running.me),
            _ => None,
        }
    }

    pub fn is_down(&self) -> bool {
        matches!(self.phase, Phase::Down)
    }

    pub fn node(&self) -> Option<&Node> {
        match &self.phase {
            Phase::Up(running) => Some(&running.node),
            _ => None,
        }
    }

    /// Lets the oracle check the state of the `Node`.
    pub fn look(&self, core: &mut Core) {
        if let Phase::Up(running) = &self.phase {
            running.node.check_invariants();
            core.oracle.look(core.clock(), running.me, &running.node);
        }
    }

    pub fn start(&mut self, core: &mut Core) {
        if !self.is_down() {
            return;
        }
        self.incarnation += 1;
        self.phase = Phase::Booting(Box::default());
        let took = core.rng.between(1_000, 30_000);
        core.input_after(took, self.process(), ProcessInput::Disk(DiskDone::Recovered));
    }

    pub fn crash(&mut self, core: &mut Core, power_lost: bool) {
        if self.is_down() {
            return self.disk.crash(core, power_lost);
        }
        self.phase = Phase::Down;
        core.process_died(self.process(), !power_lost);
        core.etcd_unwatch(self.process());
        self.disk.crash(core, power_lost);
    }

    pub fn on(&mut self, core: &mut Core, input: ProcessInput) {
        match &mut self.phase {
            Phase::Down => {}
            Phase::Booting(_) => self.boot(core, input),
            Phase::Up(_) => self.run(core, input),
        }
    }

    /// SIGTERM: the node hands its shards over, and ends.
    pub fn leave(&mut self, core: &mut Core) {
        let process = self.process();
        let Phase::Up(running) = &mut self.phase else { return };
        let mut driver = NodeDriver { process, clock: self.clock, disk: &mut self.disk, running };
        driver.handle(core, Event::Leave);
    }

    /// Sets its wall clock, which continues at its own rate from there.
    pub fn set_clock(&mut self, ahead_ms: i64) {
        self.clock.skew_ms = ahead_ms;
    }

    // ---- starting ------------------------------------------------------------------------------

    fn boot(&mut self, core: &mut Core, input: ProcessInput) {
        let me = self.process();
        let Phase::Booting(booting) = &mut self.phase else { return };
        match input {
            ProcessInput::Disk(DiskDone::Recovered) => {
                let opened = self.disk.open(core, me, self.store);
                if opened.nameless {
                    return self.refused(core, None);
                }
                let identity = opened.identity.clone();
                let wish = NameRequest { name: name_of(self.store), replace: self.replaces };
                let start = Start::new(CLUSTER, wish, opened.suspect, identity, self.store);
                let start = start.expect("its own cluster").planted(core.plan.planted);
                booting.found = Some((start, opened));
                self.read_store(core);
            }
            ProcessInput::Tock => self.read_store(core),
            ProcessInput::Disk(DiskDone::Synced { group }) => {
                self.disk.synced(core, me, group);
                if let Some((_, claimed)) = booting.logging.take_if(|(number, _)| *number == group)
                {
                    self.claim(core, claimed);
                }
            }
            ProcessInput::EtcdTimeout { call } if booting.call == Some(call) => {
                booting.call = None;
                core.input_after(TOCK, me, ProcessInput::Tock);
            }
            ProcessInput::Etcd { call, reply } if booting.call == Some(call) => {
                booting.call = None;
                self.boot_reply(core, reply);
            }
            _ => {}
        }
    }

    fn booting(&mut self) -> &mut Booting {
        match &mut self.phase {
            Phase::Booting(booting) => booting,
            _ => unreachable!("called while it boots"),
        }
    }

    fn read_store(&mut self, core: &mut Core) {
        self.booting().call = Some(core.etcd(self.process(), Call::List));
    }

    fn boot_reply(&mut self, core: &mut Core, reply: Reply) {
        let me = self.process();
        match (reply, self.booting().serves) {
            (Reply::List { all, .. }, _) => {
                let named = |store: StoreId| place_of(store) == place_of(self.store);
                let runs = |key: &EtcdKey| matches!(key, EtcdKey::Node(store) if named(*store));
                // The process before this one may live, or another of its name: wait for its lease
                // to end.
                match all.iter().any(|(key, _)| runs(key)) {
                    true => core.input_after(TOCK, me, ProcessInput::Tock),
                    false => self.identify(core, &all),
                }
            }
            (Reply::Granted { lease }, Some((boot, None))) => {
                self.booting().serves = Some((boot, Some(lease)));
                let value = EtcdValue::Node(StoreBoot { store: self.store, boot });
                let compares = vec![Compare::Created(EtcdKey::Node(self.store), 0)];
                let writes = vec![Write::Put(EtcdKey::Node(self.store), value, Some(lease))];
                self.booting().call = Some(core.etcd(me, Call::Txn { compares, writes }));
            }
            (Reply::Txn { done: true, .. }, Some((boot, Some(lease)))) => {
                self.up(core, boot, lease)
            }
            // A claim, or a key that could not be made: the next read shows the result.
            _ => self.read_store(core),
        }
    }

    /// The store's record was read, and no process is registered as this store.
    fn identify(&mut self, core: &mut Core, all: &[(EtcdKey, Versioned)]) {
        let (me, store) = (self.process(), self.store);
        let find =
            |wanted: EtcdKey| all.iter().find(|(key, _)| *key == wanted).map(|(_, kept)| kept);
        let over = |key| find(key).map_or(0, |kept| kept.modified);
        let record: Option<StoreRecord> = find(EtcdKey::Store(store)).and_then(store_of);
        let planted = core.plan.planted;
        let is_known =
            |aside: &UnmountedDisk| all.iter().any(|(key, _)| *key == EtcdKey::Store(aside.store));
        let is_empty = record.is_none() && self.aside.as_ref().is_some_and(is_known);
        let takes_unasked = is_empty && !self.replaces;
        let shards = || {
            all.iter().filter_map(|(_, versioned)| match &versioned.value {
                EtcdValue::Shard(config) => Some(config),
                _ => None,
            })
        };
        let is_trusted_member = |store| boot::is_trusted_member(store, shards(), planted);
        let trusted_member = is_trusted_member(store);
        let holder = find(name_key(store)).and_then(|kept| match kept.value {
            EtcdValue::Name(other) if other != store => Some(other),
            _ => None,
        });
        // The missing key has shown that it does not run.
        let holder = holder.and_then(|store| {
            let record = find(EtcdKey::Store(store)).and_then(store_of)?;
            Some(NameHolder {
                store,
                record,
                answers: false,
                trusted_member: is_trusted_member(store),
            })
        });
        let fresh = u128::from(core.rng.word());
        let seen = EtcdState { record: record.as_ref(), holder: holder.as_ref(), trusted_member };
        let booting = self.booting();
        let Some((start, opened)) = &mut booting.found else { return };
        match start.next_step(seen, fresh) {
            Ok(StartStep::Serve { boot, suspect, .. }) => {
                booting.suspect = suspect;
                booting.serves = Some((boot, None));
                booting.call = Some(core.etcd(me, Call::Grant { ttl: core.plan.lease_ttl }));
            }
            Ok(StartStep::Claim(StoreClaim { log, boot, nonce, status, .. })) => {
                booting.serves = None;
                if takes_unasked {
                    let at = core.now;
                    let detail = format!(
                        "{store:?}, an empty disk, takes a name without an operator at {at}"
                    );
                    core.oracle.violations.push(Violation { promise: "names", detail });
                }
                let nonce = u64::try_from(nonce).expect("drawn as one");
                let zone = zone_of(index_of(store), core.plan.zones);
                let claimed = StoreBoot { store, boot };
                let value = EtcdValue::Store { me: claimed, nonce, status, zone };
                let (over, name_over) = (over(EtcdKey::Store(store)), over(name_key(store)));
                let claimed = Claimed { value, over, name_over };
                let Some(identity) = log else { return self.claim(core, claimed) };
                let group = opened.next_group;
                opened.next_group += 1;
                booting.logging = Some((group, claimed));
                self.disk.write(LogRecord::Identity(identity));
                self.disk.sync(core, me, group);
            }
            Err(refusal) => self.refused(core, Some(refusal)),
        }
    }

    /// The start is refused; without a refusal the log can't be identified. The operator puts the
    /// disk back that was there before, or gives the node an empty one.
    fn refused(&mut self, core: &mut Core, refusal: Option<StartRefusal>) {
        core.trace.note(core.now, || format!("{:?} is refused: {refusal:?}", self.store));
        if self.place == Place::Twin {
            core.oracle.coverage.reached(Path::TwinRefused);
            return self.crash(core, false);
        }
        if self.aside.is_some() {
            core.oracle.coverage.reached(Path::EmptyRefused);
            self.crash(core, false);
            // A disk that was given up, or that went back in time, is refused forever, also while
            // an in-sync set names its store: marked there, or not removed yet (seeds 509887 and
            // 511437).
            let for_ever = match refusal {
                Some(StartRefusal::GivenUp { .. }) => true,
                Some(StartRefusal::NotOurs { .. }) | None => self.ever_harmed.contains(&self.store),
                _ => false,
            };
            if for_ever || !self.is_in_sync(core) {
                self.swap_disks(core);
            }
            // Both disks are refused: the one that was given up is of no use any more.
            self.aside.take_if(|_| self.replaces);
            return core.after(100_000, SimEvent::Restart { place: self.place });
        }
        // A late claim of the disk that was here before has taken the name: the operator's decision
        // covers that one as well.
        if self.replaces && matches!(refusal, Some(StartRefusal::NameTaken { .. })) {
            core.oracle.coverage.reached(Path::StartRefused);
            self.crash(core, false);
            return core.after(100_000, SimEvent::Restart { place: self.place });
        }
        // If two disks were both in use in one place, the later one may be the one that was
        // given up.
        let swapped = self.store != store_id(index_of(self.store))
            && matches!(refusal, Some(StartRefusal::GivenUp { .. }));
        if !self.ever_harmed.contains(&self.store) && !swapped {
            let detail = format!("{:?} may not start at {}: {refusal:?}", self.store, core.now);
            core.oracle.violations.push(Violation { promise: "heals", detail });
        }
        core.oracle.coverage.reached(Path::StartRefused);
        self.crash(core, false);
        self.is_emptied();
        core.after(100_000, SimEvent::Restart { place: self.place });
    }

    fn claim(&mut self, core: &mut Core, claimed: Claimed) {
        let Claimed { value, over, name_over } = claimed;
        let (key, name) = (EtcdKey::Store(self.store), name_key(self.store));
        let compares = vec![Compare::Modified(key, over), Compare::Modified(name, name_over)];
        let named = Write::Put(name, EtcdValue::Name(self.store), None);
        let writes = vec![Write::Put(key, value, None), named];
        self.booting().call = Some(core.etcd(self.process(), Call::Txn { compares, writes }));
    }

    fn up(&mut self, core: &mut Core, boot: Boot, lease: u64) {
        let me = StoreBoot { store: self.store, boot };
        let suspect = self.booting().suspect;
        let Some((_, mut opened)) = self.booting().found.take() else { return };
        core.oracle.serves(me, self.disk.is_outdated());
        self.disk.serves();
        if suspect {
            core.oracle.coverage.reached(Path::StartedSuspect);
            let contents = opened.replicas.iter_mut().filter_map(|one| one.content.as_mut());
            contents.for_each(|content| content.suspect = true);
        }
        core.trace.note(core.now, || format!("{me:?} starts with {:?}", opened.replicas));
        let Place::Node(index) = self.place else { return };
        let claimed = core.etcd.get(EtcdKey::Store(self.store)).and_then(store_of);
        let nonce = claimed.map_or(0, |record| record.nonce);
        let etcd = Some(Box::new(core.etcd_memory(self.store, boot, nonce)));
        let settings = Settings { suspect, etcd, ..core.plan.node(index.into()) };
        let last_group = opened.next_group - 1;
        let node = Node::new(settings, me, Now(0), opened.next_group, opened.replicas);
        self.phase = Phase::Up(Box::new(RunningNode {
            node,
            me,
            started: core.clock(),
            wake_at: None,
            in_turn: false,
            wakes_for: None,
            effects: Vec::new(),
            held_back: Vec::new(),
            late: LateItems::default(),
            last_group,
            issued: 0,
            left: false,
            conns: BTreeMap::new(),
            gateways: BTreeMap::new(),
            peers: BTreeMap::new(),
            keys: BTreeMap::new(),
            calls: BTreeMap::new(),
            lease: Some(lease),
            queries: BTreeMap::new(),
            query: 0,
            knowledge: None,
            staged: BTreeMap::new(),
            announced: BTreeMap::new(),
            full: FullCauses::default(),
        }));
        core.etcd_watch(self.process());
        let small = self.disk.small.filter(|&(_, until)| core.now < until);
        if let Some((room, until)) = small {
            let input = |room| ProcessInput::Disk(DiskDone::Room(room));
            core.input_after(0, self.process(), input(room));
            core.input_after(until - core.now, self.process(), input(u64::MAX));
        }
        self.run(core, ProcessInput::Tock);
    }

    // ---- etcd is lost --------------------------------------------------------------------------

    /// Returns its answer to a recovery of etcd of this incarnation, and asks again. `None`: it
    /// has not answered yet.
    pub fn knowledge_of_etcd(&mut self, core: &mut Core, promise: u32) -> Option<StoreKnowledge> {
        let process = self.process();
        match &self.phase {
            Phase::Down => None,
            Phase::Booting(booting) => {
                let (_, opened) = booting.found.as_ref()?;
                let (identity, replicas) = (opened.identity.as_ref(), &opened.replicas);
                Some(core.knowledge_of_log(self.store, identity, replicas))
            }
            Phase::Up(running) => {
                let message = NodeQuery::Recover { promise };
                let asks = ProcessInput::Query { from: process, query: 0, message };
                core.input_after(0, process, asks);
                let known = running.knowledge.as_deref();
                let has_promised = |it: &&StoreKnowledge| {
                    it.etcd.as_ref().is_some_and(|it| it.promised >= promise)
                };
                known.filter(has_promised).cloned()
            }
        }
    }

    // ---- its disk goes wrong -------------------------------------------------------------------

    /// The disk has failed: exit 5. The failure is recorded in etcd, if etcd can be reached.
    fn disk_failed(&mut self, core: &mut Core) {
        let key = EtcdKey::Store(self.store);
        let kept = core.etcd.get(key).cloned();
        if let Some(Versioned { value: EtcdValue::Store { me, nonce, zone, .. }, modified, .. }) =
            kept
            && self.me() == Some(me)
        {
            let value = EtcdValue::Store { me, nonce, status: StoreStatus::Suspect, zone };
            let compares = vec![Compare::Modified(key, modified)];
            let writes = vec![Write::Put(key, value, None)];
            core.etcd(self.process(), Call::Txn { compares, writes });
        }
        self.crash(core, false);
        core.after(200_000, SimEvent::Restart { place: self.place });
    }

    pub fn fsync_fails(&mut self, core: &mut Core) -> bool {
        let runs = matches!(self.phase, Phase::Up(_));
        if runs {
            self.disk_failed(core);
            self.disk.crash(core, true);
        }
        self.is_harmed(runs)
    }

    pub fn is_full_for(&mut self, core: &mut Core, micros: u64) -> bool {
        let me = self.process();
        let DiskSpace { full, room } = self.disk.fills_up(core.now, micros);
        core.input_after(0, me, ProcessInput::Disk(DiskDone::Full(full)));
        core.input_after(0, me, ProcessInput::Disk(DiskDone::Room(room)));
        core.input_after(micros, me, ProcessInput::Disk(DiskDone::Full(false)));
        core.input_after(micros, me, ProcessInput::Disk(DiskDone::Room(u64::MAX)));
        matches!(self.phase, Phase::Up(_))
    }

    /// The disk is full until [`has_room_again`](Self::has_room_again), whatever process uses it.
    pub fn stays_full(&mut self) -> bool {
        self.disk.stays_full = true;
        matches!(self.phase, Phase::Up(_))
    }

    pub fn has_room_again(&mut self, core: &mut Core) {
        self.disk.stays_full = false;
        core.input_after(0, self.process(), ProcessInput::Disk(DiskDone::Full(false)));
        core.input_after(0, self.process(), ProcessInput::Disk(DiskDone::Room(u64::MAX)));
    }

    /// Returns whether its `Node` was notified that the disk is full, or the log too long.
    pub fn is_full(&self) -> bool {
        matches!(&self.phase, Phase::Up(running) if running.full.any())
    }

    pub fn rots(&mut self) -> bool {
        let rots = self.disk.rot();
        self.is_harmed(rots)
    }

    pub fn loses_a_row(&mut self) -> bool {
        let lost = self.disk.lose_row();
        self.is_harmed(lost)
    }

    pub fn is_rolled_back(&mut self) -> bool {
        let rolled = self.disk.roll_back();
        self.is_harmed(rolled)
    }

    /// An empty disk is a new store, which an operator wants in the place of the old one.
    pub fn is_emptied(&mut self) {
        self.is_harmed(true);
        self.disk.wipe();
        self.aside = None;
        self.becomes_new();
        self.replaces = true;
    }

    /// The disk is missing at the next start, and an empty folder is in its place. `replaces`: the
    /// operator takes the disk for lost.
    pub fn is_unmounted(&mut self, core: &Core, replaces: bool) {
        // A folder that no process has claimed yet gives nothing up.
        let claimed = core.etcd.get(EtcdKey::Store(self.store)).is_some();
        if self.aside.is_some() || !self.is_down() || !claimed {
            return;
        }
        let (plan, index) = (&core.plan, usize::from(index_of(self.store)));
        let incarnation = u64::from(self.incarnation) << 8;
        let seed = plan.seed.rotate_left(24) ^ (0xE3B7_00A0 + incarnation + index as u64);
        let empty = SimDisk::new(Rng::new(seed), plan.log, plan.slowness[index]);
        let disk = std::mem::replace(&mut self.disk, empty);
        self.aside = Some(UnmountedDisk { disk, store: self.store, replaces: self.replaces });
        self.becomes_new();
        self.replaces = replaces;
    }

    /// The store of the disk that is not mounted.
    pub fn away(&self) -> Option<StoreId> {
        self.aside.as_ref().map(|aside| aside.store)
    }

    fn becomes_new(&mut self) {
        self.newest = StoreId(self.newest.0 + NEXT_DISK);
        self.store = self.newest;
    }

    /// The earlier disk is mounted again, and the other one is set aside, but not while shards
    /// count on the one that is there.
    pub fn is_put_back(&mut self, core: &mut Core) {
        if !self.is_in_sync(core) {
            self.swap_disks(core);
        }
    }

    /// Returns whether the in-sync set of some shard names the store that is there.
    fn is_in_sync(&self, core: &Core) -> bool {
        core.etcd.shards().any(|(config, _)| config.isr.contains(&self.store))
    }

    fn swap_disks(&mut self, core: &mut Core) {
        let Some(back) = self.aside.take() else { return };
        self.crash(core, false);
        core.oracle.coverage.reached(Path::DiskPutBack);
        let away = UnmountedDisk {
            disk: std::mem::replace(&mut self.disk, back.disk),
            store: std::mem::replace(&mut self.store, back.store),
            replaces: std::mem::replace(&mut self.replaces, back.replaces),
        };
        // An empty disk that etcd does not know was never in use, and is thrown away.
        let is_known = core.etcd.get(EtcdKey::Store(away.store)).is_some();
        let is_of_use = self.store == self.newest || is_known;
        self.aside = is_of_use.then_some(away);
    }

    fn is_harmed(&mut self, harmed: bool) -> bool {
        if harmed {
            self.harmed = Some(self.store);
            self.ever_harmed.insert(self.store);
            self.harmed_in = self.incarnation;
        }
        harmed
    }

    /// The disk was harmed, and a start or a load will find it.
    pub fn hides_harm(&self) -> bool {
        self.disk.hides_harm()
    }

    /// Returns whether the current process has read its state after the disk was harmed.
    pub fn read_since_harmed(&self) -> bool {
        self.incarnation > self.harmed_in
    }

    // ---- running -------------------------------------------------------------------------------

    fn run(&mut self, core: &mut Core, input: ProcessInput) {
        let process = self.process();
        if matches!(input, ProcessInput::Disk(DiskDone::Damaged)) {
            self.disk.mark_damage();
            return self.disk_failed(core);
        }
        let Phase::Up(running) = &mut self.phase else { return };
        let mut driver = NodeDriver { process, clock: self.clock, disk: &mut self.disk, running };
        driver.on_input(core, input);
        if driver.running.exits() {
            self.crash(core, false);
        } else if driver.running.left {
            // Acknowledgements of its last turn count.
            core.oracle.look(core.clock(), driver.running.me, &driver.running.node);
            // The lease ends with the process, so that no other has to wait.
            if let Some(lease) = driver.running.lease {
                core.etcd(process, Call::Revoke { lease });
            }
            self.crash(core, false);
            let after = core.rng.between(1_000, 1_000_000);
            core.after(after, SimEvent::Restart { place: self.place });
        }
    }
}

impl RunningNode {
    fn exits(&self) -> bool {
        self.effects.iter().any(|effect| matches!(effect, Effect::Exit(_)))
    }
}

/// One turn of a running node.
struct NodeDriver<'a> {
    process: ProcessId,
    clock: NodeClock,
    disk: &'a mut SimDisk,
    running: &'a mut RunningNode,
}

impl NodeDriver<'_> {
    fn on_input(&mut self, core: &mut Core, input: ProcessInput) {
        match input {
            // An earlier deadline has replaced this one.
            ProcessInput::Wake if self.running.wake_at != Some(core.now) => {}
            ProcessInput::Wake => self.wake(core),
            ProcessInput::Resumed => self.resumed(core),
            ProcessInput::Tock => self.tock(core),
            ProcessInput::Redial => self.dial_all(core),
            ProcessInput::Late { number } => self.late(core, number),
            ProcessInput::Disk(done) => self.disk_done(core, done),
            ProcessInput::Accepted { conn, from } => self.accepted(core, conn, from),
            ProcessInput::Dialled { dial, conn, .. } => self.dialled(core, dial, conn),
            ProcessInput::DialFailed { dial, refused } => self.dial_failed(core, dial, refused),
            ProcessInput::Received { conn, wire } => self.received(core, conn, wire),
            ProcessInput::Closed { conn } => self.closed(core, conn),
            ProcessInput::Query { from, query, message } => {
                self.running.query += 1;
                let local = self.running.query;
                self.running.queries.insert(local, (from, query));
                self.handle(core, Event::Query { query: local, message });
            }
            ProcessInput::Etcd { call, reply } => {
                if let Some(asked) = self.running.calls.remove(&call) {
                    self.etcd_reply(core, asked, reply);
                }
            }
            ProcessInput::EtcdTimeout { call } => {
                if let Some(asked) = self.running.calls.remove(&call) {
                    self.etcd_timeout(core, asked);
                }
            }
            ProcessInput::Watched(events) => self.watched(core, events),
            other => unreachable!("a node does not receive {other:?}"),
        }
    }

    fn now(&self, core: &Core) -> Now {
        since(self.running.started, core.clock())
    }

    fn handle(&mut self, core: &mut Core, event: Event) {
        self.step(core, event);
        match core.plan.node_turn {
            0 => self.step(core, Event::TurnEnded),
            turn => {
                self.running.in_turn = true;
                let after = core.rng.between(1, turn);
                self.wake_at(core, core.now + after);
            }
        }
        if !self.running.exits() {
            self.schedule(core);
        }
    }

    fn end_turn(&mut self, core: &mut Core) {
        self.running.in_turn = false;
        self.step(core, Event::TurnEnded);
        if !self.running.exits() {
            self.schedule(core);
        }
    }

    /// Hands one event to the `Node` and performs its effects.
    fn step(&mut self, core: &mut Core, event: Event) {
        if self.running.exits() {
            return;
        }
        let me = self.running.me;
        core.trace.note(core.now, || format!("{me:?} <- {event:?}"));
        let now = self.now(core);
        core.oracle.event(me, &event);
        self.running.late.handled += 1;
        if changes_the_view(&event) {
            self.disk.change_is_handled();
        }
        let mut effects = std::mem::take(&mut self.running.effects);
        self.running.node.handle(now, event, &mut effects);
        let exit = self.observe(core, &mut effects);
        if core.plan.reorder.on {
            self.reorder(core, &mut effects);
        }
        for effect in effects.drain(..) {
            self.perform_or_hold(core, effect);
        }
        self.running.effects = effects;
        self.running.effects.extend(exit);
    }

    /// Lets the oracle see the effects in the order given. Returns the effect that ends the
    /// process; nothing after it is performed.
    fn observe(&mut self, core: &mut Core, effects: &mut Vec<Effect>) -> Option<Effect> {
        let me = self.running.me;
        let is_exit = |effect: &Effect| matches!(effect, Effect::Exit(_));
        let exit = effects.iter().position(is_exit);
        effects.truncate(exit.map_or(effects.len(), |at| at + 1));
        for effect in effects.iter() {
            core.trace.note(core.now, || format!("{me:?} -> {effect:?}"));
            core.oracle.effect(core.now, me, effect);
            if let Effect::ToPrimary { conn, message } = effect {
                self.accepts(core, *conn, message);
            }
        }
        exit.and_then(|_| effects.pop())
    }

    fn perform_or_hold(&mut self, core: &mut Core, effect: Effect) {
        if core.holds_back(self.process) {
            self.running.held_back.push(effect);
        } else {
            self.perform(core, effect);
        }
    }

    // ---- the freedom of drivers: docs/design.md#order-of-effects -------------------------------

    /// Leaves the effects that are performed at once, in another order. The others are performed
    /// later, whatever happens meanwhile.
    fn reorder(&mut self, core: &mut Core, effects: &mut Vec<Effect>) {
        let mut at_once = Vec::new();
        for effect in effects.drain(..) {
            self.issue(&effect);
            let stream = stream_of(core.plan.planted, &effect);
            match self.lateness(core, stream, &effect) {
                Some(lag) => {
                    let item = Late::Effect(effect);
                    core.keep(&mut self.running.late, self.process, stream, (lag, item));
                }
                None => at_once.push((stream, effect)),
            }
        }
        if shuffle(&mut at_once, &mut core.plan.reorder.rng) {
            core.oracle.coverage.reached(Path::EffectsSwapped);
        }
        effects.extend(at_once.into_iter().map(|(_, effect)| effect));
    }

    /// The lateness of an effect, if it is late. A load begins before the next event is handled.
    fn lateness(
        &mut self,
        core: &mut Core,
        stream: Option<Stream>,
        effect: &Effect,
    ) -> Option<u64> {
        let is_load = matches!(effect, Effect::Load { .. } | Effect::CountRows { .. });
        let begins_now = is_load && !Planted::LoadBeginsLate.is_in(core.plan.planted);
        if begins_now { None } else { core.lateness(&self.running.late, stream) }
    }

    /// Notes which group has to be durable so that everything is that was written up to here.
    fn issue(&mut self, effect: &Effect) {
        match effect {
            Effect::Write(_) => self.running.issued = self.running.last_group + 1,
            Effect::Sync { group } => {
                (self.running.last_group, self.running.issued) = (*group, *group);
            }
            _ => {}
        }
    }

    /// Something answers: the `Node` gets the event now, or any time later.
    fn report(&mut self, core: &mut Core, stream: Option<Stream>, event: Event) {
        match core.lateness(&self.running.late, stream) {
            Some(lag) => {
                let item = Late::Answer(event);
                core.keep(&mut self.running.late, self.process, stream, (lag, item));
            }
            None => self.handle(core, event),
        }
    }

    fn late(&mut self, core: &mut Core, number: u64) {
        let Some((item, overtaken)) = self.running.late.take(number) else { return };
        if self.running.exits() {
            return;
        }
        let path = match &item {
            Late::Effect(effect) => late_effect(effect),
            Late::Answer(event) => late_answer(event),
        };
        if overtaken {
            core.oracle.coverage.reached(path);
        }
        match item {
            Late::Effect(effect) => self.perform_or_hold(core, effect),
            Late::Answer(event) => self.handle(core, event),
        }
    }

    /// Draws the times at which a flush reports its progress. Some come after its end.
    fn flush_advances(&mut self, core: &mut Core, flush: u64, all: usize) {
        for _ in 0..core.rng.below(3) {
            let counters = core.rng.index(all + 1);
            let done = ProcessInput::Disk(DiskDone::FlushAdvanced { flush, counters });
            let after = core.rng.between(1, 10_000);
            core.input_after(after, self.process, done);
        }
    }

    fn wake(&mut self, core: &mut Core) {
        let now = self.now(core);
        self.running.wake_at = None;
        let deadline = self.running.node.next_deadline();
        if core.plan.reorder.on && deadline.is_some_and(|at| at < now) {
            core.oracle.coverage.reached(Path::TickLate);
        }
        if self.running.in_turn || deadline.is_some_and(|at| at <= now) {
            self.end_turn(core);
        } else {
            self.schedule(core);
        }
    }

    /// The process was paused: the effects that it was about to perform come first.
    fn resumed(&mut self, core: &mut Core) {
        for effect in std::mem::take(&mut self.running.held_back) {
            self.perform(core, effect);
        }
        // The timers are late: the process handles them before the inputs that have arrived
        // meanwhile, or after them.
        if core.rng.percent(50) {
            self.wake(core);
        } else {
            self.running.wake_at = None;
            if self.running.in_turn {
                self.wake_at(core, core.now + 1);
            }
            self.schedule(core);
        }
    }

    fn schedule(&mut self, core: &mut Core) {
        let Some(deadline) = self.running.node.next_deadline() else { return };
        let at = core.when(deadline.0.saturating_add(self.running.started)).max(core.now + 1);
        // The lateness of a timer is drawn once.
        let wakes_for = Some((deadline, core.leapt));
        let is_known = std::mem::replace(&mut self.running.wakes_for, wakes_for) == wakes_for;
        if core.plan.reorder.on && is_known && self.running.wake_at.is_some() {
            return;
        }
        let at = at.saturating_add(core.plan.reorder.lateness(false).unwrap_or(0));
        self.wake_at(core, at);
    }

    fn wake_at(&mut self, core: &mut Core, at: u64) {
        if self.running.wake_at.is_none_or(|wake| at < wake) {
            self.running.wake_at = Some(at);
            core.input_after(at - core.now, self.process, ProcessInput::Wake);
        }
    }

    fn perform(&mut self, core: &mut Core, effect: Effect) {
        let me = self.process;
        match effect {
            Effect::Write(record) => self.disk.write(record),
            Effect::Sync { group } => self.disk.sync(core, me, group),
            Effect::Load { load, needs } => self.disk.load(core, me, load, &needs),
            Effect::CountRows { count, slots, at } => {
                self.disk.count_rows(core, me, count, (slots, at));
            }
            Effect::ReadLog { wanted, from, bytes_max } => {
                self.disk.read_log(core, me, wanted, from, bytes_max);
            }
            Effect::Flush { flush, table, shards } => {
                self.flush_advances(core, flush, table.len());
                self.disk.begin_ingest(
                    core,
                    me,
                    self.running.issued,
                    Ingest::Flush { flush, table, shards },
                );
            }
            Effect::Trim { shards } => self.disk.trim(core, me, shards),
            Effect::ToFollower { conn, message } => {
                if matches!(message, ToFollower::Snapshot { .. }) {
                    core.copy_begins(conn);
                }
                core.send(conn, WireMessage::ToFollower(message));
            }
            Effect::ToPrimary { conn, message } => {
                core.send(conn, WireMessage::FromFollower(message));
            }
            Effect::Gateway { conn, reply } => core.send(conn, WireMessage::ToGateway(reply)),
            Effect::Close { conn } => self.close(core, conn),
            Effect::QueryReply { reply: NodeQueryReply::Recover(known), .. } => {
                self.running.knowledge = Some(known);
            }
            Effect::QueryReply { query, reply } => {
                if let Some((to, number)) = self.running.queries.remove(&query) {
                    core.query_reply(me.place, to, number, reply);
                }
            }
            Effect::Report(report) => core.report(me, Some(self.running.me), &report),
            Effect::MeasureSnapshot { transfer, slots } => {
                let bytes = self.disk.size_of(slots.shard(), slots);
                core.input_after(
                    200,
                    me,
                    ProcessInput::Disk(DiskDone::Measured { transfer, bytes }),
                );
            }
            Effect::SendSnapshot { conn, transfer, shard, slots } => {
                let ask = Ingest::Snapshot { conn, transfer, shard, slots };
                self.disk.begin_ingest(core, me, self.running.issued, ask);
            }
            Effect::InstallSnapshot { conn, transfer, copy, replaces, state } => {
                let rows = self.running.staged.remove(&(conn, transfer)).unwrap_or_default();
                let install = Ingest::Install { conn, transfer, copy, replaces, rows, state };
                self.disk.begin_ingest(core, me, self.running.issued, install);
            }
            Effect::DiscardSnapshot { conn, transfer } => {
                self.running.staged.remove(&(conn, transfer));
            }
            Effect::DropRows { shard, slots } => {
                self.disk.begin_ingest(
                    core,
                    me,
                    self.running.issued,
                    Ingest::Drop { shard, slots },
                );
            }
            Effect::ReadRecord { read, shard } => {
                let call = core.etcd(me, Call::Read(vec![EtcdKey::Shard(shard)]));
                self.running.calls.insert(call, NodeCallPurpose::Config(read));
            }
            Effect::Propose { proposal, expect, record: config, candidate } => {
                let key = EtcdKey::Shard(config.shard());
                let mut compares = vec![Compare::Modified(key, expect)];
                let created = |(store, at)| Compare::Created(EtcdKey::Node(store), at);
                compares.extend(candidate.map(created));
                let writes = vec![Write::Put(key, EtcdValue::Shard(config), None)];
                let call = core.etcd(me, Call::Txn { compares, writes });
                self.running.calls.insert(call, NodeCallPurpose::Propose(proposal));
            }
            Effect::ProposeSplit { proposal, expect, left, right } => {
                let (parent, child) = (left.shard(), right.shard());
                let (parent, child) = (EtcdKey::Shard(parent), EtcdKey::Shard(child));
                let mut compares = vec![Compare::Modified(parent, expect)];
                compares.push(Compare::Created(child, 0));
                if Planted::SplitUncompared.is_in(core.plan.planted) {
                    compares.clear();
                }
                let writes = vec![
                    Write::Put(parent, EtcdValue::Shard(left), None),
                    Write::Put(child, EtcdValue::Shard(right), None),
                ];
                let call = core.etcd(me, Call::Txn { compares, writes });
                self.running.calls.insert(call, NodeCallPurpose::Propose(proposal));
            }
            Effect::CheckEtcd { check, shards } => {
                let keys = shards.into_iter().map(EtcdKey::Shard).collect();
                let call = core.etcd(me, Call::Read(keys));
                self.running.calls.insert(call, NodeCallPurpose::Check(check));
            }
            Effect::ListSessions => {
                let call = core.etcd(me, Call::List);
                self.running.calls.insert(call, NodeCallPurpose::Sessions);
            }
            // The disks of the model do not rot in a way that only a scrub would find.
            Effect::Scrub { .. } | Effect::Audit(_) => {}
            Effect::Left => self.running.left = true,
            Effect::Exit(_) => unreachable!("the caller stops at it"),
        }
    }

    // ---- disk ----------------------------------------------------------------------------------

    fn disk_done(&mut self, core: &mut Core, done: DiskDone) {
        match done {
            DiskDone::Recovered => {}
            DiskDone::Room(bytes) => {
                self.disk.room_reported = bytes;
                self.handle(core, Event::Room { bytes });
            }
            DiskDone::Measured { transfer, bytes } => {
                self.report(core, None, Event::SnapshotMeasured { transfer, bytes });
            }
            DiskDone::Full(full) => {
                self.disk_full(core, FullCauses { space: full, ..self.running.full })
            }
            DiskDone::LogFull(full) => {
                core.oracle.coverage.reached(Path::LogTooLong);
                self.disk_full(core, FullCauses { log: full, ..self.running.full });
            }
            DiskDone::Damaged => unreachable!("it ends the process"),
            DiskDone::Synced { group } => {
                self.disk.synced(core, self.process, group);
                self.report(core, Some(Stream::Durable), Event::Durable { group });
            }
            DiskDone::Loaded { load, values, records } => {
                self.report(core, None, Event::Loaded { load, values, records });
            }
            DiskDone::RowsCounted { count, counts } => {
                self.report(core, None, Event::RowsCounted { count, counts });
            }
            DiskDone::LogRead { at, parts } => {
                self.report(core, None, Event::LogRead { at, parts });
            }
            DiskDone::FlushAdvanced { flush, counters } => {
                self.handle(core, Event::FlushAdvanced { flush, counters });
            }
            DiskDone::Ingest { id } => match self.disk.ingest(core, self.process, id) {
                Some(Ingest::Flush { flush, .. }) => {
                    self.report(core, Some(Stream::Changes), Event::Ingested { flush });
                }
                Some(Ingest::Drop { shard, .. }) => {
                    self.report(core, Some(Stream::Changes), Event::RowsDropped { shard });
                }
                Some(Ingest::Install { conn, transfer, .. }) => {
                    let done = Event::SnapshotInstalled { conn, transfer };
                    self.report(core, Some(Stream::Changes), done);
                }
                Some(Ingest::Snapshot { conn, transfer, shard, slots }) => {
                    match self.disk.snapshot(shard, slots) {
                        Some((rows, state)) => {
                            let state = Box::new(state);
                            core.send(conn, WireMessage::Rows { transfer, shard, rows, state });
                        }
                        None => self.report(core, None, Event::SnapshotFailed { transfer }),
                    }
                }
                None => {}
            },
        }
    }

    fn disk_full(&mut self, core: &mut Core, full: FullCauses) {
        let before = std::mem::replace(&mut self.running.full, full);
        if before.any() != full.any() {
            self.handle(core, Event::DiskFull(full.any()));
        }
    }

    // ---- connections ---------------------------------------------------------------------------

    fn tock(&mut self, core: &mut Core) {
        core.input_after(TOCK, self.process, ProcessInput::Tock);
        let wall = wall_clock(core, self.clock);
        self.handle(core, Event::WallClock(TimeMs(wall)));
        if self.running.exits() {
            return;
        }
        if self.disk.stays_full {
            self.disk_done(core, DiskDone::Full(true));
            self.disk_done(core, DiskDone::Room(0));
        }
        self.dial_all(core);
        self.keep_alive(core);
    }

    fn dial_all(&mut self, core: &mut Core) {
        for peer in self.running.peers.values_mut() {
            let idle = peer.dial.is_none() && peer.conn.is_none();
            if idle && peer.next_dial <= core.now {
                peer.dialled_at = core.now;
                peer.dial = Some(core.dial(self.process, place_of(peer.me.store)));
            }
        }
    }

    fn accepted(&mut self, core: &mut Core, conn: Conn, from: Place) {
        if matches!(from, Place::Gateway(_)) {
            self.running.gateways.insert(conn, ());
            self.handle(core, Event::GatewayConnected { conn });
        } else {
            self.running.conns.insert(conn, None);
            self.handle(core, Event::Accepted { conn });
        }
    }

    fn dialled(&mut self, core: &mut Core, dial: u64, conn: Conn) {
        let peers = &mut self.running.peers;
        let Some(peer) = peers.values_mut().find(|peer| peer.dial == Some(dial)) else {
            return core.close(conn);
        };
        peer.dial = None;
        peer.conn = Some(conn);
        peer.refused = 0;
        let peer = peer.me;
        self.running.conns.insert(conn, Some(peer.store));
        self.handle(core, Event::Dialled { conn, peer });
    }

    fn dial_failed(&mut self, core: &mut Core, dial: u64, refused: bool) {
        let peers = &mut self.running.peers;
        let Some(peer) = peers.values_mut().find(|peer| peer.dial == Some(dial)) else { return };
        peer.dial = None;
        peer.refused = if refused { peer.refused + 1 } else { 0 };
        peer.next_dial = core.now + REDIAL;
        if peer.refused == 1 {
            // The second try follows at once: two refusals prove that the process is dead.
            core.input_after(REDIAL, self.process, ProcessInput::Redial);
        }
        if peer.refused == 2 {
            let store = peer.me.store;
            self.handle(core, Event::DialRefused { store });
        }
    }

    fn received(&mut self, core: &mut Core, conn: Conn, wire: WireMessage) {
        let known = self.running.conns.contains_key(&conn);
        if !known && !self.running.gateways.contains_key(&conn) {
            return;
        }
        let event = match wire {
            WireMessage::ToFollower(message) => return self.fed(core, conn, message),
            WireMessage::FromFollower(message) => Event::FromFollower { conn, message },
            WireMessage::ToNode(message) => Event::Gateway { conn, message },
            WireMessage::Rows { transfer, .. } if core.now < self.disk.no_room_until => {
                return core.send(conn, WireMessage::RowsRefused { transfer });
            }
            WireMessage::Rows { transfer, rows, state, .. } => {
                return self.staged(core, conn, transfer, rows, state);
            }
            WireMessage::RowsRefused { transfer } => Event::SnapshotFailed { transfer },
            WireMessage::ToGateway(_) => unreachable!("only gateways are sent replies"),
        };
        self.handle(core, event);
    }

    fn fed(&mut self, core: &mut Core, conn: Conn, message: ToFollower) {
        if let ToFollower::Snapshot { transfer, bytes, .. } = message {
            self.running.announced.insert((conn, transfer), bytes);
        }
        self.handle(core, Event::FromPrimary { conn, message });
    }

    /// A snapshot that has no room is not begun.
    fn accepts(&self, core: &mut Core, conn: Conn, message: &FromFollower) {
        let FromFollower::Snapshot { transfer, shard, outcome } = message else { return };
        let bytes = self.running.announced.get(&(conn, *transfer)).copied().unwrap_or_default();
        match outcome {
            SnapshotOutcome::NoSpace => core.oracle.coverage.reached(Path::CopyWithoutRoom),
            SnapshotOutcome::Accepted if bytes > self.disk.room_reported => {
                let detail = format!(
                    "{:?} accepts a snapshot of {shard} with {bytes} bytes and has room for {}",
                    self.process.place, self.disk.room_reported
                );
                core.oracle.violations.push(Violation { promise: "room", detail });
            }
            _ => {}
        }
    }

    fn staged(
        &mut self,
        core: &mut Core,
        conn: Conn,
        transfer: u64,
        rows: Rows,
        state: Box<ShardState>,
    ) {
        self.running.staged.insert((conn, transfer), rows);
        self.handle(core, Event::SnapshotStaged { conn, transfer, state });
    }

    fn close(&mut self, core: &mut Core, conn: Conn) {
        core.close(conn);
        self.forget(core, conn);
    }

    fn closed(&mut self, core: &mut Core, conn: Conn) {
        if self.running.gateways.remove(&conn).is_some() {
            return self.handle(core, Event::GatewayGone { conn });
        }
        if self.running.conns.contains_key(&conn) {
            self.forget(core, conn);
            self.handle(core, Event::Closed { conn });
        }
    }

    fn forget(&mut self, core: &mut Core, conn: Conn) {
        self.running.gateways.remove(&conn);
        self.running.announced.retain(|&(of, _), _| of != conn);
        let Some(Some(store)) = self.running.conns.remove(&conn) else { return };
        if let Some(peer) = self.running.peers.get_mut(&store)
            && peer.conn == Some(conn)
        {
            peer.conn = None;
            peer.refused = 0;
            // A connection that ended at once would end again: another store answers there.
            let waits = if core.now < peer.dialled_at + REDIAL { REDIAL } else { 1_000 };
            peer.next_dial = core.now + waits;
            core.input_after(waits, self.process, ProcessInput::Redial);
        }
    }

    // ---- etcd ----------------------------------------------------------------------------------

    fn keep_alive(&mut self, core: &mut Core) {
        let disk_answers = self.disk.stalled_until <= core.now;
        let asked = |asked: &NodeCallPurpose| {
            matches!(
                asked,
                NodeCallPurpose::KeepAlive | NodeCallPurpose::Grant | NodeCallPurpose::Register
            )
        };
        if !disk_answers || self.running.calls.values().any(asked) {
            return;
        }
        let (call, asked) = match self.running.lease {
            Some(lease) => (Call::KeepAlive { lease }, NodeCallPurpose::KeepAlive),
            None => (Call::Grant { ttl: core.plan.lease_ttl }, NodeCallPurpose::Grant),
        };
        let call = core.etcd(self.process, call);
        self.running.calls.insert(call, asked);
    }

    fn etcd_reply(&mut self, core: &mut Core, asked: NodeCallPurpose, reply: Reply) {
        match (asked, reply) {
            (NodeCallPurpose::Config(read), Reply::Read { keys }) => {
                for (_, record) in keys {
                    self.config(core, record, Some(read));
                }
            }
            (NodeCallPurpose::Propose(proposal), Reply::Txn { done, revision }) => {
                let outcome = match done {
                    true => CasOutcome::Done { mod_revision: revision },
                    false => CasOutcome::Failed,
                };
                self.report(core, None, Event::Proposed { proposal, outcome });
            }
            (NodeCallPurpose::Check(check), Reply::Read { keys }) => {
                let config = |(_, record): (EtcdKey, Option<Versioned>)| match record?.value {
                    EtcdValue::Shard(config) => Some(config),
                    _ => None,
                };
                let configs = Some(keys.into_iter().filter_map(config).collect());
                self.report(core, None, Event::EtcdChecked { check, records: configs });
            }
            (NodeCallPurpose::Sessions, Reply::List { revision, all }) => {
                let session = |(key, value): (EtcdKey, Versioned)| {
                    matches!(key, EtcdKey::Gateway(_))
                        .then_some(core.etcd.session_id(value.created))
                };
                let alive = all.into_iter().filter_map(session).collect();
                let at = Revision { incarnation: core.etcd.incarnation(), revision };
                self.report(core, None, Event::SessionsListed { at, alive });
            }
            (NodeCallPurpose::KeepAlive, Reply::Kept(true)) => {
                self.handle(core, Event::LeaseConfirmed)
            }
            (NodeCallPurpose::KeepAlive, Reply::Kept(false)) => self.running.lease = None,
            (NodeCallPurpose::Grant, Reply::Granted { lease }) => {
                self.running.lease = Some(lease);
                let key = EtcdKey::Node(self.running.me.store);
                let value = EtcdValue::Node(self.running.me);
                let compares = vec![Compare::Created(key, 0)];
                let writes = vec![Write::Put(key, value, Some(lease))];
                let call = core.etcd(self.process, Call::Txn { compares, writes });
                self.running.calls.insert(call, NodeCallPurpose::Register);
            }
            // The key of the previous lease still exists, or this one is gone again: start over.
            (NodeCallPurpose::Register, Reply::Txn { done: false, .. }) => {
                self.running.lease = None
            }
            (_, _) => {}
        }
    }

    fn etcd_timeout(&mut self, core: &mut Core, asked: NodeCallPurpose) {
        match asked {
            NodeCallPurpose::Config(_) | NodeCallPurpose::Sessions | NodeCallPurpose::KeepAlive => {
            }
            NodeCallPurpose::Propose(proposal) => {
                self.handle(core, Event::Proposed { proposal, outcome: CasOutcome::Unknown });
            }
            NodeCallPurpose::Check(check) => {
                self.handle(core, Event::EtcdChecked { check, records: None })
            }
            NodeCallPurpose::Grant | NodeCallPurpose::Register => self.running.lease = None,
        }
    }

    fn config(&mut self, core: &mut Core, record: Option<Versioned>, read: Option<u64>) {
        if let Some(Versioned { value: EtcdValue::Shard(config), modified, .. }) = record {
            let event = Event::ShardRecord { record: config, mod_revision: modified, read };
            self.report(core, None, event);
        }
    }

    fn watched(&mut self, core: &mut Core, events: Vec<EtcdWatchEvent>) {
        let mut peers_changed = false;
        for EtcdWatchEvent { key, value } in events {
            match (key, value) {
                (EtcdKey::Shard(_), record) => self.config(core, record, None),
                (
                    EtcdKey::Node(store),
                    Some(Versioned { value: EtcdValue::Node(me), created, .. }),
                ) => {
                    peers_changed = true;
                    self.running.keys.insert(store, (me, created));
                    self.meet(core, me);
                }
                (EtcdKey::Node(store), _) => {
                    peers_changed = true;
                    self.running.keys.remove(&store);
                }
                _ => {}
            }
            if self.running.exits() {
                return;
            }
        }
        if peers_changed {
            let peers = self.running.keys.values().copied().collect();
            self.report(core, Some(Stream::Peers), Event::PeersRegistered(peers));
            self.dial_all(core);
        }
    }

    /// Learns of a store's process; an older one of the same store is no longer of interest.
    fn meet(&mut self, core: &mut Core, me: StoreBoot) {
        if me.store == self.running.me.store {
            return;
        }
        let known = self.running.peers.get(&me.store);
        if known.is_some_and(|peer| peer.me.boot >= me.boot) {
            return;
        }
        let old = known.and_then(|peer| peer.conn);
        let peer = PeerStore {
            me,
            dial: None,
            conn: None,
            refused: 0,
            next_dial: core.now,
            dialled_at: 0,
        };
        self.running.peers.insert(me.store, peer);
        if let Some(conn) = old {
            core.close(conn);
            self.running.conns.remove(&conn);
            self.handle(core, Event::Closed { conn });
        }
    }
}
