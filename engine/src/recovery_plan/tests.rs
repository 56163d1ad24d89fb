//! What the plan decides, answer by answer; and a model of a shard whose etcd is lost at any
//! moment.

use super::*;
use crate::batcher::shard_map::ranges;
use crate::etcd_memory::EtcdMemory;
use crate::etcd_memory::tests::memory;
use crate::ids::{Seq, Slots, TimeMs};
use crate::message::ShardKnowledge;
use crate::store::testing::SplitMix64;

const A: StoreId = StoreId(1);
const B: StoreId = StoreId(2);
const C: StoreId = StoreId(3);

/// The four shards of the cluster of [`memory`].
fn shards() -> impl Iterator<Item = ShardId> {
    ranges(4).map(|slots| slots.shard())
}

fn record(shard: ShardId, epoch: u64, version: u64, isr: &[StoreId]) -> ShardRecord {
    ShardRecord {
        slots: ranges(4).find(|slots| slots.shard() == shard).expect("one of the four"),
        epoch: Epoch(epoch),
        version: Version(version),
        primary: StoreBoot { store: isr[0], boot: Boot(3) },
        isr: isr.to_vec(),
        target: isr.to_vec(),
        ..ShardRecord::default()
    }
}

/// The answer of a store that knows all shards by a record of this epoch and version.
fn answer(store: StoreId, epoch: u64, version: u64, isr: &[StoreId]) -> StoreKnowledge {
    let known = |shard| ShardKnowledge {
        shard,
        promised: Epoch(epoch),
        record: Some(record(shard, epoch, version, isr)),
        copy: Some(CopyEnd { last: (Epoch(epoch), Seq(version)), unfit: false, damaged: false }),
    };
    StoreKnowledge {
        from: StoreBoot { store, boot: Boot(3) },
        etcd: Some(Box::new(EtcdMemory { promised: 2, ..memory(store.0 as u8, 1) })),
        durable: true,
        damaged: false,
        shards: shards().map(known).collect(),
    }
}

fn terms(promised: bool, without: &[StoreId], planted: Option<Planted>) -> RecoveryTerms {
    let from = Operator { at: TimeMs(5), name: "ann@host".into() };
    let without = without.iter().copied().collect();
    RecoveryTerms { incarnation: 2, promised, without, from, unused_epochs: 0, planted }
}

/// The plan once all stores have promised.
fn planned(answers: &[StoreKnowledge]) -> Result<RecoveredRecords, Vec<RecoveryRefusal>> {
    plan(answers, &terms(true, &[], None))
}

#[track_caller]
fn check_refused(answers: &[StoreKnowledge], want: &[RecoveryRefusal]) {
    assert_eq!(planned(answers), Err(want.to_vec()));
}

#[test]
fn the_newest_record_continues_above_every_promise_and_under_no_process() {
    let mut newer = answer(B, 5, 9, &[B, C]);
    newer.shards[1].promised = Epoch(8);
    let answers = [answer(A, 5, 8, &[A, B]), newer, answer(C, 4, 20, &[A, B, C])];
    assert_eq!(next_incarnation(&answers), 3);
    let recovered = planned(&answers).unwrap();
    assert_eq!(recovered.meta.incarnation, 2);
    assert_eq!(recovered.stores.len(), 3);
    let shards: Vec<_> = recovered.shards.iter().map(ShardRecord::order).collect();
    let at = |epoch| (Epoch(epoch), Version(10));
    assert_eq!(shards, [at(6), at(9), at(6), at(6)]);
    for shard in &recovered.shards {
        assert_eq!((&shard.isr, &shard.target), (&vec![B, C], &vec![B, C]));
        assert_eq!(shard.primary, StoreBoot { store: B, boot: Boot(0) });
    }
}

#[test]
fn epochs_that_the_lost_etcd_may_have_given_stay_unused() {
    let answers = [answer(A, 5, 8, &[A, B]), answer(B, 5, 8, &[A, B])];
    let terms = RecoveryTerms { unused_epochs: UNUSED_EPOCHS, ..terms(true, &[], None) };
    let recovered = plan(&answers, &terms).unwrap();
    assert_eq!(recovered.shards[0].epoch, Epoch(1_000_006));
}

