//! Elections: one leader, its term, and the time until another process takes over.

use std::time::{Duration, Instant};

use metastore::{
    CasOutcome, CoordinatorRecord, Election, LeadershipChange, LeaseSettings, Metastore,
};

use crate::{at_version, cas_shards, connect, raw, shard, start, within};

const TTL_S: u32 = 1;

fn settings() -> LeaseSettings {
    LeaseSettings { ttl_s: TTL_S, ..LeaseSettings::default() }
}

fn candidate(index: usize) -> CoordinatorRecord {
    CoordinatorRecord { address: format!("127.0.0.1:{index}") }
}

async fn stand(endpoint: &str, index: usize) -> Election {
    stand_for(endpoint, index, settings()).await
}

async fn stand_for(endpoint: &str, index: usize, settings: LeaseSettings) -> Election {
    // Each candidate has a connection of its own, as a process has.
    connect(endpoint.to_owned()).await.stand_for_election(&candidate(index), settings)
}

/// Waits until this candidate leads, and returns its term.
async fn leads(election: &mut Election) -> u64 {
    loop {
        let change = within(15, election.next()).await.expect("it goes on");
        if let LeadershipChange::Leading { term } = change {
            return term;
        }
    }
}

async fn leader(store: &Metastore) -> Option<(String, u64)> {
    let stored = store.get::<CoordinatorRecord>(&()).await.expect("a read");
    stored.map(|stored| (stored.record.address, stored.created))
}

/// Returns the candidate that is elected first.
async fn first(elections: &mut [Election]) -> (usize, u64) {
    within(15, async {
        loop {
            for (index, election) in elections.iter_mut().enumerate() {
                let soon = tokio::time::timeout(Duration::from_millis(5), election.next()).await;
                if let Ok(Some(LeadershipChange::Leading { term })) = soon {
                    return (index, term);
                }
            }
        }
    })
    .await
}

#[tokio::test]
async fn exactly_one_leads_and_another_takes_over_in_time() {
    let (etcd, store) = start().await;
    let mut elections = Vec::new();
    for index in 0..3 {
        elections.push(stand(&etcd.endpoint(), index).await);
    }
    let (winner, term) = first(&mut elections).await;
    assert_eq!(leader(&store).await, Some((candidate(winner).address, term)));
    // For twice the time to live, no other candidate is elected.
    let others = tokio::time::timeout(Duration::from_secs(2), async {
        loop {
            let (index, _) = first(&mut elections).await;
            assert_eq!(index, winner, "a second leader");
        }
    });
    assert!(others.await.is_err());

    // The leader dies without revoking its lease.
    drop(elections.remove(winner));
    let died = Instant::now();
    let (_, next_term) = first(&mut elections).await;
    let took = died.elapsed();
    let promised = Duration::from_secs(u64::from(TTL_S) + 1);
    // A machine that is busy with other tests may take a little longer.
    assert!(took < promised + Duration::from_secs(1), "took over after {took:?}");
    assert!(next_term > term);
    assert_eq!(leader(&store).await.map(|(_, created)| created), Some(next_term));
}

#[tokio::test]
async fn a_leader_that_resigns_is_followed_at_once() {
    let (etcd, _store) = start().await;
    // A lease that is not revoked would be alive for long.
    let long = LeaseSettings { ttl_s: 60, ..settings() };
    let mut first = stand_for(&etcd.endpoint(), 0, long).await;
    let term = leads(&mut first).await;
    let mut second = stand(&etcd.endpoint(), 1).await;
    within(3, first.resign()).await;
    let resigned = Instant::now();
    assert!(leads(&mut second).await > term);
    assert!(resigned.elapsed() < Duration::from_secs(3), "{:?}", resigned.elapsed());
}

/// A leader that was paused for longer than its time to live still believes that it leads. Its term
/// prevents its writes.
#[tokio::test]
async fn writes_of_a_deposed_leader_have_no_effect_and_it_learns_that_it_was_deposed() {
    let (etcd, store) = start().await;
    let made = store.create(&shard(5).shard(), &shard(5)).await.expect("an answer");
    let CasOutcome::Done { mod_revision: revision } = made else { panic!("{made:?}") };
    let mut old = stand(&etcd.endpoint(), 0).await;
    let term = leads(&mut old).await;
    // The lease vanishes, as if the process had been paused.
    let key = raw(&etcd).await.get("/dkc/test/coordinator", None).await.expect("etcd answers");
    let lease = key.kvs()[0].lease();
    raw(&etcd).await.lease_revoke(lease).await.expect("etcd answers");

    let newer = at_version(shard(5), 2);
    let late = cas_shards(&store, [(&newer, revision)], term).await.expect("an answer");
    assert_eq!(late, CasOutcome::Failed);
    assert_eq!(within(5, old.next()).await, Some(LeadershipChange::Standby));
    let again = leads(&mut old).await;
    assert!(again > term, "a new term");
    let now = cas_shards(&store, [(&newer, revision)], again).await.expect("an answer");
    assert!(matches!(now, CasOutcome::Done { .. }));
}

/// All leases expire when etcd resumes; still only one candidate leads.
#[tokio::test]
async fn an_etcd_that_was_paused_elects_one_leader() {
    let (etcd, store) = start().await;
    let mut elections = vec![stand(&etcd.endpoint(), 0).await, stand(&etcd.endpoint(), 1).await];
    let (_, term) = first(&mut elections).await;
    etcd.freeze();
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    etcd.thaw();
    let (winner, next_term) = first(&mut elections).await;
    assert!(next_term > term);
    assert_eq!(leader(&store).await, Some((candidate(winner).address, next_term)));
}
