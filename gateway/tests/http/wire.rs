//! The protocol of a connection: pipelining, bodies, malformed and slow clients.

use std::time::{Duration, Instant};

use crate::client::Client;
use crate::cluster::{Cluster, until};

const INCREMENT: &str = "POST /v1/counters/ns/k/increment";

#[test]
fn pipelined_requests_are_answered_in_order() {
    let cluster = Cluster::start(2);
    let mut client = cluster.client();
    let one = format!(
        "{INCREMENT} HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n{{\"return\":\"value\"}}"
    );
    client.send(one.repeat(50).as_bytes());
    for value in 1..=50 {
        assert_eq!(client.answer(false).json()["value"], value);
    }
}

#[test]
fn http_1_0() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    client.send(format!("{INCREMENT} HTTP/1.0\r\n\r\n").as_bytes());
    assert_eq!(client.answer(false).status, 200);
    assert!(client.is_closed());
    let mut client = cluster.client();
    client.send(b"GET /v1/counters/ns/k HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_eq!(client.answer(false).json()["value"], 1);
    assert_eq!(client.get("/livez").status, 200);
}

#[test]
fn chunked_bodies() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    let head = format!("{INCREMENT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.send(head.as_bytes());
    for piece in ["5;x=y\r\n{\"del\r\n", "4\r\nta\":\r\n", "2\r\n7}\r\n", "0\r\nTrailer: t\r\n\r\n"]
    {
        client.send(piece.as_bytes());
    }
    assert_eq!(client.answer(false).json()["applied"], 7);
    client.send(head.as_bytes());
    client.send(b"0\r\n\r\n");
    assert_eq!(client.answer(false).json()["applied"], 1);
    // A body that is too large, without an announced length.
    let batch =
        "POST /v1/counters/ns/increment HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n";
    client.send(format!("{batch}Transfer-Encoding: chunked\r\n\r\n").as_bytes());
    let piece = [b"100000\r\n".as_slice(), &vec![b'x'; 1 << 20], b"\r\n"].concat();
    for _ in 0..9 {
        client.send(&piece);
    }
    client.send(b"0\r\n\r\n");
    assert_eq!(client.answer(false).status, 413);
    assert_eq!(client.get("/v1/counters/ns/k").json()["value"], 8);
    // The chunk is malformed.
    client.send(head.as_bytes());
    client.send(b"zz\r\n");
    assert_eq!(client.answer(false).status, 400);
    assert!(client.is_closed());
}

#[test]
fn expect_100_continue() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    let head = format!("{INCREMENT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n");
    client.send(format!("{head}Content-Length: 11\r\n\r\n").as_bytes());
    assert_eq!(client.answer(false).status, 100);
    client.send(b"{\"delta\":3}");
    assert_eq!(client.answer(false).json()["applied"], 3);
    // The client does not send a body that would be refused.
    client.send(format!("{head}Content-Length: 9000000\r\n\r\n").as_bytes());
    assert_eq!(client.answer(false).status, 413);
}

#[test]
fn half_sent_requests_change_nothing() {
    let cluster = Cluster::start(1);
    // The client disconnects in the middle of the body.
    let mut client = cluster.client();
    client.send(
        format!("{INCREMENT} HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{{\"delta\"")
            .as_bytes(),
    );
    drop(client);
    // The client falls silent in the middle of the body.
    let mut client = cluster.client();
    let began = Instant::now();
    let head = format!(
        "{INCREMENT} HTTP/1.1\r\nHost: x\r\nRequest-Timeout-Ms: 100\r\nContent-Length: 11\r\n\r\n"
    );
    client.send(format!("{head}{{\"del").as_bytes());
    let answer = client.answer(false);
    assert_eq!((answer.status, answer.outcome().as_str()), (400, "not-applied"));
    assert_eq!(answer.json()["field"], "body");
    assert!(began.elapsed() >= Duration::from_millis(100));
    assert!(client.is_closed(), "the rest of a body would be taken for a request");
    assert_eq!(cluster.client().get("/v1/counters/ns/k").json()["value"], 0);
}

#[test]
fn slow_requests_are_waited_for() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    let text =
        format!("{INCREMENT} HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{{\"delta\":3}}");
    for byte in text.as_bytes() {
        client.send(&[*byte]);
    }
    assert_eq!(client.answer(false).json()["applied"], 3);
}

/// `printf … | nc` closes its sending side after the request.
#[test]
fn a_half_closed_connection_still_gets_the_answer() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    client.request(INCREMENT, &[], b"{\"delta\":3}");
    client.end_sending();
    assert_eq!(client.answer(false).json()["applied"], 3);
    assert!(client.is_closed());
}