#[test]
fn a_shard_that_nobody_has_led_begins_again_in_its_first_epoch() {
    let mut answers = [answer(A, 1, 1, &[A, B]), answer(B, 1, 1, &[A, B])];
    for answer in &mut answers {
        answer.shards[0].promised = Epoch(0);
        answer.shards[0].copy = None;
    }
    let recovered = planned(&answers).unwrap();
    let epochs: Vec<_> = recovered.shards.iter().map(ShardRecord::order).collect();
    let at = |epoch| (Epoch(epoch), Version(2));
    assert_eq!(epochs, [at(1), at(2), at(2), at(2)]);
    assert_eq!(recovered.shards[0].primary.boot, Boot(0));
}

#[test]
fn who_may_know_something_newer_must_answer() {
    let missing = |store| RecoveryRefusal::MissingStore { store, first: ShardId(0), shards: 4 };
    check_refused(&[answer(A, 5, 8, &[A, B])], &[missing(B)]);
    let learning = |mut answer: StoreKnowledge| {
        let records = answer.shards.iter_mut().filter_map(|shard| shard.record.as_mut());
        records.for_each(|record| record.learners = vec![C]);
        answer
    };
    let answers = [learning(answer(A, 5, 8, &[A, B])), answer(B, 5, 7, &[A, B])];
    check_refused(&answers, &[missing(C)]);
    // A store that only an older record names is not needed.
    let answers = [learning(answer(A, 5, 8, &[A, B])), answer(B, 5, 9, &[A, B])];
    assert!(planned(&answers).is_ok());
}

#[test]
fn answers_that_do_not_fit_together_are_refused() {
    use RecoveryRefusal::*;
    check_refused(&[], &[NoStores]);
    let [a, b] = [A, B].map(|store| answer(store, 5, 8, &[A, B]));
    check_refused(&[StoreKnowledge { etcd: None, ..a.clone() }], &[NoStores]);
    let with = |change: &dyn Fn(&mut EtcdMemory)| {
        let mut changed = b.clone();
        change(changed.etcd.as_mut().unwrap());
        [a.clone(), changed]
    };
    check_refused(&with(&|etcd| etcd.meta.cluster = 8), &[OtherCluster { store: B }]);
    check_refused(&with(&|etcd| etcd.meta.min_in_sync = 1), &[OtherCluster { store: B }]);
    check_refused(&with(&|etcd| etcd.promised = 1), &[NotPromised { store: B }]);
    let (name, stores) = ("node-1".to_owned(), [A, B]);
    check_refused(&with(&|etcd| etcd.store.name = "node-1".into()), &[SameName { name, stores }]);
    let answers = [a.clone(), StoreKnowledge { durable: false, ..b.clone() }];
    check_refused(&answers, &[NotPromised { store: B }]);
    assert!(plan(&answers, &terms(false, &[], None)).is_ok(), "the first look asks for no promise");
    check_refused(
        &[a.clone(), StoreKnowledge { damaged: true, ..b.clone() }],
        &[Damaged { store: B }],
    );
    check_refused(&[a.clone(), b.clone(), b.clone()], &[SameStore { store: B }]);
    let mut other = b.clone();
    other.shards[0].record.as_mut().unwrap().isr = vec![B];
    check_refused(&[a.clone(), other], &[TwoHistories { shard: ShardId(0) }]);
    let forgetful = |mut answer: StoreKnowledge| {
        answer.shards.truncate(2);
        answer
    };
    let unknown = UnknownShards { first: ShardId(32_768), shards: 2 };
    check_refused(&[forgetful(a), forgetful(b)], &[unknown]);
}

#[test]
fn a_suspect_store_stays_suspect_and_a_draining_one_is_asked_again() {
    let mut one = answer(A, 5, 8, &[A]);
    for (was, becomes) in
        [(StoreStatus::Suspect, StoreStatus::Suspect), (StoreStatus::Draining, StoreStatus::Active)]
    {
        one.etcd.as_mut().unwrap().store.status = was;
        let recovered = planned(&[one.clone()]).unwrap();
        assert_eq!(recovered.stores[0].1.status, becomes);
    }
}

