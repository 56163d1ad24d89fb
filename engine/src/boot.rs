//! Who a starting store is, and whether it may run (DESIGN §6, Identity).
//!
//! A store is told by what lies on its disk, never by its name. Each start takes a new boot number and a new *nonce*,
//! writes both into the log, and then *claims* the store's record in etcd with a compare-and-set:
//!
//! ```text
//!   record read ──▶ look ──▶ Claim: log it, fsync, CAS ──▶ record read ──▶ look ──▶ Serve
//! ```
//!
//! The log first, etcd second: a crash between the two leaves a nonce that only the log knows, and the next start finds
//! itself by the one before. The other way round it would leave a nonce that no disk knows, and the store would be
//! refused for ever. A copy of the folder has the same nonces: whoever of the two starts first moves etcd on, and the
//! other does not know the new one.
//!
//! A name is one store's. A store that takes the name of another, be it an empty folder or one with data, gives that other
//! one up: so it needs an operator's word ([`check_name`]), or a data volume that was not mounted at one boot would be
//! replaced by the empty folder below it.
//!
//! A store that was given up is taken back if its disk returns and some shard still counts on its copy: then everything
//! acknowledged there is on it.
//!
//! What a newcomer gets wrong: a claim whose process died *may still come*. So the log keeps every nonce that was
//! claimed over what etcd holds, not only the last: any of them may be what the next start reads there. Once the record
//! has moved on, claims over what it held before can't succeed any more, and are forgotten.

use crate::config::ShardConfig;
use crate::ids::{Boot, StoreId};
use crate::planted::Planted;
use crate::records::{StoreRecord, StoreStatus};
use crate::store::log::{CLAIMS_MAX, Identity};

/// One start of one store. Told the store's record each time it was read.
#[derive(Clone, Debug)]
pub struct Start {
    cluster: u128,
    store: StoreId,
    suspect: bool,
    /// As the log has it, what this run wrote included.
    known: Option<Identity>,
    /// The last claim of `known` is this run's.
    claimed: bool,
}

/// What to do next.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Step {
    /// Etcd knows this run: it may register and serve. A suspect store's copies must not be promoted.
    Serve { boot: Boot, nonce: u128, suspect: bool },
    /// If nobody answers as this store, write `log` if there is one, wait for its fsync, then put the rest into the
    /// record that was read (or make it). Whatever comes of that, read the record again.
    Claim { log: Option<Identity>, boot: Boot, nonce: u128, status: StoreStatus },
}

/// Why this disk must not run as a store.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// The disk belongs to another cluster.
    OtherCluster { cluster: u128 },
    /// Etcd had a record of this store and has none: it lost something.
    Forgotten,
    /// Etcd holds a nonce that this disk never knew: the disk is older than the store, or another copy of it.
    NotOurs { boot: Boot },
    /// The store was given up: others have its places.
    GivenUp { status: StoreStatus },
    /// Another store of this name runs.
    NameRuns { store: StoreId },
    /// Another store of this name does not run, and there was no word that it is to be replaced.
    NameTaken { store: StoreId },
}

/// Another store, as etcd knows it.
#[derive(Clone, Debug)]
pub struct Other {
    pub store: StoreId,
    pub record: StoreRecord,
    /// A process answers as this store.
    pub answers: bool,
}

/// Whether a store may go by this name. `ours`: its own record, none if etcd has none. `replace`: the operator says that
/// the store which has the name is to be replaced. Returns the stores that are.
pub fn check_name(
    ours: Option<&StoreRecord>,
    name: &str,
    replace: bool,
    others: &[Other],
    planted: Option<Planted>,
) -> Result<Vec<StoreId>, Refusal> {
    let namesakes =
        || others.iter().filter(|it| it.record.name == name && !it.record.status.is_gone());
    if let Some(running) = namesakes().find(|other| other.answers) {
        return Err(Refusal::NameRuns { store: running.store });
    }
    // It had the name before: if the other one was to replace it, that has not come about.
    let is_ours = ours.is_some_and(|record| record.name == name);
    let replaces = replace || Planted::EmptyFolderTakesName.is_in(planted);
    match namesakes().next() {
        Some(taken) if !is_ours && !replaces => Err(Refusal::NameTaken { store: taken.store }),
        _ if is_ours => Ok(vec![]),
        _ => Ok(namesakes().map(|other| other.store).collect()),
    }
}

