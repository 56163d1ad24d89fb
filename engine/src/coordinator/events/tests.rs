//! Each kind of event, from the differences of records.

use super::*;
use crate::coordinator::decision::{Cause, Decision, PromotionReason};
use crate::coordinator::{AtRevision, RecordChange};
use crate::ids::{Boot, Seq, Slots, StoreBoot, Version};
use crate::records::{
    LossRecord, NodeRecord, Operator, PauseIntent, PromoteIntent, RemoveIntent, StoreRecord,
    StoreStatus,
};
use crate::shard_record::ShardRecord;

const SHARD: ShardId = ShardId(0);

fn ids(stores: &[u128]) -> Vec<StoreId> {
    stores.iter().copied().map(StoreId).collect()
}

fn process(store: u128, boot: u64) -> StoreBoot {
    StoreBoot { store: StoreId(store), boot: Boot(boot) }
}

fn operator() -> Operator {
    Operator { at: TimeMs(1), name: "ann@desk".into() }
}

/// A log whose first lists have come: nodes 1 to 4 run, and shard 0 is on 1, 2 and 3, led by 1.
struct Bench {
    log: EventLog,
    revision: u64,
    record: ShardRecord,
    /// The number of the last event that was looked at.
    seen: u64,
}

impl Bench {
    fn new() -> Self {
        let log = EventLog::new(TimeMs(7), 1 << 20);
        let record = ShardRecord {
            slots: Slots { lo: 0, hi: u16::MAX },
            epoch: Epoch(1),
            version: Version(1),
            primary: process(1, 1),
            isr: ids(&[1, 2, 3]),
            target: ids(&[1, 2, 3]),
            ..ShardRecord::default()
        };
        let mut bench = Self { log, revision: 9, record, seen: 0 };
        let all = || 1..=4_u128;
        let stores = all().map(|id| (StoreId(id), at(id as u64, store(StoreStatus::Active))));
        bench.log.on_list(TimeMs(8), RecordList::Stores(stores.collect()));
        let nodes = all().map(|id| (StoreId(id), at(id as u64, node(1))));
        bench.log.on_list(TimeMs(8), RecordList::Nodes(nodes.collect()));
        let shards = vec![at(9, bench.record.clone())];
        bench.log.on_list(TimeMs(9), RecordList::Shards(shards));
        bench.log.on_list(TimeMs(8), RecordList::Removes(vec![]));
        bench.log.on_list(TimeMs(8), RecordList::Promotes(vec![]));
        bench.log.on_list(TimeMs(8), RecordList::Pause(None));
        assert_eq!(bench.news(), "", "the first lists are no news");
        assert_eq!(bench.log.since(), TimeMs(9));
        bench
    }

    fn change(&mut self, change: impl FnOnce(u64) -> RecordChange) -> String {
        self.revision += 1;
        let change = change(self.revision);
        self.log.on_change(TimeMs(10), self.revision, &change);
        self.news()
    }

    fn shard(&mut self, change: impl FnOnce(&mut ShardRecord)) -> String {
        change(&mut self.record);
        self.record.version.0 += 1;
        let record = self.record.clone();
        self.change(|revision| RecordChange::Shard(SHARD, Some(at(revision, record))))
    }

    fn status(&mut self, id: u128, status: StoreStatus) -> String {
        let kept = |revision| Some(at(revision, store(status)));
        self.change(|revision| RecordChange::Store(StoreId(id), kept(revision)))
    }

    fn node(&mut self, id: u128, boot: Option<u64>) -> String {
        let kept = |revision| boot.map(|boot| at(revision, node(boot)));
        self.change(|revision| RecordChange::Node(StoreId(id), kept(revision)))
    }

    fn decides(&mut self, decision: Decision) -> String {
        self.log.on_decision(TimeMs(10), &decision);
        self.news()
    }

