//! Counts that are interrupted by Ctrl-C or SIGKILL, and started again with the same `--resume-id`.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::fake::{FakeGateway, Fate};
use crate::power::{self, ShadowedDisk};
use crate::{code, everything_at_once, json, signal, words};

/// A folder for input and journal, and a fake gateway.
struct Fixture {
    folder: tempfile::TempDir,
    gateway: FakeGateway,
}

impl Fixture {
    fn new(decide: impl Fn(u64) -> Fate + Send + Sync + 'static) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), gateway: FakeGateway::start(decide) }
    }

    fn start(&self, args: &[&str]) -> Child {
        self.command(args).spawn().unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dkc"));
        command
            .args(["count", "words", "--json", "--url", &self.gateway.url(), "--resume-id", "id"])
            .args(args)
            .env("XDG_STATE_HOME", self.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.start(args);
        let mut stdin = child.stdin.take().unwrap();
        std::thread::scope(|scope| {
            // The process may end without reading everything.
            scope.spawn(move || drop(stdin.write_all(input)));
            child.wait_with_output().unwrap()
        })
    }

    fn file(&self, text: &str) -> String {
        let path = self.folder.path().join("input");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// Waits until the gateway has received this many requests.
    fn wait_for(&self, requests: usize) {
        while self.gateway.state.lock().unwrap().heads.len() < requests {
            std::thread::yield_now();
        }
    }

    /// Waits until the gateway has received this many more requests.
    fn wait_for_more(&self, child: &mut Child, requests: usize) {
        let sent = || self.gateway.state.lock().unwrap().heads.len();
        let enough = sent() + requests;
        while sent() < enough {
            if let Some(status) = child.try_wait().unwrap() {
                let mut stderr = String::new();
                child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
                child.stdout.take().unwrap().read_to_string(&mut stderr).unwrap();
                panic!("it ended with {status}: {stderr}");
            }
            std::thread::yield_now();
        }
    }

    fn counters(&self) -> BTreeMap<String, i128> {
        self.gateway.state.lock().unwrap().counters.clone()
    }
}

fn truth(words: &[String]) -> BTreeMap<String, i128> {
    let mut counts = BTreeMap::new();
    for word in words {
        *counts.entry(word.clone()).or_default() += 1;
    }
    counts
}

fn lines_of(words: &[String]) -> String {
    words.join("\n") + "\n"
}

fn journal(folder: &Path) -> std::path::PathBuf {
    folder.join("dkc/count-id.journal")
}

/// A file whose count is killed several times, and continued with another `--batch` each time.
#[test]
fn killed_and_started_again_a_file_is_counted_once() {
    let fixture = Fixture::new(everything_at_once);
    let words = words(20_000);
    let file = fixture.file(&lines_of(&words));
    for (round, batch) in ["50", "70", "33"].into_iter().enumerate() {
        let mut child = fixture.start(&[&file, "--batch", batch, "--in-flight", "4"]);
        fixture.wait_for((round + 1) * 60);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let before: i128 = fixture.counters().values().sum();
    assert!((1..20_000).contains(&before), "{before}: it was not killed in the middle");
    let output = fixture.run(&[&file], b"");
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &20_000.into()), "{report}");
    assert!(report["resumed"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(fixture.counters(), truth(&words));
    // Another run: all outcomes are known, and nothing is sent.
    let requests = fixture.gateway.state.lock().unwrap().heads.len();
    let report = json(&fixture.run(&[&file], b""));
    assert_eq!((&report["applied"], &report["resumed"]), (&20_000.into(), &20_000.into()));
    assert_eq!(fixture.gateway.state.lock().unwrap().heads.len(), requests);
}

/// Kills with a power failure each time: what was not synced of the journal is lost. If the cut of
/// a batch that was sent were lost, its lines would be sent again in another request and counted
/// twice.
#[test]
fn after_a_power_cut_a_file_is_counted_once() {
    let fixture = Fixture::new(everything_at_once);
    let words = words(20_000);
    let file = fixture.file(&lines_of(&words));
    let shim = power::build_shim(fixture.folder.path()).unwrap();
    let at = |name| fixture.folder.path().join(name);
    // The journal's folder is created in one of this test, so that its directory entry can be lost,
    // too.
    std::fs::create_dir(at("state")).unwrap();
    let root = at("state").display().to_string();
    let disk = ShadowedDisk { root, shadow: at("shadow"), kept: at("kept") };
    let on_disk = |args: &[&str]| {
        let mut command = fixture.command(args);
        command.env("XDG_STATE_HOME", at("state"));
        command
    };
    let mut lost = 0;
    for batch in ["50", "70", "33"] {
        let mut command = on_disk(&[&file, "--batch", batch, "--in-flight", "4"]);
        let command = command.env("LD_PRELOAD", &shim).envs(disk.environment());
        let mut child = command.spawn().unwrap();
        fixture.wait_for_more(&mut child, 60);
        child.kill().unwrap();
        child.wait().unwrap();
        lost += disk.cut().unwrap().files;
    }
    // Outcomes are not synced: in the worst case all batches are sent again.
    assert!(lost > 0, "no cut undid anything");
    let output = on_disk(&[&file]).output().unwrap();
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &20_000.into()), "{report}");
    assert_eq!(fixture.counters(), truth(&words));
}

/// A pipe, whose lines are cut into batches by time.
#[test]
fn killed_and_started_again_a_pipe_is_counted_once() {
    let fixture = Fixture::new(everything_at_once);
    let words = words(5_000);
    let input = lines_of(&words);
    for round in 1..=3 {
        let mut child = fixture.start(&["--flush-interval", "1ms", "--in-flight", "4"]);
        let mut stdin = child.stdin.take().unwrap();
        // Batches of the previous run are not sent again, so each run needs more requests in total.
        for part in input.as_bytes().chunks(101) {
            if fixture.gateway.state.lock().unwrap().heads.len() >= round * 20 {
                break;
            }
            stdin.write_all(part).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = fixture.run(&[], input.as_bytes());
    assert_eq!(code(&output), 0, "{output:?}");
    assert_eq!(fixture.counters(), truth(&words));
}

#[test]
fn after_ctrl_c_a_count_can_be_resumed() {
    let fixture = Fixture::new(|_| Fate::Apply);
    let mut child = fixture.start(&["--flush-interval", "1ms"]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"a\nb\na\nhalf a li").unwrap();
    fixture.wait_for(1);
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &3.into()), "{report}");
    assert_eq!(report["bytes_left"], 9);
    assert_eq!((&report["complete"], &report["resume_id"]), (&false.into(), &"id".into()));
    let output = fixture.run(&[], b"a\nb\na\nhalf a line\nb\n");
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &5.into()), "{report}");
    assert_eq!((&report["complete"], &report["resumed"]), (&true.into(), &3.into()));
    let want = [("a", 2), ("b", 2), ("half a line", 1)];
    assert_eq!(fixture.counters(), want.map(|(word, count)| (word.to_owned(), count)).into());
}

