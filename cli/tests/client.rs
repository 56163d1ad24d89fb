//! The client commands, as a user runs them, against a gateway that fails in every possible way.
//!
//! The promise: every line is either known to be counted exactly once, known not to be counted, or
//! listed as unknown. So for every key `known ≤ count ≤ known + unknown`. No line stays unknown
//! whose outcome the service could still report: its request is sent again under the same token.

#[path = "../../metastore/tests/contract/calls.rs"]
mod calls;
#[path = "../../metastore/tests/contract/etcd.rs"]
mod etcd;
mod fake;
mod files;
mod operator;
mod other_servers;
#[allow(dead_code, unreachable_pub, reason = "shared with chaos, which uses all of it")]
#[path = "../../tests/src/chaos/power.rs"]
mod power;
mod resume;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use fake::{FakeGateway, Fate};
use serde_json::Value;

fn dkc(args: &[&str], urls: &str, input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"))
        .args(args)
        .args(["--url", urls])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // The process may end without reading everything.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Words that repeat, a few of them often and most of them rarely.
fn words(lines: u64) -> Vec<String> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..lines).map(|_| format!("word-{}", next() % (1 + next() % 400))).collect()
}

/// Counts `lines` words with two gateways that fail as `decide` says; checks the promise for every
/// word and returns (exit code, report).
#[track_caller]
fn count(lines: u64, decide: impl Fn(u64) -> Fate + Send + Sync + 'static) -> (i32, Value) {
    let [gateway, other] = FakeGateway::start_two(decide);
    let words = words(lines);
    let input = words.join("\n");
    let urls = format!("{},{}", gateway.url(), other.url());
    let args = ["count", "words", "--json", "--batch", "50", "--in-flight", "4"];
    let output = dkc(&args, &urls, input.as_bytes());
    let report = json(&output);
    let listed = |category: &str| -> Vec<bool> {
        let mut lines = vec![false; words.len()];
        for range in report[category].as_array().unwrap() {
            let at = |end: &str| range[end].as_u64().unwrap() as usize;
            for line in &mut lines[at("first_line") - 1..at("last_line")] {
                assert!(!*line, "a line is listed twice");
                *line = true;
            }
        }
        lines
    };
    let (unknown, not_applied, failed) =
        (listed("unknown"), listed("not_applied"), listed("failed"));
    let mut bounds: BTreeMap<&str, (i128, i128)> = BTreeMap::new();
    let mut known = 0;
    for (index, word) in words.iter().enumerate() {
        let (least, most) = bounds.entry(word).or_default();
        match (unknown[index], not_applied[index] || failed[index]) {
            (false, false) => {
                *least += 1;
                *most += 1;
                known += 1;
            }
            (true, false) => *most += 1,
            (false, true) => {}
            (true, true) => panic!("line {} is in two categories", index + 1),
        }
    }
    assert_eq!(
        report["applied"], known,
        "the number of counted lines is that of the lines that are not listed"
    );
    let state = gateway.state.lock().unwrap();
    for (word, (least, most)) in bounds {
        let counted = state.counters.get(word).copied().unwrap_or(0);
        assert!((least..=most).contains(&counted), "{word}: {least} ≤ {counted} ≤ {most}");
    }
    for head in &state.heads {
        let head = head.to_ascii_lowercase();
        for header in
            ["request-timeout-ms: 60000", "idempotency-key: \"", "idempotency-issued-at: "]
        {
            assert!(head.contains(header), "{head}");
        }
    }
    (code(&output), report)
}

#[test]
fn a_healthy_cluster_counts_everything() {
    let (code, report) = count(5000, |_| Fate::Apply);
    assert_eq!((code, &report["applied"], &report["complete"]), (0, &5000.into(), &true.into()));
}

#[test]
fn refusals_are_sent_again_until_applied() {
    let (code, report) = count(3000, |number| match number % 4 {
        0 => Fate::Refuse(503),
        1 => Fate::Refuse(429),
        _ => Fate::Apply,
    });
    assert_eq!((code, &report["applied"]), (0, &3000.into()));
    assert!(report["retries"].as_u64().unwrap() > 0);
}