#[test]
fn an_older_etcd_is_recognised_by_a_promise_or_a_record() {
    let listed: BTreeMap<_, _> =
        shards().map(|shard| (shard, record(shard, 5, 8, &[A, B]))).collect();
    let newer = |promised, own: Option<&ShardRecord>| {
        newer_than_etcd([(ShardId(0), Epoch(promised), own)].into_iter(), &listed).len()
    };
    assert_eq!(newer(5, None), 0);
    assert_eq!(newer(6, None), 1);
    assert_eq!(newer(5, Some(&record(ShardId(0), 5, 8, &[A, B]))), 0);
    assert_eq!(newer(5, Some(&record(ShardId(0), 5, 9, &[A, B]))), 1);
    assert_eq!(newer(4, Some(&record(ShardId(0), 4, 99, &[A, B]))), 0);
    let none = BTreeMap::new();
    let own = [(ShardId(0), Epoch(0), None), (ShardId(1), Epoch(1), None)].into_iter();
    assert_eq!(newer_than_etcd(own, &none), BTreeSet::from([ShardId(1)]));
}

// ---- a shard whose etcd is lost at any moment ---------------------------------------------------

/// A shard with four stores: what etcd had, what each store knows, and what was acknowledged.
///
/// Commits are modelled by their rule alone: an entry is acknowledged once it is on every member
/// that the primary counts, each of which had promised no higher epoch.
struct ShardModel {
    random: SplitMix64,
    /// All records that etcd ever had, the newest last.
    records: Vec<ShardRecord>,
    stores: BTreeMap<StoreId, StoreModel>,
    /// The entries that were acknowledged.
    acknowledged: BTreeSet<u64>,
    next_entry: u64,
    planted: Option<Planted>,
}

#[derive(Clone, Default)]
struct StoreModel {
    /// The newest record that it has seen, in memory.
    seen: Option<ShardRecord>,
    /// The newest record in its log.
    acted_on: Option<ShardRecord>,
    /// The record that it leads by.
    leads: Option<ShardRecord>,
    /// The stores that it has proposed to add since it acts on that record.
    proposed: Vec<StoreId>,
    promised: Epoch,
    log: BTreeSet<u64>,
    /// The epoch of the last entry.
    last: Epoch,
}

impl ShardModel {
    fn new(seed: u64, planted: Option<Planted>) -> Self {
        let first = ShardRecord { slots: Slots::ALL, ..record(ShardId(0), 1, 1, &[A, B]) };
        let stores = [A, B, C, StoreId(4)].map(|store| (store, StoreModel::default()));
        Self {
            random: SplitMix64::new(seed),
            records: vec![first],
            stores: stores.into(),
            acknowledged: BTreeSet::new(),
            next_entry: 1,
            planted,
        }
    }

    fn newest(&self) -> &ShardRecord {
        self.records.last().expect("never empty")
    }

    fn any(&mut self, stores: &[StoreId]) -> Option<StoreId> {
        let at = self.random.below(stores.len().max(1) as u64);
        stores.get(at as usize).copied()
    }

    fn write(&mut self, record: ShardRecord) {
        let version = Version(self.newest().version.0 + 1);
        self.records.push(ShardRecord { version, ..record });
    }

    fn step(&mut self) {
        let all: Vec<StoreId> = self.stores.keys().copied().collect();
        let store = self.any(&all).expect("there are four");
        match self.random.below(10) {
            0 => self.coordinator_learns(store),
            1 => self.promote(),
            2 => self.see(store),
            3 => self.crash(store),
            4 | 5 => self.act(store),
            6 => self.change_set(store),
            7 => self.contact(store),
            _ => self.commit(store),
        }
    }

    fn coordinator_learns(&mut self, store: StoreId) {
        let mut next = self.newest().clone();
        if next.learners.contains(&store) {
            crate::shard_record::remove(&mut next.learners, store);
        } else if !next.isr.contains(&store) {
            crate::shard_record::insert(&mut next.learners, store);
        }
        self.write(next);
    }

    fn promote(&mut self) {
        let mut next = self.newest().clone();
        let old = next.primary.store;
        let Some(primary) = self.any(&next.isr.clone()) else { return };
        next.epoch = Epoch(next.epoch.0 + 1);
        next.primary = StoreBoot { store: primary, boot: Boot(3) };
        if primary != old && next.isr.len() > 2 && self.random.below(2) == 0 {
            crate::shard_record::remove(&mut next.isr, old);
        }
        self.write(next);
    }

