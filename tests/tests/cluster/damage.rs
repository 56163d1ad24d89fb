//! A byte changes on a disk, under a running node or while the node is down. The damage is
//! detected, the copies of the node leave the in-sync sets and are filled again by the others, and
//! no value is ever wrong. No operator has to act.
//!
//! The detection differs per kind of file; `storage-node/tests/disk` tests each for the disk alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use engine::store::log::group::{SEGMENT_HEADER_BYTES, next_magic};
use tests::cluster::load::Load;
use tests::cluster::{Cluster, dkc_binary, until};

use super::{SOON, check_filled, fill};

/// Flags for many small files.
const FLAGS: [&str; 7] =
    ["--shards", "6", "--", "--segment-bytes", "65536", "--flush-after-ms", "300"];
const KEYS: u64 = 2_000;

/// A file of the state or the log of a node.
enum File {
    /// The file with the largest number among those whose names begin and end like this.
    State(&'static str, &'static str),
    /// The oldest or the newest segment with a group behind the first one, which has the identity of
    /// the node: without that a node does not start.
    Segment { newest: bool },
}

impl File {
    fn find(&self, data: &Path) -> PathBuf {
        let (folder, begin, end, newest) = match self {
            Self::State(begin, end) => ("state", *begin, *end, true),
            Self::Segment { newest } => ("log", "", ".log", *newest),
        };
        let files = fs::read_dir(data.join(folder)).expect("a node's folder");
        let named = |path: &PathBuf| {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            name.starts_with(begin) && name.ends_with(end)
        };
        let mut files: Vec<_> =
            files.map(|file| file.expect("a file").path()).filter(named).collect();
        if matches!(self, Self::Segment { .. }) {
            let has_more =
                |path: &PathBuf| fs::read(path).is_ok_and(|it| second_group(&it).is_some());
            files.retain(has_more);
        }
        files.sort();
        let file = if newest { files.pop() } else { files.into_iter().next() };
        file.unwrap_or_else(|| panic!("no {begin}…{end} in {}", data.display()))
    }

    /// Changes a byte in the middle of the written part of the file; of a segment, behind its first
    /// group.
    fn damage(&self, data: &Path) {
        use std::os::unix::fs::FileExt;
        let path = self.find(data);
        let bytes = fs::read(&path).expect("a file that stays");
        let used = bytes.iter().rposition(|&byte| byte != 0).expect("it was written to");
        let first = match self {
            Self::State(..) => 0,
            Self::Segment { .. } => second_group(&bytes).expect("a segment with two groups"),
        };
        let at = first.midpoint(used);
        let file = fs::File::options().write(true).open(&path).expect("a file of our own");
        file.write_all_at(&[bytes[at] ^ 0x10], at as u64).expect("written");
        file.sync_all().expect("on the disk");
    }
}

/// Returns where the second group of a segment begins, if there is one.
fn second_group(segment: &[u8]) -> Option<usize> {
    next_magic(segment, SEGMENT_HEADER_BYTES + 1)
}

/// Runs `dkc scrub`. Returns its output, and whether it found no damage.
fn scrub(cluster: &Cluster, name: &str) -> (String, bool) {
    let node = cluster.process(name);
    let (etcd, own) = (node.value_of("--etcd"), node.value_of("--cluster"));
    let mut command = Command::new(dkc_binary());
    command.args(["scrub", name, "--rate", "1000", "--etcd", etcd, "--cluster", own]);
    let output = command.output().expect("dkc runs");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    (printed, output.status.success())
}

/// Waits until the log of a node contains `what` after the offset `from`.
#[track_caller]
fn wait_for_log(cluster: &Cluster, name: &str, from: usize, what: &str) {
    until(SOON, || {
        let log = cluster.log(name);
        let new = log.get(from..).unwrap_or_default();
        if new.contains(what) {
            Ok(())
        } else {
            Err(format!("the log of {name} does not contain {what:?}: {new}"))
        }
    });
}