#[test]
fn malformed_heads_are_refused() {
    let cluster = Cluster::start(1);
    #[track_caller]
    fn check(cluster: &Cluster, text: &str, want: u16) {
        let mut client = cluster.client();
        client.send(text.as_bytes());
        let answer = client.answer(false);
        let kind = match want {
            414 => "url-too-long",
            431 => "too-large",
            _ => "bad-input",
        };
        let problem = (answer.status, answer.kind(), answer.outcome());
        let text = &text[..text.len().min(60)];
        assert_eq!(problem, (want, kind.into(), "not-applied".into()), "{text}");
        assert_eq!(answer.headers["content-type"], "application/problem+json", "{text}");
        assert_eq!(answer.json()["status"], want, "{text}");
    }
    for text in [
        "nonsense\r\n\r\n",
        "GET /livez\r\n\r\n",
        "GE T /livez HTTP/1.1\r\n\r\n",
        "GET /livez HTTP/2.0\r\n\r\n",
        "GET /livez HTTP/1.1\r\nX : y\r\n\r\n",
        // A TLS handshake on a port without TLS.
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\r\n\r\n",
    ] {
        check(&cluster, text, 400);
    }
    // The end of the body is not defined, or the body does not match its length.
    for text in [
        "Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        "Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        "Transfer-Encoding: chunked\r\n\r\n2\r\n{}x\r\n0\r\n\r\n",
        "Content-Length: -1\r\n\r\n",
        "Content-Length: 99999999999999999999\r\n\r\n",
    ] {
        check(&cluster, &format!("{INCREMENT} HTTP/1.1\r\nHost: x\r\n{text}"), 400);
    }
    check(&cluster, &format!("{INCREMENT} HTTP/1.1\r\nContent-Length: x\r\n\r\n"), 400);
    check(
        &cluster,
        &format!("{INCREMENT} HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        400,
    );
    // The URL is longer than the limit of dkc, and longer than the buffer of hyper.
    check(&cluster, &format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(20_000)), 414);
    check(&cluster, &format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000)), 414);
    check(&cluster, &format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1_000_000)), 431);
    check(&cluster, &format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(200)), 431);
    assert_eq!(cluster.client().get("/v1/counters/ns/k").json()["value"], 0);
}

/// The answers to earlier requests are complete and come first.
#[test]
fn malformed_heads_after_valid_requests_are_refused() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    client.send(
        format!("{INCREMENT} HTTP/1.1\r\n\r\n{INCREMENT} HTTP/1.1\r\n\r\nrubbish\r\n\r\n")
            .as_bytes(),
    );
    assert_eq!([client.answer(false).status, client.answer(false).status], [200, 200]);
    let refused = client.answer(false);
    assert_eq!((refused.status, refused.outcome().as_str()), (400, "not-applied"));
    assert!(client.is_closed());
    let mut other = cluster.client();
    assert_eq!(other.get("/v1/counters/ns/k").json()["value"], 2);
    let counted = other.get("/metrics").body;
    assert!(counted.contains("dkc_requests_total{op=\"none\",code=\"400\"} 1\n"), "{counted}");
}

#[test]
fn idle_connections_and_slow_heads_are_closed() {
    let mut cluster = Cluster::without_gateway(1);
    cluster.start_gateway_with(|options| options.idle_timeout = 1);
    cluster.ready();
    let began = Instant::now();
    let mut silent = cluster.client();
    let mut half = cluster.client();
    half.send(b"GET /livez HTTP/1.1\r\nHost:");
    let mut kept = cluster.client();
    assert_eq!(kept.get("/livez").status, 200);
    let mut trickling = cluster.client();
    trickling.send(b"GET /livez HTTP/1.1\r\n");
    // Single bytes do not extend the timeout: the head must be complete in time.
    while trickling.try_send(b"X: y\r\n") {
        std::thread::sleep(Duration::from_millis(20));
        assert!(began.elapsed() < Duration::from_secs(10), "it is still served");
    }
    for client in [&mut silent, &mut half, &mut kept] {
        assert!(client.is_closed());
    }
    assert!(began.elapsed() >= Duration::from_secs(1), "closed after {:?}", began.elapsed());
}

/// A request with a body of 200 KB that is answered with 16 MB: all of its lines but the first are
/// malformed, and each gets a reason.
fn request_with_a_large_answer() -> Vec<u8> {
    let lines = format!("{{\"key\":\"k\"}}\n{}", "x\n".repeat(99_999));
    let line =
        "POST /v1/counters/ns/increment HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson";
    format!("{line}\r\nContent-Length: {}\r\n\r\n{lines}", lines.len()).into_bytes()
}