#[test]
fn unknown_batches_are_sent_again_until_they_are_applied() {
    #[track_caller]
    fn check(fate: Fate) {
        let (code, report) =
            count(2000, move |number| if number % 4 == 3 { fate } else { Fate::Apply });
        assert_eq!((code, &report["applied"]), (0, &2000.into()), "{fate:?}: {report}");
    }
    check(Fate::Deadline { counted: true });
    check(Fate::Deadline { counted: false });
    check(Fate::Drop { counted: true });
    check(Fate::Drop { counted: false });
    check(Fate::Cut);
    check(Fate::OtherServer(502));
    check(Fate::Parts);
}

/// Two in three batches meet some failure or other.
fn everything_at_once(number: u64) -> Fate {
    match number % 15 {
        0 => Fate::Refuse(503),
        1 => Fate::Deadline { counted: number.is_multiple_of(2) },
        2 => Fate::Drop { counted: number.is_multiple_of(2) },
        3 => Fate::Cut,
        4 => Fate::Parts,
        5 => Fate::OtherServer(502),
        6 => Fate::Refuse(429),
        7 => Fate::Drop { counted: true },
        8 => Fate::Deadline { counted: true },
        _ => Fate::Apply,
    }
}

#[test]
fn whatever_fails_the_count_is_exact() {
    let (code, report) = count(20_000, everything_at_once);
    assert_eq!((code, &report["applied"]), (0, &20_000.into()), "{report}");
}

#[test]
fn a_gateway_that_is_gone_is_passed_over() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone_url = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let output =
        dkc(&["count", "words", "--json"], &format!("{gone_url},{}", gateway.url()), b"a\nb\na");
    assert_eq!((code(&output), &json(&output)["applied"]), (0, &3.into()));
    assert_eq!(gateway.state.lock().unwrap().counters["a"], 2);

    let output = dkc(&["count", "words", "--json", "--give-up", "1"], &gone_url, b"a\nb\n");
    let report = json(&output);
    assert_eq!((code(&output), &report["not_applied"][0]["last_line"]), (1, &2.into()));
}

/// Starts `dkc count` with this beginning of an input that stays open.
fn start_count(
    gateway: &FakeGateway,
    args: &[&str],
    input: &[u8],
    stderr: Stdio,
) -> (Child, ChildStdin) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"))
        .args(["count", "words", "--json", "--url", &gateway.url()])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input).unwrap();
    (child, stdin)
}

/// Sends the signal of Ctrl-C.
fn interrupt(child: &Child) {
    signal(child, "-INT");
}

fn signal(child: &Child, signal: &str) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
}

/// Counts three lines, `a b a`, of an input that stays open, and sends Ctrl-C when the gateway has
/// reached a state.
fn count_interrupted(
    gateway: &FakeGateway,
    args: &[&str],
    so_far: impl Fn(&fake::State) -> bool,
) -> Output {
    let (child, stdin) = start_count(gateway, args, b"a\nb\na\n", Stdio::null());
    while !so_far(&gateway.state.lock().unwrap()) {
        std::thread::yield_now();
    }
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    output
}

/// Input that never ends, as from a terminal: lines are counted at once, and Ctrl-C ends the count
/// with a report although the reader still waits.
#[test]
fn a_signal_ends_in_a_report() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let output = count_interrupted(&gateway, &[], |counted| counted.counters.get("a") == Some(&2));
    let report = json(&output);
    assert_eq!(code(&output), 0, "{report}");
    assert_eq!((&report["applied"], &report["complete"]), (&3.into(), &false.into()));
}

