//! One coordinator: events in, exact effects out. Lists and probes are answered by a bench that
//! holds the state of the cluster; proposals, gathers and decisions are compared.

use std::collections::BTreeMap;

use super::decision::{Cause, PromotionReason};
use super::*;
use crate::ids::{Boot, Slots, TimeMs, Version};
use crate::message::ReplicaHealth;
use crate::records::{NameRecord, Operator, StoreStatus};

const TERM: u64 = 77;
/// The revision of the shards that a test begins with: after all nodes registered.
const WRITTEN: u64 = 200;

fn id(store: u128) -> StoreId {
    StoreId(store)
}

fn ids(stores: &[u128]) -> Vec<StoreId> {
    stores.iter().copied().map(StoreId).collect()
}

fn process(store: u128, boot: u64) -> StoreBoot {
    StoreBoot { store: id(store), boot: Boot(boot) }
}

fn shard_at(lo: u16) -> ShardRecord {
    ShardRecord {
        slots: Slots { lo, hi: lo },
        epoch: Epoch(4),
        version: Version(9),
        primary: process(1, 1),
        isr: ids(&[1, 2, 3]),
        learners: vec![],
        target: ids(&[1, 2, 3]),
        tainted: vec![],
    }
}

fn meta(shards: u32) -> Meta {
    Meta { shards, ..Settings::default().meta() }
}

fn end(store: u128, shard: u16, last: (u64, u64)) -> (StoreId, ShardEnd) {
    let end = ShardEnd {
        shard: ShardId(shard),
        promised: Epoch(last.0),
        last: (Epoch(last.0), Seq(last.1)),
        applied: Seq(0),
        unfit: false,
    };
    (id(store), end)
}

fn unfit(end: (StoreId, ShardEnd)) -> (StoreId, ShardEnd) {
    (end.0, ShardEnd { unfit: true, ..end.1 })
}

/// A cluster as etcd and the network show it, and one coordinator.
struct Bench {
    coordinator: Coordinator,
    now: Now,
    etcd: Listing,
    /// The result of a probe of each store. A store that is not in the map is silent.
    found: BTreeMap<StoreId, ProbeResult>,
    /// The log ends that gathers find. While the list is empty, gathers stay open.
    ends: Vec<(StoreId, ShardEnd)>,
    /// The effects that were not answered.
    seen: Vec<Effect>,
    /// Lists stay unanswered.
    etcd_is_slow: bool,
    lists: Vec<u64>,
}

impl Bench {
    /// Nodes 1 to `nodes` run, in their first boot, each in a place of its own.
    fn new(settings: Settings, nodes: u128) -> Self {
        let mut bench = Self {
            coordinator: Coordinator::new(settings),
            now: Now(1_000_000),
            etcd: Listing { revision: 100, ..Listing::default() },
            found: BTreeMap::new(),
            ends: vec![],
            seen: vec![],
            etcd_is_slow: false,
            lists: vec![],
        };
        for store in 1..=nodes {
            bench.boot(store, 1);
        }
        bench
    }

    /// Leads over these shards, with all nodes in order, after its first reviews.
    fn leading(nodes: u128, shards: Vec<ShardRecord>) -> Self {
        Self::leading_with(Settings::default(), nodes, shards)
    }

    fn leading_with(settings: Settings, nodes: u128, shards: Vec<ShardRecord>) -> Self {
        let mut bench = Self::new(settings, nodes);
        let count = shards.len();
        bench.etcd.meta = Some(kept(meta(shards.len() as u32), 1));
        bench.etcd.shards = shards.into_iter().map(|record| kept(record, WRITTEN)).collect();
        bench.etcd.revision = WRITTEN;
        // The bench numbers shards freely: none is missing.
        bench.etcd.meta.as_mut().unwrap().value.shards = 0;
        bench.on(Event::Elected { term: TERM });
        bench.pass(400);
        let took = Decision::BecameLeader { term: TERM, stores: nodes as usize, shards: count };
        assert_eq!(bench.take(), [Effect::Decision(took)], "all is well to begin with");
        bench
    }

    fn revision(&mut self) -> u64 {
        self.etcd.revision += 1;
        self.etcd.revision
    }

    // ---- what happens to the cluster -----------------------------------------------------------

    /// The store's process registers, as a new one, and answers. (The coordinator does not learn of
    /// it.)
    fn boot(&mut self, store: u128, boot: u64) {
        let (revision, boot) = (self.revision(), Boot(boot));
        let known = self.etcd.stores.iter().find(|(known, _)| *known == id(store));
        let created = known.map_or(revision, |(_, kept)| kept.created);
        let record = StoreRecord {
            name: format!("node-{store}"),
            address: format!("host:{store}"),
            zone: String::new(),
            host: format!("host-{store}"),
            boot,
            nonce: 1,
            status: StoreStatus::Active,
        };
        let record = AtRevision { value: record, created, modified: revision };
        self.etcd.stores.retain(|(known, _)| *known != id(store));
        self.etcd.stores.push((id(store), record));
        self.name(store, &format!("node-{store}"));
        let node =
            NodeRecord { boot, address: format!("host:{store}"), capacity: 1, versions: (1, 1) };
        self.etcd.nodes.retain(|(known, _)| *known != id(store));
        self.etcd.nodes.push((id(store), kept(node, revision)));
        self.found.insert(id(store), alive(store, boot.0));
    }

    /// The store has taken this name. (The coordinator does not learn of it.)
    fn name(&mut self, store: u128, name: &str) {
        let revision = self.revision();
        let found = self.etcd.stores.iter_mut().find(|(it, _)| *it == id(store)).unwrap();
        found.1.value.name = name.into();
        found.1.modified = revision;
        self.etcd.names.retain(|(it, _)| it != name);
        self.etcd.names.push((name.into(), kept(NameRecord { store: id(store) }, revision)));
    }

    /// Delivers a store's records, as watches do.
    fn send_changes_of(&mut self, store: u128) {
        let (_, record) = self.etcd.stores.iter().find(|(it, _)| *it == id(store)).unwrap();
        let record = record.clone();
        let node = self.etcd.nodes.iter().find(|(it, _)| *it == id(store)).unwrap().1.clone();
        let revision = self.etcd.revision;
        let names = self.etcd.names.clone().into_iter();
        for (name, kept) in names.filter(|(_, kept)| kept.value.store == id(store)) {
            self.on(Event::Changed { revision, change: RecordChange::Name(name, Some(kept)) });
        }
        self.on(Event::Changed { revision, change: RecordChange::Store(id(store), Some(record)) });
        self.on(Event::Changed { revision, change: RecordChange::Node(id(store), Some(node)) });
    }

    fn set_status(&mut self, store: u128, status: StoreStatus) {
        let revision = self.revision();
        let found = self.etcd.stores.iter_mut().find(|(it, _)| *it == id(store)).unwrap();
        found.1.value.status = status;
        found.1.modified = revision;
        self.send_changes_of(store);
    }

    /// An operator wants the store emptied.
    fn drain(&mut self, store: u128) {
        let revision = self.revision();
        self.etcd.drains.push((id(store), kept((), revision)));
        let change = RecordChange::Drain(id(store), Some(kept((), revision)));
        self.on(Event::Changed { revision, change });
    }

    fn undrain(&mut self, store: u128) {
        let revision = self.revision();
        self.etcd.drains.retain(|(it, _)| *it != id(store));
        self.on(Event::Changed { revision, change: RecordChange::Drain(id(store), None) });
    }

    /// An operator wants the store, of this boot, out of the cluster.
    fn remove(&mut self, store: u128, boot: u64) {
        let revision = self.revision();
        let from = Operator { at: TimeMs(1), name: "me@here".into() };
        let intent = RemoveIntent { boot: Boot(boot), from };
        self.etcd.removes.push((id(store), kept(intent.clone(), revision)));
        let change = RecordChange::Remove(id(store), Some(kept(intent, revision)));
        self.on(Event::Changed { revision, change });
    }

