//! The rows of DESIGN §12 that are about what a client says.

use engine::ops::{Op, OpKind};
use hyper::Request;

use super::*;

/// A request line, header lines, and what becomes of it: the route, or status, field and what the detail speaks of.
fn judged(text: &str) -> Result<Head, (u16, String)> {
    let mut lines = text.lines();
    let (method, target) = lines.next().unwrap().split_once(' ').unwrap();
    let mut request = Request::builder().method(method).uri(target);
    for line in lines {
        let (name, value) = line.split_once(": ").unwrap();
        request = request.header(name, value);
    }
    let (parts, ()) = request.body(()).unwrap().into_parts();
    head(&parts).map_err(|problem| {
        assert_eq!(problem.outcome, crate::problem::Outcome::NotApplied);
        (problem.kind.status().as_u16(), problem.field.unwrap_or_default().into_owned())
    })
}

#[track_caller]
fn routed(text: &str, want: Route) {
    assert_eq!(judged(text).map(|head| head.route), Ok(want), "{text}");
}

#[track_caller]
fn refused(text: &str, status: u16, field: &str) {
    assert_eq!(judged(text), Err((status, field.to_owned())), "{text}");
}

fn named(namespace: &str, key: &[u8]) -> CounterKey {
    CounterKey::new(namespace.as_bytes(), key).unwrap()
}

fn get(key: &[u8]) -> Route {
    Route::Get { counter: named("ns", key), bounded_ms: None }
}

fn one(delta: Option<i64>, returning: bool) -> Route {
    Route::Increment { counter: named("ns", b"k"), query: IncrementQuery { delta, returning } }
}

