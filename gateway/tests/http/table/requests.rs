//! Rows about the request as such: paths, names, methods, headers, media types, limits.

use super::Table;

const BATCH: &str = "POST /v1/counters/NS/increment";

pub(super) fn rows(table: &mut Table) {
    paths(table);
    keys(table);
    keys_of_every_byte(table);
    namespaces(table);
    methods(table);
    headers(table);
    media_types(table);
    limits(table);
    pages(table);
    any_request(table);
}

fn paths(table: &mut Table) {
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v1/counters",
        "/v1/counters/",
        "/v1/counters/NS/k/",
        "/v1/counters/NS/k/increment/",
        "/v1/counters/NS/k/Increment",
        "/v1/counters/NS/a/b/increment",
        "/v1/counters/NS/increment/",
        "/v1/counters/NS/get/",
        "/v2/counters/NS/k",
        "/V1/counters/NS/k",
        "/livez/",
        "/readyz/",
        "/metrics/",
        "/v1/cluster/",
        "/openapi.json/",
        "//livez",
    ] {
        table.row(format!("GET {path}"), "404 not-found", "");
        table.row(format!("POST {path}\n\n{{\"delta\":1}}"), "404 not-found", "");
    }
    // `increment` and `get` are keys except where the contract gives them a meaning.
    table.row(
        "POST /v1/counters/NS/increment/increment",
        r#"200 {"namespace":"NS","key":"increment","applied":1}"#,
        "increment=1",
    );
    table.again(
        "GET /v1/counters/NS/increment",
        r#"200 {"namespace":"NS","key":"increment","value":1}"#,
        "increment=1",
    );
    table.again("DELETE /v1/counters/NS/increment", r#"200 {"key":"increment","value":1}"#, "");
    table.row(
        "POST /v1/counters/NS/get/increment",
        r#"200 {"namespace":"NS","key":"get","applied":1}"#,
        "get=1",
    );
    table.again(
        "GET /v1/counters/NS/get",
        r#"200 {"namespace":"NS","key":"get","value":1}"#,
        "get=1",
    );
    table.row(
        "GET http://other:1/v1/counters/NS/k",
        r#"200 {"namespace":"NS","key":"k","value":0}"#,
        "",
    );
}

