//! The kill loop: two stores count, and the process dies at every named point, again and again, on
//! the same disks.
//!
//! ```text
//!   child    counts, flushes, rolls, trims, drops and installs copies … and is killed at a point
//!   parent   cuts the power (every third time: what no sync covered is undone) or tears what was
//!            not durable (half of the others), starts both stores on what is left, reads every
//!            counter, recomputes every digest from the rows … and starts the next child
//! ```

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use storage_node::kill::POINTS;

use crate::client::Client;
use crate::ledger::Ledger;
use crate::pair::Pair;
use crate::power::{self, LostWrites, ShadowedDisk};
use crate::torn;

const FOLDER: &str = "DKC_KILL_FOLDER";
/// A child that lives longer will never reach its point.
const CHILD_LIVES: Duration = Duration::from_secs(20);
const SIGKILL: i32 = 9;

/// A point, the number of times that it is reached, and for one point a delay in µs.
type Death = (&'static str, u64, u64);

fn plan() -> Vec<Death> {
    let mut deaths = Vec::new();
    for times in [1, 2, 7] {
        // These points are reached at most twice per start, or per child.
        let seldom = |point: &str| point.starts_with("open.") || point.starts_with("drop.");
        let points = POINTS.iter().filter(|point| times < 3 || !seldom(point));
        deaths.extend(points.filter(|point| **point != STALE).map(|&point| (point, times, 0)));
    }
    // These kills are in the middle of RocksDB's one call, at different moments.
    deaths.extend([100, 300, 600, 1_000, 2_000, 4_000].map(|us| ("ingest.during", 5, us)));
    deaths
}

/// The point is reached only by a start that finds rows of a dropped copy: after a kill before
/// their removal.
const STALE: &str = "open.dropped-stale";

#[test]
#[cfg_attr(not(feature = "kill-points"), ignore = "needs --features storage-node/kill-points")]
fn nothing_is_lost_or_doubled_wherever_the_process_dies() {
    let mut folder = tempfile::tempdir().unwrap();
    // The folder of a failed run is kept for inspection.
    folder.disable_cleanup(true);
    report(&format!("in {}", folder.path().display()));
    let began = Instant::now();
    let mut run = 1;
    // The first start has nothing to rewrite.
    verify(folder.path(), run);
    let shim = power::build_shim(folder.path()).unwrap();
    let disk = ShadowedDisk {
        root: folder.path().join("store-").display().to_string(),
        shadow: folder.path().join("shadow"),
        kept: folder.path().join("kept"),
    };
    let (mut deaths, mut cut) = (0u64, LostWrites::default());
    let mut reached = Vec::new();
    for (number, death) in plan().into_iter().enumerate() {
        run += 1;
        report(&format!("{death:?}"));
        let cuts = number % 3 == 0;
        let remembers = cuts.then_some((&*shim, &disk));
        assert!(dies(folder.path(), run, death, remembers), "{death:?} was never reached");
        deaths += 1;
        reached.push(death.0);
        if cuts {
            let lost = disk.cut().unwrap();
            cut.files += lost.files;
            cut.names += lost.names;
        } else if number % 2 == 1 {
            torn::tear(folder.path(), run);
        }
        run += 1;
        verify(folder.path(), run);
    }
    // The rows are removed right after the log records it, or only after a flush: it takes a few
    // attempts to hit the time in between.
    let stale = (0..20).any(|_| {
        run += 2;
        let dropped = dies(folder.path(), run - 1, ("drop.begun", 1, 0), None);
        assert!(dropped, "no copy was dropped");
        let stale = dies(folder.path(), run, (STALE, 1, 0), None);
        deaths += 1 + u64::from(stale);
        run += 1;
        verify(folder.path(), run);
        stale
    });
    assert!(stale, "no start found stale rows");
    reached.push(STALE);
    for point in POINTS {
        assert!(reached.contains(point), "{point} was never reached");
    }
    let seconds = began.elapsed().as_secs();
    folder.disable_cleanup(false);
    let ledger = Ledger::open(&folder.path().join("ledger"));
    let there: u32 = ledger.counters.values().map(|counter| counter.there.count_ones()).sum();
    let gone: u32 = ledger.counters.values().map(|counter| counter.gone.count_ones()).sum();
    report(&format!(
        "died {deaths} times, at all of {} points; {there} adds are there, {gone} were never \
         acknowledged and are not; power cuts undid bytes of {} files and {} names; {seconds} s",
        POINTS.len(),
        cut.files,
        cut.names,
    ));
    assert!(there > 10_000, "too little was counted to prove anything");
    assert!(gone > 100, "too few adds were in flight at a kill");
    assert!(cut.files > 0 && cut.names > 0, "no cut of the power undid anything: {cut:?}");
}

/// Prints a line of the test's output: its result, or its place when it failed.
#[expect(clippy::print_stdout, reason = "it is the test's output")]
fn report(line: &str) {
    println!("kill loop: {line}");
}

/// Runs a child until it is killed, on a disk that remembers what was synced if `remembers` is set.
/// Returns `false` if the child ended by itself.
fn dies(
    folder: &Path,
    run: u64,
    (point, times, us): Death,
    remembers: Option<(&Path, &ShadowedDisk)>,
) -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap());
    if let Some((shim, disk)) = remembers {
        child.env("LD_PRELOAD", shim).envs(disk.environment());
    }
    let output = child
        .args(["--exact", "kills::child", "--ignored", "--nocapture"])
        .env(FOLDER, folder)
        .env("DKC_KILL_RUN", run.to_string())
        .env("DKC_KILL", format!("{point}:{times}"))
        .env("DKC_KILL_US", us.to_string())
        .output()
        .unwrap();
    if output.status.success() {
        return false;
    }
    let killed = output.status.signal() == Some(SIGKILL);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(killed, "at {point}:{times} the child ended with {}: {text}", output.status);
    true
}

