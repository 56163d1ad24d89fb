//! Who of the in-sync set can acknowledge, what a primary does about it, and what it says of it.

use super::*;

const C: StoreBoot = StoreBoot { store: StoreId(3), boot: Boot(1) };
const TO_C: Conn = Conn(4);

/// A with connections to B and C, all three registered, at this floor.
fn three(min_in_sync: usize) -> Bench {
    let mut bench = Bench::new(A);
    bench.node.settings.min_in_sync = min_in_sync;
    for (conn, peer) in [(TO_B, B), (TO_C, C)] {
        bench.on(Event::Dialled { conn, peer });
        let copies = vec![(SHARD, CopyNo(1))];
        let message = FromFollower::Welcome { from: peer, copies };
        bench.on(Event::FromFollower { conn, message });
    }
    bench.on(Event::GatewayConnected { conn: GATEWAY });
    bench.on(Event::Peers(vec![(A, 1), (B, 2), (C, 3)]));
    bench
}

fn of(record: &ShardConfig, isr: &[StoreBoot]) -> ShardConfig {
    let stores: Vec<StoreId> = isr.iter().map(|member| member.store).collect();
    ShardConfig { isr: stores.clone(), target: stores, ..record.clone() }
}

fn ack(conn: Conn, n: u64) -> Event {
    Event::FromFollower { conn, message: FromFollower::Ack { n } }
}

/// For so long these peers, and nobody else, are heard.
fn pass(bench: &mut Bench, ms: u64, heard: &[Conn]) -> Vec<Effect> {
    let mut effects = Vec::new();
    for _ in 0..ms / 100 {
        bench.now = bench.now.plus_ms(100);
        for &conn in heard {
            let message = FromFollower::Alive { sent: 0, fsync_age_ms: 0, digests: vec![] };
            effects.extend(bench.on(Event::FromFollower { conn, message }));
        }
        effects.extend(bench.on(Event::Tick));
    }
    effects
}

fn proposed(effects: &[Effect]) -> Option<ShardConfig> {
    effects.iter().find_map(|effect| match effect {
        Effect::Propose { config, .. } => Some(config.clone()),
        _ => None,
    })
}

/// At the floor of three one member lost data, is tainted and being filled, and another falls
/// silent. When the first is whole again it is trusted, and the silent one stays: the set has not
/// become larger.
#[test]
fn a_member_that_is_trusted_again_makes_no_room() {
    let mut bench = three(3);
    let record = of(&record(1, 1, A), &[A, B, C]);
    bench.config(ShardConfig { tainted: vec![B.store], ..record });
    bench.on(Event::Durable { group: 1 });
    bench.on(ack(TO_C, 1));
    pass(&mut bench, 1_500, &[TO_B]);
    let next = proposed(&bench.on(ack(TO_B, 1))).expect("B is trusted again");
    assert_eq!((next.isr, next.tainted), (vec![A.store, B.store, C.store], vec![]));
}