    /// The new events, each as its words: kind, node, "for" the other node, reason.
    fn news(&mut self) -> String {
        let seen = std::mem::replace(
            &mut self.seen,
            self.log.history().after(0).last().map_or(0, |it| it.number),
        );
        let lines: Vec<String> =
            self.log.history().after(seen).map(|event| text(&event.what)).collect();
        lines.join("; ")
    }

    fn last(&self) -> ClusterEvent {
        self.log.history().after(0).last().expect("there is one").clone()
    }
}

fn text(what: &EventFacts) -> String {
    let mut words = vec![what.kind.word().to_owned()];
    words.extend(what.node.map(|node| node.0.to_string()));
    words.extend(what.other.map(|other| format!("for {}", other.0)));
    words.extend(what.reason.map(|reason| reason.word().to_owned()));
    words.extend(what.count.map(|count| count.to_string()));
    words.extend(what.by.as_ref().map(|by| format!("by {by}")));
    words.join(" ")
}

fn at<V>(revision: u64, value: V) -> AtRevision<V> {
    AtRevision { value, created: revision, modified: revision }
}

fn store(status: StoreStatus) -> StoreRecord {
    StoreRecord {
        name: "node".into(),
        address: String::new(),
        zone: String::new(),
        host: String::new(),
        boot: Boot(1),
        nonce: 0,
        status,
    }
}

fn node(boot: u64) -> NodeRecord {
    NodeRecord { boot: Boot(boot), address: String::new(), capacity: 0, versions: (1, 1) }
}

#[test]
fn a_planned_move_is_shown_from_the_plan_to_the_release() {
    let mut bench = Bench::new();
    let planned = bench.shard(|record| {
        record.target = ids(&[2, 3, 4]);
        record.learners = ids(&[4]);
    });
    assert_eq!(planned, "copy-planned 4 for 1 balance; learner-added 4");
    let joined = bench.shard(|record| {
        record.isr = ids(&[1, 2, 3, 4]);
        record.learners = vec![];
    });
    assert_eq!(joined, "in-sync 4");
    let led = bench.shard(|record| {
        record.epoch = Epoch(2);
        record.primary = process(2, 1);
    });
    assert_eq!(led, "primary 2 for 1 hand-over");
    assert_eq!(bench.shard(|record| record.isr = ids(&[2, 3, 4])), "copy-removed 1 moved");
}

#[test]
fn the_reason_of_a_move_is_the_state_of_the_node_that_is_left() {
    for (status, word) in [
        (StoreStatus::Draining, "draining"),
        (StoreStatus::Suspect, "suspect"),
        (StoreStatus::Lost, "gone"),
    ] {
        let mut bench = Bench::new();
        bench.status(1, status);
        let planned = bench.shard(|record| {
            record.target = ids(&[2, 3, 4]);
            record.learners = ids(&[4]);
        });
        assert_eq!(planned, format!("copy-planned 4 for 1 {word}; learner-added 4"));
        bench.shard(|record| record.isr = ids(&[1, 2, 3, 4]));
        let led = bench.shard(|record| {
            record.epoch = Epoch(2);
            record.primary = process(2, 1);
        });
        assert_eq!(led, format!("primary 2 for 1 {word}"));
        let released = bench.shard(|record| record.isr = ids(&[2, 3, 4]));
        assert_eq!(released, format!("copy-removed 1 {word}"));
    }
}

#[test]
fn a_death_is_shown_by_records_alone() {
    let mut bench = Bench::new();
    assert_eq!(bench.node(1, None), "node-left 1");
    let led = bench.shard(|record| {
        record.epoch = Epoch(2);
        record.primary = process(2, 1);
        record.isr = ids(&[2, 3]);
    });
    assert_eq!(led, "primary 2 for 1 dead; out-of-sync 1 dead");
    let rebuilt = bench.shard(|record| {
        record.target = ids(&[2, 3, 4]);
        record.learners = ids(&[4]);
    });
    assert_eq!(rebuilt, "copy-planned 4 for 1 dead; learner-added 4; copy-removed 1 dead");
}