#[test]
fn memory_for_unread_answers_is_limited() {
    let mut cluster = Cluster::without_gateway(1);
    // 368 MiB of the memory are for bodies and answers.
    cluster.start_gateway_with(|options| {
        (options.workers, options.memory_bytes) = (Some(1), 2 << 30);
    });
    cluster.ready();
    let request = request_with_a_large_answer();
    let mut clients: Vec<_> = (0..40).map(|_| cluster.client()).collect();
    for client in &mut clients {
        client.send(&request);
    }
    let all_answered = || {
        let metrics = cluster.client().get("/metrics").body;
        let counted = |code: u16| {
            let name = format!("dkc_requests_total{{op=\"increment_batch\",code=\"{code}\"}} ");
            let rest = metrics.split(&name).nth(1);
            rest.map_or(0, |rest| rest.lines().next().unwrap().parse().unwrap())
        };
        counted(200) + counted(429) == 40
    };
    until("all are answered", all_answered);
    let statuses: Vec<_> = clients.iter_mut().map(|client| client.answer(false).status).collect();
    let applied = statuses.iter().filter(|&&status| status == 200).count();
    assert!((8..=24).contains(&applied), "368 MiB are held: {statuses:?}");
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert_eq!(cluster.client().get("/v1/counters/ns/k").json()["value"], applied);
    // A small request is admitted although the memory is exhausted.
    let mut small = cluster.client();
    let body = format!("{{\"delta\":0{}}}", " ".repeat(30_000));
    assert_eq!(small.call(INCREMENT, &[], body.as_bytes()).status, 200);
    // The answers that were read have freed memory.
    clients[0].send(&request);
    assert_eq!(clients[0].answer(false).status, 200);
}

#[test]
fn a_connection_whose_client_does_not_read_is_closed() {
    let mut cluster = Cluster::without_gateway(1);
    cluster.start_gateway_with(|options| options.idle_timeout = 1);
    cluster.ready();
    let mut deaf = cluster.client();
    deaf.send(&request_with_a_large_answer());
    let metrics_have = |line: &str| cluster.client().get("/metrics").body.contains(line);
    let answered = "dkc_requests_total{op=\"increment_batch\",code=\"200\"} 1\n";
    until("it is answered", || metrics_have(answered));
    until("only the client that asks is connected", || metrics_have("dkc_connections 1\n"));
}

/// The client reads all the time, so the write timeout alone would not end the connection.
#[test]
fn a_connection_whose_client_reads_too_slowly_is_closed() {
    let mut cluster = Cluster::without_gateway(1);
    cluster.start_gateway_with(|options| options.idle_timeout = 1);
    cluster.ready();
    let mut slow = cluster.block_on(Client::narrow(cluster.address()));
    slow.send(&request_with_a_large_answer());
    let began = Instant::now();
    until("only the client that asks is connected", || {
        // About 20 KB/s of 16 MB.
        slow.take_some();
        cluster.client().get("/metrics").body.contains("dkc_connections 1\n")
    });
    assert!(began.elapsed() >= Duration::from_secs(1));
}

/// Compressed bytes would count as very odd keys. A check of the first line only, or of the last
/// coding only, would let them pass.
#[test]
fn an_unsupported_transfer_coding_is_refused_by_name() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    let batch = "POST /v1/counters/ns/increment HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain";
    for codings in [
        "gzip, chunked",
        "deflate, chunked",
        "foo, chunked",
        "identity, chunked",
        "chunked, chunked",
        "gzip\r\nTransfer-Encoding: chunked",
    ] {
        let head = format!("{batch}\r\nTransfer-Encoding: {codings}\r\n\r\n");
        client.send(format!("{head}2\r\na\n\r\n0\r\n\r\n").as_bytes());
        let answer = client.answer(false);
        assert_eq!(answer.status, 400, "{codings}");
        assert_eq!(answer.json()["field"], "Transfer-Encoding", "{codings}");
    }
    assert_eq!(client.get("/v1/counters/ns/a").json()["value"], 0);
}

/// A body of a method without one would be ignored, or parsed as the next request.
#[test]
fn a_body_where_none_belongs_is_refused() {
    let cluster = Cluster::start(1);
    let mut client = cluster.client();
    for line in [
        "GET /v1/counters/ns/k",
        "DELETE /v1/counters/ns/k",
        "GET /livez",
        "OPTIONS /readyz",
        "GET /v1/cluster",
    ] {
        let answer = client.call(line, &[], b"{}");
        assert_eq!((answer.status, &answer.json()["field"]), (400, &"body".into()), "{line}");
        client.send(
            format!("{line} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").as_bytes(),
        );
        assert_eq!(client.answer(false).json()["field"], "body", "{line}");
    }
    // An empty body is allowed.
    assert_eq!(client.call("DELETE /v1/counters/ns/k", &["Content-Length: 0"], b"").status, 200);
}

#[test]
fn many_connections_are_served() {
    let cluster = Cluster::start(2);
    let mut clients: Vec<_> = (0..100).map(|_| cluster.client()).collect();
    for client in &mut clients {
        client.request(INCREMENT, &[], b"");
    }
    for client in &mut clients {
        assert_eq!(client.answer(false).status, 200);
    }
    let mut last = clients.pop().unwrap();
    drop(clients);
    assert_eq!(last.get("/v1/counters/ns/k").json()["value"], 100);
    until("the gateway has noticed that the others are closed", || {
        last.get("/metrics").body.contains("dkc_connections 1\n")
    });
}
