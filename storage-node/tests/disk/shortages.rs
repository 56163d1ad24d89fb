//! Shortages of bytes, inodes and open files: the disk waits, reports it, goes on by itself, and
//! nothing is mistaken for damage.
//!
//! Each case is a process of its own: with a small file system or a limit of its own.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use engine::ids::{Conn, CopyNo, Slots};
use engine::node::Event;
use engine::store::layout;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use storage_node::disk_settings::DiskSettings;
use storage_node::error::Shortage;
use storage_node::snapshot_files::NotStaged;

use crate::opening::Bench;
use crate::pair::settings;
use crate::running::{counter, flush, flush_of, load};

const FOLDER: &str = "DKC_SHORTAGES_FOLDER";

/// Runs the test of this name alone in a new process, on a file system of its own if there are
/// options for one.
#[track_caller]
fn alone(test: &str, tmpfs: Option<&str>) {
    let folder = tempfile::tempdir().unwrap();
    let exe = std::env::current_exe().unwrap();
    let name = format!("shortages::{test}");
    let arguments = ["--exact", &name, "--ignored", "--nocapture"];
    let mut command = match tmpfs {
        None => Command::new(&exe),
        Some(options) => {
            let mut command = Command::new("unshare");
            let how = if rustix::process::geteuid().is_root() { "-m" } else { "-Urm" };
            command.args([
                how,
                "sh",
                "-c",
                "mount -t tmpfs -o \"$0\" none \"$1\" && shift && exec \"$@\"",
            ]);
            command.arg(options).arg(folder.path()).arg(&exe);
            command
        }
    };
    let output = command.args(arguments).env(FOLDER, folder.path()).output().unwrap();
    let output_text = [&output.stdout[..], &output.stderr[..]].concat();
    let output_text = String::from_utf8_lossy(&output_text);
    assert!(output.status.success() && output_text.contains("1 passed"), "{output_text}");
    assert_eq!(output.status.signal(), None);
}

/// Returns `None` if all ignored tests are run, and not by [`alone`].
fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

fn no_reserve(folder: &Path) -> DiskSettings {
    DiskSettings { free_bytes_min: 0, free_inodes_min: 0, ..settings(folder) }
}

/// Opens a store with a copy in which `a` is 5.
fn bench(folder: &Path) -> Bench {
    let mut bench = Bench::with(no_reserve(&folder.join("d"))).unwrap();
    bench.begin_copy();
    bench.append(1, 0);
    flush(&mut bench, 1, &[("a", 5)]);
    assert!(matches!(bench.event(), Event::Ingested { flush: 1 }));
    bench
}

/// Checks that the folder holds an intact store, and that `a` is this.
#[track_caller]
fn is_well(folder: &Path, bench: Bench, want: i128) {
    drop(bench);
    let mut bench = Bench::with(no_reserve(&folder.join("d"))).unwrap();
    assert!(!bench.opened.is_suspect(), "{:?}", bench.opened.damage);
    assert!(!folder.join("d/damage").exists());
    assert_eq!(load(&mut bench, "a"), Some(want));
    assert_eq!(fs::read_dir(folder.join("d/state.files")).unwrap().count(), 0);
}

/// Requests a flush that fails, checks that the node refuses, ends the shortage, and checks that it
/// goes on.
fn waits_and_goes_on(folder: &Path, mut bench: Bench, give_back: impl FnOnce(), refuses: bool) {
    bench.append(1, 0);
    flush(&mut bench, 2, &[("a", 2)]);
    if refuses {
        let full = loop {
            let event = bench.next_unaccepted().expect("no failure");
            if let Event::DiskFull(full) = bench.disk.accept(event) {
                break full;
            }
        };
        assert!(full);
    } else {
        // This is time for a wrong event; the events meanwhile are about free bytes.
        let until = Instant::now() + Duration::from_millis(700);
        while let Ok(event) =
            bench.events.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            let event = bench.disk.accept(event.expect("no failure"));
            assert!(matches!(event, Event::Room { .. }), "{event:?}");
        }
    }
    give_back();
    assert!(matches!(bench.event(), Event::Ingested { flush: 2 }));
    assert_eq!(load(&mut bench, "a"), Some(7));
    is_well(folder, bench, 7);
}

