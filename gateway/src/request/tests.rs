//! Parsing of requests. The answers to valid and invalid requests are tested in
//! `tests/http/table/`.

use hyper::Request;

use super::*;

/// Parses a request line and header lines: the head, or the status and the field of the problem.
fn parsed(text: &str) -> Result<RequestHead, (u16, String)> {
    let mut lines = text.lines();
    let (method, target) = lines.next().unwrap().split_once(' ').unwrap();
    let mut request = Request::builder().method(method).uri(target);
    for line in lines {
        let (name, value) = line.split_once(": ").unwrap();
        request = request.header(name, value);
    }
    let (parts, ()) = request.body(()).unwrap().into_parts();
    head(&parts).map_err(|problem| {
        assert_eq!(problem.outcome, engine::batcher::Outcome::NotApplied);
        (problem.kind.status().as_u16(), problem.field.unwrap_or_default().into_owned())
    })
}

#[track_caller]
fn routed(text: &str, want: Route) {
    assert_eq!(parsed(text).map(|head| head.route), Ok(want), "{text}");
}

#[track_caller]
fn refused(text: &str, status: u16, field: &str) {
    assert_eq!(parsed(text), Err((status, field.to_owned())), "{text}");
}

fn named(namespace: &str, key: &[u8]) -> CounterKey {
    CounterKey::new(namespace.as_bytes(), key).unwrap()
}

fn get(key: &[u8]) -> Route {
    Route::Get { counter: named("ns", key), query: ReadQuery::default() }
}

fn one(delta: Option<i64>, returning: bool) -> Route {
    Route::Increment {
        counter: named("ns", b"k"),
        query: IncrementQuery { delta, returning, exact: false },
    }
}

#[test]
fn paths() {
    routed("POST /v1/counters/ns/k/increment", one(None, false));
    routed("POST /v1/counters/ns/increment", Route::IncrementMany { namespace: "ns".into() });
    let many = Route::GetMany { namespace: "ns".into(), query: ReadQuery::default() };
    routed("POST /v1/counters/ns/get", many);
    routed("GET /v1/counters/ns/k", get(b"k"));
    routed("HEAD /v1/counters/ns/k", get(b"k"));
    routed("DELETE /v1/counters/ns/k", Route::Delete { counter: named("ns", b"k"), exact: false });
    routed("GET /livez", Route::Page(InfoPage::Livez));
    routed("GET /readyz?verbose", Route::Page(InfoPage::Readyz));
    routed("GET /readyz?allow", Route::Page(InfoPage::Readyz));
    routed("GET /readyz?all", Route::Page(InfoPage::ReadyzAll));
    routed("OPTIONS /readyz?x&all=1", Route::Page(InfoPage::ReadyzAll));
    routed("GET /metrics", Route::Page(InfoPage::Metrics));
    routed("HEAD /v1/cluster", Route::Page(InfoPage::Cluster));
    routed("GET http://host:1/v1/counters/ns/k", get(b"k"));
    for path in
        ["/", "/v1", "/v1/counters", "/v1/counters/", "/v1/counters/ns", "/v2/counters/ns/k"]
    {
        refused(&format!("GET {path}"), 404, "");
    }
    refused("POST /v1/counters/ns/a/b/increment", 404, "");
    refused("POST /v1/counters/ns/k/increment/", 404, "");
    refused("GET /v1/counters/ns/k/", 404, "");
    refused("GET /v1/counters/ns/k/Increment", 404, "");
    refused("GET /V1/counters/ns/k", 404, "");
}

#[test]
fn consistency() {
    #[track_caller]
    fn check(query: &str, want: Option<u64>) {
        let counter = named("ns", b"k");
        let want = ReadQuery { bounded_ms: want, exact: false };
        routed(&format!("GET /v1/counters/ns/k?{query}"), Route::Get { counter, query: want });
    }
    check("consistency=linearizable", None);
    check("consistency=bounded&max_staleness_ms=250", Some(250));
    check("max_staleness_ms=0&consistency=bounded", Some(0));
    check("consistency=bounded", Some(1_000));
    let query = ReadQuery { bounded_ms: Some(7), exact: false };
    let many = Route::GetMany { namespace: "ns".into(), query };
    routed("POST /v1/counters/ns/get?consistency=bounded&max_staleness_ms=7", many);
    refused("POST /v1/counters/ns/get?max_staleness_ms=5", 400, "max_staleness_ms");
    refused("POST /v1/counters/ns/get?consistency=fresh", 400, "consistency");
    let get = "GET /v1/counters/ns/k";
    refused(&format!("{get}?consistency=eventual"), 400, "consistency");
    refused(&format!("{get}?consistency="), 400, "consistency");
    refused(&format!("{get}?max_staleness_ms=5"), 400, "max_staleness_ms");
    refused(&format!("{get}?consistency=linearizable&max_staleness_ms=5"), 400, "max_staleness_ms");
    refused(&format!("{get}?consistency=bounded&max_staleness_ms=-1"), 400, "max_staleness_ms");
    for bad in ["x", "", "1.5", "9223372036854775808", "5&max_staleness_ms=5"] {
        let query = format!("consistency=bounded&max_staleness_ms={bad}");
        refused(&format!("{get}?{query}"), 400, "max_staleness_ms");
    }
}

#[test]
fn urls_have_8_kib() {
    let start = "/v1/counters/ns/k?";
    let longest = format!("{start}{}", "&".repeat(URL_BYTES_MAX - start.len()));
    routed(&format!("GET {longest}"), get(b"k"));
    refused(&format!("GET {longest}&"), 414, "");
    // The length is checked before the meaning of the URL.
    refused(&format!("PUT /{}", "x".repeat(URL_BYTES_MAX)), 414, "");
}