#[test]
fn the_leader_knows_the_cause_whichever_comes_first() {
    let promoted = Decision::Promoted {
        shard: SHARD,
        epoch: Epoch(2),
        from: process(1, 1),
        to: process(2, 1),
        why: PromotionReason::Dead(Cause::Refused),
        last: (Epoch(1), Seq(5)),
        took_ms: 3,
    };
    let lead = |record: &mut ShardRecord| {
        record.epoch = Epoch(2);
        record.primary = process(2, 1);
    };
    let mut bench = Bench::new();
    let died = Decision::Died { process: process(1, 1), why: Cause::Refused };
    assert_eq!(bench.decides(died), "node-dead 1 refused");
    assert_eq!(bench.decides(promoted.clone()), "");
    assert_eq!(bench.shard(lead), "primary 2 for 1 refused");
    assert_eq!(bench.decides(Decision::Returned(process(1, 2))), "node-alive 1");

    let mut bench = Bench::new();
    assert_eq!(bench.shard(lead), "primary 2 for 1 hand-over", "the record alone");
    assert_eq!(bench.decides(promoted), "");
    assert_eq!(text(&bench.last().what), "primary 2 for 1 refused");
}

#[test]
fn a_node_comes_leaves_and_comes_back() {
    let mut bench = Bench::new();
    assert_eq!(bench.node(5, Some(1)), "node-came 5 new");
    let came = bench.last();
    assert_eq!(bench.node(5, None), "node-left 5");
    assert_eq!(bench.last().revision, came.revision, "the registration identifies both");
    assert_ne!(bench.last().identity(), came.identity());
    assert_eq!(bench.node(5, Some(1)), "node-came 5 lease-lost");
    assert_eq!(bench.node(5, None), "node-left 5");
    assert_eq!(bench.node(5, Some(2)), "node-came 5 restarted");
    let stops = Decision::Died { process: process(5, 2), why: Cause::Leaving };
    assert_eq!(bench.decides(stops), "node-stopping 5");
}

#[test]
fn the_statuses_of_stores() {
    let mut bench = Bench::new();
    assert_eq!(bench.status(4, StoreStatus::Draining), "node-draining 4 operator");
    assert_eq!(bench.status(4, StoreStatus::Active), "node-undrained 4 operator");
    assert_eq!(bench.status(4, StoreStatus::Suspect), "node-suspect 4");
    assert_eq!(bench.status(4, StoreStatus::Active), "node-trusted 4");
    let intent = RemoveIntent { boot: Boot(1), from: operator() };
    let asked = bench.change(|at| RecordChange::Remove(StoreId(4), Some(self::at(at, intent))));
    assert_eq!(asked, "removal-requested 4 operator by ann@desk");
    assert_eq!(bench.status(4, StoreStatus::Retired), "node-removed 4 operator");
    assert_eq!(bench.status(3, StoreStatus::Lost), "node-lost 3 name-taken");
}

#[test]
fn copies_that_fall_behind_return_or_are_tainted() {
    let mut bench = Bench::new();
    let behind = bench.shard(|record| record.isr = ids(&[1, 2]));
    assert_eq!(behind, "out-of-sync 3 not-acknowledging");
    assert_eq!(bench.shard(|record| record.learners = ids(&[3])), "learner-added 3 returned");
    let back = bench.shard(|record| {
        record.isr = ids(&[1, 2, 3]);
        record.learners = vec![];
    });
    assert_eq!(back, "in-sync 3");
    assert_eq!(bench.shard(|record| record.tainted = ids(&[3])), "tainted 3");
    assert_eq!(bench.shard(|record| record.tainted = vec![]), "in-sync 3 filled-again");
    let extra = bench.shard(|record| {
        record.target = ids(&[1, 2, 3, 4]);
        record.learners = ids(&[4]);
    });
    assert_eq!(extra, "copy-planned 4 missing; learner-added 4");
    let canceled = bench.shard(|record| {
        record.target = ids(&[1, 2, 3]);
        record.learners = vec![];
    });
    assert_eq!(canceled, "copy-removed 4 not-needed");
}

