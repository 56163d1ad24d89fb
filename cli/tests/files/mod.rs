//! Files as they occur in practice: compressed, truncated, in other encodings, CSV, and logs that
//! are rotated while they are read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use crate::fake::{FakeGateway, Fate};
use crate::{code, dkc, json, signal};

/// A folder for input, and a fake gateway.
struct Fixture {
    folder: tempfile::TempDir,
    gateway: FakeGateway,
}

impl Fixture {
    fn new() -> Self {
        let gateway = FakeGateway::start(|_| Fate::Apply);
        Self { folder: tempfile::tempdir().unwrap(), gateway }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Counts a file of this content.
    fn count(&self, content: &[u8], args: &[&str]) -> Output {
        let path = self.path("input");
        fs::write(&path, content).unwrap();
        dkc(
            &[&["count", "words", &path, "--give-up", "20"], args].concat(),
            &self.gateway.url(),
            b"",
        )
    }

    /// Counts this content through a pipe.
    fn count_pipe(&self, content: &[u8], args: &[&str]) -> Output {
        let line = ["count", "words", "-", "--give-up", "20"];
        dkc(&[&line, args].concat(), &self.gateway.url(), content)
    }

    fn counters(&self) -> BTreeMap<String, i128> {
        self.gateway.state.lock().unwrap().counters.clone()
    }

    #[track_caller]
    fn check_counters(&self, want: &[(&str, i128)]) {
        let want = want.iter().map(|(key, count)| ((*key).to_owned(), *count));
        assert_eq!(self.counters(), want.collect());
    }

    fn append(&self, name: &str, text: &str) {
        let mut file = File::options().create(true).append(true).open(self.path(name)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    /// Waits until the counter has this value.
    fn wait_for(&self, key: &str, value: i128) {
        while self.counters().get(key) != Some(&value) {
            std::thread::yield_now();
        }
    }
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn compressed_input_is_recognised_whatever_its_name() {
    let bzip2 = |text: &[u8]| {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    };
    let text = b"a\nb\na\n";
    let two_members = [gzip(b"a\nb"), gzip(b"\na\n")].concat();
    let zstd = zstd::encode_all(&text[..], 3).unwrap();
    let xz = liblzma::encode_all(&text[..], 6).unwrap();
    for packed in [gzip(text), two_members, zstd, xz, bzip2(text)] {
        let fixture = Fixture::new();
        for output in [fixture.count(&packed, &[]), fixture.count_pipe(&packed, &[])] {
            assert_eq!(code(&output), 0, "{output:?}");
        }
        fixture.check_counters(&[("a", 4), ("b", 2)]);
        let output = fixture.count(&packed, &["--no-decompress"]);
        assert_eq!(code(&output), 2, "{output:?}");
        assert!(stderr(&output).contains("--binary"), "{output:?}");
        fixture.check_counters(&[("a", 4), ("b", 2)]);
        assert_eq!(code(&fixture.count(&packed, &["--no-decompress", "--binary"])), 0);
        assert!(fixture.counters().len() > 2);
    }
}

#[test]
fn damaged_input_is_counted_up_to_the_damage() {
    let text: Vec<_> = (0..50_000).map(|number| format!("{}\n", number * 7_919 % 1_000)).collect();
    let packed = gzip(text.concat().as_bytes());
    let fixture = Fixture::new();
    let output = fixture.count(&packed[..packed.len() / 2], &["--json"]);
    let report = json(&output);
    let lines = report["lines"].as_u64().unwrap();
    assert_eq!((code(&output), &report["applied"]), (1, &lines.into()), "{report}");
    assert!((1..50_000).contains(&lines), "{report}");
    assert!(
        report["reasons"].to_string().contains("input: cannot decompress gzip data"),
        "{report}"
    );
    // All whole lines before the damage are counted, and nothing else.
    let counters = fixture.counters();
    assert_eq!(counters.values().sum::<i128>(), i128::from(lines));
    assert!(counters.keys().all(|key| text.contains(&format!("{key}\n"))));
    // The whole file is counted later under the same id.
    let state = fixture.path("state");
    let resumed = ["--json", "--resume-id", "a", "--resume-dir", &state];
    let fresh = Fixture::new();
    let path = fresh.path("input");
    for (bytes, want) in [(&packed[..packed.len() / 2], 1), (&packed[..], 0)] {
        fs::write(&path, bytes).unwrap();
        let args = [&["count", "words", &path][..], &resumed].concat();
        assert_eq!(code(&dkc(&args, &fresh.gateway.url(), b"")), want);
    }
    assert_eq!(fresh.counters().values().sum::<i128>(), 50_000);
    assert_eq!(fresh.counters()["7"], 50);
    let output = fixture.count(&packed[..packed.len() / 2], &[]);
    assert!(stderr(&output).contains("this run counted nothing after line"), "{output:?}");
    // A file without its first whole line.
    for output in
        [fixture.count(&packed[..12], &["--json"]), fixture.count_pipe(&packed[..12], &["--json"])]
    {
        let report = json(&output);
        assert_eq!((code(&output), &report["lines"]), (1, &0.into()), "{report}");
        assert!(report["reasons"].to_string().contains("cannot decompress gzip data"), "{report}");
    }
}

#[test]
fn binary_input_is_rejected_before_anything_is_sent() {
    let utf_16: Vec<u8> = "\u{feff}apple\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let inputs = [
        (&b"\x7fELF\x02\x01\x01\0\0\0\n"[..], "--binary"),
        (b"a\0b\n", "--binary"),
        (&utf_16, "iconv -f UTF-16"),
        (b"\0\0\xfe\xff\0\0\0a", "iconv -f UTF-32"),
        (b"PK\x03\x04\x14\0\n", "unzip"),
        (&gzip(b"a\0b\n"), "--binary"),
        (&gzip(&gzip(b"a\n")), "twice"),
    ];
    let fixture = Fixture::new();
    for (input, want) in inputs {
        for output in [fixture.count(input, &[]), fixture.count_pipe(input, &[])] {
            assert_eq!(code(&output), 2, "{output:?}");
            assert!(stderr(&output).contains(want), "{output:?}");
            assert!(output.stdout.is_empty(), "{output:?}");
        }
    }
    assert!(fixture.gateway.state.lock().unwrap().heads.is_empty());
    assert_eq!(code(&fixture.count(b"a\0b\n", &["--binary"])), 0);
    fixture.check_counters(&[("a\0b", 1)]);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_key() {
    let fixture = Fixture::new();
    let input = b"\xef\xbb\xbfapple\napple\n";
    for output in [fixture.count(input, &[]), fixture.count_pipe(input, &["--field", "1"])] {
        assert_eq!(code(&output), 0, "{output:?}");
        assert!(stderr(&output).contains("byte order mark"), "{output:?}");
    }
    assert!(
        String::from_utf8_lossy(&fixture.count(b"\xef\xbb\xbf", &[]).stdout)
            .starts_with("counted 0 of 0")
    );
    fixture.check_counters(&[("apple", 4)]);
}

#[test]
fn columns_have_names_and_quotes() {
    let table = b"\xef\xbb\xbfid,\"status\",text\r\n1,ok,\"a, b\"\r\n2,\"not \"\"ok\"\"\",\"two\r\nlines\"\r\n3,ok,\r\n";
    let fixture = Fixture::new();
    let output = fixture.count(table, &["--csv", "--field", "status"]);
    assert_eq!(code(&output), 0, "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).starts_with("counted 3 of 4 lines"),
        "{output:?}"
    );
    fixture.check_counters(&[("ok", 2), ("not \"ok\"", 1)]);
    let fixture = Fixture::new();
    assert_eq!(code(&fixture.count_pipe(table, &["--csv", "--field", "3", "--skip-header"])), 0);
    fixture.check_counters(&[("a, b", 1), ("two\r\nlines", 1)]);
    let output = fixture.count(table, &["--csv", "--field", "state"]);
    assert_eq!(code(&output), 2, "{output:?}");
    assert!(stderr(&output).contains("id, status, text"), "{output:?}");
    // A quote that is not closed is reported.
    let output = fixture.count(b"1,\"a\n2,b\n", &["--csv", "--field", "1", "--json"]);
    assert_eq!(code(&output), 1);
    assert!(json(&output)["reasons"].to_string().contains("within a quoted field"), "{output:?}");
}

#[test]
fn a_pattern_finds_the_key() {
    let log = b"::1 - - [x] \"GET /a?q=1 HTTP/1.1\" 200 5\n1.2.3.4 - - [x] \"POST /b HTTP/1.1\" 404 0\nbroken\n";
    let fixture = Fixture::new();
    let output = fixture.count(log, &["--regex", r#""[A-Z]+ ([^ ?"]+)"#, "--json"]);
    assert_eq!((code(&output), &json(&output)["skipped"]), (0, &1.into()), "{output:?}");
    fixture.check_counters(&[("/a", 1), ("/b", 1)]);
    let fixture = Fixture::new();
    let output = fixture.count(log, &["--regex", r#"(\S+) .*" (?P<key>\d{3}) "#, "--skip-header"]);
    assert_eq!(code(&output), 0, "{output:?}");
    fixture.check_counters(&[("404", 1)]);
}

/// Starts `dkc count --follow` of a log; returns the process and its stderr.
fn follow(fixture: &Fixture) -> (Child, BufReader<ChildStderr>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"))
        .args(["count", "words", &fixture.path("log"), "--follow", "--json"])
        .args(["--flush-interval", "1ms", "--url", &fixture.gateway.url()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    (child, stderr)
}

/// Reads messages until one contains this text.
fn wait_for(stderr: &mut BufReader<ChildStderr>, what: &str) {
    let mut line = String::new();
    while !line.contains(what) {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before it printed {what:?}");
    }
}

#[test]
fn a_log_is_followed_over_rotation_and_truncation() {
    let fixture = Fixture::new();
    let (child, mut stderr) = follow(&fixture);
    wait_for(&mut stderr, "waiting for");
    fixture.append("log", "a\nb\nfo");
    fixture.wait_for("b", 1);
    fixture.append("log", "o\n");
    fixture.wait_for("foo", 1);
    // The writer uses the old file until it opens the new one.
    fs::rename(fixture.path("log"), fixture.path("log.1")).unwrap();
    fixture.append("log.1", "late\n");
    fixture.append("log", "c\n");
    wait_for(&mut stderr, "was rotated");
    fixture.wait_for("c", 1);
    fixture.append("log.1", "later\n");
    fixture.wait_for("later", 1);
    fixture.append("log", "d\nhal");
    fixture.wait_for("d", 1);
    fs::write(fixture.path("log"), "e\n").unwrap();
    wait_for(&mut stderr, "was truncated");
    wait_for(&mut stderr, "its 3 bytes are not counted");
    fixture.wait_for("e", 1);
    // Lines that are complete by then are counted.
    fixture.append("log", "f\nhalf");
    signal(&child, "-TERM");
    let output = child.wait_with_output().unwrap();
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &9.into()), "{report}");
    wait_for(&mut stderr, "its 4 bytes are not counted");
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert!(!rest.contains("--resume-id"), "{rest}");
    let keys = ["a", "b", "c", "d", "e", "f", "foo", "late", "later"];
    fixture.check_counters(&keys.map(|key| (key, 1)));
}

#[test]
fn what_can_not_be_followed_ends_with_2() {
    let fixture = Fixture::new();
    fs::write(fixture.path("log"), b"a\0\n").unwrap();
    let (child, _) = follow(&fixture);
    assert_eq!(code(&child.wait_with_output().unwrap()), 2);
}