/// A resume after the service's idempotency window: lines that may have been counted are reported,
/// and not counted again.
#[test]
fn what_is_too_old_to_be_asked_again_is_unknown() {
    let fixture = Fixture::new(|number| match number {
        0 => Fate::Apply,
        1 => Fate::Drop { counted: true },
        2 => Fate::TooOld,
        _ => Fate::Apply,
    });
    let args = ["--batch", "2", "--in-flight", "1", "--give-up", "0"];
    let output = fixture.run(&args, b"a\na\nb\nb\n");
    let report = json(&output);
    assert_eq!(code(&output), 3, "{report}");
    let unknown = r#"[{"first_line":3,"last_line":4}]"#;
    assert_eq!(report["unknown"].to_string(), unknown, "{report}");
    for _ in 0..2 {
        // The second time nothing is sent.
        let output = fixture.run(&args, b"a\na\nb\nb\nc\n");
        let report = json(&output);
        assert_eq!((code(&output), &report["applied"]), (3, &3.into()), "{report}");
        assert_eq!(report["unknown"].to_string(), unknown, "{report}");
        let want = [("a", 2), ("b", 2), ("c", 1)];
        assert_eq!(fixture.counters(), want.map(|(word, count)| (word.to_owned(), count)).into());
    }
    assert_eq!(fixture.gateway.state.lock().unwrap().heads.len(), 4);
}