    /// The removals that are proposed: the store, its status, and whether its drain ends with it.
    fn removals(&mut self) -> Vec<(StoreId, StoreStatus, bool)> {
        let removal = |effect| match effect {
            Effect::Propose { writes: Writes::Removal(removal), .. } => {
                Some((removal.store, removal.record.status, removal.drain.is_some()))
            }
            _ => None,
        };
        self.take().into_iter().filter_map(removal).collect()
    }

    /// The status of a store that is proposed, and takes effect.
    #[track_caller]
    fn accept_status(&mut self) -> (StoreId, StoreStatus) {
        let proposed = self.take().into_iter().find_map(|effect| match effect {
            Effect::Propose { proposal, writes: Writes::Store { store, record, .. }, .. } => {
                Some((proposal, store, record))
            }
            _ => None,
        });
        let (proposal, store, record) = proposed.expect("a status is proposed");
        let mod_revision = self.revision();
        let found = self.etcd.stores.iter_mut().find(|(it, _)| *it == store).unwrap();
        found.1.value = record.clone();
        found.1.modified = mod_revision;
        let outcome = CasOutcome::Done { mod_revision };
        self.on(Event::Proposed { proposal, outcome });
        (store, record.status)
    }

    fn lease_ends(&mut self, store: u128) {
        let revision = self.revision();
        self.etcd.nodes.retain(|(it, _)| *it != id(store));
        self.on(Event::Changed { revision, change: RecordChange::Node(id(store), None) });
    }

    fn kill(&mut self, store: u128) {
        self.found.insert(id(store), ProbeResult::Refused);
    }

    fn silence(&mut self, store: u128) {
        self.found.remove(&id(store));
    }

    fn report(&mut self, from: u128, report: HealthReport) {
        self.on(Event::Reported { from: process(from, 1), report });
    }

    // ---- what the coordinator does -------------------------------------------------------------

    fn on(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.coordinator.handle(self.now, event, &mut effects);
        for effect in effects {
            match effect {
                Effect::List { list } => self.lists.push(list),
                Effect::Probe { probe, to } => {
                    if let Some(&result) = self.found.get(&to.store) {
                        self.on(Event::Probed { probe, result });
                    }
                }
                Effect::Gather { gather, to, shards } if !self.ends.is_empty() => {
                    self.answer_gather(gather, to, &shards);
                }
                other => self.seen.push(other),
            }
        }
        self.answer_lists();
    }

    fn answer_lists(&mut self) {
        while !self.etcd_is_slow && !self.lists.is_empty() {
            let list = self.lists.remove(0);
            self.on(Event::Listed { list, listing: Some(self.etcd.clone()) });
        }
    }

    /// Lets time pass, from one deadline to the next.
    fn pass(&mut self, ms: u64) {
        let until = self.now.plus_ms(ms);
        while let Some(next) = self.coordinator.next_deadline().filter(|next| *next <= until) {
            self.now = self.now.max(next);
            self.on(Event::Tick);
        }
        self.now = until;
    }

    fn take(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.seen)
    }

    fn logged(&self, decision: impl Fn(&Decision) -> bool) -> usize {
        self.seen
            .iter()
            .filter(|effect| matches!(effect, Effect::Decision(it) if decision(it)))
            .count()
    }

    /// Answers the gathers that are open, and those to come.
    fn gathered(&mut self, ends: &[(StoreId, ShardEnd)]) {
        self.ends = ends.to_vec();
        for effect in self.take() {
            match effect {
                Effect::Gather { gather, to, shards } => self.answer_gather(gather, to, &shards),
                other => self.seen.push(other),
            }
        }
    }

    fn answer_gather(&mut self, gather: u64, to: StoreBoot, shards: &[ShardId]) {
        let asked =
            |(store, end): &&(StoreId, ShardEnd)| *store == to.store && shards.contains(&end.shard);
        let ends = self.ends.iter().filter(asked).map(|(_, end)| *end).collect();
        self.on(Event::Gathered { gather, store: to.store, ends: Some(ends) });
    }

    /// The proposals for shards since the last `take`.
    fn proposed(&self) -> Vec<(u64, Vec<(u64, ShardRecord)>)> {
        let proposal = |effect: &Effect| match effect {
            Effect::Propose { proposal, term, writes: Writes::Shards(shards) } => {
                assert_eq!(*term, TERM);
                Some((*proposal, shards.clone()))
            }
            _ => None,
        };
        self.seen.iter().filter_map(proposal).collect()
    }

    /// The one shard that is proposed, and takes effect.
    #[track_caller]
    fn accept(&mut self) -> ShardRecord {
        let proposed = self.proposed();
        let [(proposal, shards)] = &proposed[..] else { panic!("{:#?}", self.seen) };
        let [(_, record)] = &shards[..] else { panic!("{shards:#?}") };
        let mod_revision = self.revision();
        self.etcd.shards.retain(|kept| kept.value.shard() != record.shard());
        self.etcd.shards.push(kept(record.clone(), mod_revision));
        self.seen.clear();
        let outcome = CasOutcome::Done { mod_revision };
        self.on(Event::Proposed { proposal: *proposal, outcome });
        record.clone()
    }
}

fn kept<V>(value: V, revision: u64) -> AtRevision<V> {
    AtRevision { value, created: revision, modified: revision }
}

fn alive(store: u128, boot: u64) -> ProbeResult {
    ProbeResult::Alive { from: process(store, boot), fsync_age_ms: 10 }
}

fn silent(stores: &[u128]) -> HealthReport {
    HealthReport { silent: ids(stores), ..HealthReport::default() }
}

fn writes_a_store(effect: &Effect) -> bool {
    matches!(effect, Effect::Propose { writes: Writes::Store { .. }, .. })
}

// ---- leader ------------------------------------------------------------------------------------

#[test]
fn a_standby_does_nothing() {
    let mut bench = Bench::new(Settings::default(), 3);
    bench.on(Event::Tick);
    bench.send_changes_of(1);
    assert_eq!((bench.take(), bench.lists.len()), (vec![], 0));
    assert_eq!(bench.coordinator.next_deadline(), None);
}

#[test]
fn a_leader_reads_before_it_does_anything() {
    let mut coordinator = Coordinator::new(Settings::default());
    let mut effects = Vec::new();
    coordinator.handle(Now(5), Event::Elected { term: TERM }, &mut effects);
    assert_eq!(effects, [Effect::List { list: 1 }]);
    assert!(!coordinator.is_leading());
    effects.clear();
    // Etcd did not answer: it is asked again.
    coordinator.handle(Now(5), Event::Listed { list: 1, listing: None }, &mut effects);
    assert_eq!(effects, []);
    coordinator.handle(coordinator.next_deadline().unwrap(), Event::Tick, &mut effects);
    assert_eq!(effects, [Effect::List { list: 2 }]);
}

#[test]
fn a_deposed_leader_forgets_and_ignores_late_answers() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.kill(1);
    bench.pass(300);
    let gathers = bench.take();
    bench.on(Event::Deposed);
    for effect in gathers {
        if let Effect::Gather { gather, to, .. } = effect {
            let ends = Some(vec![end(2, 0, (4, 9)).1]);
            bench.on(Event::Gathered { gather, store: to.store, ends });
        }
    }
    bench.pass(1_000);
    assert_eq!(bench.take(), []);
}

// ---- creating a cluster ------------------------------------------------------------------------

#[test]
fn the_first_coordinator_makes_the_cluster_from_its_flags() {
    let flags = Flags { shards: Some(6), replicas: Some(1), ..Flags::default() };
    let settings = Settings { flags, new_cluster: 99, ..Settings::default() };
    let mut bench = Bench::new(settings, 0);
    bench.on(Event::Elected { term: TERM });
    let meta = Meta { cluster: 99, shards: 6, replicas: 1, min_in_sync: 1, ..meta(6) };
    let is_meta = |effect: &Effect| match effect {
        Effect::Propose { term: TERM, writes: Writes::Meta(it), .. } => *it == meta,
        _ => false,
    };
    assert!(bench.take().iter().any(is_meta));
}