#[test]
fn an_accepted_loss_is_shown_by_the_taint_or_by_the_intent() {
    let mut bench = Bench::new();
    let lost = bench.shard(|record| {
        record.epoch = Epoch(2);
        record.primary = process(2, 1);
        record.tainted = ids(&[1, 3]);
    });
    assert_eq!(lost, "loss-accepted 2; primary 2 for 1 loss-accepted; tainted 1; tainted 3");
    let record = LossRecord {
        shard: SHARD,
        epoch: Epoch(2),
        primary: process(2, 1),
        last: (Epoch(1), Seq(4)),
        given_up: vec![],
        accepted_by: Some(operator()),
    };
    assert_eq!(bench.decides(Decision::LossAccepted(Box::new(record))), "");
    assert_eq!(
        text(&bench.log.history().after(0).next().expect("one").what),
        "loss-accepted 2 by ann@desk"
    );

    let mut bench = Bench::new();
    bench.shard(|record| (record.isr, record.target) = (ids(&[2]), ids(&[2])));
    let (store, version) = (StoreId(2), bench.record.version);
    let intent = PromoteIntent { store, version, from: operator() };
    bench.change(|at| RecordChange::Promote(SHARD, Some(self::at(at, intent))));
    bench.shard(|record| {
        record.epoch = Epoch(2);
        record.primary = process(2, 1);
    });
    bench.log.on_change(TimeMs(11), bench.revision, &RecordChange::Promote(SHARD, None));
    assert_eq!(bench.news(), "loss-accepted 2 by ann@desk");
    assert_eq!(bench.last().revision, bench.revision);
}

#[test]
fn pauses_the_guard_elections_and_shards_without_a_primary() {
    let mut bench = Bench::new();
    let intent = PauseIntent { from: operator() };
    let paused = bench.change(|at| RecordChange::Pause(Some(self::at(at, intent))));
    assert_eq!(paused, "moves-paused operator by ann@desk");
    assert_eq!(bench.change(|_| RecordChange::Pause(None)), "moves-resumed operator");
    assert_eq!(bench.decides(Decision::Guarded { away: 2, of: 5 }), "guard-held 2");
    assert_eq!(bench.decides(Decision::Unguarded), "guard-ended");
    let none = Decision::Leaderless { shard: SHARD, why: "no member answers" };
    assert_eq!(bench.decides(none), "no-primary");
    bench.log.on_election(TimeMs(11), Some(44), "coordinator-2");
    assert_eq!(bench.news(), "leader-elected by coordinator-2");
    assert_eq!((bench.last().revision, bench.last().at), (44, TimeMs(11)));
}

#[test]
fn shards_placed_in_one_transaction_are_one_event() {
    let mut log = EventLog::new(TimeMs(1), 1 << 20);
    log.on_list(TimeMs(1), RecordList::Shards(vec![]));
    for lo in [0, 100, 200] {
        let slots = Slots { lo, hi: lo + 99 };
        let record = ShardRecord { slots, epoch: Epoch(1), ..ShardRecord::default() };
        log.on_change(TimeMs(2), 30, &RecordChange::Shard(ShardId(lo), Some(at(30, record))));
    }
    let all: Vec<String> = log.history().after(0).map(|event| text(&event.what)).collect();
    assert_eq!(all, ["shards-placed 3"]);
}