    /// A watch shows some record to the store, perhaps a late one.
    fn see(&mut self, store: StoreId) {
        let at = self.random.below(self.records.len() as u64) as usize;
        let record = self.records[at].clone();
        let seen = &mut self.stores.get_mut(&store).unwrap().seen;
        let newest = seen.take().into_iter().chain([record]).max_by_key(ShardRecord::order);
        *seen = newest;
    }

    fn crash(&mut self, store: StoreId) {
        let store = self.stores.get_mut(&store).unwrap();
        (store.seen, store.leads) = (None, None);
        if Planted::RecordNotKept.is_in(self.planted) {
            store.acted_on = None;
        }
    }

    /// The store acts on a record that names it primary: of a new epoch, or of the one that it
    /// leads.
    fn act(&mut self, store: StoreId) {
        let at = self.random.below(self.records.len() as u64) as usize;
        let record = self.records[at].clone();
        let model = self.stores.get_mut(&store).unwrap();
        let newer = model.acted_on.as_ref().is_none_or(|known| known.order() < record.order());
        let leads = model.leads.as_ref().is_some_and(|leads| leads.epoch == record.epoch);
        let begins = model.promised < record.epoch;
        if record.primary.store == store && newer && (leads || begins) {
            model.promised = record.epoch;
            model.acted_on = Some(record.clone());
            model.proposed.clear();
            model.leads = Some(record);
        }
    }

    /// A primary of a new epoch reaches a member before the record is in its own log, so the member
    /// may promise an epoch of which no store knows the record.
    fn contact(&mut self, store: StoreId) {
        let at = self.random.below(self.records.len() as u64) as usize;
        let record = self.records[at].clone();
        let begins = self.stores[&store].promised < record.epoch;
        if let Some(member) = self.any(&record.isr)
            && record.primary.store == store
            && begins
        {
            let member = self.stores.get_mut(&member).unwrap();
            member.promised = member.promised.max(record.epoch);
        }
    }

    /// A primary adds a learner that has its whole log, or removes a member, if the record that it
    /// has acted on is still the newest one.
    fn change_set(&mut self, store: StoreId) {
        let Some(leads) = self.stores[&store].leads.clone() else { return };
        if leads.order() != self.newest().order() || self.stores[&store].promised > leads.epoch {
            return;
        }
        let others: Vec<_> = leads.isr.iter().copied().filter(|&other| other != store).collect();
        if self.random.below(2) == 0 {
            let Some(add) = self.any(&leads.learners) else { return };
            if self.replicate(store, leads.epoch, &[&others[..], &[add]].concat()) {
                self.stores.get_mut(&store).unwrap().proposed.push(add);
                self.write(leads.changed(&[add], &[], &[], 2));
            }
        } else if let Some(gone) = self.any(&others) {
            self.write(leads.changed(&[], &[gone], &[], 2));
        }
    }

    /// Brings the log of the primary onto these stores. Fails if one of them obeys a newer one.
    fn replicate(&mut self, from: StoreId, epoch: Epoch, to: &[StoreId]) -> bool {
        if to.iter().any(|store| self.stores[store].promised > epoch) {
            return false;
        }
        let (log, last) = (self.stores[&from].log.clone(), self.stores[&from].last);
        for store in to {
            let model = self.stores.get_mut(store).unwrap();
            (model.promised, model.log, model.last) = (epoch, log.clone(), last);
        }
        true
    }

    fn commit(&mut self, store: StoreId) {
        let model = &self.stores[&store];
        let Some(leads) = model.leads.clone().filter(|leads| leads.epoch == model.promised) else {
            return;
        };
        let entry = self.next_entry;
        self.next_entry += 1;
        let model = self.stores.get_mut(&store).unwrap();
        model.log.insert(entry);
        model.last = leads.epoch;
        let members = [&leads.isr[..], &self.stores[&store].proposed].concat();
        if self.replicate(store, leads.epoch, &members) {
            self.acknowledged.insert(entry);
        }
    }

    /// Loses etcd, asks some stores, and returns the records if there is a plan.
    fn recover(&mut self) -> Option<RecoveredRecords> {
        let mut missing: Vec<StoreId> = self.stores.keys().copied().collect();
        missing.retain(|_| self.random.below(4) == 0);
        self.recover_from_others(&missing, &[])
    }