#[test]
fn flags_that_the_cluster_was_not_made_with_end_the_process() {
    #[track_caller]
    fn check(flags: Flags, want: Option<&str>) {
        assert_eq!(flags.difference(&meta(24)).as_deref(), want);
    }
    check(Flags::default(), None);
    let flags = Flags {
        shards: Some(24),
        replicas: Some(3),
        min_in_sync: Some(2),
        idempotency_window_ms: Some(3_600_000),
        idempotency_bytes: Some(8 << 30),
    };
    check(flags, None);
    let want = "--shards is 12, but this cluster was made with 24";
    check(Flags { shards: Some(12), ..Flags::default() }, Some(want));
    let want = "--min-in-sync is 1, but this cluster was made with 2";
    check(Flags { min_in_sync: Some(1), ..Flags::default() }, Some(want));

    let flags = Flags { replicas: Some(5), ..Flags::default() };
    let mut bench = Bench::new(Settings { flags, ..Settings::default() }, 0);
    bench.etcd.meta = Some(kept(meta(24), 1));
    bench.on(Event::Elected { term: TERM });
    let difference = "--replicas is 5, but this cluster was made with 3".into();
    assert!(bench.take().contains(&Effect::Exit(difference)));
}

#[test]
fn impossible_flags_are_named() {
    #[track_caller]
    fn check(shards: u32, replicas: u8, min_in_sync: u8, want: Result<(), &str>) {
        let (replicas, min_in_sync) = (Some(replicas), Some(min_in_sync));
        let flags = Flags { shards: Some(shards), replicas, min_in_sync, ..Flags::default() };
        assert_eq!(flags.check(), want.map_err(str::to_owned));
    }
    check(24, 3, 2, Ok(()));
    check(0, 3, 2, Err("--shards 0: give 1 to 65536"));
    check(24, 0, 0, Err("--replicas 0: give at least 1"));
    check(24, 3, 4, Err("--min-in-sync 4: give 1 to --replicas (3)"));
    check(24, 3, 0, Err("--min-in-sync 0: give 1 to --replicas (3)"));
}

/// An empty cluster of 12 shards, `nodes` of them registered.
fn empty(settings: Settings, nodes: u128) -> Bench {
    let mut bench = Bench::new(settings, nodes);
    bench.etcd.meta = Some(kept(meta(12), 1));
    bench.on(Event::Elected { term: TERM });
    bench
}

#[test]
fn shards_are_placed_when_enough_nodes_are_here_and_no_more_come() {
    let mut bench = empty(Settings::default(), 2);
    bench.pass(10_000);
    assert_eq!(bench.proposed(), []);
    assert_eq!(bench.coordinator.waits_for(), Some(PlacementWait { nodes: 2, of: 3 }));
    bench.boot(3, 1);
    bench.send_changes_of(3);
    bench.pass(2_900);
    assert_eq!(bench.proposed(), []);
    bench.pass(200);
    let proposed = bench.proposed();
    assert_eq!(proposed.len(), 1);
    let shards = &proposed[0].1;
    assert_eq!(shards.len(), 12);
    let slots: Vec<_> = shards.iter().map(|(_, record)| record.slots).collect();
    assert_eq!(slots[0], Slots { lo: 0, hi: 5460 });
    assert_eq!(slots[11], Slots { lo: 60074, hi: 65535 });
    for (expect, record) in shards {
        assert_eq!((*expect, record.epoch, record.version), (0, Epoch(1), Version(1)));
        assert_eq!((&record.isr, &record.target), (&ids(&[1, 2, 3]), &ids(&[1, 2, 3])));
        assert_eq!(record.primary.boot, Boot(1));
    }
    assert_eq!(bench.coordinator.waits_for(), None);
}

#[test]
fn shards_are_placed_at_once_when_all_that_are_expected_are_here() {
    let settings = Settings { expect_nodes: Some(4), ..Settings::default() };
    let mut bench = empty(settings, 3);
    bench.pass(500);
    assert_eq!(bench.proposed(), []);
    assert_eq!(bench.coordinator.waits_for(), Some(PlacementWait { nodes: 3, of: 4 }));
    bench.boot(4, 1);
    bench.send_changes_of(4);
    bench.pass(100);
    assert_eq!(bench.proposed().len(), 1);
}

#[test]
fn a_half_placed_cluster_is_completed() {
    let mut bench = empty(Settings { expect_nodes: Some(3), ..Settings::default() }, 3);
    bench.pass(100);
    let placed = bench.proposed()[0].1.clone();
    let settings = Settings { expect_nodes: Some(3), ..Settings::default() };
    let mut next = Bench::new(settings, 3);
    next.etcd.meta = Some(kept(meta(12), 1));
    next.etcd.shards = placed[..7].iter().map(|(_, record)| kept(record.clone(), 60)).collect();
    next.on(Event::Elected { term: TERM });
    next.pass(100);
    let missing: Vec<_> = next.proposed()[0].1.iter().map(|(_, record)| record.slots).collect();
    let want: Vec<_> = placed[7..].iter().map(|(_, record)| record.slots).collect();
    assert_eq!(missing, want);
}

// ---- failure detection -------------------------------------------------------------------------

fn gather(bench: &Bench) -> Vec<(u128, Vec<ShardId>)> {
    let asked = |effect: &Effect| match effect {
        Effect::Gather { to, shards, .. } => Some((to.store.0, shards.clone())),
        _ => None,
    };
    bench.seen.iter().filter_map(asked).collect()
}

/// Two members left are asked for the end of shard 0.
fn asked_both() -> Vec<(u128, Vec<ShardId>)> {
    vec![(2, vec![ShardId(0)]), (3, vec![ShardId(0)])]
}

#[test]
fn a_killed_primary_is_noticed_by_two_refusals() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.kill(1);
    bench.pass(250);
    let died = Decision::Died { process: process(1, 1), why: Cause::Refused };
    assert_eq!(bench.logged(|decision| *decision == died), 1);
    assert_eq!(gather(&bench), asked_both());
}

#[test]
fn a_report_makes_one_refusal_enough() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.pass(199);
    bench.kill(1);
    bench.report(2, silent(&[1]));
    assert_eq!(gather(&bench), asked_both(), "at once");
}

#[test]
fn a_gateways_suspicion_is_confirmed_at_once_too() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.kill(1);
    bench.on(Event::GatewayReported(ids(&[1])));
    assert_eq!(gather(&bench), asked_both());
}

#[test]
fn a_complaint_about_a_living_node_is_not_believed() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.report(2, silent(&[1]));
    bench.lease_ends(1);
    bench.pass(5_000);
    assert_eq!(gather(&bench), []);
    assert_eq!(bench.proposed(), []);
}

#[test]
fn silence_is_the_coordinators_own_until_another_process_complains() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.silence(1);
    bench.pass(5_000);
    assert_eq!(bench.take(), []);
    bench.lease_ends(1);
    assert_eq!(gather(&bench), asked_both(), "the answer is known already");
}

#[test]
fn a_stalled_disk_is_as_bad_as_silence() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    let stalled = ProbeResult::Alive { from: process(1, 1), fsync_age_ms: 1_000 };
    bench.found.insert(id(1), stalled);
    bench.report(2, silent(&[1]));
    assert_eq!(gather(&bench), asked_both());
}

#[test]
fn another_process_at_its_address_proves_it_dead() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.found.insert(id(1), alive(9, 1));
    bench.pass(200);
    let died = Decision::Died { process: process(1, 1), why: Cause::Replaced };
    assert_eq!(bench.logged(|decision| *decision == died), 1);
    assert_eq!(gather(&bench), asked_both());
}

#[test]
fn a_coordinator_that_was_paused_suspects_no_node() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.lease_ends(1);
    bench.take();
    // A probe is in flight; then this process stops for a minute.
    bench.silence(1);
    bench.pass(100);
    bench.now = bench.now.plus_ms(60_000);
    bench.found.insert(id(1), alive(1, 1));
    bench.on(Event::Tick);
    assert_eq!(gather(&bench), []);
}

