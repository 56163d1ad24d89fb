//! The HTTP contract as a table: requests, their answers and their effects.
//!
//! A row is a request (request line, header lines, an empty line, the body), the answer in one
//! line, and every counter that it changed. Rows are independent: `NS` is a namespace that only
//! this row uses. So each row, in particular a refused one, shows that nothing else was counted. At
//! the end, all answers are compared with the document at `/openapi.json`, in both directions.
//!
//! An answer in one line:
//!
//! - `200 {"key":…}`: exactly this JSON. `200 text 5`: exactly this text. `200`: no body at all.
//!   `200 *`: any body.
//! - `400 bad-input delta`: a problem, by the last part of its type and its field. The properties
//!   of every problem are checked for each: media type, status, outcome, `Retry-After`, and `Allow`
//!   with 405.
//! - `405 method-not-allowed GET, HEAD`: this problem also has the allowed methods.
//! - `200 replayed …`: the same, with `Idempotent-Replayed`.
//! - `200 2/3 1:delta`: a batch with 3 valid items, of which 2 were applied, and the malformed
//!   items with their fields. `400 0/0 0:key` is a batch whose items are all malformed.

mod batches;
mod document;
mod failures;
mod requests;
mod singles;
mod tokens;

use std::collections::BTreeSet;

use engine::ids::Slots;
use engine::message::{Refusal, ShardAvailability};
use serde_json::Value;

use self::document::{Document, DocumentedAnswer};
use crate::client::{Answer, Client};
use crate::cluster::{Cluster, until};
use crate::node::{Mood, Node};

#[test]
fn every_row() {
    let mut table = Table::start();
    requests::rows(&mut table);
    singles::rows(&mut table);
    batches::rows(&mut table);
    tokens::rows(&mut table);
    failures::rows(&mut table);
    table.finish();
}

/// A cluster with one shard, so that the requests of a row go to one node.
pub(crate) struct Table {
    cluster: Cluster,
    client: Client,
    rows: usize,
    document: Document,
    seen: BTreeSet<DocumentedAnswer>,
}

impl Table {
    fn start() -> Self {
        let cluster = Cluster::start(1);
        let mut client = cluster.client();
        let document = Document::new(client.get("/openapi.json").json());
        Self { cluster, client, rows: 0, document, seen: BTreeSet::new() }
    }

    /// Checks a row. `effect` is `key=value` of every counter that is not 0 afterwards, in order,
    /// separated by commas.
    #[track_caller]
    pub(crate) fn row(&mut self, request: impl AsRef<[u8]>, answer: &str, effect: &str) {
        self.rows += 1;
        self.again(request, answer, effect);
    }

    /// Checks a row in the namespace of the row before.
    #[track_caller]
    pub(crate) fn again(&mut self, request: impl AsRef<[u8]>, answer: &str, effect: &str) {
        let batches = self.node().state().batches;
        let namespace = format!("row-{}", self.rows);
        let (head, body) = parts(request.as_ref());
        let head = head.replace("/NS/", &format!("/{namespace}/"));
        let mut lines = head.lines();
        let line = lines.next().expect("a request line");
        let headers: Vec<_> = lines.collect();
        let want = answer.replace("\"NS\"", &format!("\"{namespace}\""));
        let answer = self.client.call(line, &headers, body);
        self.check(line, &answer, &want);
        assert_eq!(self.values(&namespace), effect, "the effect\n{head}\n{answer:?}");
        if (400..=417).contains(&answer.status) && answer.status != 410 {
            let now = self.node().state().batches;
            assert_eq!(now, batches, "sent to a node although refused\n{head}");
        }
        let (method, target) = line.split_once(' ').expect("a method and a target");
        let media = answer.headers.get("content-type").map_or("", String::as_str);
        self.seen.extend(self.document.find(method, target, answer.status, media));
    }

    /// Checks rows while the node refuses all batches and reads.
    #[track_caller]
    fn refused(&mut self, refusal: Refusal, rows: &[(String, String)]) {
        self.node().set_mood(Mood::Refuses(refusal));
        for (request, answer) in rows {
            self.row(request, answer, "");
        }
        self.node().set_mood(Mood::Serves);
    }

    /// Lets the node announce that the shard is open.
    fn opened(&mut self) {
        self.node().announce(Slots::ALL, ShardAvailability::Open);
        let increment = "POST /v1/counters/opened/k/increment";
        until("the gateway has received it", || {
            self.client.call(increment, &[], b"").status == 200
        });
    }

    /// Checks rows while the node does not answer. Their batches are applied afterwards, which no
    /// row sees.
    #[track_caller]
    fn unanswered(&mut self, rows: &[(String, String)]) {
        for (request, answer) in rows {
            self.node().set_mood(Mood::Swallows);
            self.row(request, answer, "");
            self.node().set_mood(Mood::Serves);
            self.node().cut();
            self.opened();
        }
    }

