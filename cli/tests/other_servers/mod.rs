//! URLs that are not those of a gateway: a proxy, a web server, another service, or no server at
//! all.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::fake::{self, FakeGateway, Fate};
use crate::{code, dkc, json, signal, words};

/// An address at which nothing listens.
fn gone() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// A server that answers every request with these bytes.
fn answering(bytes: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            fake::http::read_request(&mut BufReader::new(stream.try_clone().unwrap()));
            let _ = stream.write_all(bytes);
        }
    });
    url
}

/// A server that takes requests and answers none.
fn deaf() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let streams: Vec<_> = listener.incoming().collect();
        drop(streams);
    });
    url
}

#[test]
fn an_answer_that_applied_nothing_is_final() {
    for status in [301, 302, 308, 400, 401, 403, 404, 405, 410, 501, 505] {
        let gateway = FakeGateway::start(move |_| Fate::OtherServer(status));
        let named = format!(
            "{} is not a dkc gateway: {status}, text/html, Location: https://",
            gateway.address
        );
        let args = ["count", "words", "--json", "--batch", "1", "--in-flight", "1"];
        let output = dkc(&args, &gateway.url(), b"a\nb\n");
        let report = json(&output);
        assert_eq!(code(&output), 1, "{report}");
        assert_eq!(report["not_applied"][0]["first_line"], 1, "{report}");
        assert!(report["reasons"].to_string().contains(&named), "{report}");
        assert_eq!(gateway.state.lock().unwrap().heads.len(), 1, "{status}: it was sent again");
        for command in [&["incr", "words", "k"][..], &["get", "words", "k"]] {
            let output = dkc(command, &gateway.url(), b"");
            assert_eq!(code(&output), 1);
            assert!(String::from_utf8_lossy(&output.stderr).contains(&named), "{output:?}");
        }
        assert_eq!(gateway.state.lock().unwrap().heads.len(), 2);
    }
}

#[test]
fn after_an_ambiguous_answer_the_request_is_sent_again() {
    for status in [200, 500, 502, 503, 504] {
        let gateway = FakeGateway::start(move |_| Fate::OtherServer(status));
        let output = dkc(&["count", "words", "--json", "--give-up", "1"], &gateway.url(), b"a\n");
        let report = json(&output);
        assert_eq!((code(&output), &report["unknown"][0]["last_line"]), (3, &1.into()), "{report}");
        assert!(report["reasons"].to_string().contains("is not a dkc gateway"), "{report}");
        assert!(report["retries"].as_u64().unwrap() > 0, "{report}");
    }
    // After such an answer the request may have been applied, whatever a later answer is.
    let gateway =
        FakeGateway::start(|number| Fate::OtherServer(if number == 0 { 502 } else { 404 }));
    let output = dkc(&["count", "words", "--json"], &gateway.url(), b"a\n");
    assert_eq!((code(&output), &json(&output)["unknown"][0]["last_line"]), (3, &1.into()));
}

#[test]
fn one_gateway_among_other_servers_is_enough() {
    let other = FakeGateway::start(|_| Fate::OtherServer(404));
    let gateway = FakeGateway::start(|_| Fate::Apply);
    let urls = format!("{},{}", other.url(), gateway.url());
    let output = dkc(&["count", "words", "--json", "--batch", "1"], &urls, b"a\nb\na\n");
    assert_eq!((code(&output), &json(&output)["applied"]), (0, &3.into()), "{output:?}");
    assert_eq!(gateway.state.lock().unwrap().counters["a"], 2);
    assert_eq!(dkc(&["incr", "words", "a"], &urls, b"").stdout, b"3\n");
}

#[test]
fn another_protocol_is_named_at_once() {
    for answer in [
        &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
        b"-ERR unknown command\r\n",
        b"\x15\x03\x01\0\x02\x02\x46",
    ] {
        let url = answering(answer);
        let output = dkc(&["count", "words", "--json"], &url, b"a\n");
        let report = json(&output);
        assert_eq!(
            (code(&output), &report["not_applied"][0]["last_line"]),
            (1, &1.into()),
            "{report}"
        );
        assert!(report["reasons"].to_string().contains("does not use HTTP"), "{report}");
        assert_eq!(code(&dkc(&["incr", "words", "k"], &url, b"")), 1);
    }
}

#[test]
fn a_batch_that_is_too_large_for_a_proxy_is_split() {
    let gateway = FakeGateway::start(|_| Fate::Limit(300));
    let words = words(2_000);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().to_str().unwrap();
    let args =
        ["count", "words", "--json", "--batch", "400", "--resume-id", "a", "--resume-dir", folder];
    let input = words.join("\n") + "\n";
    let output = dkc(&args, &gateway.url(), input.as_bytes());
    let report = json(&output);
    assert_eq!((code(&output), &report["applied"]), (0, &2_000.into()), "{report}");
    let state = || gateway.state.lock().unwrap();
    assert_eq!(state().counters.values().sum::<i128>(), 2_000);
    assert_eq!(
        state().counters["word-0"],
        words.iter().filter(|word| *word == "word-0").count() as i128
    );
    // Batches that were read later were made smaller at once.
    let requests = state().heads.len();
    assert!(requests < 1_000, "{requests}");
    let report = json(&dkc(&args, &gateway.url(), input.as_bytes()));
    assert_eq!((&report["applied"], &report["resumed"]), (&2_000.into(), &2_000.into()));
    assert_eq!(state().heads.len(), requests);
    // A single line that is too large ends the count.
    let long = "x".repeat(400);
    let output = dkc(&["count", "words", "--json"], &gateway.url(), long.as_bytes());
    let report = json(&output);
    assert_eq!((code(&output), &report["not_applied"][0]["last_line"]), (1, &1.into()), "{report}");
    assert!(report["reasons"].to_string().contains("413, text/html"), "{report}");
}

/// `dkc count` of one line, whose input stays open.
fn count(url: &str) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dkc"))
        .args([
            "count",
            "words",
            "--json",
            "--flush-interval",
            "1ms",
            "--give-up",
            "77",
            "--url",
            url,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.as_mut().unwrap().write_all(b"a\n").unwrap();
    child
}

/// A message soon names the URL and the time limit of the wait, and a signal ends the count soon.
#[test]
fn a_stall_is_reported_and_ends_at_a_signal() {
    for (url, stop, want) in [(gone(), "-INT", 1), (deaf(), "-TERM", 3)] {
        let begun = Instant::now();
        let mut child = count(&url);
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        assert!(line.contains(&url) && line.contains("--give-up 77"), "{line}");
        assert!(begun.elapsed() < Duration::from_millis(2_500), "{:?}", begun.elapsed());
        let begun = Instant::now();
        signal(&child, stop);
        let output = child.wait_with_output().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        let report = json(&output);
        assert_eq!(code(&output), want, "{report}");
        assert_eq!(report["lines"], 1, "{report}");
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("stopping"), "{rest}");
    }
    let url = deaf();
    for args in [&["incr", "words", "k", "--give-up", "1"][..], &["get", "words", "k"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dkc"));
        let mut child =
            command.args(args).args(["--url", &url]).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains(&format!("no answer yet from {url}")), "{line}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
