//! Tests of starts with a record and a log, step by step.

use super::*;

const CLUSTER: u128 = 1;
const STORE: StoreId = StoreId(2);

/// Etcd's record of the store, and the log. Starts are numbered by their nonce.
#[derive(Default)]
struct Bench {
    etcd: Option<StoreRecord>,
    log: Option<Identity>,
    trusted_member: bool,
}

fn record(boot: u64, nonce: u128, status: StoreStatus) -> StoreRecord {
    StoreRecord {
        name: "a".into(),
        address: "a:1".into(),
        zone: String::new(),
        host: String::new(),
        boot: Boot(boot),
        nonce,
        status,
    }
}

fn wish(replace: bool) -> NameRequest {
    NameRequest { name: "a".into(), replace }
}

fn start(suspect: bool, log: Option<Identity>) -> Start {
    Start::new(CLUSTER, wish(false), suspect, log, STORE).unwrap()
}

impl Bench {
    fn start(&self) -> Start {
        start(false, self.log.clone())
    }

    fn seen(&self) -> EtcdState<'_> {
        EtcdState { record: self.etcd.as_ref(), holder: None, trusted_member: self.trusted_member }
    }

    /// A start with this nonce that ends after its write to the log. Returns the record it would
    /// put into etcd.
    fn logs(&mut self, nonce: u128) -> Result<(Start, StoreRecord), StartRefusal> {
        let mut start = self.start();
        let claim = self.look(&mut start, nonce)?;
        Ok((start, claim))
    }

    fn look(&mut self, start: &mut Start, nonce: u128) -> Result<StoreRecord, StartRefusal> {
        match start.next_step(self.seen(), nonce)? {
            StartStep::Claim(StoreClaim { log, boot, nonce, status, .. }) => {
                self.log = log.or(self.log.take());
                Ok(record(boot.0, nonce, status))
            }
            serve @ StartStep::Serve { .. } => panic!("{serve:?} without a claim"),
        }
    }

    /// A complete start.
    fn serves(&mut self, nonce: u128) -> Result<StartStep, StartRefusal> {
        let (mut start, claim) = self.logs(nonce)?;
        self.etcd = Some(claim);
        start.next_step(self.seen(), 0)
    }
}

#[track_caller]
fn check(bench: &mut Bench, nonce: u128, want: Result<u64, StartRefusal>) {
    let want = want.map(|boot| StartStep::Serve { boot: Boot(boot), nonce, suspect: false });
    assert_eq!(bench.serves(nonce), want);
}

#[test]
fn boot_numbers_rise_from_the_first_record_on() {
    let mut bench = Bench::default();
    // The first start ended between log and etcd, and so did the second: no reason to refuse the
    // third.
    for nonce in [1, 2] {
        assert_eq!(bench.logs(nonce).unwrap().1.boot, Boot(1));
    }
    check(&mut bench, 3, Ok(1));
    check(&mut bench, 4, Ok(2));
    // A later start ended there: its number is used up.
    bench.logs(5).unwrap();
    check(&mut bench, 6, Ok(4));
}

/// Story: boot 2 logged its nonce and sent its claim; boot 3 read the record before that came,
/// logged, and died. Then the claim of boot 2 took effect: its nonce was two back, the log had only
/// one, and the store was refused for ever (simulator, seed 100371).
#[test]
fn a_claim_that_comes_late_is_known_however_many_starts_ago() {
    let mut bench = Bench::default();
    check(&mut bench, 1, Ok(1));
    let (_, late) = bench.logs(2).unwrap();
    for nonce in 3..9 {
        bench.logs(nonce).unwrap();
    }
    bench.etcd = Some(late);
    check(&mut bench, 9, Ok(9));
    // The first record can come as late.
    let mut bench = Bench::default();
    let (_, late) = bench.logs(1).unwrap();
    bench.logs(2).unwrap();
    bench.logs(3).unwrap();
    bench.etcd = Some(late);
    check(&mut bench, 4, Ok(2));
}

#[test]
fn a_late_claim_of_the_boot_before_is_moved_over() {
    let mut bench = Bench::default();
    check(&mut bench, 1, Ok(1));
    let (_, late) = bench.logs(2).unwrap();
    let (mut start, _) = bench.logs(3).unwrap();
    bench.etcd = Some(late);
    // This start's claim was refused. Its next one has the same nonce, over the new record and with
    // a higher number.
    let again = bench.look(&mut start, 99).unwrap();
    assert_eq!((again.nonce, again.boot), (3, Boot(4)));
    let log = bench.log.clone().unwrap();
    assert_eq!((log.read_nonce, log.claims), (Some(2), vec![3]));
    // A second read shows that the claim had no effect: the log has it already.
    let step = start.next_step(bench.seen(), 99).unwrap();
    assert!(matches!(step, StartStep::Claim(StoreClaim { log: None, nonce: 3, .. })), "{step:?}");
    bench.etcd = Some(again);
    let serve = StartStep::Serve { boot: Boot(4), nonce: 3, suspect: false };
    assert_eq!(start.next_step(bench.seen(), 99), Ok(serve));
}