/// Some shard counts on this store's copy: everything acknowledged there is on it.
pub fn is_counted_on<'a>(
    store: StoreId,
    mut shards: impl Iterator<Item = &'a ShardConfig>,
    planted: Option<Planted>,
) -> bool {
    if Planted::NeededStoreGivenUp.is_in(planted) {
        return false;
    }
    shards.any(|config| config.isr.contains(&store) && !config.tainted.contains(&store))
}

impl Start {
    /// `found`: who the disk says it is. `fresh`: who it becomes if it says nothing. `suspect`: recovery found damage.
    pub fn new(
        cluster: u128,
        suspect: bool,
        found: Option<Identity>,
        fresh: StoreId,
    ) -> Result<Self, Refusal> {
        if let Some(found) = &found
            && found.cluster != cluster
        {
            return Err(Refusal::OtherCluster { cluster: found.cluster });
        }
        let store = found.as_ref().map_or(fresh, |found| found.store);
        Ok(Self { cluster, store, suspect, known: found, claimed: false })
    }

    pub fn store(&self) -> StoreId {
        self.store
    }

    /// The store's record was read, after the key of the run before this one was gone. `counted_on`: what
    /// [`is_counted_on`] said of it, read later than the record; of interest for a store that was given up. `fresh`: a
    /// number that nothing else has, for the nonce if one is needed.
    pub fn look(
        &mut self,
        record: Option<&StoreRecord>,
        counted_on: bool,
        fresh: u128,
    ) -> Result<Step, Refusal> {
        if let Some(identity) = self.known.as_ref().filter(|_| self.claimed)
            && let Some(record) = record
            && record.nonce == identity.nonce()
        {
            let suspect = record.status == StoreStatus::Suspect;
            return Ok(Step::Serve { boot: record.boot, nonce: record.nonce, suspect });
        }
        self.check(record, counted_on)?;
        let log = self.prepare(record, fresh);
        let (boot, nonce) = match &log {
            Some(identity) => (identity.boot, identity.nonce()),
            None => {
                self.known.as_ref().map(|known| (known.boot, known.nonce())).unwrap_or_default()
            }
        };
        let status = match record.map(|record| record.status) {
            _ if self.suspect => StoreStatus::Suspect,
            Some(status) => status.taken_back().unwrap_or(status),
            None => StoreStatus::Active,
        };
        Ok(Step::Claim { log, boot, nonce, status })
    }

    /// The record is one that this disk knows.
    fn check(&self, record: Option<&StoreRecord>, counted_on: bool) -> Result<(), Refusal> {
        let Some(record) = record else {
            // First starts that ended between log and etcd left no record.
            let had_one = self.known.as_ref().is_some_and(|known| known.over.is_some());
            return if had_one { Err(Refusal::Forgotten) } else { Ok(()) };
        };
        if !self.known.as_ref().is_some_and(|known| known.knows(record.nonce)) {
            return Err(Refusal::NotOurs { boot: record.boot });
        }
        let returns = counted_on && record.status.taken_back().is_some();
        match record.status {
            status if status.is_gone() && !returns => Err(Refusal::GivenUp { status }),
            _ => Ok(()),
        }
    }

    /// What must be in the log before the claim; none if it is there.
    fn prepare(&mut self, record: Option<&StoreRecord>, fresh: u128) -> Option<Identity> {
        let over = record.map(|record| record.nonce);
        let stands = self.known.as_ref().filter(|known| known.over == over);
        if self.claimed && stands.is_some() {
            return None;
        }
        let mut claims = stands.map(|known| known.claims.clone()).unwrap_or_default();
        // One run has one nonce, over whatever it claims it.
        let ours = self.known.as_ref().filter(|_| self.claimed).map(Identity::nonce);
        claims.push(ours.unwrap_or(fresh));
        // So many starts ago: what that process sent has long arrived or never will.
        claims.drain(..claims.len().saturating_sub(CLAIMS_MAX));
        let identity = Identity {
            cluster: self.cluster,
            store: self.store,
            boot: next_boot(self.known.as_ref(), record),
            over,
            claims,
        };
        self.known = Some(identity.clone());
        self.claimed = true;
        Some(identity)
    }
}