    /// Loses etcd and some stores, of which `without` are given up.
    fn recover_from_others(
        &self,
        missing: &[StoreId],
        without: &[StoreId],
    ) -> Option<RecoveredRecords> {
        let mut answers = Vec::new();
        for (&store, model) in self.stores.iter().filter(|(store, _)| !missing.contains(store)) {
            let known = model.seen.iter().chain(&model.acted_on);
            let newest = known.max_by_key(|record| record.order()).cloned();
            let mut answer = answer(store, 1, 1, &[store]);
            answer.etcd.as_mut().unwrap().meta.shards = 1;
            answer.shards.truncate(1);
            answer.shards[0].promised = model.promised;
            answer.shards[0].record = newest;
            let last = (model.last, Seq(model.log.len() as u64));
            answer.shards[0].copy = Some(CopyEnd { last, unfit: false, damaged: false });
            answers.push(answer);
        }
        plan(&answers, &terms(true, without, self.planted)).ok()
    }

    /// Returns what is wrong with the records.
    fn judge(&self, recovered: &RecoveredRecords, gone: &[StoreId]) -> Result<(), String> {
        let record = &recovered.shards[0];
        for (store, model) in self.stores.iter().filter(|(store, _)| !gone.contains(store)) {
            if model.promised >= record.epoch {
                return Err(format!("{store} has promised {:?}: {record:?}", model.promised));
            }
            let complete = self.acknowledged.is_subset(&model.log);
            let may_lead = record.isr.contains(store) && !record.tainted.contains(store);
            if may_lead && !complete {
                return Err(format!("member {store} lacks something: {record:?}"));
            }
        }
        Ok(())
    }
}

/// Runs the model, and returns the number of recoveries and the first that was wrong.
fn run_model(seeds: std::ops::Range<u64>, planted: Option<Planted>) -> (u64, Option<String>) {
    let mut recovered = 0;
    for seed in seeds {
        let mut model = ShardModel::new(seed, planted);
        for _ in 0..20 + model.random.below(60) {
            model.step();
        }
        if let Some(records) = model.recover() {
            recovered += 1;
            if let Err(why) = model.judge(&records, &[]) {
                return (recovered, Some(format!("seed {seed}: {why}")));
            }
        }
    }
    (recovered, None)
}

#[test]
fn whatever_was_acknowledged_is_on_every_member_of_a_recovered_record() {
    let (recovered, wrong) = run_model(0..20_000, None);
    assert_eq!(wrong, None);
    assert!(recovered > 1_000, "{recovered} of 20,000 had a plan");
}

#[test]
#[cfg(feature = "planted-bugs")]
fn the_model_notices_each_rule_that_is_broken() {
    use Planted::*;
    for bug in [RecordNotKept, RecoveredWithoutMember, PromisesNotRecovered] {
        let (_, wrong) = run_model(0..100_000, Some(bug));
        assert!(wrong.is_some(), "{bug:?}");
    }
}

/// A shard was split before etcd was lost. Of the two records of the transaction, stores may know
/// one, but the newest record of the parent alone counts as a hole where no child is known.
#[test]
fn the_children_of_a_split_are_recovered() {
    let whole = record(ShardId(0), 4, 7, &[A, B]);
    let at = whole.slots.hi / 2;
    let (left, right) = (Slots { hi: at - 1, ..whole.slots }, Slots { lo: at, ..whole.slots });
    let narrowed = ShardRecord { slots: left, version: Version(8), ..whole.clone() };
    let child = ShardRecord { slots: right, version: Version(1), ..whole.clone() };
    let known = |record: &ShardRecord| ShardKnowledge {
        shard: record.shard(),
        promised: Epoch(4),
        record: Some(record.clone()),
        copy: None,
    };
    let slots = |first: &ShardRecord| {
        let mut answers = [answer(A, 4, 7, &[A, B]), answer(B, 4, 7, &[A, B])];
        answers[0].shards[0] = known(first);
        answers[1].shards.push(known(&child));
        let recovered = planned(&answers).unwrap();
        recovered.shards.iter().map(|record| record.slots).take(2).collect::<Vec<_>>()
    };
    // The record of the parent that is known may be an older one.
    assert_eq!(slots(&narrowed), [left, right]);
    assert_eq!(slots(&whole), [left, right]);
    let mut answers = [answer(A, 4, 7, &[A, B]), answer(B, 4, 7, &[A, B])];
    answers[0].shards[0] = known(&narrowed);
    let want = RecoveryRefusal::UnknownShards { first: ShardId(at), shards: 1 };
    check_refused(&answers, &[want]);
}