#[test]
fn deadlines() {
    #[track_caller]
    fn check(value: &str, want: Option<u64>) {
        let text = format!("GET /v1/counters/ns/k\nRequest-Timeout-Ms: {value}");
        match want {
            Some(ms) => assert_eq!(parsed(&text).unwrap().timeout.as_millis(), u128::from(ms)),
            None => refused(&text, 400, "Request-Timeout-Ms"),
        }
    }
    check("1", Some(1));
    check("60000", Some(60_000));
    for value in ["0", "-1", "60001", "5s", "1.5", "", "9223372036854775808"] {
        check(value, None);
    }
    assert_eq!(parsed("GET /v1/counters/ns/k").unwrap().timeout.as_millis(), 5_000);
    let twice = "GET /v1/counters/ns/k\nRequest-Timeout-Ms: 5\nRequest-Timeout-Ms: 6";
    refused(twice, 400, "Request-Timeout-Ms");
}

#[test]
fn plain_answers() {
    #[track_caller]
    fn check(accept: &str, want: bool) {
        let head = parsed(&format!("GET /v1/counters/ns/k\nAccept: {accept}")).unwrap();
        assert_eq!(head.plain, want, "{accept}");
    }
    check("*/*", false);
    check("application/json", false);
    check("text/plain", true);
    check("Text/Plain; charset=utf-8", true);
    check("text/plain, */*", true);
    check("text/plain, application/json", true);
    check("application/json, text/plain", false);
    check("application/json, text/plain, */*", false);
    check("text/plain;q=0.5, application/json", false);
    check("text/plain;q=0.9, application/json;q=0.5", true);
    check("text/plain;q=0", false);
    check("text/html, application/xhtml+xml", false);
    check("application/json\nAccept: text/plain", false);
    check("text/html\nAccept: text/plain", true);
    assert!(!parsed("GET /v1/counters/ns/k").unwrap().plain);
}

/// Every line of a name is checked, and a line that would change the meaning of a request is never
/// ignored.
#[test]
fn headers_are_understood_or_refused() {
    let batch = "POST /v1/counters/ns/increment";
    let many = Route::IncrementMany { namespace: "ns".into() };
    for fine in [
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: Chunked",
        "Content-Encoding: identity",
        "Content-Encoding: Identity\nContent-Encoding: identity",
        "Content-Type: text/plain; charset=UTF-8",
        "Content-Type: text/plain;charset=\"us-ascii\"; format=flowed",
        "Content-Type: application/json ; CHARSET=utf8",
        "Expect: 100-Continue",
        "Host: x",
    ] {
        routed(&format!("{batch}\n{fine}"), many.clone());
    }
    for (wrong, status, field) in [
        ("Transfer-Encoding: gzip, chunked", 400, "Transfer-Encoding"),
        ("Transfer-Encoding: gzip\nTransfer-Encoding: chunked", 400, "Transfer-Encoding"),
        ("Transfer-Encoding: chunked\nTransfer-Encoding: chunked", 400, "Transfer-Encoding"),
        ("Transfer-Encoding: chunked, chunked", 400, "Transfer-Encoding"),
        ("Transfer-Encoding: identity, chunked", 400, "Transfer-Encoding"),
        ("Transfer-Encoding: chunked;q=1", 400, "Transfer-Encoding"),
        ("Content-Range: bytes 0-1/99", 400, "Content-Range"),
        ("Host: x\nHost: x", 400, "Host"),
        ("Expect: foo", 417, ""),
        ("Expect: 100-continue\nExpect: foo", 417, ""),
        ("Expect: 100-continue, foo", 417, ""),
        ("Content-Encoding: gzip", 415, ""),
        ("Content-Encoding: identity\nContent-Encoding: gzip", 415, ""),
        ("Content-Encoding: gzip\nContent-Encoding: identity", 415, ""),
        ("Content-Encoding: identity, gzip", 415, ""),
        ("Content-Encoding: ", 415, ""),
        ("Content-Type: text/plain\nContent-Type: application/json", 415, ""),
        ("Content-Type: application/json\nContent-Type: application/json", 415, ""),
        ("Content-Type: text/plain, application/json", 415, ""),
        ("Content-Type: text/plain; charset=utf-16", 415, ""),
        ("Content-Type: text/plain; charset=latin1", 415, ""),
        ("Content-Type: application/json; charset=\"iso-8859-1\"", 415, ""),
        ("Content-Type: text/plain; format=flowed; charset=utf-7", 415, ""),
        ("Content-Type: text/plain; charset=utf-8; charset=utf-16", 415, ""),
        ("Content-Type: text/plain; charset", 415, ""),
    ] {
        refused(&format!("{batch}\n{wrong}"), status, field);
    }
}

#[test]
fn values_as_strings_are_requested_by_a_parameter() {
    let counter = || named("ns", b"k");
    let read = ReadQuery { bounded_ms: None, exact: true };
    let get = "GET /v1/counters/ns/k";
    routed(&format!("{get}?value=string"), Route::Get { counter: counter(), query: read });
    let many = Route::GetMany { namespace: "ns".into(), query: read };
    routed("POST /v1/counters/ns/get?value=string", many);
    let delete = "DELETE /v1/counters/ns/k?value=string";
    routed(delete, Route::Delete { counter: counter(), exact: true });
    let query = IncrementQuery { delta: None, returning: true, exact: true };
    let one = "POST /v1/counters/ns/k/increment?return=value&value=string";
    routed(one, Route::Increment { counter: counter(), query });
    for wrong in ["value", "value=", "value=number", "value=string&value=string"] {
        refused(&format!("{get}?{wrong}"), 400, "value");
    }
    refused("POST /v1/counters/ns/increment?value=string", 400, "value");
}