/// Creates empty files until no more can be created.
fn use_up_inodes(folder: &Path) -> Vec<PathBuf> {
    let names = (0..).map(|number| folder.join(format!("x{number}")));
    names.take_while(|path| File::create(path).is_ok()).collect()
}

fn use_up_bytes(folder: &Path) -> Vec<PathBuf> {
    let path = folder.join("x");
    let mut file = File::create(&path).unwrap();
    while file.write_all(&[0; 4_096]).is_ok() {}
    vec![path]
}

fn remove(files: Vec<PathBuf>) {
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
}

#[test]
fn no_inodes_left() {
    alone("without_inodes", Some("size=64m,nr_inodes=200"));
}

#[test]
#[ignore = "run by `no_inodes_left`"]
fn without_inodes() {
    let Some(folder) = folder() else { return };
    let bench = bench(&folder);
    let files = use_up_inodes(&folder);
    waits_and_goes_on(&folder, bench, || remove(files), true);
}

#[test]
fn no_bytes_left() {
    alone("without_bytes", Some("size=32m"));
}

#[test]
#[ignore = "run by `no_bytes_left`"]
fn without_bytes() {
    let Some(folder) = folder() else { return };
    let bench = bench(&folder);
    let files = use_up_bytes(&folder);
    waits_and_goes_on(&folder, bench, || remove(files), true);
}

/// The error is distinct from damage, so the caller can retry the opening.
#[test]
fn a_start_without_room() {
    alone("starts_without_room", Some("size=32m,nr_inodes=200"));
}

#[test]
#[ignore = "run by `a_start_without_room`"]
fn starts_without_room() {
    let Some(folder) = folder() else { return };
    drop(bench(&folder));
    for use_up in [use_up_inodes, use_up_bytes] {
        let files = use_up(&folder);
        let refused = Bench::with(no_reserve(&folder.join("d"))).map(drop).unwrap_err();
        assert_eq!(
            (refused.shortage(), refused.exit_code()),
            (Some(Shortage::Space), 1),
            "{refused}"
        );
        remove(files);
    }
    let bench = Bench::with(no_reserve(&folder.join("d"))).unwrap();
    is_well(&folder, bench, 5);
}

/// A snapshot that does not fit is given up, leaves nothing, and the store is as before.
#[test]
fn a_copy_without_room() {
    alone("copies_without_room", Some("size=32m"));
}

#[test]
#[ignore = "run by `a_copy_without_room`"]
fn copies_without_room() {
    let Some(folder) = folder() else { return };
    let bench = bench(&folder);
    let files = use_up_bytes(&folder);
    let record = layout::encode_shard(CopyNo(4), &flush_of(9, &[("b", 1)]).1);
    let staged =
        bench.disk.staging().begin(Conn(3), 8, Slots::ALL, &record).and_then(|mut stager| {
            let counter = counter("b");
            let key = layout::counter_key(counter.slot(), counter.name());
            stager.rows(&[(key.into(), layout::counter_value(1).into())])?;
            stager.finish().map(drop)
        });
    assert!(matches!(staged, Err(NotStaged::NoRoom(_))), "{staged:?}");
    remove(files);
    is_well(&folder, bench, 5);
}

#[test]
fn no_open_files_left() {
    alone("without_open_files", None);
}

#[test]
#[ignore = "run by `no_open_files_left`"]
fn without_open_files() {
    let Some(folder) = folder() else { return };
    let bench = bench(&folder);
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..before }).unwrap();
    let give_back = || setrlimit(Resource::Nofile, before).unwrap();
    waits_and_goes_on(&folder, bench, give_back, false);
}
