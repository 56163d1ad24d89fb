//! Rows about `Idempotency-Key`: the same request with the same key counts once, and gets the first
//! answer again.

use super::Table;
use crate::node::{Mood, NOW, WINDOW_MS};

const ONE: &str = "POST /v1/counters/NS/k/increment";
const DELETE: &str = "DELETE /v1/counters/NS/k";
const BATCH: &str = "POST /v1/counters/NS/increment";
const ITEMS: &str = r#"{"increments":[{"key":"a","delta":2},{"key":"b"}]}"#;

pub(super) fn rows(table: &mut Table) {
    headers(table);
    singles(table);
    deletes(table);
    batches(table);
    too_old(table);
    quota(table);
}

fn headers(table: &mut Table) {
    let writes = [ONE.to_owned(), DELETE.to_owned(), format!("{BATCH}\n\n{ITEMS}")];
    let with = |request: &str, header: &str| match request.split_once("\n\n") {
        Some((head, body)) => format!("{head}\n{header}\n\n{body}"),
        None => format!("{request}\n{header}"),
    };
    let long = format!("\"{}\"", "k".repeat(256));
    for key in [
        "a",
        "\"\"",
        "\"a",
        "a\"",
        "\"a\"b\"",
        "\"a\\n\"",
        "\"é\"",
        "\"a\";p=1",
        "\"a\", \"b\"",
        "'a'",
        "",
        &long,
        "\"a\"\nIdempotency-Key: \"a\"",
    ] {
        for request in &writes {
            let ask = with(request, &format!("Idempotency-Key: {key}"));
            table.row(ask, "400 bad-input Idempotency-Key", "");
        }
    }
    let at = NOW.0;
    for issued in [
        "",
        "x",
        "-1",
        "1.5",
        "1e3",
        "9223372036854775808",
        &format!("{at}\nIdempotency-Issued-At: {at}"),
    ] {
        for request in &writes {
            let header = format!("Idempotency-Key: \"a\"\nIdempotency-Issued-At: {issued}");
            table.row(with(request, &header), "400 bad-input Idempotency-Issued-At", "");
        }
    }
    for request in &writes {
        let ask = with(request, &format!("Idempotency-Issued-At: {at}"));
        table.row(ask, "400 bad-input Idempotency-Issued-At", "");
    }
    // A read changes nothing: its idempotency headers are not checked.
    for headers in ["Idempotency-Key: \"a\"", "Idempotency-Key: a", "Idempotency-Issued-At: x"] {
        let answer = r#"200 {"namespace":"NS","key":"k","value":0}"#;
        table.row(format!("GET /v1/counters/NS/k\n{headers}"), answer, "");
        let answer = r#"200 {"counters":[{"key":"k","value":0}]}"#;
        table.row(
            format!("POST /v1/counters/NS/get\n{headers}\n\n{{\"keys\":[\"k\"]}}"),
            answer,
            "",
        );
    }
    // The longest key, and the allowed characters.
    let ok = r#"200 {"namespace":"NS","key":"k","applied":1}"#;
    let again = r#"200 replayed {"namespace":"NS","key":"k","applied":1}"#;
    for key in [
        "k".repeat(255),
        "8e03978e-40d5-43e8-bc93-6894a57f9324".into(),
        " !#~'; ".into(),
        r#"\"\\"#.into(),
    ] {
        let ask = format!("{ONE}\nIdempotency-Key: \"{key}\"");
        table.row(&ask, ok, "k=1");
        table.again(&ask, again, "k=1");
        let ask = format!("{ONE}\nIdempotency-Key:   \"{key}\"  \nIdempotency-Issued-At: {at}");
        table.again(ask, again, "k=1");
    }
}