#[test]
fn claims_over_what_has_moved_on_are_forgotten() {
    let mut bench = Bench::default();
    check(&mut bench, 1, Ok(1));
    for nonce in 2..200 {
        bench.logs(nonce).unwrap();
    }
    assert_eq!(bench.log.as_ref().unwrap().claims.len(), CLAIMS_MAX);
    check(&mut bench, 200, Ok(200));
    bench.logs(201).unwrap();
    assert_eq!(bench.log.unwrap().claims, [201]);
}

#[test]
fn a_copy_and_an_older_disk_are_refused() {
    let mut bench = Bench::default();
    check(&mut bench, 1, Ok(1));
    let image = bench.log.clone();
    check(&mut bench, 2, Ok(2));
    check(&mut bench, 3, Ok(3));
    bench.log = image;
    check(&mut bench, 4, Err(StartRefusal::NotOurs { boot: Boot(3) }));
    // An empty disk with this store's id has none of its nonces.
    bench.log = None;
    check(&mut bench, 4, Err(StartRefusal::NotOurs { boot: Boot(3) }));
}

#[test]
fn what_etcd_lost_or_gave_up_is_refused() {
    let mut bench = Bench::default();
    check(&mut bench, 1, Ok(1));
    check(&mut bench, 2, Ok(2));
    let known = bench.etcd.clone().unwrap();
    bench.etcd = None;
    check(&mut bench, 3, Err(StartRefusal::Forgotten));
    for status in [StoreStatus::Lost, StoreStatus::Retired] {
        bench.etcd = Some(StoreRecord { status, ..known.clone() });
        check(&mut bench, 3, Err(StartRefusal::GivenUp { status }));
    }
    let elsewhere = Start::new(9, wish(false), false, bench.log, STORE);
    assert_eq!(elsewhere.unwrap_err(), StartRefusal::OtherCluster { cluster: CLUSTER });
}

/// Story: three data volumes were not mounted at one boot, empty folders took the three names, all
/// three stores were given up, and with the disks back the service refused the only copies there
/// were.
#[test]
fn a_store_that_was_given_up_is_taken_back_while_a_shard_counts_on_it() {
    for (given_up, back) in [
        (StoreStatus::Lost, Ok(StoreStatus::Active)),
        (StoreStatus::LostSuspect, Ok(StoreStatus::Suspect)),
        (StoreStatus::Retired, Err(StartRefusal::GivenUp { status: StoreStatus::Retired })),
    ] {
        let mut bench = Bench { trusted_member: true, ..Bench::default() };
        check(&mut bench, 1, Ok(1));
        let known = bench.etcd.clone().unwrap();
        bench.etcd = Some(StoreRecord { status: given_up, ..known });
        assert_eq!(bench.logs(2).map(|(_, claim)| claim.status), back);
    }
}

#[test]
fn a_shard_counts_on_members_that_are_not_tainted() {
    let members = |isr: &[u128], tainted: &[u128]| ShardRecord {
        isr: isr.iter().copied().map(StoreId).collect(),
        tainted: tainted.iter().copied().map(StoreId).collect(),
        learners: vec![STORE],
        ..ShardRecord::default()
    };
    let trusted_member = |shards: &[ShardRecord]| is_trusted_member(STORE, shards.iter(), None);
    assert!(!trusted_member(&[members(&[1, 3], &[])]));
    assert!(!trusted_member(&[members(&[1, 2], &[2])]));
    assert!(trusted_member(&[members(&[1, 3], &[]), members(&[1, 2], &[1])]));
}

const OTHER: StoreId = StoreId(9);

fn holder(status: StoreStatus, answers: bool) -> NameHolder {
    NameHolder { store: OTHER, record: record(1, 1, status), answers, trusted_member: false }
}

/// The store that loses the name by a claim.
fn replaced(step: StartStep) -> Option<StoreId> {
    match step {
        StartStep::Claim(claim) => claim.replaces,
        serve @ StartStep::Serve { .. } => panic!("{serve:?} without a claim"),
    }
}

#[test]
fn a_name_changes_hands_by_an_operators_consent_only() {
    /// `ours`: the name that the store had until now, if there was a store.
    #[track_caller]
    fn check(
        ours: Option<&str>,
        replace: bool,
        holder: &NameHolder,
        want: Result<Option<StoreId>, StartRefusal>,
    ) {
        let mut bench = Bench::default();
        if let Some(name) = ours {
            bench.serves(1).unwrap();
            bench.etcd.as_mut().unwrap().name = name.into();
        }
        let mut start = Start::new(CLUSTER, wish(replace), false, bench.log, STORE).unwrap();
        let seen =
            EtcdState { record: bench.etcd.as_ref(), holder: Some(holder), trusted_member: false };
        assert_eq!(start.next_step(seen, 2).map(replaced), want);
    }
    let (away, runs) = (holder(StoreStatus::Active, false), holder(StoreStatus::Active, true));
    let renamed =
        NameHolder { record: StoreRecord { name: "b".into(), ..away.record.clone() }, ..runs };
    let runs = holder(StoreStatus::Active, true);
    // An empty folder, and one that had another name (its disk is in another machine).
    for ours in [None, Some("b")] {
        check(ours, false, &away, Err(StartRefusal::NameTaken { store: OTHER }));
        check(ours, true, &away, Ok(Some(OTHER)));
        check(ours, true, &runs, Err(StartRefusal::NameRuns { store: OTHER }));
        check(ours, false, &holder(StoreStatus::Lost, false), Ok(None));
        check(ours, false, &renamed, Ok(None));
    }
    // The store had the name before, and takes it back from one that has no data.
    check(Some("a"), false, &away, Ok(Some(OTHER)));
    let filled = NameHolder { trusted_member: true, ..away };
    check(Some("a"), false, &filled, Err(StartRefusal::NameTaken { store: OTHER }));
    check(Some("a"), true, &filled, Ok(Some(OTHER)));
    check(Some("a"), false, &runs, Err(StartRefusal::NameRuns { store: OTHER }));
}