// ---- promotion ---------------------------------------------------------------------------------

/// Node 1 is dead, by proof.
fn without_primary(shards: Vec<ShardRecord>) -> Bench {
    let mut bench = Bench::leading(3, shards);
    bench.kill(1);
    bench.report(2, silent(&[1]));
    bench
}

#[test]
fn the_longest_log_is_promoted_and_the_dead_leave() {
    let mut bench = without_primary(vec![shard_at(0)]);
    bench.gathered(&[end(2, 0, (4, 20)), end(3, 0, (4, 21))]);
    let proposed = bench.proposed();
    let want = ShardRecord {
        epoch: Epoch(5),
        version: Version(10),
        primary: process(3, 1),
        isr: ids(&[2, 3]),
        ..shard_at(0)
    };
    assert_eq!(proposed.len(), 1);
    assert_eq!(proposed[0].1, [(WRITTEN, want.clone())]);
    assert_eq!(bench.accept(), want);
    let decision = Decision::Promoted {
        shard: ShardId(0),
        epoch: Epoch(5),
        from: process(1, 1),
        to: process(3, 1),
        why: PromotionReason::Dead(Cause::Refused),
        last: (Epoch(4), Seq(21)),
        took_ms: 0,
    };
    assert_eq!(bench.logged(|it| *it == decision), 1);
    bench.take();
    bench.pass(2_000);
    assert_eq!(bench.proposed(), [], "nothing is left to do");
}

#[test]
fn shards_of_one_dead_node_are_spread_over_the_others() {
    let mut bench = without_primary(vec![shard_at(0), shard_at(1), shard_at(2), shard_at(3)]);
    let ends: Vec<_> = (0..4).flat_map(|at| [end(2, at, (4, 9)), end(3, at, (4, 9))]).collect();
    bench.gathered(&ends);
    let proposed = bench.proposed();
    assert_eq!(proposed.len(), 1, "one transaction");
    let primaries =
        |store| proposed[0].1.iter().filter(|(_, it)| it.primary.store == id(store)).count();
    assert_eq!((primaries(2), primaries(3)), (2, 2));
}

#[test]
fn at_most_127_shards_go_in_one_transaction() {
    let mut bench = without_primary((0..130).map(shard_at).collect());
    let ends: Vec<_> = (0..130).flat_map(|at| [end(2, at, (4, 9)), end(3, at, (4, 9))]).collect();
    bench.gathered(&ends);
    let sizes: Vec<_> = bench.proposed().iter().map(|(_, shards)| shards.len()).collect();
    assert_eq!(sizes, [127, 3]);
}

#[test]
fn a_gather_waits_for_the_last_node_but_not_for_long() {
    let mut bench = without_primary(vec![shard_at(0)]);
    let gathers = bench.take();
    let Some(Effect::Gather { gather, .. }) =
        gathers.iter().find(|effect| matches!(effect, Effect::Gather { .. }))
    else {
        panic!("{gathers:?}")
    };
    let ends = Some(vec![end(2, 0, (4, 20)).1]);
    bench.on(Event::Gathered { gather: *gather, store: id(2), ends });
    bench.pass(49);
    assert_eq!(bench.proposed(), []);
    bench.pass(1);
    assert_eq!(bench.accept().primary, process(2, 1));
}

#[test]
fn a_restarted_primary_does_not_simply_go_on() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.boot(1, 2);
    bench.send_changes_of(1);
    assert_eq!(gather(&bench), asked_both(), "the others are known to answer");
    bench.gathered(&[end(2, 0, (4, 20)), end(3, 0, (4, 20))]);
    let next = bench.accept();
    assert_eq!((next.epoch, next.primary), (Epoch(5), process(2, 1)));
    assert_eq!(next.isr, ids(&[1, 2, 3]), "it may be there again");
}

#[test]
fn a_restarted_primary_leads_again_only_in_a_new_epoch() {
    let alone = ShardRecord { isr: ids(&[1]), target: ids(&[1]), ..shard_at(0) };
    let mut bench = Bench::new(Settings::default(), 1);
    let single = Meta { shards: 0, replicas: 1, min_in_sync: 1, ..meta(1) };
    bench.etcd.meta = Some(kept(single, 1));
    bench.etcd.shards = vec![kept(alone, WRITTEN)];
    bench.on(Event::Elected { term: TERM });
    bench.pass(400);
    bench.take();
    bench.boot(1, 2);
    bench.send_changes_of(1);
    bench.pass(100);
    bench.gathered(&[end(1, 0, (4, 30))]);
    let next = bench.accept();
    assert_eq!((next.epoch, next.primary), (Epoch(5), process(1, 2)));
}

#[test]
fn at_the_floor_the_dead_stay_members() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    bench.gathered(&[end(2, 0, (4, 20))]);
    let next = bench.accept();
    assert_eq!((next.primary, next.isr), (process(2, 1), ids(&[1, 2])));
}

#[test]
fn outside_the_in_sync_set_no_store_is_asked() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    assert_eq!(gather(&bench), [(2, vec![ShardId(0)])]);
    bench.kill(2);
    bench.gathered(&[]);
    let is_logged =
        |bench: &Bench| bench.logged(|decision| matches!(decision, Decision::Leaderless { .. }));
    // An ordinary failover is not worth a warning.
    bench.pass(900);
    assert_eq!(is_logged(&bench), 0);
    bench.pass(300);
    assert_eq!(is_logged(&bench), 1);
    assert_eq!(bench.proposed(), []);
}

#[test]
fn a_tainted_member_is_never_promoted() {
    let record =
        ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), tainted: ids(&[2]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    bench.gathered(&[end(2, 0, (4, 20))]);
    bench.pass(200_000);
    assert_eq!(bench.proposed(), []);
}

/// The incident: 1 and 2 are in sync, 2 restarts and its scan finds damage, and the machine of 1
/// takes five minutes to reboot. After a minute the damaged copy was promoted, 1 came back with
/// everything that had been acknowledged, contradicted the new primary, and was overwritten.
#[test]
fn a_damaged_copy_waits_for_a_better_one_however_long_it_takes() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    bench.gathered(&[unfit(end(2, 0, (4, 20)))]);
    bench.pass(3_600_000);
    assert_eq!(bench.proposed(), []);
    bench.boot(1, 2);
    bench.send_changes_of(1);
    bench.gathered(&[end(1, 0, (4, 25)), unfit(end(2, 0, (4, 20)))]);
    bench.pass(200);
    assert_eq!(bench.accept().primary, process(1, 2));
}

/// The same for a copy without damage on a disk that is suspect.
#[test]
fn a_copy_on_a_suspect_store_waits_for_a_better_one_however_long_it_takes() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    bench.set_status(2, StoreStatus::Suspect);
    bench.gathered(&[end(2, 0, (4, 20))]);
    bench.pass(3_600_000);
    assert_eq!(bench.proposed(), []);
}

/// The other member's store is given up: the remaining copy is the best there will ever be, and the
/// possible loss stays on record.
#[test]
fn a_damaged_copy_leads_once_every_better_one_is_gone_for_good() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    bench.gathered(&[unfit(end(2, 0, (4, 20)))]);
    bench.pass(1_000);
    bench.set_status(1, StoreStatus::Retired);
    bench.pass(200);
    let (next, loss) = bench.accepted().pop().expect("it leads");
    assert_eq!((next.primary, loss.accepted_by), (process(2, 1), None));
    assert_eq!(loss.given_up, [(id(1), Some(Seq(0)))]);
}

/// The incident: the whole cluster was without power for longer than a restarted survivor is made
/// to wait, while a coordinator led. The first node that answered was promoted at once; the next
/// one was ten seconds behind it.
#[test]
fn a_survivor_waits_from_its_own_answer_on() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = Bench::leading(3, vec![record]);
    for store in [1, 2, 3] {
        bench.kill(store);
        bench.lease_ends(store);
    }
    bench.pass(300_000);
    bench.boot(2, 2);
    bench.send_changes_of(2);
    bench.gathered(&[end(2, 0, (4, 20))]);
    bench.pass(59_000);
    assert_eq!(bench.proposed(), []);
    bench.pass(2_000);
    assert_eq!(bench.accept().primary, process(2, 2));
}