/// After the first Ctrl-C the lines that were read are still counted, however long that takes; the
/// second one ends the process at once, so the outcome is unknown.
#[test]
fn a_second_signal_ends_it_without_a_report() {
    let gateway = FakeGateway::start(|_| Fate::Refuse(503));
    let (mut child, _stdin) = start_count(&gateway, &[], b"a\n", Stdio::piped());
    while gateway.state.lock().unwrap().heads.is_empty() {
        std::thread::yield_now();
    }
    interrupt(&child);
    let mut messages = BufReader::new(child.stderr.take().unwrap()).lines();
    while !messages.next().expect("a line").unwrap().starts_with("stopping:") {}
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!((code(&output), output.stdout), (3, Vec::new()));
}

/// Ctrl-C while a line waits for its batch to fill: the line was read, so it is counted.
#[test]
fn what_was_read_is_counted_before_the_report() {
    #[track_caller]
    fn check(fate: Fate, want: (i32, u64)) {
        let gateway =
            FakeGateway::start(move |number| if number == 0 { Fate::Apply } else { fate });
        let args = ["--batch", "2", "--flush-interval", "1000s", "--give-up", "1"];
        let output = count_interrupted(&gateway, &args, |counted| !counted.heads.is_empty());
        let report = json(&output);
        let got = (code(&output), report["applied"].as_u64().unwrap());
        assert_eq!(got, want, "{fate:?}: {report}");
        assert_eq!((&report["lines"], &report["complete"]), (&3.into(), &false.into()));
    }
    check(Fate::Apply, (0, 3));
    check(Fate::Deadline { counted: false }, (3, 2));
    check(Fate::Refuse(503), (1, 2));
}

/// `tail -F log | dkc count hits`: a line does not wait for a full batch.
#[test]
fn lines_of_a_stream_are_counted_as_they_come() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"))
        .args(["count", "hits", "--field", "2", "--flush-interval", "20ms"])
        .args(["--url", &gateway.url()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for round in 1..=3 {
        stdin.write_all(b"GET /a 200\nPOST  /b\nshort\n").unwrap();
        while gateway.state.lock().unwrap().counters.get("/b") != Some(&round) {
            std::thread::yield_now();
        }
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 0);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(stdout.starts_with("counted 6 of 9 lines"), "{stdout}");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("skipped 3 lines without a key"), "{stderr}");
    let state = gateway.state.lock().unwrap();
    assert_eq!((state.counters["/a"], state.counters.len()), (3, 2));
}

#[test]
fn fields_are_cut_where_they_are_asked_to_be() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let args = ["count", "words", "--field", "3", "--delimiter", "\\t"];
    let output = dkc(&args, &gateway.url(), b"a\tb c\td\na\t\td\n");
    assert_eq!(code(&output), 0, "{output:?}");
    assert_eq!(gateway.state.lock().unwrap().counters["d"], 2);
}

/// A service that rejects for ever: `--give-up` ends the count, and nothing counts as applied.
#[test]
fn giving_up_lists_what_was_not_applied() {
    let (gateway, words) = (FakeGateway::start(|_| Fate::Refuse(503)), words(500).join("\n"));
    let args = ["count", "words", "--json", "--give-up", "1", "--batch", "50", "--in-flight", "2"];
    let output = dkc(&args, &gateway.url(), words.as_bytes());
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (1, &0.into()), "{report}");
    // Lines that were sent are listed; lines that were never sent are beyond `lines`.
    let want = format!(r#"[{{"first_line":1,"last_line":{}}}]"#, report["lines"]);
    assert_eq!(report["not_applied"].to_string(), want);
    assert_eq!(report["complete"], false);
    assert!(gateway.state.lock().unwrap().counters.is_empty());
}