/// Two forms with the same meaning are the same request.
fn singles(table: &mut Table) {
    let key = "Idempotency-Key: \"t\"";
    table.row(
        format!("{ONE}?delta=5\n{key}"),
        r#"200 {"namespace":"NS","key":"k","applied":5}"#,
        "k=5",
    );
    let again = r#"200 replayed {"namespace":"NS","key":"k","applied":5}"#;
    for ask in [
        format!("{ONE}?delta=5\n{key}"),
        format!("{ONE}?delta=%35\n{key}\nRequest-Timeout-Ms: 900"),
        format!("{ONE}\n{key}\n\n{{\"delta\":5}}"),
        format!("{ONE}\n{key}\nContent-Type: application/json\n\n {{ \"delta\" : 5 }} "),
        format!("POST /v1/counters/NS/%6B/increment?delta=5\n{key}"),
    ] {
        table.again(ask, again, "k=5");
    }
    table.again(format!("{ONE}?delta=5\n{key}\nAccept: text/plain"), "200 replayed text 5", "k=5");
    for ask in [
        format!("{ONE}\n{key}"),
        format!("{ONE}?delta=6\n{key}"),
        format!("{ONE}?delta=5&return=value\n{key}"),
        format!("{DELETE}\n{key}"),
    ] {
        table.again(ask, "422 token-reused", "k=5");
    }
    // Another counter, another key, or no key: other requests.
    table.again(
        format!("POST /v1/counters/NS/other/increment?delta=5\n{key}"),
        r#"200 {"namespace":"NS","key":"other","applied":5}"#,
        "k=5, other=5",
    );
    let ok = r#"200 {"namespace":"NS","key":"k","applied":5}"#;
    table.again(format!("{ONE}?delta=5\nIdempotency-Key: \"T\""), ok, "k=10, other=5");
    table.again(format!("{ONE}?delta=5"), ok, "k=15, other=5");
    // The value is the one of the first answer.
    let value = format!("{ONE}?return=value\nIdempotency-Key: \"v\"");
    table.row(&value, r#"200 {"namespace":"NS","key":"k","applied":1,"value":1}"#, "k=1");
    table.again(ONE, r#"200 {"namespace":"NS","key":"k","applied":1}"#, "k=2");
    let then = r#"200 replayed {"namespace":"NS","key":"k","applied":1,"value":1}"#;
    table.again(&value, then, "k=2");
    // A malformed request does not use up its key.
    table.row(format!("{ONE}?delta=x\n{key}"), "400 bad-input delta", "");
    table.again(format!("{ONE}?delta=5\n{key}"), ok, "k=5");
}

fn deletes(table: &mut Table) {
    table.row(format!("{ONE}?delta=7"), r#"200 {"namespace":"NS","key":"k","applied":7}"#, "k=7");
    let ask = format!("{DELETE}\nIdempotency-Key: \"d\"");
    table.again(&ask, r#"200 {"key":"k","value":7}"#, "");
    table.again(ONE, r#"200 {"namespace":"NS","key":"k","applied":1}"#, "k=1");
    table.again(&ask, r#"200 replayed {"key":"k","value":7}"#, "k=1");
    table.again(format!("{ask}\nAccept: text/plain"), "200 replayed text 7", "k=1");
    table.again(format!("{ONE}\nIdempotency-Key: \"d\""), "422 token-reused", "k=1");
}

fn batches(table: &mut Table) {
    let key = "Idempotency-Key: \"b\"";
    table.row(format!("{BATCH}\n{key}\n\n{ITEMS}"), "200 2/2", "a=2, b=1");
    // The same batch in another format is the same request.
    for ask in [
        format!("{BATCH}\n{key}\n\n{ITEMS}"),
        format!(
            "{BATCH}\n{key}\n\n{{\"increments\":[{{\"delta\":2,\"key_base64\":\"YQ==\"}},{{\"key\":\"b\",\"delta\":1}}]}}"
        ),
        format!(
            "{BATCH}\n{key}\nContent-Type: application/x-ndjson\n\n{{\"key\":\"a\",\"delta\":2}}\n{{\"key\":\"b\"}}"
        ),
        format!("{BATCH}\n{key}\nContent-Type: text/plain\n\na\t2\nb\n"),
    ] {
        table.again(ask, "200 replayed 2/2", "a=2, b=1");
    }
    for items in ["a\t2\n", "a\t2\nb\t2\n", "b\na\t2\n", "a\t2\nb\nc\n", "a\t1\na\t1\nb\n"] {
        let ask = format!("{BATCH}\n{key}\nContent-Type: text/plain\n\n{items}");
        table.again(ask, "422 token-reused", "a=2, b=1");
    }
    // A key of a batch and the same key of a single write are different keys.
    table.again(
        format!("POST /v1/counters/NS/a/increment\n{key}"),
        r#"200 {"namespace":"NS","key":"a","applied":1}"#,
        "a=3, b=1",
    );
    // Malformed items fail each time, and are part of the request.
    let bad = r#"{"increments":[{"key":"a"},{"key":"b","delta":"x"}]}"#;
    table.row(format!("{BATCH}\n{key}\n\n{bad}"), "200 1/1 1:delta", "a=1");
    table.again(format!("{BATCH}\n{key}\n\n{bad}"), "200 replayed 1/1 1:delta", "a=1");
    let other = [
        r#"{"increments":[{"key":"a"}]}"#,
        r#"{"increments":[{"key":"a"},{"key":"c","delta":"x"}]}"#,
        r#"{"increments":[{"key":"b","delta":"x"},{"key":"a"}]}"#,
    ];
    for (items, want) in other.into_iter().zip(["422 token-reused", "200 *", "200 *"]) {
        table.again(format!("{BATCH}\n{key}\n\n{items}"), want, "a=1");
    }
    let nothing = format!("{BATCH}\n{key}\n\n{{\"increments\":[]}}");
    table.row(&nothing, "200 0/0", "");
    table.again(&nothing, "200 0/0", "");
}

fn too_old(table: &mut Table) {
    for (issued, want) in [
        (0, "410 token-too-old"),
        (NOW.0 - WINDOW_MS - 1, "410 token-too-old"),
        (NOW.0 - WINDOW_MS, ""),
        (NOW.0 + 299_000, ""),
        (4_100_000_000_000, "400 bad-input Idempotency-Issued-At"),
        (NOW.0 / 1_000, "400 bad-input Idempotency-Issued-At"),
    ] {
        let headers = format!("Idempotency-Key: \"o\"\nIdempotency-Issued-At: {issued}");
        let asked = [
            (ONE, "", r#"200 {"namespace":"NS","key":"k","applied":1}"#, "k=1"),
            (DELETE, "", r#"200 {"key":"k","value":0}"#, ""),
            (BATCH, ITEMS, "200 2/2", "a=2, b=1"),
        ];
        for (request, body, ok, effect) in asked {
            let (want, effect) = if want.is_empty() { (ok, effect) } else { (want, "") };
            table.row(format!("{request}\n{headers}\n\n{body}"), want, effect);
        }
    }
    // A recorded request is answered, however old it is.
    let ask =
        |issued: u64| format!("{ONE}\nIdempotency-Key: \"o\"\nIdempotency-Issued-At: {issued}");
    table.row(ask(NOW.0), r#"200 {"namespace":"NS","key":"k","applied":1}"#, "k=1");
    table.again(ask(0), r#"200 replayed {"namespace":"NS","key":"k","applied":1}"#, "k=1");
}

fn quota(table: &mut Table) {
    table.node().set_mood(Mood::FullOfTokens);
    for ask in [ONE.to_owned(), DELETE.to_owned()] {
        table.row(format!("{ask}\nIdempotency-Key: \"q\""), "429 quota", "");
    }
    table.row(format!("{BATCH}\nIdempotency-Key: \"q\"\n\n{ITEMS}"), "429 quota", "");
    let ok = r#"200 {"namespace":"NS","key":"k","applied":1}"#;
    table.again(ONE, ok, "k=1");
    table.node().set_mood(Mood::Serves);
    table.row(format!("{ONE}\nIdempotency-Key: \"q\""), ok, "k=1");
}