/// The state of the copy could not be read and its log does not reach back to the first entry:
/// promoted, it would count from 0.
#[test]
fn a_copy_that_lost_everything_is_never_promoted() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    bench.gathered(&[unfit(end(2, 0, (0, 0)))]);
    bench.pass(200_000);
    assert_eq!(bench.proposed(), []);
}

/// There is nothing to wait for. The possible loss stays on record.
#[test]
fn when_all_have_answered_the_best_damaged_copy_is_taken_at_once() {
    let record = ShardRecord {
        isr: ids(&[2, 3]),
        learners: ids(&[1]),
        primary: process(2, 1),
        ..shard_at(0)
    };
    let mut bench = Bench::leading(3, vec![record]);
    bench.boot(2, 2);
    bench.send_changes_of(2);
    bench.gathered(&[unfit(end(2, 0, (4, 20))), unfit(end(3, 0, (4, 25)))]);
    bench.pass(200);
    let (next, loss) = bench.accepted().pop().expect("the best leads");
    assert_eq!((next.primary, next.tainted), (process(3, 1), ids(&[2])));
    assert_eq!((loss.last, loss.accepted_by), ((Epoch(4), Seq(25)), None));
    assert_eq!(loss.given_up, [(id(2), Some(Seq(20)))]);
}

#[test]
fn a_suspect_store_is_promoted_only_after_all_others() {
    let mut bench = without_primary(vec![shard_at(0)]);
    bench.set_status(2, StoreStatus::Suspect);
    bench.gathered(&[end(2, 0, (4, 30)), end(3, 0, (4, 20))]);
    assert_eq!(bench.accept().primary, process(3, 1));
}

#[test]
fn a_member_whose_disk_is_full_is_promoted_after_those_that_take_writes() {
    let mut bench = without_primary(vec![shard_at(0)]);
    bench.report(3, HealthReport { full: true, silent: ids(&[1]), ..HealthReport::default() });
    bench.gathered(&[end(2, 0, (4, 20)), end(3, 0, (4, 21))]);
    assert_eq!(bench.accept().primary, process(2, 1));
}

/// The copy of a full store is whole: it serves reads at least.
#[test]
fn a_member_whose_disk_is_full_is_promoted_before_a_copy_that_may_be_wrong() {
    let mut bench = without_primary(vec![shard_at(0)]);
    bench.set_status(2, StoreStatus::Suspect);
    bench.report(3, HealthReport { full: true, silent: ids(&[1]), ..HealthReport::default() });
    bench.gathered(&[end(2, 0, (4, 30)), end(3, 0, (4, 21))]);
    assert_eq!(bench.accept().primary, process(3, 1));
}

/// Found by the simulator, with disks that rot: the good member was alive and answered a few
/// milliseconds late, so the damaged one was promoted, and entries that only the good one held were
/// lost.
#[test]
fn a_damaged_copy_is_not_promoted_over_a_member_that_is_slow_to_answer() {
    let mut bench = without_primary(vec![ShardRecord { tainted: ids(&[1]), ..shard_at(0) }]);
    let gathers = bench.take();
    let asked = |effect: &Effect| match effect {
        Effect::Gather { gather, to, .. } if to.store == id(2) => Some(*gather),
        _ => None,
    };
    let gather = gathers.iter().find_map(asked).expect("both are asked");
    let ends = Some(vec![unfit(end(2, 0, (4, 10))).1]);
    bench.on(Event::Gathered { gather, store: id(2), ends });
    bench.pass(50);
    assert_eq!(bench.proposed(), [], "its time is over, and it waits all the same");
    bench.gathered(&[unfit(end(2, 0, (4, 10))), end(3, 0, (4, 20))]);
    bench.pass(200);
    assert_eq!(bench.accept().primary, process(3, 1));
}

/// All nodes lost power; one of two in-sync members is back.
#[test]
fn a_restarted_lone_survivor_waits_for_another_member() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = Bench::leading(3, vec![record]);
    bench.kill(1);
    bench.boot(2, 2);
    bench.send_changes_of(2);
    bench.gathered(&[end(2, 0, (4, 20))]);
    bench.pass(5_000);
    assert_eq!(bench.proposed(), []);
    bench.boot(1, 2);
    bench.send_changes_of(1);
    bench.pass(200);
    bench.gathered(&[end(1, 0, (4, 19)), end(2, 0, (4, 20))]);
    assert_eq!(bench.accept().primary, process(2, 2));
}

impl Bench {
    /// An operator accepts a loss, decided on this version of shard 0's record.
    fn accept_loss(&mut self, store: u128, version: u64) {
        let revision = self.revision();
        let intent = PromoteIntent {
            store: id(store),
            version: Version(version),
            from: Operator { at: TimeMs(1), name: "me".into() },
        };
        let change = RecordChange::Promote(ShardId(0), Some(kept(intent, revision)));
        self.on(Event::Changed { revision, change });
    }

    fn accepted(&mut self) -> Vec<(ShardRecord, LossRecord)> {
        let accepted = |effect| match effect {
            Effect::Propose { writes: Writes::AcceptedLoss(accepted), .. } => {
                Some((accepted.record, accepted.loss))
            }
            _ => None,
        };
        self.take().into_iter().filter_map(accepted).collect()
    }
}

#[test]
fn an_operator_may_accept_that_something_is_lost() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    let (store, unfit) = unfit(end(2, 0, (4, 20)));
    bench.gathered(&[(store, ShardEnd { applied: Seq(18), ..unfit })]);
    bench.pass(1_000);
    // The intent is for an older version of the record: it was decided on another state.
    bench.accept_loss(2, 8);
    bench.pass(1_000);
    assert_eq!(bench.accepted(), []);
    bench.accept_loss(2, 9);
    bench.pass(200);
    let accepted = bench.accepted();
    let [(next, loss)] = &accepted[..] else { panic!("{accepted:?}") };
    assert_eq!((next.epoch, next.primary), (Epoch(5), process(2, 1)));
    assert_eq!((&next.isr, &next.tainted), (&ids(&[1, 2]), &ids(&[1])));
    assert_eq!((loss.last, &loss.given_up), ((Epoch(4), Seq(20)), &vec![(id(1), Some(Seq(18)))]));
    assert_eq!(loss.accepted_by, Some(Operator { at: TimeMs(1), name: "me".into() }));
}

#[test]
fn an_operators_intent_is_not_used_where_a_copy_may_lead_by_itself() {
    let mut bench = without_primary(vec![shard_at(0)]);
    bench.accept_loss(2, 9);
    bench.gathered(&[unfit(end(2, 0, (4, 20))), end(3, 0, (4, 21))]);
    assert_eq!(bench.accept().primary, process(3, 1));
    assert_eq!(bench.accepted(), []);
}

/// All disks are lost, and a store without a copy is to begin again; and a learner that holds a
/// part.
#[test]
fn an_operator_may_name_a_store_outside_the_in_sync_set() {
    for (ends, last) in [
        (end(3, 0, (2, 7)), (Epoch(2), Seq(7))),
        // The intent is for another shard.
        (end(3, 1, (2, 7)), (Epoch(0), Seq(0))),
    ] {
        let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
        let mut bench = without_primary(vec![record]);
        bench.kill(2);
        bench.report(3, silent(&[1, 2]));
        bench.pass(1_000);
        bench.accept_loss(3, 9);
        bench.gathered(&[ends]);
        bench.pass(200);
        let accepted = bench.accepted();
        let (next, loss) = accepted.first().expect("it is obeyed");
        assert_eq!((next.primary, &next.isr, loss.last), (process(3, 1), &ids(&[2, 3]), last));
    }
}

#[test]
fn a_lone_survivor_that_was_not_restarted_is_promoted_at_once() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = without_primary(vec![record]);
    bench.gathered(&[end(2, 0, (4, 20))]);
    assert_eq!(bench.accept().primary, process(2, 1));
}