    fn killed(&mut self) {
        self.cluster.nodes[0].kill();
        let reason = "connection to node-1\n";
        until("the gateway has noticed", || self.client.get("/readyz?all").body == reason);
    }

    fn node(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    #[track_caller]
    fn check(&self, line: &str, answer: &Answer, want: &str) {
        let (status, rest) = want.split_once(' ').unwrap_or((want, ""));
        assert_eq!(answer.status.to_string(), status, "{line} {answer:?}");
        let header = |name: &str| answer.headers.get(name).map_or("", String::as_str);
        let retry = header("retry-after");
        let whole_seconds = retry.parse::<u64>().is_ok_and(|seconds| seconds >= 1);
        let is_page = header("content-type").starts_with("text/plain");
        let (replayed, rest) = match rest.strip_prefix("replayed ") {
            Some(rest) => ("true", rest),
            None => ("", rest),
        };
        assert_eq!(header("idempotent-replayed"), replayed, "{line} {answer:?}");
        let later = matches!(answer.status, 429 | 503) && !is_page;
        assert_eq!(later, whole_seconds, "{line} {answer:?}");
        if line.starts_with("HEAD ") {
            assert_eq!(answer.body, "", "{line}");
            assert_ne!(header("content-length"), "0", "it has the length of the body of a GET");
        } else if answer.status != 200 && !is_page {
            let problem = answer.json();
            is_problem(line, answer, &problem);
            let got = match rest.split_once('/') {
                Some(_) => batch(&problem),
                None => {
                    let more = if answer.status == 405 { header("allow") } else { field(&problem) };
                    format!("{} {more}", answer.kind()).trim_end().to_owned()
                }
            };
            assert_eq!(got, rest, "{line} {answer:?}");
        } else if let Some(text) = rest.strip_prefix("text ") {
            assert_eq!(answer.body, text, "{line}");
            assert_eq!(header("content-type"), "text/plain; charset=utf-8");
        } else if rest == "*" {
            assert_ne!(answer.body, "", "{line}");
        } else if rest.starts_with('{') {
            assert_eq!(answer.body, rest, "{line}");
            assert_eq!(header("content-type"), "application/json");
        } else {
            let got = batch(&answer.json());
            assert_eq!(got, rest, "{line} {answer:?}");
        }
    }

    fn values(&self, namespace: &str) -> String {
        let state = self.node().state();
        let start = [namespace.as_bytes(), b"\0"].concat();
        let of_row = state.counters.iter().filter_map(|(name, value)| {
            let key = name.strip_prefix(&start[..])?;
            (*value != 0).then(|| format!("{}={value}", key.escape_ascii()))
        });
        of_row.collect::<Vec<_>>().join(", ")
    }

    fn finish(self) {
        assert!(self.rows > 200, "only {} rows", self.rows);
        self.document.check_complete(&self.seen);
    }
}

/// The head of a request, which ends at the first empty line, and its body.
fn parts(request: &[u8]) -> (String, &[u8]) {
    let end = request.windows(2).position(|two| two == b"\n\n");
    let (head, body) =
        end.map_or((request, &b""[..]), |end| (&request[..end], &request[end + 2..]));
    (String::from_utf8(head.to_vec()).expect("a head is text"), body)
}

/// Checks the properties that RFC 9457 and docs/problems.md require of every problem.
#[track_caller]
fn is_problem(line: &str, answer: &Answer, problem: &Value) {
    assert_eq!(answer.headers["content-type"], "application/problem+json", "{line}");
    assert_eq!(problem["status"], answer.status, "{line}");
    assert!(problem["type"].as_str().unwrap().starts_with("https://"), "{line}");
    for member in ["title", "detail"] {
        assert!(!problem[member].as_str().unwrap().is_empty(), "{line} {member}");
    }
    let reads = line.starts_with("GET ") || line.contains("/get");
    let unknown = matches!(answer.status, 410 | 504) && !reads;
    let outcome = if unknown { "unknown" } else { "not-applied" };
    assert_eq!(problem["outcome"], outcome, "{line}");
    assert_eq!(problem["field"].is_string(), answer.status == 400, "{line} {answer:?}");
    assert_eq!(answer.headers.contains_key("allow"), answer.status == 405, "{line}");
}

fn field(problem: &Value) -> &str {
    problem["field"].as_str().unwrap_or_default()
}

/// The result of a batch in the form `applied/accepted index:field …`.
fn batch(answer: &Value) -> String {
    let mut summary = format!("{}/{}", answer["applied"], answer["accepted"]);
    for item in answer["failed"].as_array().into_iter().flatten() {
        let kind = item["type"].as_str().unwrap().rsplit('/').next().unwrap();
        assert_eq!((kind, &item["outcome"]), ("bad-input", &"not-applied".into()), "{item}");
        assert!(!item["detail"].as_str().unwrap().is_empty(), "{item}");
        summary.push_str(&format!(" {}:{}", item["index"], field(item)));
    }
    summary
}