/// Story: two machines got one name and were started at the same moment. Each read etcd before the
/// other had its record, both served, and when one of them died its store was given up for the
/// other.
#[test]
fn of_two_starts_that_want_one_name_the_second_is_refused() {
    let taken = Err(StartRefusal::NameTaken { store: OTHER });
    let holder = holder(StoreStatus::Active, false);
    for replace in [false, true] {
        let bench = Bench::default();
        let mut start =
            Start::new(CLUSTER, wish(replace), false, bench.log.clone(), STORE).unwrap();
        assert_eq!(start.next_step(bench.seen(), 2).map(replaced), Ok(None));
        // The other start's claim came first, and this one's had no effect.
        let seen = EtcdState { holder: Some(&holder), ..bench.seen() };
        assert_eq!(start.next_step(seen, 2).map(replaced), taken);
    }
}

/// Story: an empty folder was started with `--replace` by mistake and stopped at once. Its claim
/// took effect when the store's own folder was back and had begun to start, and that start was
/// refused (simulator, seed 504809).
#[test]
fn a_store_takes_its_name_back_from_a_claim_that_came_late() {
    let mut bench = Bench::default();
    bench.serves(1).unwrap();
    let mut start = bench.start();
    assert_eq!(start.next_step(bench.seen(), 2).map(replaced), Ok(None));
    let (away, runs) = (holder(StoreStatus::Active, false), holder(StoreStatus::Active, true));
    let seen = EtcdState { holder: Some(&away), ..bench.seen() };
    assert_eq!(start.next_step(seen, 2).map(replaced), Ok(Some(OTHER)));
    let seen = EtcdState { holder: Some(&runs), ..bench.seen() };
    assert_eq!(
        start.next_step(seen, 2).map(replaced),
        Err(StartRefusal::NameRuns { store: OTHER })
    );
}

/// The claim took effect, and its answer came late: another start has taken the name meanwhile.
#[test]
fn a_start_that_has_lost_its_name_does_not_serve() {
    let mut bench = Bench::default();
    let (mut start, claim) = bench.logs(1).unwrap();
    bench.etcd = Some(claim);
    let holder = holder(StoreStatus::Active, false);
    let seen = EtcdState { holder: Some(&holder), ..bench.seen() };
    assert_eq!(start.next_step(seen, 2), Err(StartRefusal::NameTaken { store: OTHER }));
}

/// The coordinator gave up the store between its claim and the next read.
#[test]
fn a_start_that_was_given_up_does_not_serve() {
    let mut bench = Bench::default();
    let (mut start, claim) = bench.logs(1).unwrap();
    let status = StoreStatus::Lost;
    bench.etcd = Some(StoreRecord { status, ..claim });
    assert_eq!(start.next_step(bench.seen(), 2), Err(StartRefusal::GivenUp { status }));
    bench.trusted_member = true;
    let claim = bench.look(&mut start, 2).unwrap();
    assert_eq!((claim.nonce, claim.boot, claim.status), (1, Boot(2), StoreStatus::Active));
    bench.etcd = Some(claim);
    assert!(matches!(start.next_step(bench.seen(), 3), Ok(StartStep::Serve { .. })));
}

#[test]
fn a_status_is_kept_and_damage_makes_it_suspect() {
    let mut bench = Bench::default();
    check(&mut bench, 1, Ok(1));
    let draining = StoreRecord { status: StoreStatus::Draining, ..bench.etcd.clone().unwrap() };
    bench.etcd = Some(draining);
    assert_eq!(bench.logs(2).unwrap().1.status, StoreStatus::Draining);
    let mut damaged = start(true, bench.log.clone());
    bench.etcd = Some(bench.look(&mut damaged, 3).unwrap());
    let step = damaged.next_step(bench.seen(), 0).unwrap();
    assert!(matches!(step, StartStep::Serve { suspect: true, .. }), "{step:?}");
    // The store stays suspect, over a start that finds no damage, until its copies are replaced.
    let (_, claim) = bench.logs(4).unwrap();
    assert_eq!(claim.status, StoreStatus::Suspect);
}
