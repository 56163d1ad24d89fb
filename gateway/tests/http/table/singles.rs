//! Rows about one counter.

use super::Table;

const ONE: &str = "POST /v1/counters/NS/k/increment";

pub(super) fn rows(table: &mut Table) {
    increments(table);
    malformed_increments(table);
    values(table);
    reads(table);
    deletes(table);
}

fn applied(delta: i64) -> String {
    format!(r#"200 {{"namespace":"NS","key":"k","applied":{delta}}}"#)
}

fn increments(table: &mut Table) {
    for ask in [
        "",
        "?",
        "?&&",
        "\n\n{}",
        "\n\n { } \n",
        "\nContent-Length: 0",
        "?delta=1",
        "?delta=%2B1",
        "?delta=+1",
    ] {
        table.row(format!("{ONE}{ask}"), &applied(1), "k=1");
    }
    for (ask, delta) in [
        ("?delta=5", 5),
        ("?delta=-5", -5),
        ("?delta=%2D5", -5),
        ("?%64elta=5", 5),
        ("?delta=007", 7),
        ("\n\n{\"delta\":5}", 5),
        ("\n\n{\"delta\":-5}", -5),
        ("\n\n{\"\\u0064elta\":5}", 5),
        ("?delta=5\n\n{}", 5),
        ("?delta=9223372036854775807", i64::MAX),
        ("\n\n{\"delta\":9223372036854775807}", i64::MAX),
        ("?delta=-9223372036854775808", i64::MIN),
        ("\n\n{\"delta\":-9223372036854775808}", i64::MIN),
    ] {
        table.row(format!("{ONE}{ask}"), &applied(delta), &format!("k={delta}"));
    }
    for ask in ["?delta=0", "?delta=-0", "?delta=+0", "\n\n{\"delta\":0}", "\n\n{\"delta\":-0}"] {
        table.row(format!("{ONE}{ask}"), &applied(0), "");
    }
    for ask in [
        "?return=value&delta=5",
        "?return=value\n\n{\"delta\":5}",
        "?delta=5\n\n{\"return\":\"value\"}",
        "\n\n{\"return\":\"value\",\"delta\":5}",
    ] {
        table.row(format!("{ONE}?delta=-7"), &applied(-7), "k=-7");
        table.again(
            format!("{ONE}{ask}"),
            r#"200 {"namespace":"NS","key":"k","applied":5,"value":-2}"#,
            "k=-2",
        );
    }
}

fn malformed_increments(table: &mut Table) {
    for (ask, field) in [
        ("?delta=", "delta"),
        ("?delta", "delta"),
        ("?delta=x", "delta"),
        ("?delta=1.0", "delta"),
        ("?delta=1e3", "delta"),
        ("?delta=0x5", "delta"),
        ("?delta=1_000", "delta"),
        ("?delta=5%20", "delta"),
        ("?delta=--5", "delta"),
        ("?delta=9223372036854775808", "delta"),
        ("?delta=-9223372036854775809", "delta"),
        ("?delta=1&delta=1", "delta"),
        ("?detla=5", "detla"),
        ("?Delta=5", "Delta"),
        ("?return=all", "return"),
        ("?return", "return"),
        ("?return=value&return=value", "return"),
        ("?delta=%zz", "query"),
        ("?consistency=bounded", "consistency"),
        // The delta is in the URL and in the body.
        ("?delta=5\n\n{\"delta\":5}", "delta"),
        ("?return=value\n\n{\"return\":\"value\"}", "return"),
        // The delta is not an integer.
        ("\n\n{\"delta\":9223372036854775808}", "delta"),
        ("\n\n{\"delta\":-9223372036854775809}", "delta"),
        ("\n\n{\"delta\":123456789012345678901234567890}", "delta"),
        ("\n\n{\"delta\":1.0}", "delta"),
        ("\n\n{\"delta\":1.5}", "delta"),
        ("\n\n{\"delta\":1e3}", "delta"),
        ("\n\n{\"delta\":\"5\"}", "delta"),
        ("\n\n{\"delta\":null}", "delta"),
        ("\n\n{\"delta\":true}", "delta"),
        ("\n\n{\"delta\":[5]}", "delta"),
        ("\n\n{\"delta\":{\"a\":[{}]}}", "delta"),
        // Unknown names are refused.
        ("\n\n{\"dleta\":5}", "dleta"),
        ("\n\n{\"delta\":1,\"delta\":1}", "delta"),
        ("\n\n{\"delta\":5,\"key\":\"k\"}", "key"),
        ("\n\n{\"return\":\"values\"}", "return"),
        ("\n\n{\"return\":null}", "return"),
        ("\n\n{\"return\":true}", "return"),
        // The body is not a JSON object.
        ("\n\n[]", "body"),
        ("\n\n5", "body"),
        ("\n\n\"x\"", "body"),
        ("\n\nnull", "body"),
        ("\n\n{", "body"),
        ("\n\n{}{}", "body"),
        ("\n\n{} x", "body"),
        ("\n\n{\"delta\":5", "body"),
        ("\n\n{\"delta\":05}", "body"),
        ("\n\n{\"delta\":+5}", "body"),
        ("\n\n{\"delta\":1e400}", "delta"),
        ("\n\n{\"delta\":-0.0}", "delta"),
        ("\n\n{\"return\":\"\\ud83d\"}", "return"),
        ("?value=string", "value"),
        ("?return=value&value=number", "value"),
        ("?return=value&value=string&value=string", "value"),
        ("\n\n{delta:5}", "body"),
        ("\n\n{\"delta\":5,}", "body"),
        ("\n\n\u{feff}{}", "body"),
        ("\n\n ", "body"),
        ("\nContent-Type: application/x-www-form-urlencoded\n\ndelta=5", "body"),
    ] {
        table.row(format!("{ONE}{ask}"), &format!("400 bad-input {field}"), "");
    }
    table.row([ONE.as_bytes(), b"\n\n{\"delta\":5\xff}"].concat(), "400 bad-input body", "");
    table.row(format!("{ONE}\n\n{{\"a\":{}", "[".repeat(100_000)), "400 bad-input body", "");
}

/// Values are JSON integers of any size.
fn values(table: &mut Table) {
    for (delta, value) in [(i64::MAX, "27670116110564327421"), (i64::MIN, "-27670116110564327424")]
    {
        let ask = format!("{ONE}?delta={delta}");
        table.row(&ask, &applied(delta), &format!("k={delta}"));
        table.again(&ask, &applied(delta), &format!("k={}", 2 * i128::from(delta)));
        let effect = format!("k={value}");
        let want =
            format!(r#"200 {{"namespace":"NS","key":"k","applied":{delta},"value":{value}}}"#);
        table.again(format!("{ask}&return=value"), &want, &effect);
        table.again(
            "GET /v1/counters/NS/k",
            &format!(r#"200 {{"namespace":"NS","key":"k","value":{value}}}"#),
            &effect,
        );
        table.again(
            "GET /v1/counters/NS/k\nAccept: text/plain",
            &format!("200 text {value}"),
            &effect,
        );
        // Numbers of 53 bits can't represent them.
        let exact = format!("\"value\":{value},\"value_string\":\"{value}\"");
        table.again(
            "GET /v1/counters/NS/k?value=string",
            &format!(r#"200 {{"namespace":"NS","key":"k",{exact}}}"#),
            &effect,
        );
        table.again(
            "GET /v1/counters/NS/k?value=string&consistency=bounded",
            &format!(r#"200 {{"namespace":"NS","key":"k",{exact},"staleness_ms":0}}"#),
            &effect,
        );
        table.again(
            format!("{ONE}?delta=0&return=value&value=string"),
            &format!(r#"200 {{"namespace":"NS","key":"k","applied":0,{exact}}}"#),
            &effect,
        );
        let ask = "POST /v1/counters/NS/get?value=string\n\n{\"keys\":[\"k\"]}";
        table.again(ask, &format!(r#"200 {{"counters":[{{"key":"k",{exact}}}]}}"#), &effect);
        let ask = "POST /v1/counters/NS/get\n\n{\"keys\":[\"k\"]}";
        table.again(
            ask,
            &format!(r#"200 {{"counters":[{{"key":"k","value":{value}}}]}}"#),
            &effect,
        );
        let ask = "DELETE /v1/counters/NS/k?value=string";
        table.again(ask, &format!(r#"200 {{"key":"k",{exact}}}"#), "");
    }
}

fn reads(table: &mut Table) {
    table.row("GET /v1/counters/NS/never", r#"200 {"namespace":"NS","key":"never","value":0}"#, "");
    table.row("HEAD /v1/counters/NS/never", "200", "");
    table.row("HEAD /v1/counters/NS/%zz", "400", "");
    table.row(
        "GET /v1/counters/NS/k?consistency=linearizable",
        r#"200 {"namespace":"NS","key":"k","value":0}"#,
        "",
    );
    let ask = "GET /v1/counters/NS/k?consistency=bounded&max_staleness_ms=10";
    table.row(ask, r#"200 {"namespace":"NS","key":"k","value":0,"staleness_ms":0}"#, "");
    for query in ["consistency=eventual", "consistency=", "consistency=bounded&consistency=bounded"]
    {
        table.row(format!("GET /v1/counters/NS/k?{query}"), "400 bad-input consistency", "");
    }
    for query in [
        "max_staleness_ms=5",
        "consistency=linearizable&max_staleness_ms=5",
        "consistency=bounded&max_staleness_ms=-1",
        "consistency=bounded&max_staleness_ms=x",
        "consistency=bounded&max_staleness_ms=",
    ] {
        table.row(format!("GET /v1/counters/NS/k?{query}"), "400 bad-input max_staleness_ms", "");
    }
    table.row("GET /v1/counters/NS/k?delta=5", "400 bad-input delta", "");

    let many = "POST /v1/counters/NS/get";
    table.row(format!("{ONE}?delta=7"), &applied(7), "k=7");
    // Values are in order, repeated for repeated keys; keys may be objects, too.
    table.again(
        format!("{many}\n\n{}", r#"{"keys":["never","k",{"key":"k"},{"key_base64":"aw=="},{"key_base64":"/w"}]}"#),
        r#"200 {"counters":[{"key":"never","value":0},{"key":"k","value":7},{"key":"k","value":7},{"key":"k","value":7},{"key_base64":"/w==","value":0}]}"#,
        "k=7",
    );
    table.row(format!("{many}\n\n{{\"keys\":[]}}"), r#"200 {"counters":[]}"#, "");
    for (body, field) in [
        (r#"{"keys":["a",""]}"#, "keys[1].key"),
        (r#"{"keys":["a",5,""]}"#, "keys[1].key"),
        (r#"{"keys":[{}]}"#, "keys[0].key"),
        (r#"{"keys":[{"key":"a","delta":1}]}"#, "keys[0].delta"),
        (r#"{"keys":[{"key_base64":"*"}]}"#, "keys[0].key_base64"),
        (r#"{"keys":[null]}"#, "keys[0].key"),
        (r#"{"keys":"a"}"#, "keys"),
        (r#"{"keys":null}"#, "keys"),
        ("{}", "keys"),
        (r#"{"keys":[],"keys":[]}"#, "keys"),
        (r#"{"keys":[],"consistency":"bounded"}"#, "consistency"),
        (r#"{"increments":[]}"#, "increments"),
        ("[]", "body"),
        ("", "body"),
        (r#"{"keys":["a"}"#, "body"),
        ("\u{feff}{\"keys\":[]}", "body"),
        (r#"{"keys":["a","\ud83d"]}"#, "keys[1].key"),
        (r#"{"keys":["a",1e400]}"#, "keys[1].key"),
        (r#"{"keys":[{"key":"a","x":1e400}]}"#, "keys[0].x"),
    ] {
        table.row(format!("{many}\n\n{body}"), &format!("400 bad-input {field}"), "");
    }
    table.row(
        format!("{many}\n\n{{\"keys\":[\"{}\"]}}", "k".repeat(1025)),
        "400 bad-input keys[0].key",
        "",
    );
    table.row(format!("{many}?x"), "400 bad-input x", "");
    table.row(
        format!("{many}?consistency=bounded&max_staleness_ms=10\n\n{{\"keys\":[\"k\"]}}"),
        r#"200 {"counters":[{"key":"k","value":0}],"staleness_ms":0}"#,
        "",
    );
    table.row(format!("{many}?max_staleness_ms=5"), "400 bad-input max_staleness_ms", "");
}

fn deletes(table: &mut Table) {
    table.row("DELETE /v1/counters/NS/k", r#"200 {"key":"k","value":0}"#, "");
    table.row(format!("{ONE}?delta=7"), &applied(7), "k=7");
    table.again("DELETE /v1/counters/NS/k", r#"200 {"key":"k","value":7}"#, "");
    table.again("GET /v1/counters/NS/k", r#"200 {"namespace":"NS","key":"k","value":0}"#, "");
    table.again(
        format!("{ONE}?return=value"),
        r#"200 {"namespace":"NS","key":"k","applied":1,"value":1}"#,
        "k=1",
    );
    table.again("DELETE /v1/counters/NS/k?delta=1", "400 bad-input delta", "k=1");
    table.again("DELETE /v1/counters/NS/%FF", r#"200 {"key_base64":"/w==","value":0}"#, "k=1");
}
