//! The records of etcd that a store keeps in its log, and its answer to a recovery of etcd.

use super::*;
use crate::etcd_memory::tests::memory;
use crate::message::{NodeQuery, NodeQueryReply, StoreKnowledge};

const C: StoreBoot = StoreBoot { store: StoreId(3), boot: Boot(1) };
const TO_C: Conn = Conn(4);

/// A, which leads with B and C in sync, has batch 2 on its own disk and on that of B.
fn waiting_for_c() -> Bench {
    let mut bench = Bench::new(A);
    bench.node.shared.shards.etcd = Some(Box::new(memory(1, 1)));
    for (conn, peer) in [(TO_B, B), (TO_C, C)] {
        bench.on(Event::Dialled { conn, peer });
        let message = FromFollower::Welcome { from: peer, copies: vec![(SHARD, CopyNo(1))] };
        bench.on(Event::FromFollower { conn, message });
    }
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    bench.deliver(named(1, &[A, B, C]));
    bench.on(Event::Durable { group: 1 });
    bench.on(acked(TO_B, 1));
    bench.on(acked(TO_C, 1));
    bench.frame(1, add(1));
    bench.on(Event::Durable { group: 2 });
    bench.on(acked(TO_B, 2));
    bench
}

fn named(version: u64, isr: &[StoreBoot]) -> ShardRecord {
    ShardRecord { isr: isr.iter().map(|member| member.store).collect(), ..record(1, version, A) }
}

fn acked(conn: Conn, n: u64) -> Event {
    Event::FromFollower { conn, message: FromFollower::Ack { n } }
}

fn is_applied(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| word(effect).starts_with("applied"))
}

fn ask(bench: &mut Bench, promise: u32) -> (Vec<Effect>, StoreKnowledge) {
    let mut effects = bench.on(Event::Query { query: 1, message: NodeQuery::Recover { promise } });
    let at = effects.iter().position(|effect| matches!(effect, Effect::QueryReply { .. }));
    match effects.remove(at.expect("an answer")) {
        Effect::QueryReply { reply: NodeQueryReply::Recover(known), .. } => (effects, *known),
        other => panic!("{other:?}"),
    }
}

/// Without the record in its log the store would not know after a crash that C has left, and a
/// recovery of etcd would take C for complete.
#[test]
fn who_has_left_counts_until_that_is_in_the_log() {
    let mut bench = waiting_for_c();
    let effects = bench.deliver_only(named(2, &[A, B]));
    assert!(effects.iter().map(word).any(|word| word == "act on 1.2"));
    assert!(!is_applied(&effects), "{effects:?}");
    assert!(is_applied(&bench.on(Event::Durable { group: 3 })));
}

/// The log of A has no record of C as a learner yet, so a recovery would not ask C: C must not
/// become a member meanwhile.
#[test]
fn nothing_is_proposed_before_the_record_is_in_the_log() {
    let mut bench = waiting_for_c();
    bench.on(Event::LeaseConfirmed);
    bench.on(Event::PeersRegistered(vec![(A, 1), (B, 2), (C, 3)]));
    let proposes =
        |effects: &[Effect]| effects.iter().any(|effect| matches!(effect, Effect::Propose { .. }));
    bench.deliver_only(named(2, &[A, B]));
    bench.on(Event::Durable { group: 3 });
    let learning = ShardRecord { learners: vec![C.store], ..named(3, &[A, B]) };
    let effects = bench.deliver_only(learning);
    let opening = effects.iter().find_map(|effect| match effect {
        Effect::ToFollower { conn: TO_C, message: ToFollower::Append { n, .. } } => Some(*n),
        _ => None,
    });
    assert!(!proposes(&bench.on(acked(TO_C, opening.expect("C is fed")))));
    assert!(proposes(&bench.on(Event::Durable { group: 4 })));
}

#[test]
fn a_store_that_has_promised_a_new_etcd_follows_no_record_any_more() {
    let mut bench = waiting_for_c();
    let (effects, known) = ask(&mut bench, 0);
    assert_eq!((effects.len(), known.durable), (0, true));
    assert_eq!(known.shards[0].record, Some(named(1, &[A, B, C])));

    let (effects, known) = ask(&mut bench, 2);
    assert_eq!((effects.len(), known.durable), (2, false), "{effects:?}");
    assert_eq!(known.etcd.map(|etcd| etcd.promised), Some(2));
    assert!(!is_applied(&bench.deliver_only(named(2, &[A, B]))));
    assert!(!is_applied(&bench.on(Event::Durable { group: 3 })));
    let (effects, known) = ask(&mut bench, 2);
    assert_eq!((effects.len(), known.durable), (0, true));
    assert_eq!(known.shards[0].record, Some(named(1, &[A, B, C])));
    // The copy of C counts as before.
    assert!(is_applied(&bench.on(acked(TO_C, 2))));
}

/// A start knows by its log what the store has acted on, and takes no older record.
#[test]
fn a_record_older_than_what_the_log_has_is_not_followed() {
    let acted_on = ShardRecord { isr: vec![B.store], learners: vec![A.store], ..record(2, 5, B) };
    let known = RecoveredReplica {
        shard: SHARD,
        slots: Slots::ALL,
        promised: Epoch(2),
        copy: CopyNo(0),
        acted_on: Some(Box::new(acted_on.clone())),
        content: None,
    };
    let settings = Settings::default();
    let mut bench = Bench::new(A);
    bench.node = Node::new(settings, A, Now(0), 1, vec![known]);
    let copied = |effects: &[Effect]| effects.iter().any(|it| word(it).starts_with("copy"));
    assert!(!copied(&bench.deliver_only(named(4, &[A, B]))));
    assert_eq!(ask(&mut bench, 0).1.shards[0].record, Some(acted_on.clone()));
    assert!(copied(&bench.deliver_only(ShardRecord { version: Version(6), ..acted_on })));
}
