//! The permitted dependencies between crates (docs/design.md#crates): arrows point down only, and
//! the engine stays pure.
//!
//! A forbidden dependency compiles like an allowed one, so only a test can refuse it. Unused arrows
//! are fine: a crate that is not in the workspace is ignored, but a crate that no table names is an
//! error.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The crates of the workspace, each with those that it may use in any role (normal, build or dev).
const ARROWS: &[(&str, &[&str])] = &[
    ("engine", &[]),
    // Logs, health and metrics, independent of counters.
    ("telemetry", &[]),
    ("proto", &["engine"]),
    ("metastore", &["engine"]),
    ("process", &["metastore", "telemetry"]),
    ("gateway", &["engine", "metastore", "process", "proto", "telemetry"]),
    ("storage-node", &["engine", "metastore", "process", "proto", "telemetry"]),
    ("coordinator", &["engine", "metastore", "process", "proto", "telemetry"]),
    // Clients, and so the benchmark, have no access to internals.
    ("client", &[]),
    ("bench", &["client"]),
    (
        "cli",
        &[
            "bench",
            "client",
            "coordinator",
            "engine",
            "gateway",
            "metastore",
            "process",
            "proto",
            "storage-node",
            "telemetry",
        ],
    ),
    // Real processes are started by their binary and never linked. `proto` encodes the messages of
    // the simulator.
    ("tests", &["engine", "proto"]),
];

/// The crates that the engine may depend on, directly or not. None of them opens a file or a
/// socket, starts a thread or reads a clock.
const UNDER_ENGINE: &[&str] = &["bytes", "engine", "lz4_flex", "xxhash-rust"];

/// Libraries that only one crate may use, each with that crate.
const OWNERS: &[(&str, &str)] = &[("etcd-client", "metastore"), ("rocksdb", "storage-node")];

/// The paths that `engine/clippy.toml` must forbid, so that the lint keeps them out of the code.
const FORBIDDEN_IN_ENGINE: &[&str] = &[
    "std::time::Instant",
    "std::time::Instant::now",
    "std::time::SystemTime",
    "std::time::SystemTime::now",
    "std::thread::spawn",
    "std::thread::sleep",
    "std::sync::Mutex",
    "std::sync::RwLock",
    "std::sync::Condvar",
    "std::fs::File",
    "std::net::TcpStream",
    "std::env::var",
    "std::collections::HashMap",
    "std::collections::HashSet",
];

struct Crate {
    name: String,
    folder: PathBuf,
    dependencies: BTreeSet<String>,
    integration_tests: BTreeSet<String>,
}

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("this crate lies in the workspace's folder").to_path_buf()
}

/// Returns the output of cargo in this workspace.
#[track_caller]
fn cargo(arguments: &[&str]) -> String {
    let cargo = std::env::var_os("CARGO").expect("cargo sets it for the tests that it runs");
    let output =
        Command::new(cargo).args(arguments).current_dir(root()).output().expect("cargo runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {arguments:?} failed: {errors}");
    String::from_utf8(output.stdout).expect("cargo prints UTF-8")
}

fn workspace() -> Vec<Crate> {
    let text = cargo(&["metadata", "--format-version", "1", "--no-deps", "--locked"]);
    let metadata: Value = serde_json::from_str(&text).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    assert!(!packages.is_empty(), "cargo named no package");
    packages.iter().map(read_crate).collect()
}

fn read_crate(package: &Value) -> Crate {
    let manifest = Path::new(text(&package["manifest_path"]));
    let dependencies = package["dependencies"].as_array().expect("a list of dependencies");
    let targets = package["targets"].as_array().expect("a list of targets");
    let is_test = |target: &&Value| {
        target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| text(kind) == "test"))
    };
    Crate {
        name: text(&package["name"]).to_owned(),
        folder: manifest.parent().expect("a manifest lies in a folder").to_path_buf(),
        dependencies: dependencies.iter().map(|one| text(&one["name"]).to_owned()).collect(),
        integration_tests: targets
            .iter()
            .filter(is_test)
            .map(|target| text(&target["name"]).to_owned())
            .collect(),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().expect("cargo's metadata has text here")
}