#[test]
fn a_primary_that_resigns_is_replaced_and_not_too_often() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    let resigned = HealthReport { resigned: vec![ShardId(0)], ..HealthReport::default() };
    bench.report(1, resigned.clone());
    assert_eq!(gather(&bench).len(), 3);
    bench.gathered(&[end(1, 0, (4, 30)), end(2, 0, (4, 20)), end(3, 0, (4, 20))]);
    let next = bench.accept();
    assert_eq!((next.primary, next.isr), (process(2, 1), ids(&[2, 3])));
    bench.pass(100);
    assert_eq!(bench.accept().learners, ids(&[1]), "it answers, after all");
    bench.take();
    bench.report(2, resigned);
    bench.pass(800);
    assert_eq!(bench.proposed(), [], "the shard was moved just now");
    bench.pass(300);
    assert_eq!(bench.accept().primary, process(3, 1));
}

#[test]
fn a_frozen_primary_that_reaches_no_peer_is_replaced_by_one_that_does() {
    let record = ShardRecord { isr: ids(&[1, 2]), learners: ids(&[3]), ..shard_at(0) };
    let mut bench = Bench::leading(3, vec![record]);
    let cut_off = HealthReport {
        silent: ids(&[2, 3]),
        frozen: vec![(ShardId(0), vec![(StoreId(2), ReplicaHealth::Silent)])],
        ..HealthReport::default()
    };
    for _ in 0..2 {
        bench.report(1, cut_off.clone());
        bench.report(2, silent(&[1]));
        bench.pass(950);
    }
    assert_eq!(gather(&bench), []);
    bench.report(1, cut_off);
    bench.pass(100);
    bench.gathered(&[end(1, 0, (4, 30)), end(2, 0, (4, 20))]);
    let next = bench.accept();
    assert_eq!((next.primary, next.isr), (process(2, 1), ids(&[1, 2])));
}

// ---- proposals that fail, or have an unknown outcome -------------------------------------------

/// Three shards are proposed in one transaction.
fn three_proposed() -> (Bench, u64) {
    let mut bench = without_primary(vec![shard_at(0), shard_at(1), shard_at(2)]);
    bench.gathered(&all_ends());
    let proposal = bench.proposed()[0].0;
    bench.take();
    bench.ends.clear();
    (bench, proposal)
}

fn all_ends() -> Vec<(StoreId, ShardEnd)> {
    (0..3).flat_map(|at| [end(2, at, (4, 9)), end(3, at, (4, 9))]).collect()
}

#[test]
fn after_a_failed_compare_the_one_that_moved_goes_singly() {
    let (mut bench, proposal) = three_proposed();
    let moved = ShardRecord { version: Version(10), isr: ids(&[1, 2]), ..shard_at(1) };
    bench.etcd.shards[1] = kept(moved, 201);
    bench.etcd_is_slow = true;
    bench.on(Event::Proposed { proposal, outcome: CasOutcome::Failed });
    bench.pass(50);
    assert_eq!((bench.take(), bench.lists.len()), (vec![], 1), "it reads before it tries again");
    bench.etcd_is_slow = false;
    bench.answer_lists();
    bench.gathered(&all_ends());
    let again: Vec<Vec<(u64, u16)>> = bench
        .proposed()
        .iter()
        .map(|(_, shards)| shards.iter().map(|(at, record)| (*at, record.slots.lo)).collect())
        .collect();
    assert_eq!(again, [vec![(201, 1)], vec![(WRITTEN, 0), (WRITTEN, 2)]]);
}

#[test]
fn an_unknown_outcome_is_settled_by_reading() {
    let (mut bench, proposal) = three_proposed();
    for kept in &mut bench.etcd.shards {
        kept.value.epoch = Epoch(5);
        kept.value.primary = process(2, 1);
        kept.modified = 202;
    }
    bench.on(Event::Proposed { proposal, outcome: CasOutcome::Unknown });
    bench.pass(2_000);
    assert_eq!(gather(&bench), [], "it had taken effect");
}

#[test]
fn a_list_that_began_before_settles_nothing() {
    let (mut bench, proposal) = three_proposed();
    bench.etcd_is_slow = true;
    bench.on(Event::WatchBroke);
    bench.on(Event::Proposed { proposal, outcome: CasOutcome::Unknown });
    assert_eq!(bench.lists.len(), 1);
    let list = bench.lists.remove(0);
    bench.on(Event::Listed { list, listing: Some(bench.etcd.clone()) });
    assert_eq!((gather(&bench), bench.lists.len()), (vec![], 1), "it reads once more");
    bench.etcd_is_slow = false;
    bench.answer_lists();
    assert_eq!(gather(&bench).len(), 2);
}

#[test]
fn a_failure_without_a_reason_makes_it_pause() {
    let (mut bench, proposal) = three_proposed();
    bench.on(Event::Proposed { proposal, outcome: CasOutcome::Failed });
    bench.pass(190);
    assert_eq!(gather(&bench), []);
    bench.pass(110);
    assert_eq!(gather(&bench).len(), 2);
}

// ---- upkeep ------------------------------------------------------------------------------------

#[test]
fn dead_followers_leave_above_the_floor_only() {
    let at_floor = ShardRecord { isr: ids(&[1, 3]), learners: ids(&[2]), ..shard_at(1) };
    let mut bench = Bench::leading(3, vec![shard_at(0), at_floor]);
    bench.kill(3);
    bench.report(2, silent(&[3]));
    let next = bench.accept();
    assert_eq!((next.slots.lo, next.version, next.epoch), (0, Version(10), Epoch(4)));
    assert_eq!(next.isr, ids(&[1, 2]));
    bench.pass(200);
    assert_eq!(bench.proposed(), [], "a learner is there that will be swapped in");
}

#[test]
fn a_member_that_is_back_becomes_a_learner() {
    let record = ShardRecord { isr: ids(&[1, 2]), ..shard_at(0) };
    let mut bench = Bench::new(Settings::default(), 3);
    bench.etcd.meta = Some(kept(Meta { shards: 0, ..meta(1) }, 1));
    bench.etcd.shards = vec![kept(record.clone(), 50)];
    bench.on(Event::Elected { term: TERM });
    bench.pass(400);
    let want = ShardRecord { version: Version(10), learners: ids(&[3]), ..record };
    assert_eq!(bench.accept(), want);
}

#[test]
fn a_lost_replica_is_made_elsewhere_after_the_delay() {
    let mut bench = Bench::leading(5, vec![shard_at(0)]);
    bench.kill(3);
    bench.report(2, silent(&[3]));
    bench.accept();
    bench.pass(598_000);
    assert_eq!(bench.proposed(), []);
    bench.pass(3_000);
    let next = bench.accept();
    assert_eq!((next.learners, next.target), (ids(&[4]), ids(&[1, 2, 4])));
}

#[test]
fn a_store_under_the_name_of_a_dead_one_takes_its_places() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.kill(3);
    bench.report(2, silent(&[3]));
    bench.accept();
    bench.boot(9, 1);
    bench.name(9, "node-3");
    bench.send_changes_of(9);
    let writes = bench.take();
    let lost = |effect: &&Effect| match effect {
        Effect::Propose { writes: Writes::Store { store, record, .. }, .. } => {
            *store == id(3) && record.status == StoreStatus::Lost
        }
        _ => false,
    };
    assert!(writes.iter().any(|effect| lost(&effect)), "{writes:?}");
    bench.set_status(3, StoreStatus::Lost);
    bench.pass(200);
    let next = bench.accept();
    assert_eq!((next.learners, next.target), (ids(&[9]), ids(&[1, 2, 9])));
}

fn gives_up(effects: &[Effect], wanted: u128) -> bool {
    effects.iter().any(|effect| match effect {
        Effect::Propose { writes: Writes::Store { store, record, .. }, .. } => {
            *store == id(wanted) && record.status.is_gone()
        }
        _ => false,
    })
}