/// A store promises for the right child of a split before the split is in etcd.
#[test]
fn a_promise_for_a_child_does_not_make_etcd_older() {
    let etcd: BTreeMap<_, _> = shards().map(|shard| (shard, record(shard, 1, 1, &[A]))).collect();
    let newer = |shard: u16| {
        let known = [(ShardId(shard), Epoch(3), None)];
        newer_than_etcd(known.into_iter(), &etcd).len()
    };
    assert_eq!(newer(7), 0);
    let hole = etcd.keys().nth(1).copied().unwrap();
    let without: BTreeMap<_, _> =
        etcd.iter().filter(|(shard, _)| **shard != hole).map(|(k, v)| (*k, v.clone())).collect();
    let known = [(hole, Epoch(3), None)];
    assert_eq!(newer_than_etcd(known.into_iter(), &without).len(), 1);
}

// ---- a store is given up ------------------------------------------------------------------------

fn with_copy(mut answer: StoreKnowledge, last: (u64, u64), unfit: bool) -> StoreKnowledge {
    for shard in &mut answer.shards {
        shard.copy = Some(CopyEnd { last: (Epoch(last.0), Seq(last.1)), unfit, damaged: unfit });
    }
    answer
}

/// The first shard of the plan without these stores, and the number of losses.
fn given_up(answers: &[StoreKnowledge], without: &[StoreId]) -> (ShardRecord, usize) {
    let recovered = plan(answers, &terms(true, without, None)).unwrap();
    for store in without {
        let named = recovered.stores.iter().find(|(known, _)| known == store).unwrap();
        assert_eq!((named.1.status, named.1.boot), (StoreStatus::Lost, Boot(0)));
    }
    (recovered.shards[0].clone(), recovered.losses.len())
}

#[test]
fn without_a_follower_that_never_led_the_newest_record_continues() {
    let answers = [answer(A, 5, 8, &[A, B, C]), answer(B, 5, 7, &[A, B, C])];
    let (record, losses) = given_up(&answers, &[C]);
    assert_eq!((record.isr, record.tainted, losses), (vec![A, B], vec![], 0));
    // Two members are all that there are: the coordinator replaces the one that is gone.
    let (record, losses) = given_up(&[answer(A, 5, 8, &[A, B])], &[B]);
    assert_eq!((record.isr, record.tainted, losses), (vec![A, B], vec![], 0));
}

#[test]
fn without_a_store_that_may_have_led_the_longest_log_continues_alone() {
    let ends = |a, b| {
        let members = [C, A, B];
        let of = |store, last| with_copy(answer(store, 5, 8, &members), last, false);
        [of(A, a), of(B, b)]
    };
    for (answers, first) in [(ends((5, 9), (5, 10)), B), (ends((5, 1), (4, 10)), A)] {
        let (record, losses) = given_up(&answers, &[C]);
        assert_eq!(record.primary, StoreBoot { store: first, boot: Boot(0) });
        let other = if first == A { B } else { A };
        assert_eq!((record.tainted, losses), (vec![other], 0));
        assert!(!record.isr.contains(&C), "{:?}", record.isr);
    }
    // A is the primary of the newest record, but B has promised more.
    let mut answers = [answer(A, 5, 8, &[A, B, C]), answer(B, 5, 8, &[A, B, C])];
    answers[1].shards[0].promised = Epoch(6);
    answers[1].shards[0].copy =
        Some(CopyEnd { last: (Epoch(6), Seq(3)), unfit: false, damaged: false });
    let (record, losses) = given_up(&answers, &[C]);
    assert_eq!((record.primary.store, record.tainted, losses), (B, vec![A], 0));
    assert_eq!(record.epoch, Epoch(7));
}

