//! Rows about many increments in one body: the failure of one item never hides the success of
//! another.

use super::Table;

const BATCH: &str = "POST /v1/counters/NS/increment";

pub(super) fn rows(table: &mut Table) {
    json(table);
    json_items(table);
    ndjson(table);
    text(table);
    failed_items(table);
}

fn json(table: &mut Table) {
    for (body, want, effect) in [
        (r#"{"increments":[]}"#, "200 0/0", ""),
        (
            r#"{"increments":[{"key":"a","delta":5},{"delta":-1,"key":"b"},{"key":"c"}]}"#,
            "200 3/3",
            "a=5, b=-1, c=1",
        ),
        (
            r#"{"increments":[{"key":"a","delta":5},{"key":"a","delta":2},{"key":"b","delta":0}]}"#,
            "200 3/3",
            "a=7",
        ),
        (
            r#"{"increments":[{"key":"\u00e9\n\u0000"},{"key":"é\n\u0000"}]}"#,
            "200 2/2",
            r"\xc3\xa9\n\x00=2",
        ),
        (
            r#"{"increments":[{"key_base64":"/wA="},{"key_base64":"/wA"}]}"#,
            "200 2/2",
            r"\xff\x00=2",
        ),
        (
            r#"{"increments":[{"key":"a","delta":9223372036854775807},{"key":"a","delta":9223372036854775807}]}"#,
            "200 2/2",
            "a=18446744073709551614",
        ),
        // An unreadable body has no effect.
        ("", "400 bad-input body", ""),
        ("[]", "400 bad-input body", ""),
        ("{}", "400 bad-input increments", ""),
        (r#"{"increments":{}}"#, "400 bad-input increments", ""),
        (r#"{"increments":5}"#, "400 bad-input increments", ""),
        (r#"{"increments":null}"#, "400 bad-input increments", ""),
        (
            r#"{"increments":[{"key":"a"}],"increments":[{"key":"a"}]}"#,
            "400 bad-input increments",
            "",
        ),
        (r#"{"increments":[{"key":"a"}],"return":"value"}"#, "400 bad-input return", ""),
        (r#"{"increments":[{"key":"a"}"#, "400 bad-input body", ""),
        (r#"{"increments":[{"key":"a"},]}"#, "400 bad-input body", ""),
        ("{\"increments\":[{\"key\":\"a\"},{\"key\":\"b\nc\"}]}", "400 bad-input body", ""),
        (r#"{"increments":[{"key":"a"},{"key":"b","delta":05}]}"#, "400 bad-input body", ""),
        ("\u{feff}{\"increments\":[{\"key\":\"a\"}]}", "400 bad-input body", ""),
        (r#"{"increments":[{"key":"a"}]} x"#, "400 bad-input body", ""),
        ("a\t5\n", "400 bad-input body", ""),
    ] {
        table.row(format!("{BATCH}\n\n{body}"), want, effect);
    }
    table.row(
        [BATCH.as_bytes(), b"\n\n{\"increments\":[{\"key\":\"\xff\"}]}"].concat(),
        "400 bad-input body",
        "",
    );
    table.row(
        format!("{BATCH}?delta=5\n\n{{\"increments\":[{{\"key\":\"a\"}}]}}"),
        "400 bad-input delta",
        "",
    );
}

/// Each of these items fails alone beside a valid item; and in a batch of its own, whose status is
/// then that of the item.
fn json_items(table: &mut Table) {
    let nested = format!("{{\"key\":\"a\",\"delta\":{}{}}}", "[".repeat(200), "]".repeat(200));
    for (item, field) in [
        ("{}", "key"),
        ("5", "key"),
        ("null", "key"),
        ("true", "key"),
        ("1.5", "key"),
        ("[1,[2]]", "key"),
        (r#""b""#, "key"),
        (r#"{"key":5}"#, "key"),
        (r#"{"key":null}"#, "key"),
        (r#"{"key":{"key":"a"}}"#, "key"),
        (r#"{"key":""}"#, "key"),
        (r#"{"key":"a","key":"b"}"#, "key"),
        (r#"{"key":"a","key_base64":"YQ=="}"#, "key"),
        (r#"{"key_base64":""}"#, "key"),
        (r#"{"key_base64":"?"}"#, "key_base64"),
        (r#"{"key_base64":7}"#, "key_base64"),
        (r#"{"delta":1}"#, "key"),
        (r#"{"key":"a","delta":"5"}"#, "delta"),
        (r#"{"key":"a","delta":1.5}"#, "delta"),
        (r#"{"key":"a","delta":1.0}"#, "delta"),
        (r#"{"key":"a","delta":null}"#, "delta"),
        (r#"{"key":"a","delta":1,"delta":1}"#, "delta"),
        (r#"{"key":"a","delta":9223372036854775808}"#, "delta"),
        (r#"{"key":"a","delta":-9223372036854775809}"#, "delta"),
        (r#"{"key":"a","detla":5}"#, "detla"),
        (r#"{"key":"a","return":"value"}"#, "return"),
        // Valid JSON, but not valid text, and a number that fits no type.
        (r#"{"key":"\ud83d"}"#, "key"),
        (r#"{"key":"\ude00\ud83d"}"#, "key"),
        (r#""\ud83d""#, "key"),
        (r#"{"key_base64":"\ud83d"}"#, "key_base64"),
        (r#"{"key":"a","x":"\ud83d"}"#, "x"),
        (r#"{"key":"a","x\ud83d":1}"#, r"x\ud83d"),
        (r#"{"key":"a","delta":1e400}"#, "delta"),
        (r#"{"key":"a","delta":-1e400}"#, "delta"),
        (r#"{"key":"a","delta":1e3}"#, "delta"),
        (r#"{"key":"a","delta":-0.0}"#, "delta"),
        (r#"{"key":"a","delta":123456789012345678901234567890}"#, "delta"),
        ("1e400", "key"),
        (nested.as_str(), "delta"),
    ] {
        let body =
            format!("{BATCH}\n\n{{\"increments\":[{{\"key\":\"z\"}},{item},{{\"key\":\"z\"}}]}}");
        table.row(body, &format!("200 2/2 1:{field}"), "z=2");
        table.row(
            format!("{BATCH}\n\n{{\"increments\":[{item}]}}"),
            &format!("400 0/0 0:{field}"),
            "",
        );
        let line =
            format!("{BATCH}\nContent-Type: application/x-ndjson\n\n{{\"key\":\"z\"}}\n{item}\n");
        table.row(line, &format!("200 1/1 1:{field}"), "z=1");
    }
    let long = format!("{{\"key\":\"{}\"}}", "k".repeat(1025));
    table.row(
        format!("{BATCH}\n\n{{\"increments\":[{long},{{\"key\":\"z\"}}]}}"),
        "200 1/1 0:key",
        "z=1",
    );
}

fn ndjson(table: &mut Table) {
    for (body, want, effect) in [
        ("", "200 0/0", ""),
        ("{\"key\":\"a\"}\n \r\n\n{\"key\":\"b\",\"delta\":2}", "200 2/2", "a=1, b=2"),
        ("{\"key\":\"a\"}\r\n{\"key\":\"a\",\"delta\":-3}\r\n", "200 2/2", "a=-2"),
        (
            "{\"key\":\"a\"}\n{\"key\":\n{\"key\":\"c\"} {}\n{\"key\":\"d\"}\n",
            "200 2/2 1:body 2:body",
            "a=1, d=1",
        ),
        ("{\"increments\":[{\"key\":\"a\"}]}", "400 0/0 0:increments", ""),
        ("a\t5\n", "400 0/0 0:body", ""),
        ("\u{feff}{\"key\":\"a\"}\n{\"key\":\"b\"}\n", "200 1/1 0:body", "b=1"),
    ] {
        table.row(format!("{BATCH}\nContent-Type: application/x-ndjson\n\n{body}"), want, effect);
    }
    let line = b"\nContent-Type: application/x-ndjson\n\n{\"key\":\"\xff\"}\n{\"key\":\"b\"}\n";
    table.row([BATCH.as_bytes(), line].concat(), "200 1/1 0:body", "b=1");
    // UTF-16 and UTF-32: no line means what it seems to mean.
    for mark in [&b"\xff\xfe"[..], b"\xfe\xff", b"\xff\xfe\0\0", b"\0\0\xfe\xff"] {
        for media in ["text/plain", "application/x-ndjson", "application/json"] {
            let head = format!("{BATCH}\nContent-Type: {media}\n\n");
            let ask = [head.as_bytes(), mark, b"a\0\n\0"].concat();
            table.row(ask, "400 bad-input body", "");
        }
        let ask = [&b"POST /v1/counters/NS/get\n\n"[..], mark, b"{\0}\0"].concat();
        table.row(ask, "400 bad-input body", "");
    }
}

fn text(table: &mut Table) {
    let long = "k".repeat(1025);
    let rows: &[(&[u8], &str, &str)] = &[
        (b"", "200 0/0", ""),
        (b"\n\r\n\n", "200 0/0", ""),
        (b"a\nb\r\nc", "200 3/3", "a=1, b=1, c=1"),
        (b"a\n\nb\n", "200 2/2", "a=1, b=1"),
        (b"a\t5\nb\t-5\nc\t+5\nd\t007\n", "200 4/4", "a=5, b=-5, c=5, d=7"),
        (b"a\t2\na\t3\na\n", "200 3/3", "a=6"),
        (b"a\t0", "200 1/1", ""),
        (
            b"a\t9223372036854775807\nb\t-9223372036854775808",
            "200 2/2",
            "a=9223372036854775807, b=-9223372036854775808",
        ),
        // A line is split at the last TAB, and only if an integer follows it.
        (b"a\tb\t5", "200 1/1", r"a\tb=5"),
        (b"a\tb", "200 1/1", r"a\tb=1"),
        (b"a\t5\t", "200 1/1", r"a\t5\t=1"),
        (b"a\t", "200 1/1", r"a\t=1"),
        (b"\t", "200 1/1", r"\t=1"),
        (b"a\t+", "200 1/1", r"a\t+=1"),
        (b"a\tv1.5", "200 1/1", r"a\tv1.5=1"),
        // Text there that looks like a number and is not an integer is an invalid delta.
        (b"a\t5 \nb", "200 1/1 0:delta", "b=1"),
        (b"a\t 5\nb", "200 1/1 0:delta", "b=1"),
        (b"a\t1.5\nb", "200 1/1 0:delta", "b=1"),
        (b"a\t1e3\nb", "200 1/1 0:delta", "b=1"),
        (b"a\t1,000\nb", "200 1/1 0:delta", "b=1"),
        (b"a\t--5\nb", "200 1/1 0:delta", "b=1"),
        (b"a\t0x10\nb", "200 1/1 0:delta", "b=1"),
        (b"a\tNaN\nb", "200 1/1 0:delta", "b=1"),
        ("a\t\u{2212}5\nb".as_bytes(), "200 1/1 0:delta", "b=1"),
        // One CR is dropped, only at the end of a line.
        (b"a\r\r\nb\rc\nd\r", "200 3/3", r"a\r=1, b\rc=1, d=1"),
        (b"a\t5\r\nb\t5\r", "200 2/2", "a=5, b=5"),
        // A byte order mark at the beginning is not part of the first key; elsewhere it is.
        (b"\xef\xbb\xbfa\na\n", "200 2/2", "a=2"),
        (b"\xef\xbb\xbf", "200 0/0", ""),
        (b"a\n\xef\xbb\xbfa\n", "200 2/2", r"a=1, \xef\xbb\xbfa=1"),
        (b" a \n", "200 1/1", " a =1"),
        (b"\xff\x00\t7\n\xc3\xa9\n", "200 2/2", r"\xc3\xa9=1, \xff\x00=7"),
        // A malformed line fails alone.
        (b"a\t9223372036854775808\nb", "200 1/1 0:delta", "b=1"),
        (b"a\nb\t-9223372036854775809\n\nc", "200 2/2 1:delta", "a=1, c=1"),
        (b"\t5\nb", "200 1/1 0:key", "b=1"),
        (b"\t5", "400 0/0 0:key", ""),
        (long.as_bytes(), "400 0/0 0:key", ""),
    ];
    for (body, want, effect) in rows {
        for media in ["text/plain", "text/plain; charset=us-ascii"] {
            let head = format!("{BATCH}\nContent-Type: {media}\n\n");
            table.row([head.as_bytes(), body].concat(), want, effect);
        }
    }
}

/// The complete answer about a failed item.
fn failed_items(table: &mut Table) {
    table.row(
        format!("{BATCH}\nContent-Type: text/plain\n\na\nb\t9223372036854775808\n"),
        r#"200 {"accepted":1,"applied":1,"failed":[{"index":1,"key":"b","type":"https://dkc.invalid/problems/bad-input","outcome":"not-applied","detail":"is not between -9,223,372,036,854,775,808 and 9,223,372,036,854,775,807","field":"delta"}]}"#,
        "a=1",
    );
    table.row(
        format!("{BATCH}\n\n{}", r#"{"increments":[{"key":"a"},{"key_base64":"/w==","delta":"5"}]}"#),
        r#"200 {"accepted":1,"applied":1,"failed":[{"index":1,"key_base64":"/w==","type":"https://dkc.invalid/problems/bad-input","outcome":"not-applied","detail":"is not a whole number","field":"delta"}]}"#,
        "a=1",
    );
}