/// Returns every violation of the tables above.
fn broken(crates: &[Crate]) -> Vec<String> {
    let arrows: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let mut broken = Vec::new();
    for one in crates {
        let Some(allowed) = arrows.get(one.name.as_str()) else {
            broken.push(format!("{} is in no table", one.name));
            continue;
        };
        if one.folder != root().join(&one.name) {
            broken.push(format!("{} lies in {}", one.name, one.folder.display()));
        }
        for dependency in &one.dependencies {
            let ours = arrows.contains_key(dependency.as_str());
            if ours && !allowed.contains(&dependency.as_str()) {
                broken.push(format!("{} -> {dependency}", one.name));
            }
        }
        for (library, owner) in OWNERS {
            if one.dependencies.contains(*library) && one.name != *owner {
                broken.push(format!("{} -> {library}, which is for {owner}", one.name));
            }
        }
    }
    broken
}

fn made_up(name: &str, dependencies: &[&str]) -> Crate {
    Crate {
        name: name.to_owned(),
        folder: root().join(name),
        dependencies: dependencies.iter().map(|&one| one.to_owned()).collect(),
        integration_tests: BTreeSet::new(),
    }
}

#[test]
fn arrows_point_down() {
    assert_eq!(broken(&workspace()), Vec::<String>::new());
}

#[test]
fn an_arrow_up_is_noticed() {
    let crates = [
        made_up("engine", &["bytes", "proto"]),
        made_up("gateway", &["engine", "etcd-client"]),
        made_up("stranger", &[]),
        Crate { folder: root().join("elsewhere"), ..made_up("proto", &["engine"]) },
    ];
    let elsewhere = root().join("elsewhere");
    let want = [
        "engine -> proto".to_owned(),
        "gateway -> etcd-client, which is for metastore".to_owned(),
        "stranger is in no table".to_owned(),
        format!("proto lies in {}", elsewhere.display()),
    ];
    assert_eq!(broken(&crates), want);
}

#[test]
fn the_engine_reaches_nothing_impure() {
    // `cargo tree` resolves features for the engine alone, which the metadata does not.
    let tree = cargo(&[
        "tree",
        "--locked",
        "-p",
        "engine",
        "--edges",
        "normal,build,dev",
        "--prefix",
        "none",
        "--format",
        "{lib} {p}",
    ]);
    let reached: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    let allowed: BTreeSet<&str> = UNDER_ENGINE.iter().copied().collect();
    assert!(reached.contains("bytes"), "cargo tree was misread: {tree}");
    assert_eq!(reached.difference(&allowed).collect::<Vec<_>>(), Vec::<&&str>::new());
}

#[test]
fn the_lints_keep_the_engine_pure() {
    let path = root().join("engine/clippy.toml");
    let settings = std::fs::read_to_string(&path).expect("engine/clippy.toml is there");
    for forbidden in FORBIDDEN_IN_ENGINE {
        assert!(settings.contains(&format!("path = \"{forbidden}\"")), "{forbidden} is allowed");
    }
}

/// The code must not switch the lint off, which the settings would not show.
#[test]
fn the_engine_does_not_switch_its_lints_off() {
    let mut folders = vec![root().join("engine")];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the engine") {
            let path = entry.expect("an entry of the engine's folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs" || ending == "toml") {
                let text = std::fs::read_to_string(&path).expect("a file of the engine");
                for lint in ["clippy::disallowed", "disallowed_methods", "disallowed_types"] {
                    assert!(!text.contains(lint), "{} mentions {lint}", path.display());
                }
                files += 1;
            }
        }
    }
    assert!(files > 10, "only {files} files found: was the engine moved?");
}

/// `./test` lists its steps one by one, so a new file of integration tests could be missing there.
#[test]
fn every_integration_test_is_a_step_of_the_test_script() {
    let script = std::fs::read_to_string(root().join("test")).expect("the script ./test");
    for one in workspace() {
        for test in one.integration_tests {
            let named = script.split_whitespace().zip(script.split_whitespace().skip(1));
            let is_a_step = named.into_iter().any(|pair| pair == ("--test", test.as_str()));
            assert!(is_a_step, "./test does not run {}/tests/{test}.rs", one.name);
        }
    }
}