/// Waits until every node is up and not suspect, and every copy is in sync.
#[track_caller]
fn wait_until_healed(cluster: &Cluster) {
    until(Duration::from_secs(120), || {
        let status = tests::cluster::status(&cluster.gateways())?;
        let nodes = status["nodes"].as_array().ok_or("no nodes")?;
        match nodes.iter().find(|node| node["state"] != "up") {
            None => Ok(()),
            Some(node) => Err(format!("{node}")),
        }
    });
    cluster.wait_until_full(3);
}

#[test]
fn a_byte_changed_under_a_running_node_is_found_and_healed() {
    let flags: Vec<&str> = ["--respawn"].iter().chain(&FLAGS).copied().collect();
    let cluster = Cluster::start(&flags);
    cluster.wait_until_full(3);
    let load = Load::start(&cluster.gateways(), "probe", &cluster.key_per_shard("probe"));
    let files = [
        ("node-1", File::Segment { newest: false }),
        ("node-2", File::State("", ".sst")),
        ("node-3", File::State("MANIFEST", "")),
        ("node-1", File::State("CURRENT", "")),
        ("node-2", File::Segment { newest: true }),
    ];
    let mut rounds = 0;
    for (name, file) in files {
        fill(&cluster, "rot", KEYS, 5);
        rounds += 5;
        let from = cluster.log(name).len();
        file.damage(&cluster.process(name).data());
        // A compaction or a read may have found the damage before.
        let (output, well) = scrub(&cluster, name);
        assert!(!well, "{output}");
        wait_for_log(&cluster, name, from, "suspect=true");
        check_filled(&cluster, "rot", KEYS, rounds);
        wait_until_healed(&cluster);
        check_filled(&cluster, "rot", KEYS, rounds);
    }
    for name in ["node-1", "node-2", "node-3"] {
        let (output, well) = scrub(&cluster, name);
        assert!(well && output.contains("no damage found in 6 copies"), "{output}");
    }
    load.stop().check(&cluster.gateway);
    cluster.wait_until_copies_agree(3);
}

#[test]
fn a_byte_changed_while_the_node_is_away_is_found_at_its_start_and_healed() {
    let cluster = Cluster::start(&FLAGS);
    cluster.wait_until_full(3);
    let files = [
        ("node-1", File::Segment { newest: false }, true),
        ("node-2", File::State("MANIFEST", ""), true),
        ("node-3", File::State("CURRENT", ""), true),
        // No data depend on these files.
        ("node-1", File::State("OPTIONS", ""), false),
        ("node-2", File::State("IDENTITY", ""), false),
    ];
    let mut rounds = 0;
    for (name, file, matters) in files {
        fill(&cluster, "rot", KEYS, 5);
        rounds += 5;
        let node = cluster.kill(name);
        let from = cluster.log(name).len();
        file.damage(&node.data());
        cluster.start_again(&node);
        wait_for_log(&cluster, name, from, "identity claimed");
        if matters {
            wait_for_log(&cluster, name, from, "damage found on the disk");
        }
        wait_until_healed(&cluster);
        check_filled(&cluster, "rot", KEYS, rounds);
    }
    cluster.wait_until_copies_agree(3);
}

/// The identity of a node is in its log alone. A node without identity must not start as another
/// one, and logs what to do.
#[test]
fn a_node_without_identity_logs_what_to_do() {
    let cluster = Cluster::start(&FLAGS);
    fill(&cluster, "rot", KEYS, 1);
    let node = cluster.kill("node-3");
    for file in fs::read_dir(node.data().join("log")).expect("its log") {
        fs::write(file.expect("a file").path(), [7; 4_096]).expect("a file of our own");
    }
    assert_eq!(cluster.exit_code_of("nameless", &node.argv, SOON), 5);
    let log = cluster.log("nameless");
    assert!(
        log.contains("delete the store's folder and start with --replace to be a new store"),
        "{log}"
    );
    fs::remove_dir_all(node.data()).expect("the folder of a node that is dead");
    cluster.start_replacing(&node);
    wait_until_healed(&cluster);
    check_filled(&cluster, "rot", KEYS, 1);
    cluster.wait_until_copies_agree(3);
}