#[test]
fn bad_lines_fail_alone() {
    let gateway = FakeGateway::start(|_| Fate::BadInput);
    let long = "x".repeat(1025);
    let input = format!("a\nbad-1\n\n{long}\nbad-1\na\t7\n");
    let output = dkc(&["count", "words", "--json"], &gateway.url(), input.as_bytes());
    let report = json(&output);
    assert_eq!(code(&output), 1);
    assert_eq!((&report["applied"], &report["skipped"]), (&2.into(), &1.into()));
    let failed = report["failed"].to_string();
    assert_eq!(failed, r#"[{"first_line":2,"last_line":2},{"first_line":4,"last_line":5}]"#);
    // Each line has its own reason.
    let reasons = [
        r#"{"first":[{"key":"bad-1","line":2},{"key":"bad-1","line":5}],"lines":2,"reason":"bad-input"}"#,
        r#"{"first":[{"line":4}],"lines":1,"reason":"the key is longer than 1024 bytes"}"#,
    ];
    let got = report["reasons"].as_array().unwrap().iter().map(Value::to_string);
    assert_eq!(got.collect::<BTreeSet<_>>(), reasons.map(str::to_owned).into());
    let output = dkc(&["count", "words"], &gateway.url(), input.as_bytes());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("reason: bad-input: 2 lines, first 2 (bad-1), 5 (bad-1)"), "{stderr}");
    assert!(stderr.contains("reason: the key is longer than 1024 bytes: line 4"), "{stderr}");
    let state = gateway.state.lock().unwrap();
    assert_eq!(state.counters["a\t7"], 2, "a TAB and a number are part of the key");
}

#[test]
fn bytes_that_are_no_text_are_keys_too() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let output = dkc(&["count", "words"], &gateway.url(), b"\xff\n\xff\n");
    assert_eq!(code(&output), 0, "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("counted 2 of 2 lines"));
    assert_eq!(gateway.state.lock().unwrap().counters["bytes:\\xff"], 2);
}

#[test]
fn single_counters() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let url = gateway.url();
    let stdout = |args: &[&str]| String::from_utf8(dkc(args, &url, b"").stdout).unwrap();
    assert_eq!(stdout(&["incr", "words", "k"]), "1\n");
    assert_eq!(stdout(&["incr", "words", "k", "41"]), "42\n");
    assert_eq!(stdout(&["incr", "words", "k", "-2"]), "40\n");
    assert_eq!(stdout(&["get", "words", "k"]), "40\n");
    assert_eq!(stdout(&["get", "words", "k", "other"]), "k\t40\nother\t0\n");
    let printed = json(&dkc(&["incr", "words", "k", "--json"], &url, b""));
    assert_eq!(printed.to_string(), r#"{"applied":1,"key":"k","namespace":"words","value":41}"#);
    // Keys are printed in a form that the commands accept.
    assert_eq!(stdout(&["incr", "words", "%6Bk", "7", "--percent"]), "7\n");
    assert_eq!(stdout(&["get", "words", "--percent", "%6Bk", "caf%E9"]), "kk\t7\ncaf%E9\t0\n");
    assert_eq!(stdout(&["get", "words", "caf%E9", "a\tb\n"]), "caf%25E9\t0\na%09b%0A\t0\n");
    assert_eq!(code(&dkc(&["get", "words", "--percent", "100%"], &url, b"")), 2);
    // A value of more than 64 bits.
    for _ in 0..3 {
        stdout(&["incr", "words", "big", "9223372036854775807"]);
    }
    assert_eq!(stdout(&["get", "words", "big"]), "27670116110564327421\n");
    let printed = stdout(&["get", "words", "big", "--json"]);
    let want = r#"{"namespace":"words","counters":[{"key":"big","value":27670116110564327421}]}"#;
    assert_eq!(printed.trim_end(), want);
    // The key is one path segment, whatever it contains.
    assert_eq!(stdout(&["incr", "words", "a/b c"]), "1\n");
    assert_eq!(gateway.state.lock().unwrap().counters["a%2Fb%20c"], 1);
}

/// One token per invocation: after a lost answer the request is sent again to any gateway.
#[test]
fn an_increment_whose_answer_is_lost_counts_once() {
    for lost in [
        Fate::Drop { counted: true },
        Fate::Drop { counted: false },
        Fate::Deadline { counted: true },
    ] {
        let [one, other] =
            FakeGateway::start_two(move |number| if number % 3 < 2 { lost } else { Fate::Apply });
        let urls = format!("{},{}", one.url(), other.url());
        for value in 1..=2 {
            let output = dkc(&["incr", "words", "k"], &urls, b"");
            assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{value}\n"), "{lost:?}");
        }
    }
    // A rejection is reported at once; nothing was applied.
    let gateway = FakeGateway::start(|_| Fate::Refuse(503));
    assert_eq!(code(&dkc(&["incr", "words", "k"], &gateway.url(), b"")), 1);
    assert_eq!(gateway.state.lock().unwrap().heads.len(), 1);
}