/// The incident: all data volumes were unmounted at one boot. Empty stores took the names, the
/// stores with the data were given up at once, and nothing could ever lead.
#[test]
fn a_store_that_a_shard_needs_is_not_given_up_for_one_of_its_name() {
    let record = ShardRecord { isr: ids(&[1, 2]), target: ids(&[1, 2]), ..shard_at(0) };
    let mut bench = Bench::leading(2, vec![record]);
    for store in [1, 2] {
        bench.kill(store);
        bench.lease_ends(store);
    }
    for (store, name) in [(8, "node-1"), (9, "node-2")] {
        bench.boot(store, 1);
        bench.name(store, name);
        bench.send_changes_of(store);
    }
    bench.pass(10_000);
    let effects = bench.take();
    assert!(!gives_up(&effects, 1) && !gives_up(&effects, 2), "{effects:?}");
    // The disks are back, and the empty stores are gone: they had nothing.
    for (store, empty) in [(1, 8), (2, 9)] {
        bench.kill(empty);
        bench.lease_ends(empty);
        bench.boot(store, 2);
        bench.send_changes_of(store);
    }
    bench.pass(200);
    bench.gathered(&[end(1, 0, (4, 20)), end(2, 0, (4, 20))]);
    bench.pass(400);
    let effects = bench.take();
    assert!(gives_up(&effects, 8) && gives_up(&effects, 9), "{effects:?}");
    assert!(!gives_up(&effects, 1) && !gives_up(&effects, 2), "{effects:?}");
}

/// The other copy of a shard leads it and sends this report; the store that is away is given up for
/// one of its name.
fn is_given_up_beside(reports: &HealthReport) -> bool {
    let record = ShardRecord { isr: ids(&[1, 2]), target: ids(&[1, 2]), ..shard_at(0) };
    let mut bench = Bench::leading(2, vec![record]);
    bench.report(1, reports.clone());
    bench.kill(2);
    bench.lease_ends(2);
    bench.boot(9, 1);
    bench.name(9, "node-2");
    bench.send_changes_of(9);
    for _ in 0..20 {
        bench.report(1, reports.clone());
        bench.pass(500);
    }
    gives_up(&bench.take(), 2)
}

/// A primary that stopped its copy as wrong does not count as good: the member that is away has the
/// only good copy. No seed of the simulator shows it, since the simulator harms no disk while
/// another one is away.
#[test]
fn a_store_is_not_given_up_while_the_other_copy_is_known_to_be_wrong() {
    let resigned = HealthReport { resigned: vec![ShardId(0)], ..HealthReport::default() };
    assert!(!is_given_up_beside(&resigned));
    assert!(is_given_up_beside(&HealthReport::default()));
}

/// The incident, found by the simulator: a start sent its claim and died, its disk was replaced,
/// and the store in its place served. That store was being restarted when the claim took effect at
/// last: the claimed record was the newer one of that name, and the store with the data was given
/// up for one that had never run.
#[test]
fn a_store_that_does_not_run_takes_no_place() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.kill(3);
    bench.report(2, silent(&[3]));
    bench.accept();
    let record = bench.etcd.stores[2].clone().1;
    bench.etcd.stores.push((id(9), record));
    bench.name(9, "node-3");
    bench.on(Event::WatchBroke);
    bench.pass(5_000);
    assert!(!bench.take().iter().any(writes_a_store));
}

#[test]
fn a_name_of_a_living_store_is_its_own() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.boot(9, 1);
    bench.name(9, "node-3");
    bench.send_changes_of(9);
    bench.pass(5_000);
    assert!(!bench.take().iter().any(writes_a_store));
}

/// The order in which stores were created decides nothing: a node that is started under another
/// name takes that of a younger one.
#[test]
fn a_store_that_is_renamed_takes_the_places_of_a_younger_one() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.kill(3);
    bench.report(2, silent(&[3]));
    bench.accept();
    bench.name(2, "node-3");
    bench.send_changes_of(2);
    bench.pass(200);
    assert!(gives_up(&bench.take(), 3));
}

/// A name's record has no effect if its store has another name by now.
#[test]
fn a_name_that_its_store_no_longer_has_means_nothing() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.kill(3);
    bench.report(2, silent(&[3]));
    bench.accept();
    bench.name(2, "node-3");
    bench.name(2, "node-4");
    bench.send_changes_of(2);
    bench.pass(5_000);
    assert!(!bench.take().iter().any(writes_a_store));
}

fn clears(effect: &Effect, wanted: u128) -> bool {
    match effect {
        Effect::Propose { writes: Writes::Store { store, record, .. }, .. } => {
            *store == id(wanted) && record.status == StoreStatus::Active
        }
        _ => false,
    }
}

/// With as many nodes as `min_in_sync` the copies of a suspect store can't be taken away. They are
/// refilled in place; without this rule the store stayed suspect for ever, and was never promoted
/// again.
#[test]
fn a_suspect_store_at_the_floor_is_cleared_when_its_copies_are_new() {
    let record = ShardRecord { isr: ids(&[1, 2]), target: ids(&[1, 2]), ..shard_at(0) };
    let mut bench = Bench::leading(2, vec![record]);
    bench.set_status(2, StoreStatus::Suspect);
    bench.pass(1_200);
    bench.gathered(&[unfit(end(2, 0, (4, 9)))]);
    bench.ends.clear();
    assert!(!bench.take().iter().any(|effect| clears(effect, 2)));
    bench.pass(1_000);
    bench.gathered(&[end(2, 0, (4, 9))]);
    assert!(bench.take().iter().any(|effect| clears(effect, 2)));
}

#[test]
fn a_suspect_store_is_cleared_when_it_holds_nothing_any_more() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.set_status(3, StoreStatus::Suspect);
    bench.pass(200);
    let next = bench.accept();
    assert_eq!((next.isr, next.target), (ids(&[1, 2]), ids(&[1, 2])));
    bench.take();
    bench.pass(1_000);
    // The store has not deleted its copy yet.
    assert_eq!(gather(&bench), [(3, vec![ShardId(0)])]);
    bench.gathered(&[unfit(end(3, 0, (4, 9)))]);
    bench.ends.clear();
    bench.pass(1_000);
    bench.gathered(&[]);
    assert!(bench.take().iter().any(|effect| clears(effect, 3)));
    bench.set_status(3, StoreStatus::Active);
    bench.pass(200);
    assert_eq!(bench.accept().learners, ids(&[3]));
}

#[test]
fn a_draining_primary_steps_down_before_another_is_named() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    bench.drain(1);
    assert_eq!(bench.accept_status(), (id(1), StoreStatus::Draining));
    bench.pass(100);
    let draining = Effect::Decision(Decision::Draining(id(1)));
    let step_down = Effect::StepDown { to: process(1, 1), shard: ShardId(0), epoch: Epoch(4) };
    assert_eq!(bench.take(), [draining, step_down]);
    let end_of_log = Some((Epoch(4), Seq(30)));
    bench.on(Event::SteppedDown { shard: ShardId(0), epoch: Epoch(4), end: end_of_log });
    bench.gathered(&[end(1, 0, (4, 30)), end(2, 0, (4, 29)), end(3, 0, (4, 30))]);
    let next = bench.accept();
    assert_eq!((next.primary, next.isr), (process(2, 1), ids(&[1, 2, 3])));
    bench.undrain(1);
    assert_eq!(bench.accept_status(), (id(1), StoreStatus::Active));
}

#[test]
fn a_full_primary_steps_down_for_a_member_that_has_room() {
    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    let full = || HealthReport { full: true, ..HealthReport::default() };
    (1..=2).for_each(|store| bench.report(store, full()));
    bench.pass(2_000);
    let step_down = Effect::StepDown { to: process(1, 1), shard: ShardId(0), epoch: Epoch(4) };
    assert!(!bench.take().contains(&step_down), "one alone can't take writes");
    bench.report(2, HealthReport::default());
    bench.report(1, full());
    bench.pass(100);
    assert!(bench.take().contains(&step_down));
    let end_of_log = Some((Epoch(4), Seq(30)));
    bench.on(Event::SteppedDown { shard: ShardId(0), epoch: Epoch(4), end: end_of_log });
    bench.gathered(&[end(1, 0, (4, 30)), end(2, 0, (4, 30)), end(3, 0, (4, 30))]);
    assert_eq!(bench.accept().primary, process(2, 1));
}

