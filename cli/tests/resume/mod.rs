//! A count that is interrupted, by Ctrl-C or by death, and started again with the same `--resume-id`.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::fake::{FakeGateway, Fate};
use crate::power::{self, Disk};
use crate::{code, everything_at_once, json, signal, words};

/// What an interrupted and resumed count is played with.
struct Story {
    folder: tempfile::TempDir,
    gateway: FakeGateway,
}

impl Story {
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
            // It may end without reading everything.
            scope.spawn(move || drop(stdin.write_all(input)));
            child.wait_with_output().unwrap()
        })
    }

    fn file(&self, text: &str) -> String {
        let path = self.folder.path().join("input");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// Once the gateway has been asked so often, since it runs.
    fn wait_for(&self, requests: usize) {
        while self.gateway.state.lock().unwrap().heads.len() < requests {
            std::thread::yield_now();
        }
    }

    /// Once this child has asked so much more of the gateway.
    fn wait_for_more(&self, child: &mut Child, requests: usize) {
        let sent = || self.gateway.state.lock().unwrap().heads.len();
        let enough = sent() + requests;
        while sent() < enough {
            if let Some(status) = child.try_wait().unwrap() {
                let mut said = String::new();
                child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
                child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
                panic!("it ended with {status}: {said}");
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

/// Of a file: killed in the middle, again and again, with another `--batch` each time.
#[test]
fn killed_and_started_again_a_file_is_counted_once() {
    let story = Story::new(everything_at_once);
    let words = words(20_000);
    let file = story.file(&lines_of(&words));
    for (round, batch) in ["50", "70", "33"].into_iter().enumerate() {
        let mut child = story.start(&[&file, "--batch", batch, "--in-flight", "4"]);
        story.wait_for((round + 1) * 60);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let before: i128 = story.counters().values().sum();
    assert!((1..20_000).contains(&before), "{before}: it was not killed in the middle");
    let output = story.run(&[&file], b"");
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &20_000.into()), "{report}");
    assert!(report["resumed"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(story.counters(), truth(&words));
    // Once more: all is known, and nothing is sent.
    let requests = story.gateway.state.lock().unwrap().heads.len();
    let report = json(&story.run(&[&file], b""));
    assert_eq!((&report["applied"], &report["resumed"]), (&20_000.into(), &20_000.into()));
    assert_eq!(story.gateway.state.lock().unwrap().heads.len(), requests);
}

/// The same, and with each death the power goes: of the journal nothing is left that was not synced. A cut that was sent and
/// is not there would be sent again as another, and counted twice.
#[test]
fn after_a_power_cut_a_file_is_counted_once() {
    let story = Story::new(everything_at_once);
    let words = words(20_000);
    let file = story.file(&lines_of(&words));
    let shim = power::build_shim(story.folder.path()).unwrap();
    let at = |name| story.folder.path().join(name);
    // The journal's folder is made in one of ours, so that its name can be lost, too.
    std::fs::create_dir(at("state")).unwrap();
    let root = at("state").display().to_string();
    let disk = Disk { root, shadow: at("shadow"), kept: at("kept") };
    let on_disk = |args: &[&str]| {
        let mut command = story.command(args);
        command.env("XDG_STATE_HOME", at("state"));
        command
    };
    let mut lost = 0;
    for batch in ["50", "70", "33"] {
        let mut command = on_disk(&[&file, "--batch", batch, "--in-flight", "4"]);
        let command = command.env("LD_PRELOAD", &shim).envs(disk.environment());
        let mut child = command.spawn().unwrap();
        story.wait_for_more(&mut child, 60);
        child.kill().unwrap();
        child.wait().unwrap();
        lost += disk.cut().unwrap().files;
    }
    // What became of batches is not synced: it is asked again, at worst of all.
    assert!(lost > 0, "no cut undid anything");
    let output = on_disk(&[&file]).output().unwrap();
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &20_000.into()), "{report}");
    assert_eq!(story.counters(), truth(&words));
}

/// Of a pipe, whose lines are cut by the clock.
#[test]
fn killed_and_started_again_a_pipe_is_counted_once() {
    let story = Story::new(everything_at_once);
    let words = words(5_000);
    let input = lines_of(&words);
    for round in 1..=3 {
        let mut child = story.start(&["--flush-interval", "1ms", "--in-flight", "4"]);
        let mut stdin = child.stdin.take().unwrap();
        // What the run before has seen to is asked of nobody, so it takes more each time.
        for part in input.as_bytes().chunks(101) {
            if story.gateway.state.lock().unwrap().heads.len() >= round * 20 {
                break;
            }
            stdin.write_all(part).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = story.run(&[], input.as_bytes());
    assert_eq!(code(&output), 0, "{output:?}");
    assert_eq!(story.counters(), truth(&words));
}

#[test]
fn after_ctrl_c_it_goes_on_and_says_how() {
    let story = Story::new(|_| Fate::Apply);
    let mut child = story.start(&["--flush-interval", "1ms"]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"a\nb\na\nhalf a li").unwrap();
    story.wait_for(1);
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &3.into()), "{report}");
    assert_eq!(report["bytes_left"], 9);
    assert_eq!((&report["complete"], &report["resume_id"]), (&false.into(), &"id".into()));
    let output = story.run(&[], b"a\nb\na\nhalf a line\nb\n");
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &5.into()), "{report}");
    assert_eq!((&report["complete"], &report["resumed"]), (&true.into(), &3.into()));
    let want = [("a", 2), ("b", 2), ("half a line", 1)];
    assert_eq!(story.counters(), want.map(|(word, count)| (word.to_owned(), count)).into());
}

/// Later than the service remembers tokens: what may have been counted is reported, and not counted again.
#[test]
fn what_is_too_old_to_be_asked_again_is_unknown() {
    let story = Story::new(|number| match number {
        0 => Fate::Apply,
        1 => Fate::Drop { counted: true },
        2 => Fate::TooOld,
        _ => Fate::Apply,
    });
    let args = ["--batch", "2", "--in-flight", "1", "--give-up", "0"];
    let output = story.run(&args, b"a\na\nb\nb\n");
    let report = json(&output);
    assert_eq!(code(&output), 3, "{report}");
    let unknown = r#"[{"first_line":3,"last_line":4}]"#;
    assert_eq!(report["unknown"].to_string(), unknown, "{report}");
    for _ in 0..2 {
        // The second time nobody asks.
        let output = story.run(&args, b"a\na\nb\nb\nc\n");
        let report = json(&output);
        assert_eq!((code(&output), &report["applied"]), (3, &3.into()), "{report}");
        assert_eq!(report["unknown"].to_string(), unknown, "{report}");
        let want = [("a", 2), ("b", 2), ("c", 1)];
        assert_eq!(story.counters(), want.map(|(word, count)| (word.to_owned(), count)).into());
    }
    assert_eq!(story.gateway.state.lock().unwrap().heads.len(), 4);
}

#[test]
fn another_input_is_refused() {
    let story = Story::new(|_| Fate::Apply);
    assert_eq!(code(&story.run(&["--batch", "2"], b"a\nb\nc\n")), 0);
    for input in [&b"a\nb\nd\n"[..], b"a\nb\n", b"b\na\nc\n", b""] {
        let output = story.run(&["--batch", "2"], input);
        let report = json(&output);
        assert_eq!(code(&output), 1, "{report}");
        let ends_early = input.is_empty() || input == b"a\nb\n";
        let why = if ends_early { "the input ends before" } else { "are not what they were" };
        assert!(report["reasons"].to_string().contains(why), "{report}");
    }
    assert_eq!(code(&story.run(&["--field", "2"], b"a\nb\nc\n")), 1);
    assert_eq!(story.counters().values().sum::<i128>(), 3);
    // Of another namespace, or beside one that runs.
    let mut other = Command::new(env!("CARGO_BIN_EXE_dkc"));
    other.args(["count", "other", "--url", &story.gateway.url(), "--resume-id", "id"]);
    let output = other.env("XDG_STATE_HOME", story.folder.path()).output().unwrap();
    assert_eq!(code(&output), 2, "{output:?}");
    let mut running = story.start(&[]);
    while running.try_wait().unwrap().is_none() {
        let output = story.run(&[], b"a\nb\nc\n");
        if code(&output) == 2 {
            break;
        }
    }
    running.kill().unwrap();
    running.wait().unwrap();
}

/// The machine stopped in the middle of a write: that batch was not sent.
#[test]
fn a_torn_journal_is_gone_on_with() {
    let story = Story::new(|_| Fate::Apply);
    assert_eq!(code(&story.run(&["--batch", "2"], b"a\nb\nc\n")), 0);
    let path = journal(story.folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend_from_slice(br#"{"cut":{"first_li"#);
    std::fs::write(&path, &bytes).unwrap();
    let output = story.run(&["--batch", "2"], b"a\nb\nc\nd\n");
    assert_eq!((code(&output), &json(&output)["applied"]), (0, &4.into()), "{output:?}");
    // Damage of another kind is named.
    std::fs::write(&path, b"x\n").unwrap();
    let output = story.run(&[], b"a\n");
    assert_eq!(code(&output), 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("count-id.journal"), "{output:?}");
}

/// As cron does with a log that is being written: its last line may be half there.
#[test]
fn half_a_line_is_left_for_the_next_run() {
    let story = Story::new(|_| Fate::Apply);
    let counted = |text: &str, args: &[&str]| {
        let file = story.file(text);
        let from_file = story.run(&[&[file.as_str()], args].concat(), b"");
        let report = json(&from_file);
        assert_eq!((code(&from_file), &report["complete"]), (0, &true.into()), "{report}");
        let said = String::from_utf8_lossy(&from_file.stderr).into_owned();
        (report["applied"].as_u64().unwrap(), report["bytes_left"].as_u64().unwrap(), said)
    };
    let (applied, left, said) = counted("a\nb\nfo", &[]);
    assert_eq!((applied, left), (2, 2), "{said}");
    for _ in 0..2 {
        assert_eq!(counted("a\nb\nfoo\nz\n", &[]).0, 4);
    }
    // With another end of the same line, and in smaller batches.
    assert_eq!(counted("a\nb\nfoo\nz\nk\r", &["--batch", "1"]).1, 2);
    assert_eq!(counted("a\nb\nfoo\nz\nk\r\n", &["--batch", "1"]).0, 5);
    let want = [("a", 1), ("b", 1), ("foo", 1), ("k", 1), ("z", 1)];
    assert_eq!(story.counters(), want.map(|(word, count)| (word.to_owned(), count)).into());
    // Of a pipe.
    let mut command = story.command(&[]);
    let mut child =
        command.arg("--resume-dir").arg(story.folder.path().join("other")).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a\nha").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), &json(&output)["bytes_left"]), (0, &2.into()));
}

/// Two machines, one id: each line counts.
#[test]
fn one_id_on_two_machines_is_two_counts() {
    let story = Story::new(|_| Fate::Apply);
    for machine in ["m1", "m2", "m3"] {
        let mut command = story.command(&[]);
        let state = command.env("XDG_STATE_HOME", story.folder.path().join(machine));
        let mut child = state.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"200\n200\n200\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((code(&output), &json(&output)["replayed"]), (0, &0.into()), "{output:?}");
    }
    assert_eq!(story.counters()["200"], 9);
}

/// A journal that was copied to another machine, whose lines the service takes for those of the first.
#[test]
fn a_first_send_that_was_applied_before_is_told() {
    let story = Story::new(|number| if number < 2 { Fate::Replayed } else { Fate::Apply });
    let output = story.run(&["--batch", "2"], b"a\nb\n");
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"], &report["replayed"]), (0, &2.into(), &2.into()));
    // For people.
    let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"));
    child.args(["count", "words", "--url", &story.gateway.url()]).stdin(Stdio::piped());
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"a\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("1 of the lines had been counted before"), "{said}");
}