/// The watch delivers the two records of a split in either order.
#[test]
fn each_half_of_a_split_has_an_event() {
    let half = |lo, hi| ShardRecord {
        slots: Slots { lo, hi },
        primary: StoreBoot { store: StoreId(3), boot: Boot(1) },
        epoch: Epoch(2),
        ..ShardRecord::default()
    };
    let changed = |created, record: ShardRecord| {
        let kept = AtRevision { created, ..at(31, record.clone()) };
        RecordChange::Shard(record.shard(), Some(kept))
    };
    for order in [[0, 1], [1, 0]] {
        let mut log = EventLog::new(TimeMs(1), 1 << 20);
        let whole = AtRevision { created: 30, ..at(30, half(0, 99)) };
        log.on_list(TimeMs(1), RecordList::Shards(vec![whole]));
        let halves = [changed(30, half(0, 49)), changed(31, half(50, 99))];
        order.iter().for_each(|&which| log.on_change(TimeMs(2), 31, &halves[which]));
        let mut all: Vec<String> = log.history().after(0).map(|event| text(&event.what)).collect();
        all.sort();
        assert_eq!(all, ["shard-split 3", "shard-split 3"], "{order:?}");
    }
}

/// After a watch has failed, a list shows what changed meanwhile.
#[test]
fn a_later_list_gives_the_events_that_the_watch_has_missed() {
    let mut bench = Bench::new();
    let nodes = (1..=3).map(|id| (StoreId(id), at(id as u64, node(1)))).collect();
    bench.log.on_list(TimeMs(20), RecordList::Nodes(nodes));
    assert_eq!((bench.news(), bench.last().revision), ("node-left 4".into(), 4));
    // The watch's own, later message is no second event.
    assert_eq!(bench.node(4, None), "");
    bench.record.target = ids(&[1, 2]);
    bench.record.isr = ids(&[1, 2]);
    let shards = vec![at(30, bench.record.clone())];
    bench.log.on_list(TimeMs(20), RecordList::Shards(shards.clone()));
    assert_eq!(bench.news(), "copy-removed 3 moved");
    bench.log.on_list(TimeMs(21), RecordList::Shards(shards));
    assert_eq!(bench.news(), "");
}

#[test]
fn two_coordinators_agree_on_the_identity_of_an_event() {
    let events = |mut bench: Bench| {
        bench.node(4, None);
        bench.node(4, Some(2));
        bench.status(3, StoreStatus::Draining);
        bench.shard(|record| record.isr = ids(&[1, 2]));
        bench.log.history().after(0).map(ClusterEvent::identity).collect::<Vec<_>>()
    };
    let first = events(Bench::new());
    let mut other = Bench::new();
    other.decides(Decision::Unguarded);
    assert_eq!(events(other)[1..], first);
    let distinct: std::collections::BTreeSet<_> = first.iter().collect();
    assert_eq!((distinct.len(), first.contains(&None)), (first.len(), false));
}

#[test]
fn the_oldest_events_make_room() {
    let mut history = EventHistory::new(10 * size_of::<ClusterEvent>());
    for count in 0..25 {
        let count = Some(count);
        history.push(TimeMs(1), 0, EventFacts { count, ..EventFacts::new(EventKind::GuardHeld) });
        assert_eq!(history.is_cut(), count > Some(9));
    }
    let numbers = |after| history.after(after).map(|event| event.number).collect::<Vec<_>>();
    assert_eq!(numbers(0), (16..=25).collect::<Vec<_>>());
    assert_eq!((numbers(24), numbers(25)), (vec![25], vec![]));
    let by = Some("x".repeat(5 * size_of::<ClusterEvent>()));
    history.push(TimeMs(1), 0, EventFacts { by, ..EventFacts::new(EventKind::LeaderElected) });
    assert_eq!(history.after(0).count(), 5, "text counts, too");
}

#[test]
fn words_are_unique_and_plain() {
    let kinds = EventKind::ALL.iter().map(|kind| kind.word());
    let reasons = EventReason::ALL.iter().map(|reason| reason.word());
    for words in [kinds.collect::<Vec<_>>(), reasons.collect()] {
        let distinct: std::collections::BTreeSet<_> = words.iter().collect();
        assert_eq!(distinct.len(), words.len());
        let plain = |word: &&str| word.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
        assert!(words.iter().all(plain), "{words:?}");
    }
}