#[test]
fn exit_codes() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone_url = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    #[track_caller]
    fn check(args: &[&str], url: &str, want: i32) {
        let output = dkc(args, url, b"");
        assert_eq!(code(&output), want, "{args:?}: {output:?}");
    }
    check(&["incr", "words", "k"], &gone_url, 1);
    check(&["get", "words", "k"], &gone_url, 1);
    check(&["status"], &gone_url, 1);
    check(&["status", "--json"], &gone_url, 1);
    check(&["bench", "--seconds", "1"], &gone_url, 1);
    check(&["get", "Words", "k"], &gone_url, 2);
    check(&["get", "words", ""], &gone_url, 2);
    check(&["incr", "Words", "k"], &gone_url, 2);
    check(&["incr", "words", ""], &gone_url, 2);
    check(&["incr", "words", "k", "9223372036854775808"], &gone_url, 2);
    check(&["count", "words", "/no/such/file"], &gone_url, 2);
    check(&["count", "words", "/"], &gone_url, 2);
    check(&["count", "words", "--delimiter", ","], &gone_url, 2);
    check(&["count", "words", "--csv"], &gone_url, 2);
    check(&["count", "words", "--field", "name"], &gone_url, 2);
    check(&["count", "words", "--csv", "--field", "1", "--delimiter", "\""], &gone_url, 2);
    check(&["count", "words", "--regex", "a+"], &gone_url, 2);
    check(&["count", "words", "--regex", "(a"], &gone_url, 2);
    check(&["count", "words", "--regex", "(a)", "--field", "1"], &gone_url, 2);
    check(&["count", "words", "--regex", "(a)", "--csv"], &gone_url, 2);
    check(&["count", "words", "--follow"], &gone_url, 2);
    check(&["count", "words", "/", "--follow"], &gone_url, 2);
    check(&["count", "words", "log", "--follow", "--resume-id", "a"], &gone_url, 2);
    check(&["count", "words", "log", "--follow", "--skip-header"], &gone_url, 2);
    check(&["count", "words", "log", "--follow", "--csv", "--field", "name"], &gone_url, 2);
    check(&["count", "words", "--field", "0"], &gone_url, 2);
    check(&["count", "words", "--field", "1", "--delimiter", "ab"], &gone_url, 2);
    check(&["count", "words", "--flush-interval", "0s"], &gone_url, 2);
    check(&["count", "words", "--resume-id", "a/b"], &gone_url, 2);
    check(&["status"], "ftp://x", 2);
    let refusing = FakeGateway::start(|_| Fate::Refuse(503));
    check(&["bench", "--seconds", "1", "--warm-up", "0"], &refusing.url(), 1);
    // No answer comes after the request was sent: the outcome is unknown.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let deaf = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            fake::http::read_request(&mut reader);
        }
    });
    check(&["incr", "words", "k", "--give-up", "1"], &deaf, 3);
    check(&["get", "words", "k"], &deaf, 1);
}

/// Without --resume-dir and without a home directory, the count does not begin.
#[test]
fn a_journal_needs_a_folder() {
    let mut count = Command::new(env!("CARGO_BIN_EXE_dkc"));
    count.args(["count", "words", "--resume-id", "a"]).stdin(Stdio::null());
    count.env_remove("HOME").env_remove("XDG_STATE_HOME");
    // Or with a home directory that cannot be used, as in many containers.
    for home in [None, Some("/dev/null"), Some("/proc/nobody")] {
        home.map(|home| count.env("HOME", home));
        let output = count.output().unwrap();
        assert_eq!(code(&output), 2, "{home:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--resume-dir"), "{output:?}");
    }
}