#[test]
fn another_input_is_refused() {
    let fixture = Fixture::new(|_| Fate::Apply);
    assert_eq!(code(&fixture.run(&["--batch", "2"], b"a\nb\nc\n")), 0);
    for input in [&b"a\nb\nd\n"[..], b"a\nb\n", b"b\na\nc\n", b""] {
        let output = fixture.run(&["--batch", "2"], input);
        let report = json(&output);
        assert_eq!(code(&output), 1, "{report}");
        let ends_early = input.is_empty() || input == b"a\nb\n";
        let why =
            if ends_early { "the input ends before" } else { "differ from those of the first run" };
        assert!(report["reasons"].to_string().contains(why), "{report}");
    }
    assert_eq!(code(&fixture.run(&["--field", "2"], b"a\nb\nc\n")), 1);
    assert_eq!(fixture.counters().values().sum::<i128>(), 3);
    // A count of another namespace, or next to one that is running.
    let mut other = Command::new(env!("CARGO_BIN_EXE_dkc"));
    other.args(["count", "other", "--url", &fixture.gateway.url(), "--resume-id", "id"]);
    let output = other.env("XDG_STATE_HOME", fixture.folder.path()).output().unwrap();
    assert_eq!(code(&output), 2, "{output:?}");
    let mut running = fixture.start(&[]);
    while running.try_wait().unwrap().is_none() {
        let output = fixture.run(&[], b"a\nb\nc\n");
        if code(&output) == 2 {
            break;
        }
    }
    running.kill().unwrap();
    running.wait().unwrap();
}

/// The machine stopped in the middle of a write to the journal: that batch was not sent.
#[test]
fn a_torn_journal_is_gone_on_with() {
    let fixture = Fixture::new(|_| Fate::Apply);
    assert_eq!(code(&fixture.run(&["--batch", "2"], b"a\nb\nc\n")), 0);
    let path = journal(fixture.folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend_from_slice(br#"{"cut":{"first_li"#);
    std::fs::write(&path, &bytes).unwrap();
    let output = fixture.run(&["--batch", "2"], b"a\nb\nc\nd\n");
    assert_eq!((code(&output), &json(&output)["applied"]), (0, &4.into()), "{output:?}");
    // Other damage is reported.
    std::fs::write(&path, b"x\n").unwrap();
    let output = fixture.run(&[], b"a\n");
    assert_eq!(code(&output), 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("count-id.journal"), "{output:?}");
}

/// A cron job that counts a log while it is being written: the last line may be incomplete.
#[test]
fn half_a_line_is_left_for_the_next_run() {
    let fixture = Fixture::new(|_| Fate::Apply);
    let counted = |text: &str, args: &[&str]| {
        let file = fixture.file(text);
        let from_file = fixture.run(&[&[file.as_str()], args].concat(), b"");
        let report = json(&from_file);
        assert_eq!((code(&from_file), &report["complete"]), (0, &true.into()), "{report}");
        let stderr = String::from_utf8_lossy(&from_file.stderr).into_owned();
        (report["applied"].as_u64().unwrap(), report["bytes_left"].as_u64().unwrap(), stderr)
    };
    let (applied, left, stderr) = counted("a\nb\nfo", &[]);
    assert_eq!((applied, left), (2, 2), "{stderr}");
    for _ in 0..2 {
        assert_eq!(counted("a\nb\nfoo\nz\n", &[]).0, 4);
    }
    // With another end of the same line, and in smaller batches.
    assert_eq!(counted("a\nb\nfoo\nz\nk\r", &["--batch", "1"]).1, 2);
    assert_eq!(counted("a\nb\nfoo\nz\nk\r\n", &["--batch", "1"]).0, 5);
    let want = [("a", 1), ("b", 1), ("foo", 1), ("k", 1), ("z", 1)];
    assert_eq!(fixture.counters(), want.map(|(word, count)| (word.to_owned(), count)).into());
    // The same with a pipe.
    let mut command = fixture.command(&[]);
    let mut child =
        command.arg("--resume-dir").arg(fixture.folder.path().join("other")).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a\nha").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), &json(&output)["bytes_left"]), (0, &2.into()));
}

/// Two machines with the same id: each line counts.
#[test]
fn one_id_on_two_machines_is_two_counts() {
    let fixture = Fixture::new(|_| Fate::Apply);
    for machine in ["m1", "m2", "m3"] {
        let mut command = fixture.command(&[]);
        let state = command.env("XDG_STATE_HOME", fixture.folder.path().join(machine));
        let mut child = state.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"200\n200\n200\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((code(&output), &json(&output)["replayed"]), (0, &0.into()), "{output:?}");
    }
    assert_eq!(fixture.counters()["200"], 9);
}

/// A journal that was copied to another machine: the service treats the lines there as those of the
/// first machine.
#[test]
fn a_first_send_that_was_applied_before_is_reported() {
    let fixture = Fixture::new(|number| if number < 2 { Fate::Replayed } else { Fate::Apply });
    let output = fixture.run(&["--batch", "2"], b"a\nb\n");
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"], &report["replayed"]), (0, &2.into(), &2.into()));
    // The text output.
    let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"));
    child.args(["count", "words", "--url", &fixture.gateway.url()]).stdin(Stdio::piped());
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("1 of the lines had already been counted"), "{stderr}");
}