/// An announced shutdown costs no detection time.
#[test]
fn a_process_that_leaves_is_replaced_at_once_and_comes_back_as_another() {
    let follows = ShardRecord { primary: process(2, 1), ..shard_at(1) };
    let mut bench = Bench::leading(3, vec![shard_at(0), follows]);
    bench.report(1, HealthReport { leaving: true, ..HealthReport::default() });
    bench.gathered(&[end(2, 0, (4, 9)), end(3, 0, (4, 9))]);
    let mut shards: Vec<ShardRecord> = Vec::new();
    for (proposal, written) in bench.proposed() {
        let mod_revision = bench.revision();
        shards.extend(written.into_iter().map(|(_, record)| record));
        bench.on(Event::Proposed { proposal, outcome: CasOutcome::Done { mod_revision } });
    }
    shards.sort_by_key(ShardRecord::shard);
    let [led, followed] = &shards[..] else { panic!("{shards:#?}") };
    assert_eq!((led.epoch, led.primary, &led.isr), (Epoch(5), process(3, 1), &ids(&[2, 3])));
    assert_eq!((followed.epoch, &followed.isr), (Epoch(4), &ids(&[2, 3])));
    assert_eq!(
        bench.logged(|decision| matches!(decision, Decision::Died { why: Cause::Leaving, .. })),
        1
    );

    let revision = bench.etcd.revision;
    bench.etcd.shards = shards.into_iter().map(|record| kept(record, revision)).collect();
    bench.take();
    // The process answers probes until it has ended, which does not bring it back.
    bench.pass(2_000);
    assert_eq!(bench.proposed(), []);
    bench.boot(1, 2);
    bench.send_changes_of(1);
    bench.pass(400);
    let recruits = |(_, shards): &(u64, Vec<(u64, ShardRecord)>)| {
        shards.iter().any(|(_, record)| record.learners == ids(&[1]))
    };
    assert!(bench.proposed().iter().any(recruits), "{:#?}", bench.take());
}

#[test]
fn a_mass_failure_holds_back_new_copies_but_no_promotions() {
    let settings = Settings { rebuild_delay_ms: 1_000, ..Settings::default() };
    let record = ShardRecord { primary: process(3, 1), ..shard_at(0) };
    let other = ShardRecord { isr: ids(&[3, 4, 5]), target: ids(&[3, 4, 5]), ..record.clone() };
    let other = ShardRecord { slots: Slots { lo: 1, hi: 1 }, ..other };
    let mut bench = Bench::leading_with(settings, 5, vec![record, other]);
    bench.kill(1);
    bench.kill(4);
    bench.pass(400);
    assert_eq!(bench.logged(|decision| *decision == Decision::Guarded { away: 2, of: 5 }), 1);
    let proposed = bench.proposed();
    assert_eq!(proposed.len(), 2, "each leaves as it is found dead");
    bench.take();
    for (proposal, _) in proposed {
        bench.on(Event::Proposed { proposal, outcome: CasOutcome::Done { mod_revision: 300 } });
    }
    bench.pass(60_000);
    assert_eq!(bench.proposed(), []);
    bench.kill(3);
    bench.pass(300);
    assert_eq!(gather(&bench).len(), 2);
}

// ---- removing a store --------------------------------------------------------------------------

/// Stops node 4 of four, the process and its lease.
fn without_node_4(shards: Vec<ShardRecord>) -> Bench {
    let mut bench = Bench::leading(4, shards);
    bench.kill(4);
    bench.lease_ends(4);
    bench.pass(300);
    bench.take();
    bench
}

#[test]
fn a_stopped_store_that_holds_nothing_is_removed_with_its_drain() {
    let mut bench = without_node_4(vec![shard_at(0)]);
    bench.remove(4, 1);
    assert_eq!(bench.removals(), [(id(4), StoreStatus::Retired, false)]);

    let mut bench = Bench::leading(4, vec![shard_at(0)]);
    bench.drain(4);
    assert_eq!(bench.accept_status(), (id(4), StoreStatus::Draining));
    bench.remove(4, 1);
    bench.pass(1_000);
    assert_eq!(bench.removals(), [], "it runs");
    bench.kill(4);
    bench.lease_ends(4);
    bench.pass(300);
    assert_eq!(bench.removals(), [(id(4), StoreStatus::Retired, true)]);
}

#[test]
fn an_intent_to_remove_a_former_boot_has_no_effect() {
    let mut bench = without_node_4(vec![shard_at(0)]);
    bench.boot(4, 2);
    bench.send_changes_of(4);
    bench.pass(300);
    bench.kill(4);
    bench.lease_ends(4);
    bench.pass(300);
    bench.take();
    bench.remove(4, 1);
    bench.pass(1_000);
    assert_eq!(bench.removals(), []);
}

#[test]
fn a_store_that_holds_copies_is_not_removed() {
    let held = ShardRecord { isr: ids(&[1, 2, 4]), target: ids(&[1, 2, 4]), ..shard_at(0) };
    let mut bench = Bench::leading(4, vec![held]);
    bench.kill(4);
    bench.lease_ends(4);
    bench.remove(4, 1);
    bench.pass(5_000);
    assert_eq!(bench.removals(), []);
}

// ---- a pause of moves for balance --------------------------------------------------------------

#[test]
fn a_pause_in_etcd_holds_back_moves_for_balance() {
    let mut bench = Bench::leading(3, (0..4).map(shard_at).collect());
    let from = Operator { at: TimeMs(1), name: "me@here".into() };
    let revision = bench.revision();
    bench.etcd.pause = Some(kept(PauseIntent { from }, revision));
    let change = RecordChange::Pause(bench.etcd.pause.clone());
    bench.on(Event::Changed { revision, change });
    bench.boot(4, 1);
    bench.send_changes_of(4);
    bench.pass(10_000);
    assert_eq!(bench.logged(|decision| *decision == Decision::Paused(true)), 1);
    assert_eq!(bench.proposed(), [], "the new node gets nothing");
    let step_down = |effect: &Effect| matches!(effect, Effect::StepDown { .. });
    assert!(!bench.take().iter().any(step_down), "one node leads all shards, and goes on");

    let revision = bench.revision();
    bench.etcd.pause = None;
    bench.on(Event::Changed { revision, change: RecordChange::Pause(None) });
    bench.pass(200);
    assert_eq!(bench.logged(|decision| *decision == Decision::Paused(false)), 1);
    assert_ne!(bench.proposed(), []);
}

// ---- what an operator may ask ------------------------------------------------------------------

#[test]
fn a_leader_shows_its_plan_and_whether_it_moves_on() {
    use planner::{MoveReason, MoveState};
    let mut standby = Coordinator::new(Settings::default());
    assert!(standby.plan_view().is_none() && standby.moves().is_none());

    let mut bench = Bench::leading(3, vec![shard_at(0)]);
    let view = bench.coordinator.plan_view().expect("it leads");
    assert_eq!(view.forecast(10), planner::PlanForecast::default());
    assert_eq!(bench.coordinator.moves().map(|moves| moves.wanted), Some(0));
    let what_if = view.drained(id(2)).forecast(10).moves;
    let [one] = &what_if[..] else { panic!("{what_if:?}") };
    let want = (MoveState::Impossible, Some(MoveReason::NoTarget));
    assert_eq!((one.from, (one.state, one.reason)), (Some(id(2)), want));

    bench.drain(2);
    assert_eq!(bench.accept_status(), (id(2), StoreStatus::Draining));
    bench.pass(50_000);
    let moves = bench.coordinator.moves().expect("it leads");
    assert_eq!((moves.wanted, moves.stalled), (1, false));
    bench.pass(20_000);
    assert!(bench.coordinator.moves().expect("it leads").stalled);
}