#[test]
fn paths() {
    routed("POST /v1/counters/ns/k/increment", one(None, false));
    routed("POST /v1/counters/ns/increment", Route::IncrementMany { namespace: "ns".into() });
    let many = Route::GetMany { namespace: "ns".into(), bounded_ms: None };
    routed("POST /v1/counters/ns/get", many);
    routed("GET /v1/counters/ns/k", get(b"k"));
    routed("HEAD /v1/counters/ns/k", get(b"k"));
    routed("DELETE /v1/counters/ns/k", Route::Delete { counter: named("ns", b"k") });
    routed("GET /livez", Route::Page(Page::Livez));
    routed("GET /readyz?verbose", Route::Page(Page::Readyz));
    routed("GET /metrics", Route::Page(Page::Metrics));
    routed("HEAD /v1/cluster", Route::Page(Page::Cluster));
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

/// They are words of the URL only where the contract puts them.
#[test]
fn increment_and_get_are_keys_too() {
    routed("GET /v1/counters/ns/increment", get(b"increment"));
    routed("GET /v1/counters/ns/get", get(b"get"));
    routed("DELETE /v1/counters/ns/get", Route::Delete { counter: named("ns", b"get") });
    let query = IncrementQuery::default();
    let counter = named("ns", b"increment");
    routed("POST /v1/counters/ns/increment/increment", Route::Increment { counter, query });
}

#[test]
fn keys_are_decoded_once_and_nothing_else_is_done_to_them() {
    routed("GET /v1/counters/ns/a%2Fb", get(b"a/b"));
    routed("GET /v1/counters/ns/a%2fb", get(b"a/b"));
    routed("GET /v1/counters/ns/a%252Fb", get(b"a%2Fb"));
    routed("GET /v1/counters/ns/a+b", get(b"a+b"));
    routed("GET /v1/counters/ns/%00%ff", get(&[0, 255]));
    routed("GET /v1/counters/ns/%20", get(b" "));
    routed("GET /v1/counters/ns/..", get(b".."));
    routed("GET /v1/counters/ns/.", get(b"."));
    routed("GET /v1/counters/ns/%2e%2E", get(b".."));
    routed("GET /v1/counters/ns/key%3Fx=1", get(b"key?x=1"));
    routed("GET /v1/counters/%6es/k", get(b"k"));
    for key in ["%", "%4", "%zz", "a%", "%%41", "%+1"] {
        refused(&format!("GET /v1/counters/ns/{key}"), 400, "key");
    }
    refused("GET /v1/counters/ns/", 400, "key");
    refused("POST /v1/counters/ns//increment", 400, "key");
    let long = "k".repeat(1024);
    routed(&format!("GET /v1/counters/ns/{long}"), get(long.as_bytes()));
    refused(&format!("GET /v1/counters/ns/{long}k"), 400, "key");
    // Counted in bytes, decoded.
    routed(&format!("GET /v1/counters/ns/{}", "%41".repeat(1024)), get(&[b'A'; 1024]));
    refused(&format!("GET /v1/counters/ns/{}", "%41".repeat(1025)), 400, "key");
}

#[test]
fn namespaces() {
    for namespace in ["NS", "a%2Fb", "", "%zz", "a+b", &"n".repeat(65)] {
        refused(&format!("GET /v1/counters/{namespace}/k"), 400, "namespace");
        refused(&format!("POST /v1/counters/{namespace}/k/increment"), 400, "namespace");
        refused(&format!("POST /v1/counters/{namespace}/increment"), 400, "namespace");
        refused(&format!("POST /v1/counters/{namespace}/get"), 400, "namespace");
        refused(&format!("DELETE /v1/counters/{namespace}/k"), 400, "namespace");
    }
    let namespace = "a_b.c-9";
    routed(
        &format!("POST /v1/counters/{namespace}/get"),
        Route::GetMany { namespace: namespace.into(), bounded_ms: None },
    );
}

#[test]
fn methods() {
    #[track_caller]
    fn check(given: &str, want: &str) {
        let (method, target) = given.split_once(' ').unwrap();
        let request = Request::builder().method(method).uri(target).body(()).unwrap();
        let problem = head(&request.into_parts().0).unwrap_err();
        assert_eq!((problem.kind.status().as_u16(), problem.allow), (405, Some(want)), "{given}");
    }
    check("GET /v1/counters/ns/k/increment", "POST");
    check("PUT /v1/counters/ns/k/increment", "POST");
    check("POST /v1/counters/ns/k", "DELETE, GET, HEAD");
    check("PATCH /v1/counters/ns/increment", "DELETE, GET, HEAD, POST");
    check("OPTIONS /v1/counters/ns/get", "DELETE, GET, HEAD, POST");
    check("POST /livez", "GET, HEAD");
    check("DELETE /v1/cluster", "GET, HEAD");
}

#[test]
fn queries() {
    let increment = "POST /v1/counters/ns/k/increment";
    routed(&format!("{increment}?delta=5"), one(Some(5), false));
    routed(&format!("{increment}?delta=+5"), one(Some(5), false));
    routed(&format!("{increment}?delta=%2D5"), one(Some(-5), false));
    routed(&format!("{increment}?delta=0&return=value"), one(Some(0), true));
    routed(&format!("{increment}?"), one(None, false));
    routed(&format!("{increment}?&&"), one(None, false));
    for delta in ["", "x", "1.0", "1e3", "9223372036854775808", "5 ", "%zz"] {
        let field = if delta == "%zz" { "query" } else { "delta" };
        refused(&format!("{increment}?delta={}", delta.replace(' ', "%20")), 400, field);
    }
    refused(&format!("{increment}?delta=1&delta=1"), 400, "delta");
    refused(&format!("{increment}?detla=1"), 400, "detla");
    refused(&format!("{increment}?Delta=1"), 400, "Delta");
    refused(&format!("{increment}?return=all"), 400, "return");
    refused("POST /v1/counters/ns/increment?delta=5", 400, "delta");
    refused("POST /v1/counters/ns/get?x", 400, "x");
    refused("DELETE /v1/counters/ns/k?delta=5", 400, "delta");
    refused("GET /v1/counters/ns/k?delta=5", 400, "delta");
}

#[test]
fn consistency() {
    #[track_caller]
    fn check(query: &str, want: Option<u64>) {
        let counter = named("ns", b"k");
        routed(&format!("GET /v1/counters/ns/k?{query}"), Route::Get { counter, bounded_ms: want });
    }
    check("consistency=linearizable", None);
    check("consistency=bounded&max_staleness_ms=250", Some(250));
    check("max_staleness_ms=0&consistency=bounded", Some(0));
    check("consistency=bounded", Some(1_000));
    let many = Route::GetMany { namespace: "ns".into(), bounded_ms: Some(7) };
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
    // Said first: what such a URL means does not matter any more.
    refused(&format!("PUT /{}", "x".repeat(URL_BYTES_MAX)), 414, "");
}

#[test]
fn deadlines() {
    #[track_caller]
    fn check(value: &str, want: Option<u64>) {
        let text = format!("GET /v1/counters/ns/k\nRequest-Timeout-Ms: {value}");
        match want {
            Some(ms) => assert_eq!(judged(&text).unwrap().timeout.as_millis(), u128::from(ms)),
            None => refused(&text, 400, "Request-Timeout-Ms"),
        }
    }
    check("1", Some(1));
    check("60000", Some(60_000));
    for value in ["0", "-1", "60001", "5s", "1.5", "", "9223372036854775808"] {
        check(value, None);
    }
    assert_eq!(judged("GET /v1/counters/ns/k").unwrap().timeout.as_millis(), 5_000);
    let twice = "GET /v1/counters/ns/k\nRequest-Timeout-Ms: 5\nRequest-Timeout-Ms: 6";
    refused(twice, 400, "Request-Timeout-Ms");
}

/// It must not be taken for a request that has none: whoever sends it relies on it.
#[test]
fn a_token_is_refused_until_it_is_supported() {
    for target in [
        "POST /v1/counters/ns/k/increment",
        "POST /v1/counters/ns/increment",
        "DELETE /v1/counters/ns/k",
    ] {
        refused(&format!("{target}\nIdempotency-Key: \"a\""), 400, "Idempotency-Key");
    }
    routed("GET /v1/counters/ns/k\nIdempotency-Key: \"a\"", get(b"k"));
}

#[test]
fn media_types() {
    #[track_caller]
    fn check(target: &str, headers: &str, want: Result<BodyType, u16>) {
        let got = judged(&format!("POST /v1/counters/ns/{target}\n{headers}"));
        assert_eq!(got.map(|head| head.body).map_err(|(status, _)| status), want, "{headers}");
    }
    check("increment", "", Ok(BodyType::Json));
    check("increment", "Content-Type: application/json", Ok(BodyType::Json));
    check("increment", "Content-Type: Application/JSON; charset=utf-8", Ok(BodyType::Json));
    check("increment", "Content-Type: application/x-www-form-urlencoded", Ok(BodyType::Json));
    check("increment", "Content-Type: application/x-ndjson", Ok(BodyType::NdJson));
    check("increment", "Content-Type: text/plain;charset=UTF-8", Ok(BodyType::Text));
    check("increment", "Content-Type: text/plain\nContent-Encoding: identity", Ok(BodyType::Text));
    for target in ["increment", "k/increment", "get"] {
        for media in ["application/xml", "text/html", "text/plainer", "json", "multipart/form-data"]
        {
            check(target, &format!("Content-Type: {media}"), Err(415));
        }
        check(target, "Content-Type: application/json\nContent-Encoding: gzip", Err(415));
    }
    check("get", "Content-Type: text/plain", Err(415));
    check("get", "Content-Type: application/x-ndjson", Err(415));
    // Nothing is read there, so it does not matter.
    routed("GET /v1/counters/ns/k\nContent-Type: application/xml", get(b"k"));
}

#[test]
fn plain_answers() {
    #[track_caller]
    fn check(accept: &str, want: bool) {
        let head = judged(&format!("GET /v1/counters/ns/k\nAccept: {accept}")).unwrap();
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
    assert!(!judged("GET /v1/counters/ns/k").unwrap().plain);
}

#[track_caller]
fn read_one(body: &str, query: IncrementQuery, want: Result<(i64, bool), &str>) {
    let got = increment(BodyType::Json, body.as_bytes(), query);
    let got = got.map(|told| (told.delta, told.returning));
    let want = want.map_err(str::to_owned);
    assert_eq!(got.map_err(|problem| problem.field.unwrap().into_owned()), want, "{body}");
}

#[test]
fn single_increments() {
    let none = IncrementQuery::default();
    #[track_caller]
    fn check(body: &str, want: Result<(i64, bool), &str>) {
        read_one(body, IncrementQuery::default(), want);
    }
    check("", Ok((1, false)));
    check("{}", Ok((1, false)));
    check(" { } \n", Ok((1, false)));
    check(r#"{"delta": 5}"#, Ok((5, false)));
    check(r#"{"delta": 0}"#, Ok((0, false)));
    check(r#"{"delta": -9223372036854775808}"#, Ok((i64::MIN, false)));
    check(r#"{"return": "value", "delta": 9223372036854775807}"#, Ok((i64::MAX, true)));
    check(r#"{"\u0064elta": -0}"#, Ok((0, false)));
    for delta in [
        "9223372036854775808",
        "-9223372036854775809",
        "1e400",
        "123456789012345678901234567890",
        "1.0",
        "1.5",
        "1e3",
        "\"5\"",
        "null",
        "true",
        "[5]",
        "{\"a\":[{}]}",
    ] {
        // No number at all in the sense of JSON's reader, so there is no field yet.
        let field = if delta == "1e400" { "body" } else { "delta" };
        check(&format!("{{\"delta\":{delta}}}"), Err(field));
    }
    check(r#"{"delta":1,"delta":1}"#, Err("delta"));
    check(r#"{"dleta":5}"#, Err("dleta"));
    check(r#"{"return":"values"}"#, Err("return"));
    check(r#"{"return":null}"#, Err("return"));
    for body in
        ["[]", "5", "\"x\"", "null", "{", "{}{}", "{} x", "delta=5", "{\"delta\":5", "\u{feff}{}"]
    {
        check(body, Err("body"));
    }
    check(&format!("{{\"a\":{}", "[".repeat(100_000)), Err("body"));
    assert_eq!(
        increment(BodyType::Json, b"{\"delta\":5\xff}", none).unwrap_err().kind,
        Kind::BadInput
    );
}

#[test]
fn what_is_in_the_url_is_not_in_the_body() {
    let delta = IncrementQuery { delta: Some(5), returning: false };
    let returning = IncrementQuery { delta: None, returning: true };
    read_one("", delta, Ok((5, false)));
    read_one("{}", delta, Ok((5, false)));
    read_one(r#"{"return":"value"}"#, delta, Ok((5, true)));
    read_one(r#"{"delta":5}"#, delta, Err("delta"));
    read_one(r#"{"delta":6}"#, returning, Ok((6, true)));
    read_one(r#"{"return":"value"}"#, returning, Err("return"));
}

#[test]
fn a_single_increment_takes_json_only() {
    let none = IncrementQuery::default();
    for body_type in [BodyType::NdJson, BodyType::Text] {
        assert!(increment(body_type, b"", none).is_ok());
        assert_eq!(increment(body_type, b"5", none).unwrap_err().kind, Kind::UnsupportedMediaType);
    }
}

/// `index key delta` of what was understood, `index field` of what was not; or the field that makes it unreadable.
#[track_caller]
fn read_many(body_type: BodyType, body: &[u8], want: Result<&[&str], &str>) {
    let got = increments("ns", body_type, body).map_err(|problem| {
        assert_eq!(problem.kind, Kind::BadInput);
        problem.field.unwrap().into_owned()
    });
    let got = got.map(|batch| {
        let mut items: Vec<(u32, String)> = Vec::new();
        for (index, Op { counter, kind }) in batch.indexes.iter().zip(&batch.ops) {
            let OpKind::Add { delta } = kind else { panic!("{kind:?}") };
            assert_eq!(counter.namespace(), b"ns");
            items.push((*index, format!("{} {delta}", counter.key().escape_ascii())));
        }
        for item in &batch.failed {
            assert_eq!(item.problem.kind, Kind::BadInput);
            items.push((item.index, item.problem.field.clone().unwrap().into_owned()));
        }
        items.sort();
        items.into_iter().map(|(index, item)| format!("{index} {item}")).collect::<Vec<_>>()
    });
    let want = want.map(|items| items.iter().map(|&item| item.to_owned()).collect::<Vec<_>>());
    assert_eq!(got, want.map_err(str::to_owned), "{}", body.escape_ascii());
}

#[test]
fn text_lines() {
    #[track_caller]
    fn check(body: &str, want: &[&str]) {
        read_many(BodyType::Text, body.as_bytes(), Ok(want));
    }
    check("", &[]);
    check("\n\r\n\n", &[]);
    check("a\nb\r\nc", &["0 a 1", "1 b 1", "2 c 1"]);
    check("a\t5\nb\t-5\nc\t+5\n", &["0 a 5", "1 b -5", "2 c 5"]);
    check("a\n\nb\n", &["0 a 1", "1 b 1"]);
    // The last TAB, and only if an integer follows it.
    check("a\tb\t5", &["0 a\\tb 5"]);
    check("a\t5\t", &["0 a\\t5\\t 1"]);
    check("a\tb", &["0 a\\tb 1"]);
    check("a\t5 ", &["0 a\\t5  1"]);
    check("a\t1.5", &["0 a\\t1.5 1"]);
    check("a\t0", &["0 a 0"]);
    check("a\t9223372036854775808\nb", &["0 delta", "1 b 1"]);
    check("\t5\nb", &["0 key", "1 b 1"]);
    check(&format!("{}\nb", "k".repeat(1025)), &["0 key", "1 b 1"]);
    // One CR before a LF, no more and nowhere else.
    check("a\r\r\nb\rc\nd\r", &["0 a\\r 1", "1 b\\rc 1", "2 d\\r 1"]);
    read_many(BodyType::Text, b"\xff\x00\t7\n", Ok(&["0 \\xff\\x00 7"]));
}

#[test]
fn json_batches() {
    #[track_caller]
    fn check(body: &str, want: Result<&[&str], &str>) {
        read_many(BodyType::Json, body.as_bytes(), want);
    }
    check(r#"{"increments":[]}"#, Ok(&[]));
    check(
        r#"{"increments":[{"key":"a","delta":5},{"delta":-1,"key":"b"},{"key":"c"}]}"#,
        Ok(&["0 a 5", "1 b -1", "2 c 1"]),
    );
    check(r#"{"increments":[{"key":"\u00e9\n\u0000"}]}"#, Ok(&["0 \\xc3\\xa9\\n\\x00 1"]));
    check(
        r#"{"increments":[{"key_base64":"/wA="},{"key_base64":"/wA"}]}"#,
        Ok(&["0 \\xff\\x00 1", "1 \\xff\\x00 1"]),
    );
    // Each of these fails alone.
    check(
        r#"{"increments":[{"key":"a"},{},5,"b",null,[1,[2]],true,1.5,{"key":5},{"key":""},{"key":"a","delta":"5"},
           {"key":"a","delta":1.5},{"key":"a","delta":9223372036854775808},{"key":"a","detla":5},
           {"key":"a","key":"b"},{"key":"a","key_base64":"YQ=="},{"key_base64":"?"},{"key_base64":7},
           {"key":"a","delta":null},{"key":"a","delta":1,"delta":1},{"key":{"key":"a"}},{"key":"z"}]}"#,
        Ok(&[
            "0 a 1",
            "1 key",
            "2 key",
            "3 key",
            "4 key",
            "5 key",
            "6 key",
            "7 key",
            "8 key",
            "9 key",
            "10 delta",
            "11 delta",
            "12 delta",
            "13 detla",
            "14 key",
            "15 key",
            "16 key_base64",
            "17 key_base64",
            "18 delta",
            "19 delta",
            "20 key",
            "21 z 1",
        ]),
    );
    // These can't be read at all.
    check("", Err("body"));
    check("{}", Err("increments"));
    check("[]", Err("body"));
    check(r#"{"increments":{}}"#, Err("increments"));
    check(r#"{"increments":5}"#, Err("increments"));
    check(r#"{"increments":null}"#, Err("increments"));
    check(r#"{"increments":[],"increments":[]}"#, Err("increments"));
    check(r#"{"increments":[],"return":"value"}"#, Err("return"));
    check(r#"{"increments":[{"key":"a"}"#, Err("body"));
    check(r#"{"increments":[{"key":"a"},]}"#, Err("body"));
    check(r#"{"increments":[{"key":"\ud800"}]}"#, Err("body"));
    check("a\t5\n", Err("body"));
    read_many(BodyType::Json, b"{\"increments\":[{\"key\":\"\xff\"}]}", Err("body"));
}

#[test]
fn ndjson_lines() {
    #[track_caller]
    fn check(body: &str, want: &[&str]) {
        read_many(BodyType::NdJson, body.as_bytes(), Ok(want));
    }
    check("", &[]);
    check("{\"key\":\"a\"}\n \r\n{\"key\":\"b\",\"delta\":2}", &["0 a 1", "1 b 2"]);
    check(
        "{\"key\":\"a\"}\n{\"key\":\n{\"key\":\"c\"} {}\n{\"key\":\"d\"}\r\n",
        &["0 a 1", "1 body", "2 body", "3 d 1"],
    );
}

#[test]
fn items_are_limited() {
    let lines = "k\n".repeat(ITEMS_MAX);
    assert_eq!(increments("ns", BodyType::Text, lines.as_bytes()).unwrap().ops.len(), ITEMS_MAX);
    let problem = increments("ns", BodyType::Text, (lines + "k").as_bytes()).unwrap_err();
    assert_eq!(problem.kind.status(), 413);
    let list = |items: usize| format!("{{\"keys\":[{}]}}", vec!["\"k\""; items].join(","));
    assert_eq!(keys("ns", list(ITEMS_MAX).as_bytes()).unwrap().len(), ITEMS_MAX);
    assert_eq!(keys("ns", list(ITEMS_MAX + 1).as_bytes()).unwrap_err().kind.status(), 413);
}

#[test]
fn lists_of_keys() {
    #[track_caller]
    fn check(body: &str, want: Result<&[&[u8]], &str>) {
        let got = keys("ns", body.as_bytes());
        let want = want.map(|keys| keys.iter().map(|key| named("ns", key)).collect());
        let got = got.map_err(|problem| problem.field.unwrap().into_owned());
        assert_eq!(got, want.map_err(str::to_owned), "{body}");
    }
    check(r#"{"keys":[]}"#, Ok(&[]));
    check(
        r#"{"keys":["a","b\n",{"key":"c"},{"key_base64":"/wA="},"a"]}"#,
        Ok(&[b"a", b"b\n", b"c", b"\xff\0", b"a"]),
    );
    check(r#"{"keys":["a",""]}"#, Err("keys[1].key"));
    check(r#"{"keys":["a",5,""]}"#, Err("keys[1].key"));
    check(r#"{"keys":[{"key":"a","delta":1}]}"#, Err("keys[0].delta"));
    check(r#"{"keys":[{"key_base64":"*"}]}"#, Err("keys[0].key_base64"));
    check(r#"{"keys":"a"}"#, Err("keys"));
    check("{}", Err("keys"));
    check("", Err("body"));
    check(r#"{"increments":[]}"#, Err("increments"));
}
