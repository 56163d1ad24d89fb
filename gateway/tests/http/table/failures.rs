//! Rows about a cluster that can't serve a request. Longer scenarios are in `failures.rs` beside
//! this folder.

use engine::message::Refusal;

use super::Table;

const SHORT: &str = "Request-Timeout-Ms: 150";

/// A request for each way to write and to read, with the answer of writes and that of reads.
fn all(write: &str, read: &str) -> [(String, String); 6] {
    let items = r#"{"increments":[{"key":"a"},{"key":"a"}]}"#;
    [
        (format!("POST /v1/counters/NS/k/increment\n{SHORT}"), write.to_owned()),
        (format!("DELETE /v1/counters/NS/k\n{SHORT}"), write.to_owned()),
        (format!("POST /v1/counters/NS/increment\n{SHORT}\n\n{items}"), write.to_owned()),
        (format!("GET /v1/counters/NS/k\n{SHORT}"), read.to_owned()),
        (format!("HEAD /v1/counters/NS/k\n{SHORT}"), read[..3].to_owned()),
        (format!("POST /v1/counters/NS/get\n{SHORT}\n\n{{\"keys\":[\"k\"]}}"), read.to_owned()),
    ]
}

pub(super) fn rows(table: &mut Table) {
    table.refused(Refusal::Overloaded, &all("429 overloaded", "503 overloaded"));
    table.refused(Refusal::NoSpace, &all("503 no-space", "503 no-space"));
    table.refused(Refusal::Frozen, &all("503 frozen", "503 frozen"));
    table.opened();
    table.unanswered(&all("504 deadline", "504 deadline"));
    // The node is dead from here on.
    table.killed();
    table.row("GET /readyz?all", "503 text connection to node-1\n", "");
    table.row("HEAD /readyz?all", "503", "");
    table.row("OPTIONS /readyz?all", "503 text ", "");
    table.row("GET /readyz", "200 text ok\n", "");
    table.row("GET /livez", "200 text ok\n", "");
    for (ask, want) in all("503 no-primary", "503 no-primary") {
        table.row(ask, &want, "");
    }
}
