//! A node that was down catches up: from the logs of its peers, or by snapshots where the logs do
//! not reach back far enough.

use std::io::Write;
use std::time::{Duration, Instant};

use tests::cluster::Cluster;
use tests::cluster::http::Client;

use crate::{SOON, fill};

/// Flags for small blocks and segments, so that a second of writes fills many of them and little of
/// it is in memory.
const SMALL: [&str; 11] = [
    "--shards",
    "2",
    "--",
    "--segment-bytes",
    "65536",
    "--log-block-bytes",
    "16384",
    "--flush-after-ms",
    "300",
    "--memory-bytes",
    "134217728",
];
/// Writes of more than the 5 MiB of log that a node with this memory limit keeps in memory.
const KEYS: u64 = 5_000;
const ROUNDS: u64 = 400;
/// The log line of node-3 for a received snapshot.
const COPIED: &str = "snapshot received";

/// Stops node-3 while `write` writes. Returns the time that it then takes to be in sync.
fn away_while(cluster: &Cluster, write: impl FnOnce(&Cluster)) -> Duration {
    let copies = cluster.names("storage-node").len();
    cluster.wait_until_full(copies);
    let node = cluster.kill("node-3");
    write(cluster);
    cluster.start_again(&node);
    let began = Instant::now();
    cluster.wait_until_full(copies);
    let took = began.elapsed();
    cluster.wait_until_copies_agree(copies);
    took
}

fn copies(cluster: &Cluster) -> usize {
    cluster.log("node-3").matches(COPIED).count()
}

/// Returns the CPU time of all nodes in clock ticks (10 ms each).
fn cpu_ticks(cluster: &Cluster) -> u64 {
    let nodes = cluster.processes().into_iter().filter(|one| one.name.starts_with("node-"));
    let ticks = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        let fields: Vec<u64> = fields.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
        fields[11] + fields[12]
    };
    nodes.map(|node| ticks(node.pid)).sum()
}

/// Regression: a follower that lagged by more than the log in memory and one block was sent the
/// same empty slice for ever, at the speed of the disk.
#[test]
fn a_node_that_lags_by_many_blocks_is_filled_from_the_log() {
    let cluster = Cluster::start(&SMALL);
    let before = copies(&cluster);
    away_while(&cluster, |cluster| fill(cluster, "lag", KEYS, ROUNDS));
    assert_eq!(copies(&cluster), before, "the log holds all missing entries");
    let (began, spent) = (Instant::now(), cpu_ticks(&cluster));
    std::thread::sleep(Duration::from_secs(3)); // The test measures CPU time per second.
    let ticks = cpu_ticks(&cluster) - spent;
    let of_a_core = ticks as f64 / 100.0 / began.elapsed().as_secs_f64();
    assert!(of_a_core < 0.5, "idle nodes use {of_a_core:.2} of a core");
}

#[test]
fn a_node_that_lags_by_more_than_the_log_keeps_is_filled_by_copies() {
    let cluster = Cluster::start(&[&SMALL[..], &["--log-keep-bytes", "65536"]].concat());
    let before = copies(&cluster);
    away_while(&cluster, |cluster| fill(cluster, "lag", KEYS, ROUNDS));
    assert!(copies(&cluster) > before, "the log does not hold all missing entries");
}

/// Returns a key of 990 bytes that hardly compresses.
fn long_key(number: u64) -> String {
    let mut state = number;
    let mut key = format!("{number}-");
    while key.len() < 990 {
        // splitmix64: the same key for the same number, and all of them different.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        key += &format!("{:016x}", word ^ (word >> 31));
    }
    key
}