/// Above every number that etcd may have heard of. As long as etcd has no record it is 1, however often a first start
/// has ended before it came to etcd.
fn next_boot(known: Option<&Identity>, record: Option<&StoreRecord>) -> Boot {
    let local = known.map_or(Boot(0), |identity| identity.boot);
    record.map_or(Boot(1), |record| Boot(record.boot.max(local).0 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u128 = 1;
    const STORE: StoreId = StoreId(2);

    /// Etcd's record of the store, and the log. Starts are numbered by their nonce.
    #[derive(Default)]
    struct Bench {
        etcd: Option<StoreRecord>,
        log: Option<Identity>,
        counted_on: bool,
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

    impl Bench {
        fn start(&self) -> Start {
            Start::new(CLUSTER, false, self.log.clone(), STORE).unwrap()
        }

        /// A start with this nonce that comes as far as its log. Returns the record it would put into etcd.
        fn logs(&mut self, nonce: u128) -> Result<(Start, StoreRecord), Refusal> {
            let mut start = self.start();
            let claim = self.look(&mut start, nonce)?;
            Ok((start, claim))
        }

        fn look(&mut self, start: &mut Start, nonce: u128) -> Result<StoreRecord, Refusal> {
            match start.look(self.etcd.as_ref(), self.counted_on, nonce)? {
                Step::Claim { log, boot, nonce, status } => {
                    self.log = log.or(self.log.take());
                    Ok(record(boot.0, nonce, status))
                }
                serve @ Step::Serve { .. } => panic!("{serve:?} without a claim"),
            }
        }

        /// A whole start.
        fn serves(&mut self, nonce: u128) -> Result<Step, Refusal> {
            let (mut start, claim) = self.logs(nonce)?;
            self.etcd = Some(claim);
            start.look(self.etcd.as_ref(), self.counted_on, 0)
        }
    }

    #[track_caller]
    fn check(bench: &mut Bench, nonce: u128, want: Result<u64, Refusal>) {
        let want = want.map(|boot| Step::Serve { boot: Boot(boot), nonce, suspect: false });
        assert_eq!(bench.serves(nonce), want);
    }

    #[test]
    fn boot_numbers_rise_from_the_first_record_on() {
        let mut bench = Bench::default();
        // Its first start ended between log and etcd, and so did the second: no reason to refuse the third.
        for nonce in [1, 2] {
            assert_eq!(bench.logs(nonce).unwrap().1.boot, Boot(1));
        }
        check(&mut bench, 3, Ok(1));
        check(&mut bench, 4, Ok(2));
        // A later one ended there: its number is used up.
        bench.logs(5).unwrap();
        check(&mut bench, 6, Ok(4));
    }

    /// Story: run 2 logged its nonce and sent its claim; run 3 read the record before that came, logged, and died. Then
    /// the claim of run 2 came: its nonce was two back, the log knew only one, and the store was refused for ever
    /// (simulator, seed 100371).
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
    fn a_late_claim_of_the_run_before_is_moved_over() {
        let mut bench = Bench::default();
        check(&mut bench, 1, Ok(1));
        let (_, late) = bench.logs(2).unwrap();
        let (mut start, _) = bench.logs(3).unwrap();
        bench.etcd = Some(late);
        // Ours was refused. The same nonce, over the new record and with a higher number.
        let again = bench.look(&mut start, 99).unwrap();
        assert_eq!((again.nonce, again.boot), (3, Boot(4)));
        let log = bench.log.clone().unwrap();
        assert_eq!((log.over, log.claims), (Some(2), vec![3]));
        // Told again that nothing came of it: the log has it already.
        let step = start.look(bench.etcd.as_ref(), false, 99).unwrap();
        assert!(matches!(step, Step::Claim { log: None, nonce: 3, .. }), "{step:?}");
        bench.etcd = Some(again);
        let serve = Step::Serve { boot: Boot(4), nonce: 3, suspect: false };
        assert_eq!(start.look(bench.etcd.as_ref(), false, 99), Ok(serve));
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
        check(&mut bench, 4, Err(Refusal::NotOurs { boot: Boot(3) }));
        // An empty disk that is given this store's number knows nothing.
        bench.log = None;
        check(&mut bench, 4, Err(Refusal::NotOurs { boot: Boot(3) }));
    }

    #[test]
    fn what_etcd_lost_or_gave_up_is_refused() {
        let mut bench = Bench::default();
        check(&mut bench, 1, Ok(1));
        check(&mut bench, 2, Ok(2));
        let known = bench.etcd.clone().unwrap();
        bench.etcd = None;
        check(&mut bench, 3, Err(Refusal::Forgotten));
        for status in [StoreStatus::Lost, StoreStatus::Retired] {
            bench.etcd = Some(StoreRecord { status, ..known.clone() });
            check(&mut bench, 3, Err(Refusal::GivenUp { status }));
        }
        let elsewhere = Start::new(9, false, bench.log, STORE);
        assert_eq!(elsewhere.unwrap_err(), Refusal::OtherCluster { cluster: CLUSTER });
    }

    /// Story: three data volumes were not mounted at one boot, empty folders took the three names, all three stores were
    /// given up, and with the disks back the service refused the only copies there were.
    #[test]
    fn a_store_that_was_given_up_is_taken_back_while_a_shard_counts_on_it() {
        for (given_up, back) in [
            (StoreStatus::Lost, Ok(StoreStatus::Active)),
            (StoreStatus::LostSuspect, Ok(StoreStatus::Suspect)),
            (StoreStatus::Retired, Err(Refusal::GivenUp { status: StoreStatus::Retired })),
        ] {
            let mut bench = Bench { counted_on: true, ..Bench::default() };
            check(&mut bench, 1, Ok(1));
            let known = bench.etcd.clone().unwrap();
            bench.etcd = Some(StoreRecord { status: given_up, ..known });
            assert_eq!(bench.logs(2).map(|(_, claim)| claim.status), back);
        }
    }

    #[test]
    fn a_shard_counts_on_members_that_are_not_tainted() {
        let members = |isr: &[u128], tainted: &[u128]| ShardConfig {
            isr: isr.iter().copied().map(StoreId).collect(),
            tainted: tainted.iter().copied().map(StoreId).collect(),
            learners: vec![STORE],
            ..ShardConfig::default()
        };
        let counted_on = |shards: &[ShardConfig]| is_counted_on(STORE, shards.iter(), None);
        assert!(!counted_on(&[members(&[1, 3], &[])]));
        assert!(!counted_on(&[members(&[1, 2], &[2])]));
        assert!(counted_on(&[members(&[1, 3], &[]), members(&[1, 2], &[1])]));
    }

    #[test]
    fn a_name_changes_hands_by_an_operators_word_only() {
        let namesake =
            |status, answers| Other { store: StoreId(9), record: record(1, 1, status), answers };
        #[track_caller]
        fn check(
            ours: Option<&str>,
            replace: bool,
            other: Other,
            want: Result<Vec<StoreId>, Refusal>,
        ) {
            let ours = ours
                .map(|name| StoreRecord { name: name.into(), ..record(1, 1, StoreStatus::Active) });
            assert_eq!(check_name(ours.as_ref(), "a", replace, &[other], None), want);
        }
        let store = StoreId(9);
        let (away, runs) =
            (namesake(StoreStatus::Active, false), namesake(StoreStatus::Active, true));
        // An empty folder, and one that had another name (its disk is in another machine).
        for ours in [None, Some("b")] {
            check(ours, false, away.clone(), Err(Refusal::NameTaken { store }));
            check(ours, true, away.clone(), Ok(vec![store]));
            check(ours, true, runs.clone(), Err(Refusal::NameRuns { store }));
            check(ours, false, namesake(StoreStatus::Lost, false), Ok(vec![]));
        }
        // It had the name before: nothing is taken from anything.
        check(Some("a"), false, away, Ok(vec![]));
        check(Some("a"), false, runs, Err(Refusal::NameRuns { store }));
    }

    #[test]
    fn a_status_is_kept_and_damage_makes_it_suspect() {
        let mut bench = Bench::default();
        check(&mut bench, 1, Ok(1));
        let draining = StoreRecord { status: StoreStatus::Draining, ..bench.etcd.clone().unwrap() };
        bench.etcd = Some(draining);
        assert_eq!(bench.logs(2).unwrap().1.status, StoreStatus::Draining);
        let mut damaged = Start::new(CLUSTER, true, bench.log.clone(), STORE).unwrap();
        bench.etcd = Some(bench.look(&mut damaged, 3).unwrap());
        let step = damaged.look(bench.etcd.as_ref(), false, 0).unwrap();
        assert!(matches!(step, Step::Serve { suspect: true, .. }), "{step:?}");
        // It stays so, over a start that finds nothing wrong, until the copies are made anew.
        let (_, claim) = bench.logs(4).unwrap();
        assert_eq!(claim.status, StoreStatus::Suspect);
    }
}