/// A script would take half of a result for the whole. A closed pipe (`| head -1`) is not an error.
#[test]
fn a_result_that_can_not_be_written_is_an_error() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let status_to = |stdout: Stdio| {
        let mut status = Command::new(env!("CARGO_BIN_EXE_dkc"));
        status.args(["status", "--url", &gateway.url()]).stdout(stdout).stderr(Stdio::null());
        status.status().unwrap().code()
    };
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    assert_eq!(status_to(full.into()), Some(1));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(status_to(writer.into()), Some(0));
}

#[test]
fn status_lists_shards_that_are_not_open_with_reasons() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let text = String::from_utf8(dkc(&["status"], &gateway.url(), b"").stdout).unwrap();
    assert!(text.contains("1 of 2 shards open"), "{text}");
    assert!(text.contains("node-2 is not registered"), "{text}");
    let page = json(&dkc(&["status", "--json"], &gateway.url(), b""));
    assert_eq!(page["cluster"], "fake");
    assert_eq!(page["summary"]["not_open"][0]["id"], 1);
    assert_eq!(page["summary"]["in_sync_min"], 1);
}

#[test]
fn bench_counts_what_it_reports() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let url = gateway.url();
    for (batch, format) in [("1", "text"), ("100", "text"), ("100", "json")] {
        let args = [
            "bench",
            "--json",
            "--clients",
            "4",
            "--seconds",
            "1",
            "--warm-up",
            "0",
            "--batch",
            batch,
            "--format",
            format,
            "--keys",
            "50",
        ];
        let before: i128 = gateway.state.lock().unwrap().counters.values().sum();
        let report = json(&dkc(&args, &url, b""));
        let after: i128 = gateway.state.lock().unwrap().counters.values().sum();
        let reported = i128::from(report["increments"].as_u64().unwrap());
        let batch: i128 = batch.parse().unwrap();
        assert_eq!(report["errors"], 0, "{report}");
        assert!(reported > 0, "{report}");
        // Increments before and after the measured second were counted, too.
        let counted = after - before;
        assert!(counted >= reported, "{counted} {report}");
        assert!(counted <= reported * 2 + 8 * batch, "{counted} {report}");
        assert!(report["cpus_busy"]["generator"].as_f64().is_some(), "{report}");
    }
}

#[test]
fn bench_counts_refusals_apart_from_errors() {
    #[track_caller]
    fn check(fate: Fate, counted: &str, others: [&str; 2], extra: &[&str]) {
        let gateway = FakeGateway::start(move |_| fate);
        let usual = ["bench", "--json", "--clients", "4", "--seconds", "1", "--warm-up", "0"];
        let output = dkc(&[&usual, extra].concat(), &gateway.url(), b"");
        let report = json(&output);
        assert!(report[counted].as_u64() > Some(0), "{report}");
        others.iter().for_each(|other| assert_eq!(report[other], 0, "{other} of {report}"));
        assert_eq!(code(&output), i32::from(counted != "requests"), "{report}");
    }
    check(Fate::Refuse(429), "refused", ["requests", "errors"], &[]);
    check(Fate::Deadline { counted: true }, "errors", ["requests", "refused"], &[]);
    // Of four items some were not applied; of ten one is unknown, too.
    check(Fate::Parts, "refused", ["requests", "errors"], &["--batch", "4"]);
    check(Fate::Parts, "errors", ["requests", "refused"], &["--batch", "10"]);
    let open = ["--rate", "50", "--distribution", "zipf"];
    check(Fate::Apply, "requests", ["refused", "errors"], &open);
}

#[test]
fn bench_refuses_what_makes_no_sense() {
    let gateway = FakeGateway::start(|_| Fate::Apply);
    for args in [
        ["--rate", "0"],
        ["--reads", "101"],
        ["--distribution", "normal"],
        ["--rounds", "2"],
        ["--profile", "none"],
    ] {
        let output = dkc(&[&["bench"], &args[..]].concat(), &gateway.url(), b"");
        assert_eq!(code(&output), 2, "{args:?}: {output:?}");
    }
}