/// Counts `keys` long keys `rounds` times by `dkc count`, which retries refused batches.
fn fill_long(cluster: &Cluster, keys: u64, rounds: u64) {
    let path = cluster.folder().join(format!("long-{keys}"));
    if !path.exists() {
        let file = std::fs::File::create(&path).expect("a file in a folder of our own");
        let mut file = std::io::BufWriter::new(file);
        for number in 0..keys {
            writeln!(file, "{}", long_key(number)).expect("room on the disk");
        }
    }
    for _ in 0..rounds {
        let mut count = cluster.dkc(&["count", "long", "--batch", "4000"]);
        let output = count.arg(&path).output().expect("dkc count runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Returns the bytes of log that node-1 has written, from the number of its newest segment (of
/// default size).
fn log_written(cluster: &Cluster) -> u64 {
    let log = cluster.process("node-1").data().join("log");
    let names = std::fs::read_dir(log).expect("the log").filter_map(Result::ok);
    let number = |name: std::fs::DirEntry| -> Option<u64> {
        name.file_name().to_str()?.strip_suffix(".log")?.parse().ok()
    };
    names.filter_map(number).max().unwrap_or(0) * (64 << 20)
}

/// Stops node-3 while at least so many bytes of log are written, and prints the actual number, the
/// time until the node is in sync and the snapshots that it took meanwhile. Returns the latter.
#[expect(clippy::print_stdout, reason = "the times are what it is run for")]
fn away_for(cluster: &Cluster, bytes: u64, what: &str, write: impl Fn(&Cluster)) -> usize {
    // A node that registers after the shards were placed takes snapshots first.
    cluster.wait_until_full(cluster.names("storage-node").len());
    let before = copies(cluster);
    let mut written = 0;
    let took = away_while(cluster, |cluster| {
        let before = log_written(cluster);
        while written < bytes {
            write(cluster);
            written = log_written(cluster) - before;
        }
    });
    let gib = written as f64 / f64::from(1 << 30);
    let copies = copies(cluster) - before;
    let took = took.as_secs_f64();
    println!("{what}: {gib:.1} GiB of log behind, in sync after {took:.1} s, {copies} snapshots");
    copies
}

/// Counts half a million keys of 990 bytes twice, at the maximum speed of the log.
fn long_keys(cluster: &Cluster) {
    fill_long(cluster, 500_000, 2);
}

/// Adds to 200,000 short keys for 25 seconds, about a hundred million increments.
fn short_keys(cluster: &Cluster) {
    let load = ["--clients", "16", "--batch", "1000", "--keys", "200000", "--seconds", "25"];
    let mut bench = cluster.dkc(&[&["bench"][..], &load].concat());
    let status = bench.output().expect("dkc bench runs").status;
    assert!(status.success(), "{status}");
}

/// A log of 8 GiB holds all entries written meanwhile; the default of 1 GiB does not.
const LARGE_LOG: [&str; 3] = ["--", "--log-keep-bytes", "8589934592"];
/// Flags for four copies of which three are needed: with one node down, the in-sync sets are at
/// `min_in_sync`.
const FOUR: [&str; 6] = ["--nodes", "4", "--replicas", "4", "--min-in-sync", "3"];

/// Measures 4 GiB of lag, with the default log of 1 GiB and with a larger one that holds it all.
/// All other limits are defaults. The printed lines are in docs/reliability.md.
fn gigabytes_of_lag(shape: &[&str]) {
    for (log, flags, whole) in [("as shipped", &[][..], false), ("8 GiB", &LARGE_LOG, true)] {
        let cluster = Cluster::start(&[shape, flags].concat());
        let what = format!("log {log}, keys of 990 bytes");
        let copies = away_for(&cluster, 4 << 30, &what, long_keys);
        assert_eq!(copies == 0, whole, "{copies} snapshots: the log holds all entries: {whole}");
    }
}

#[test]
#[ignore = "minutes, gigabytes of disk: ./test --full"]
fn gigabytes_of_lag_of_one_in_three() {
    gigabytes_of_lag(&[]);
}

#[test]
#[ignore = "minutes, gigabytes of disk: ./test --full"]
fn gigabytes_of_lag_of_one_in_four() {
    gigabytes_of_lag(&FOUR);
}

#[test]
#[ignore = "minutes, gigabytes of disk: ./test --full"]
fn gigabytes_of_lag_of_short_keys() {
    let cluster = Cluster::start(&LARGE_LOG);
    let copies = away_for(&cluster, 2 << 30, "log 8 GiB, short keys", short_keys);
    assert_eq!(copies, 0, "the log holds all missing entries");
}

/// Regression: after a snapshot of more than one file into a wiped folder, the member stayed a
/// learner and the primary read the same block for ever.
#[test]
fn a_wiped_node_takes_a_copy_of_several_files() {
    let cluster = Cluster::start(&["--shards", "1"]);
    cluster.wait_until_full(3);
    fill_long(&cluster, 110_000, 1);
    let node = cluster.kill("node-3");
    std::fs::remove_dir_all(node.data()).expect("the folder of a node that is dead");
    cluster.start_replacing(&node);
    cluster.wait_until_full(3);
    cluster.wait_until_copies_agree(3);
    let body = serde_json::json!({ "keys": [long_key(0), long_key(109_999)] }).to_string();
    let headers = [("Content-Type", "application/json")];
    let mut client = Client::new(&cluster.gateway);
    let answer = client.call("POST", "/v1/counters/long/get", &headers, body.as_bytes(), SOON);
    let counters = answer.expect("a gateway that lives").body;
    assert_eq!(counters["counters"][1]["value"], 1, "{counters}");
}