/// Keys are percent-decoded once, and not changed otherwise.
fn keys(table: &mut Table) {
    for (path, counted) in [
        ("a%2Fb", "a/b"),
        ("a%2fb", "a/b"),
        ("a%252Fb", "a%2Fb"),
        ("a+b", "a+b"),
        ("%20", " "),
        (".", "."),
        ("..", ".."),
        ("%2e%2E", ".."),
        ("...", "..."),
        ("~", "~"),
        ("%3Fx=1", "?x=1"),
        ("a;b=c", "a;b=c"),
        ("%C3%A9", "\\xc3\\xa9"),
    ] {
        let ask = format!("POST /v1/counters/NS/{path}/increment?delta=7&return=value");
        let shown = if path == "%C3%A9" { "é" } else { counted };
        let want = format!(r#"200 {{"namespace":"NS","key":"{shown}","applied":7,"value":7}}"#);
        table.row(ask, &want, &format!("{counted}=7"));
        let want = format!(r#"200 {{"namespace":"NS","key":"{shown}","value":7}}"#);
        table.again(format!("GET /v1/counters/NS/{path}"), &want, &format!("{counted}=7"));
        table.again(
            format!("DELETE /v1/counters/NS/{path}"),
            &format!(r#"200 {{"key":"{shown}","value":7}}"#),
            "",
        );
    }
    for path in ["%", "%4", "%zz", "a%", "%%41", "%+1", "", &"k".repeat(1025), &"%41".repeat(1025)]
    {
        table.row(format!("GET /v1/counters/NS/{path}"), "400 bad-input key", "");
        table.row(format!("POST /v1/counters/NS/{path}/increment"), "400 bad-input key", "");
        table.row(format!("DELETE /v1/counters/NS/{path}"), "400 bad-input key", "");
    }
    // The limit is on the bytes after decoding.
    let longest = "k".repeat(1024);
    for path in [longest.clone(), "%6B".repeat(1024)] {
        let ask = format!("POST /v1/counters/NS/{path}/increment");
        let want = format!(r#"200 {{"namespace":"NS","key":"{longest}","applied":1}}"#);
        table.row(ask, &want, &format!("{longest}=1"));
    }
}

fn keys_of_every_byte(table: &mut Table) {
    let mut effect = String::new();
    table.row("GET /v1/counters/NS/none", r#"200 {"namespace":"NS","key":"none","value":0}"#, "");
    for byte in 0..=255_u8 {
        let name = match byte {
            0..128 => format!(r#""key":{}"#, serde_json::json!(char::from(byte).to_string())),
            128.. => format!(r#""key_base64":"{}""#, base64(byte)),
        };
        effect.push_str(&format!(
            "{}{}={}",
            if byte == 0 { "" } else { ", " },
            byte.escape_ascii(),
            u16::from(byte) + 1
        ));
        let ask =
            format!("POST /v1/counters/NS/%{byte:02x}/increment?delta={}", u16::from(byte) + 1);
        table.again(
            ask,
            &format!(r#"200 {{"namespace":"NS",{name},"applied":{}}}"#, u16::from(byte) + 1),
            &effect,
        );
        // The key of an answer can be used in a request.
        let ask = format!("POST /v1/counters/NS/get\n\n{{\"keys\":[{{{name}}}]}}");
        table.again(
            ask,
            &format!(r#"200 {{"counters":[{{{name},"value":{}}}]}}"#, u16::from(byte) + 1),
            &effect,
        );
    }
}

/// The base64 form of one byte.
fn base64(byte: u8) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode([byte])
}

fn namespaces(table: &mut Table) {
    let longest = "n".repeat(64);
    for namespace in ["a_b.c-9", "0", "..", "%6es", &longest] {
        let shown = if namespace == "%6es" { "ns" } else { namespace };
        let want = format!(r#"200 {{"namespace":"{shown}","key":"k","value":0}}"#);
        table.row(format!("GET /v1/counters/{namespace}/k"), &want, "");
    }
    for namespace in ["NS", "Likes", "a%2Fb", "", "%zz", "a+b", "a%20b", "%C3%A9", &"n".repeat(65)]
    {
        let namespace = if namespace == "NS" { "N" } else { namespace };
        for request in
            ["GET {}/k", "DELETE {}/k", "POST {}/k/increment", "POST {}/increment", "POST {}/get"]
        {
            let request = request.replace("{}", &format!("/v1/counters/{namespace}"));
            table.row(request, "400 bad-input namespace", "");
        }
    }
}

fn methods(table: &mut Table) {
    for method in ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"] {
        let want = if method == "HEAD" { "405" } else { "405 method-not-allowed POST" };
        table.row(format!("{method} /v1/counters/NS/k/increment"), want, "");
    }
    for method in ["POST", "PUT", "PATCH", "OPTIONS", "TRACE"] {
        let counter = "405 method-not-allowed DELETE, GET, HEAD";
        table.row(format!("{method} /v1/counters/NS/k\n\n{{\"delta\":5}}"), counter, "");
        for page in ["/metrics", "/v1/cluster", "/openapi.json"] {
            table.row(format!("{method} {page}"), "405 method-not-allowed GET, HEAD", "");
        }
        for page in ["/livez", "/readyz"].iter().filter(|_| method != "OPTIONS") {
            table.row(format!("{method} {page}"), "405 method-not-allowed GET, HEAD, OPTIONS", "");
        }
    }
    for method in ["PUT", "PATCH", "OPTIONS", "TRACE"] {
        for path in ["increment", "get"] {
            let want = "405 method-not-allowed DELETE, GET, HEAD, POST";
            table.row(format!("{method} /v1/counters/NS/{path}"), want, "");
        }
    }
    table.row("OPTIONS *", "404 not-found", "");
}

fn headers(table: &mut Table) {
    let one = "POST /v1/counters/NS/k/increment";
    let ok = r#"200 {"namespace":"NS","key":"k","applied":1}"#;
    for value in ["60000", "5000", "+900", "0900"] {
        table.row(format!("{one}\nRequest-Timeout-Ms: {value}"), ok, "k=1");
    }
    for value in [
        "0",
        "-1",
        "60001",
        "5s",
        "1.5",
        "1e3",
        "",
        "9223372036854775808",
        "5\nRequest-Timeout-Ms: 5",
    ] {
        for request in [
            "GET /v1/counters/NS/k",
            "DELETE /v1/counters/NS/k",
            one,
            BATCH,
            "POST /v1/counters/NS/get",
        ] {
            table.row(
                format!("{request}\nRequest-Timeout-Ms: {value}"),
                "400 bad-input Request-Timeout-Ms",
                "",
            );
        }
    }
    table.row(format!("{one}\nX-Unknown: 5\nCookie: a=b"), ok, "k=1");

    let plain = "200 text 5";
    for accept in [
        "text/plain",
        "Text/Plain; charset=utf-8",
        "text/plain, */*",
        "text/plain, application/json",
    ] {
        table.row(format!("{one}?delta=5\nAccept: {accept}"), plain, "k=5");
        table.again(format!("{one}?delta=-2&return=value\nAccept: {accept}"), "200 text 3", "k=3");
        table.again(format!("GET /v1/counters/NS/k\nAccept: {accept}"), "200 text 3", "k=3");
        table.again(format!("DELETE /v1/counters/NS/k\nAccept: {accept}"), "200 text 3", "");
    }
    for accept in [
        "*/*",
        "application/json",
        "application/json, text/plain",
        "text/html",
        "text/plain;q=0",
        "",
    ] {
        table.row(format!("{one}\nAccept: {accept}"), ok, "k=1");
    }
    // A problem is JSON also with `Accept: text/plain`.
    table.row(format!("{one}?delta=x\nAccept: text/plain"), "400 bad-input delta", "");
}

fn media_types(table: &mut Table) {
    let one = "POST /v1/counters/NS/k/increment";
    let (item, keys) = (r#"{"increments":[{"key":"k"}]}"#, r#"{"keys":["k"]}"#);
    for media in [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/x-www-form-urlencoded",
        "",
    ] {
        let header = format!("\nContent-Type: {media}\n\n");
        table.row(
            format!("{one}{header}{{\"delta\":5}}"),
            r#"200 {"namespace":"NS","key":"k","applied":5}"#,
            "k=5",
        );
        table.row(format!("{BATCH}{header}{item}"), "200 1/1", "k=1");
        table.row(
            format!("POST /v1/counters/NS/get{header}{keys}"),
            r#"200 {"counters":[{"key":"k","value":0}]}"#,
            "",
        );
    }
    table.row(format!("{BATCH}\n\n{item}"), "200 1/1", "k=1");
    table.row(format!("{BATCH}\nContent-Encoding: identity\n\n{item}"), "200 1/1", "k=1");
    let unknown = "415 unsupported-media-type";
    for media in
        ["application/xml", "text/html", "text/plainer", "json", "multipart/form-data; boundary=x"]
    {
        for request in [one, BATCH, "POST /v1/counters/NS/get"] {
            table.row(format!("{request}\nContent-Type: {media}\n\n{item}"), unknown, "");
        }
    }
    // Compressed bytes would count as very odd keys.
    table.row(
        format!("{BATCH}\nContent-Type: text/plain\nContent-Encoding: gzip\n\nabc"),
        unknown,
        "",
    );
    for headers in [
        "Content-Encoding: identity\nContent-Encoding: gzip",
        "Content-Type: application/json",
        "Content-Type: text/plain",
    ] {
        let ask = format!("{BATCH}\nContent-Type: text/plain\n{headers}\n\n{item}");
        table.row(ask, unknown, "");
    }
    for charset in ["utf-16", "latin1", "\"windows-1252\""] {
        for media in ["text/plain", "application/json", "application/x-ndjson"] {
            let ask = format!("{BATCH}\nContent-Type: {media}; charset={charset}\n\n{item}");
            table.row(ask, unknown, "");
        }
    }
    table.row("POST /v1/counters/NS/get\nContent-Type: text/plain\n\nk", unknown, "");
    table.row("POST /v1/counters/NS/get\nContent-Type: application/x-ndjson\n\n\"k\"", unknown, "");
    table.row(format!("{one}\nContent-Type: text/plain\n\n5"), unknown, "");
    table.row(format!("{one}\nContent-Type: application/x-ndjson\n\n{{\"delta\":5}}"), unknown, "");
    // The type does not matter where there is no body.
    table.row(
        format!("{one}\nContent-Type: text/plain"),
        r#"200 {"namespace":"NS","key":"k","applied":1}"#,
        "k=1",
    );
    table.row(
        "GET /v1/counters/NS/k\nContent-Type: application/xml",
        r#"200 {"namespace":"NS","key":"k","value":0}"#,
        "",
    );
}

fn limits(table: &mut Table) {
    // The limit is on the whole URL, and is checked before its meaning.
    let url = |bytes: usize| {
        format!("{}{}", "/v1/counters/u/k?", "&".repeat(bytes - "/v1/counters/u/k?".len()))
    };
    table.row(format!("GET {}", url(8 * 1024)), r#"200 {"namespace":"u","key":"k","value":0}"#, "");
    table.row(format!("GET {}", url(8 * 1024 + 1)), "414 url-too-long", "");
    table.row(format!("HEAD {}", url(8 * 1024 + 1)), "414", "");
    table.row(format!("DELETE {}", url(8 * 1024 + 1)), "414 url-too-long", "");
    for request in [
        "PUT /{}",
        "POST /v1/counters/NS/{}/increment",
        "POST /v1/counters/{}/increment",
        "POST /v1/counters/{}/get",
    ] {
        table.row(request.replace("{}", &"x".repeat(8 * 1024)), "414 url-too-long", "");
    }
    let text = format!("{BATCH}\nContent-Type: text/plain\n\n");
    table.row(format!("{text}{}", "k\n".repeat(100_000)), "200 100000/100000", "k=100000");
    table.row(format!("{text}{}", "k\n".repeat(100_001)), "413 too-large", "");
    let json = |items: usize| {
        format!("{BATCH}\n\n{{\"increments\":[{}]}}", vec![r#"{"key":"k"}"#; items].join(","))
    };
    table.row(json(100_000), "200 100000/100000", "k=100000");
    table.row(json(100_001), "413 too-large", "");
    let keys = |items: usize| {
        format!("POST /v1/counters/NS/get\n\n{{\"keys\":[{}]}}", vec!["5"; items].join(","))
    };
    table.row(keys(100_000), "400 bad-input keys[0].key", "");
    table.row(keys(100_001), "413 too-large", "");
    // A body of 8 MiB with the longest keys: one key repeated, and white space.
    let lines = format!("{}\n", "k".repeat(1023)).repeat(8 * 1024);
    table.row(format!("{text}{lines}"), "200 8192/8192", &format!("{}=8192", "k".repeat(1023)));
    table.row(format!("{text}{lines}\n"), "413 too-large", "");
    for request in ["POST /v1/counters/NS/k/increment", "POST /v1/counters/NS/get"] {
        table.row(format!("{request}\n\n{}", " ".repeat((8 << 20) + 1)), "413 too-large", "");
    }
}

fn pages(table: &mut Table) {
    table.row("GET /livez", "200 text ok\n", "");
    table.row("GET /readyz?verbose", "200 text ok\n", "");
    table.row("GET /readyz?all", "200 text ok\n", "");
    // HAProxy uses OPTIONS.
    for page in ["/livez", "/readyz", "/readyz?all"] {
        table.row(format!("OPTIONS {page}"), "200 text ", "");
    }
    for page in ["/livez", "/readyz", "/metrics", "/v1/cluster", "/openapi.json"] {
        table.row(format!("HEAD {page}"), "200", "");
        table.row(format!("GET {page}\nRequest-Timeout-Ms: x"), "200 *", "");
        let long = format!("{page}?{}", "&".repeat(8 * 1024));
        table.row(format!("GET {long}"), "414 url-too-long", "");
        table.row(format!("HEAD {long}"), "414", "");
        if matches!(page, "/livez" | "/readyz") {
            table.row(format!("OPTIONS {long}"), "414 url-too-long", "");
        }
    }
}

/// The problems that every route can have.
fn any_request(table: &mut Table) {
    for line in [
        "POST /v1/counters/NS/k/increment",
        "GET /v1/counters/NS/k",
        "HEAD /v1/counters/NS/k",
        "DELETE /v1/counters/NS/k",
        BATCH,
        "POST /v1/counters/NS/get",
        "GET /livez",
        "HEAD /livez",
        "OPTIONS /livez",
        "GET /readyz",
        "HEAD /readyz",
        "OPTIONS /readyz",
        "GET /metrics",
        "HEAD /metrics",
        "GET /v1/cluster",
        "HEAD /v1/cluster",
        "GET /openapi.json",
        "HEAD /openapi.json",
    ] {
        for (header, want) in [
            ("Origin: https://evil.example", "403 forbidden-origin"),
            ("Origin: null", "403 forbidden-origin"),
            ("Sec-Fetch-Site: cross-site", "403 forbidden-origin"),
            ("Sec-Fetch-Site: same-origin", "403 forbidden-origin"),
            ("Content-Encoding: gzip", "415 unsupported-media-type"),
            ("Expect: foo", "417 expectation-failed"),
            ("Content-Range: bytes 0-1/99", "400 bad-input Content-Range"),
            ("Host: other", "400 bad-input Host"),
        ] {
            let want = if line.starts_with("HEAD ") { &want[..3] } else { want };
            table.row(format!("{line}\n{header}"), want, "");
        }
    }
}