/// Two copies are two disks: both may have had what no other store has.
#[test]
fn what_may_be_lost_is_recorded() {
    let recovered = plan(&[answer(A, 5, 8, &[A, B, C])], &terms(true, &[B, C], None)).unwrap();
    assert_eq!(recovered.losses.len(), 4);
    let loss = &recovered.losses[0];
    assert_eq!((loss.shard, loss.epoch), (ShardId(0), Epoch(6)));
    assert_eq!((loss.primary.store, loss.last), (A, (Epoch(5), Seq(8))));
    assert_eq!(loss.given_up, [(B, None), (C, None)]);
    assert_eq!(loss.accepted_by.as_ref().unwrap().name, "ann@host");
    assert_eq!(recovered.shards[0].isr, [A, C], "not below min_in_sync");
    assert_eq!(recovered.shards[0].tainted, [C]);
    // A damaged copy may have been the longest.
    let members = [C, A, B];
    let damaged = with_copy(answer(B, 5, 8, &members), (5, 2), true);
    let (record, losses) = given_up(&[answer(A, 5, 8, &members), damaged.clone()], &[C]);
    assert_eq!((record.primary.store, losses), (A, 4));
    // A member that is being filled was complete once; another store that is never was.
    let filling = |store: u128| {
        let mut answer = with_copy(answer(StoreId(store), 5, 8, &members), (5, 2), true);
        let copies = answer.shards.iter_mut().filter_map(|shard| shard.copy.as_mut());
        copies.for_each(|copy| copy.damaged = false);
        answer
    };
    let b = with_copy(answer(B, 5, 8, &members), (5, 2), false);
    for (store, answers, want) in [
        ("a member", vec![answer(A, 5, 8, &members), filling(B.0)], 4),
        ("another", vec![answer(A, 5, 8, &members), b, filling(4)], 0),
    ] {
        let (record, losses) = given_up(&answers, &[C]);
        assert_eq!((record.primary.store, losses), (A, want), "{store}");
    }
    let none = RecoveryRefusal::NoCopy { first: ShardId(0), shards: 4 };
    assert_eq!(plan(&[damaged], &terms(true, &[A, C], None)), Err(vec![none]));
}

#[test]
fn a_store_that_answers_is_not_given_up_and_one_that_is_not_named_is_not_recorded() {
    let answers = [answer(A, 5, 8, &[A, B]), answer(B, 5, 8, &[A, B])];
    let refused = plan(&answers, &terms(true, &[B], None));
    assert_eq!(refused, Err(vec![RecoveryRefusal::NotLost { store: B }]));
    let refused = plan(&answers, &terms(true, &[C], None));
    assert_eq!(refused, Err(vec![RecoveryRefusal::NotNamed { store: C }]));
}

/// The copy of a tainted member lacks something, however long its log is.
#[test]
fn a_tainted_member_continues_only_at_last_and_with_a_loss() {
    let tainted = |store, last| {
        let mut answer = with_copy(answer(store, 5, 8, &[C, A, B]), last, false);
        let records = answer.shards.iter_mut().filter_map(|shard| shard.record.as_mut());
        records.for_each(|record| record.tainted = vec![B]);
        answer
    };
    let answers = [tainted(A, (5, 7)), tainted(B, (5, 9))];
    let (record, losses) = given_up(&answers, &[C]);
    assert_eq!((record.primary.store, record.tainted, losses), (A, vec![B], 4));
    let (record, losses) = given_up(&answers[1..], &[A, C]);
    assert_eq!((record.primary.store, losses), (B, 4));
}

/// A shard that seems new may have been led by the store that is given up.
#[test]
fn a_shard_that_a_lost_store_may_have_led_is_not_new() {
    let mut answer = answer(A, 1, 1, &[A, B]);
    answer.shards[0].promised = Epoch(0);
    let (record, _) = given_up(&[answer], &[B]);
    assert_eq!(record.epoch, Epoch(2));
}

/// One of four stores is lost together with etcd. Returns the number of plans in which another one
/// than the lost store continues alone, and the first plan that was wrong.
fn run_model_without_one(
    seeds: std::ops::Range<u64>,
    planted: Option<Planted>,
) -> (u64, Option<String>) {
    let mut alone = 0;
    for seed in seeds {
        let mut model = ShardModel::new(seed, planted);
        for _ in 0..20 + model.random.below(60) {
            model.step();
        }
        let lost = [A, B, C, StoreId(4)][model.random.below(4) as usize];
        let Some(records) = model.recover_from_others(&[lost], &[lost]) else { continue };
        alone += u64::from(!records.shards[0].tainted.is_empty());
        let wrong = model.judge(&records, &[lost]).err();
        let wrong = wrong.or((!records.losses.is_empty()).then(|| "a loss".to_owned()));
        if let Some(why) = wrong {
            return (alone, Some(format!("seed {seed}, {lost} is lost: {why}")));
        }
    }
    (alone, None)
}