/// The child's work, until it is killed.
#[test]
#[ignore = "the kill loop starts it"]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let run = std::env::var("DKC_KILL_RUN").unwrap().parse().unwrap();
    let began = Instant::now();
    let mut pair = Pair::start(folder.as_ref());
    let mut client = Client::new(run);
    let mut next_change = [10, 20];
    // A start that does not reach the point ends by itself.
    let lives = match std::env::var("DKC_KILL").unwrap().starts_with("open.") {
        true => Duration::ZERO,
        false => CHILD_LIVES,
    };
    while began.elapsed() < lives {
        client.pump(&mut pair);
        pair.turn();
        for (shard, next_change) in next_change.iter_mut().enumerate() {
            if client.answered >= *next_change && change_members(&mut pair, shard) {
                *next_change = client.answered + 20;
            }
        }
    }
}

/// Drops and fills the follower's copy in turn, as soon as the previous step is done.
fn change_members(pair: &mut Pair, shard: usize) -> bool {
    let primary = pair.primary(shard);
    let record = pair.record(shard);
    if !record.learners.is_empty() || !pair.is_active(shard) {
        return false;
    }
    if record.isr.len() == 2 {
        pair.remove_follower(shard);
        return true;
    }
    // The log must no longer reach back to the beginning: otherwise no snapshot would be needed.
    let gone = pair.view(1 - primary, shard).is_none_or(|view| !view.exists);
    if !gone || pair.oldest_segment(primary) == 1 {
        return false;
    }
    pair.add_learner(shard);
    true
}

/// Starts both stores on the remaining data, and checks everything.
fn verify(folder: &Path, run: u64) {
    for store in 0..2 {
        torn::check_prefix(folder, store);
    }
    let mut pair = Pair::start(folder);
    let mut client = Client::new(run);
    pair.until("both barriers", |pair| (0..2).all(|shard| pair.is_active(shard)));
    client.read_all(&mut pair);
    // Under its token each add counts once, in spite of all kills.
    client.repeat_all(&mut pair);
    client.read_all(&mut pair);
    for shard in 0..2 {
        let (primary, members) = (pair.primary(shard), pair.record(shard).isr.len());
        pair.check_rows(primary, shard);
        if members == 2 {
            pair.until("the follower to apply all", |pair| same_applied(pair, shard));
            let digest = |store| pair.view(store, shard).unwrap().state.counter_digest;
            assert_eq!(digest(0), digest(1), "shard {shard}");
            pair.check_rows(1 - primary, shard);
        }
    }
    assert_eq!(pair.digest_mismatches(), 0);
    assert_eq!(pair.durability_violations(), 0);
}

fn same_applied(pair: &Pair, shard: usize) -> bool {
    let applied = |store| pair.view(store, shard).unwrap().state.applied;
    applied(0) == applied(1)
}