#[test]
fn without_one_store_nothing_that_was_acknowledged_is_lost() {
    let (alone, wrong) = run_model_without_one(0..20_000, None);
    assert_eq!(wrong, None);
    assert!(alone > 1_000, "in {alone} of 20,000 one copy continues alone");
}

#[test]
#[cfg(feature = "planted-bugs")]
fn the_model_notices_that_a_store_that_was_given_up_may_have_led() {
    let (_, wrong) = run_model_without_one(0..200_000, Some(Planted::GivenUpNeverLed));
    assert!(wrong.is_some());
}

/// The shard 0 of `answer` was split at its middle, and no store that answers has seen the record
/// of the child. `copy`: B has a copy of the child, with this promise and this last entry.
fn split_unseen(primary: StoreId, copy: Option<(u64, (u64, u64))>) -> [StoreKnowledge; 2] {
    let mut isr = vec![primary];
    isr.extend([A, B, C].into_iter().filter(|&store| store != primary));
    let mut answers = [answer(A, 5, 8, &isr), answer(B, 5, 8, &isr)];
    if let Some((promised, (epoch, seq))) = copy {
        let last = (Epoch(epoch), Seq(seq));
        answers[1].shards.push(ShardKnowledge {
            shard: ShardId(100),
            promised: Epoch(promised),
            record: None,
            copy: Some(CopyEnd { last, unfit: false, damaged: false }),
        });
    }
    answers
}

#[test]
fn a_child_that_a_given_up_store_may_have_led_gets_a_record() {
    let recovered = |answers: &[StoreKnowledge], without: &[StoreId]| {
        plan(answers, &terms(true, without, None)).unwrap().shards
    };
    let end = u16::MAX / 4;
    // C may have led the child after the split.
    let shards = recovered(&split_unseen(C, Some((5, (5, 9)))), &[C]);
    assert_eq!((shards[0].slots.hi, shards[1].slots), (99, Slots { lo: 100, hi: end }));
    assert_eq!((shards[1].primary.store, &shards[1].tainted), (B, &vec![A]));
    assert_eq!(shards[1].order(), (Epoch(6), Version(1)));
    // A leads the parent and has no record of the child, so no process led the child in A's epoch.
    let shards = recovered(&split_unseen(A, Some((5, (5, 9)))), &[C]);
    assert_eq!((shards[1].primary.store, &shards[1].tainted), (A, &vec![]));
    assert_eq!((&shards[1].isr, shards.len()), (&vec![A, B], 5));
    // In a later epoch C may have, of the child or of the parent.
    let shards = recovered(&split_unseen(A, Some((7, (7, 3)))), &[C]);
    assert_eq!((shards[1].primary.store, &shards[1].tainted), (B, &vec![A]));
    assert_eq!(shards[1].epoch, Epoch(8));
    let mut answers = split_unseen(A, Some((5, (5, 9))));
    answers[1].shards[0].promised = Epoch(6);
    let shards = recovered(&answers, &[C]);
    assert_eq!((shards[1].primary.store, &shards[1].tainted), (B, &vec![A]));
    // Without a copy nothing was acknowledged of the child: the parent's primary splits it again.
    let shards = recovered(&split_unseen(C, None), &[C]);
    assert_eq!((shards[0].slots.hi, shards.len()), (end, 4));
}

#[test]
fn a_child_of_a_child_gets_a_record_and_whole_members_need_none() {
    let mut answers = split_unseen(C, Some((5, (5, 9))));
    let grandchild = ShardKnowledge { shard: ShardId(200), ..answers[1].shards[4].clone() };
    answers[1].shards.push(grandchild);
    let recovered = plan(&answers, &terms(true, &[C], None)).unwrap().shards;
    let slots: Vec<_> = recovered.iter().map(|record| (record.slots.lo, record.slots.hi)).collect();
    assert_eq!(slots[..3], [(0, 99), (100, 199), (200, u16::MAX / 4)]);
    // If every member answers, the parent's primary writes both records again, above the promise.
    let mut all = split_unseen(A, Some((9, (5, 9)))).to_vec();
    all.push(answer(C, 5, 8, &[A, B, C]));
    let recovered = planned(&all).unwrap().shards;
    assert_eq!((recovered.len(), recovered[0].slots.hi), (4, u16::MAX / 4));
    assert_eq!(recovered[0].epoch, Epoch(10));
}
