//! A fake gateway: it counts in a map, and answers as a test demands.
//!
//! The fake implements docs/http.md over plain sockets without the product's client code, and can
//! fail as a failing cluster can: reject a request, lose the answer after or before counting, cut
//! the answer in half, fail single items. An item is counted once per token.

pub(crate) mod http;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use self::http::{answer, answer_with, read_request};

const REPLAYED: &str = "Idempotent-Replayed: true\r\n";

/// What the gateway does with a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fate {
    Apply,
    /// 503 or 429, nothing counted.
    Refuse(u16),
    /// 504, counted or not.
    Deadline {
        counted: bool,
    },
    /// The connection closes without an answer.
    Drop {
        counted: bool,
    },
    /// The connection closes in the middle of the answer, after counting.
    Cut,
    /// Every third item is not applied, every fifth unknown (the tenth is counted all the same).
    Parts,
    /// Items whose key begins with `bad` are bad input.
    BadInput,
    /// The answer of a proxy or another server: HTML. Nothing is counted.
    OtherServer(u16),
    /// A proxy's 413 for a body of more bytes than this.
    Limit(usize),
    /// The answer of a batch that was counted before.
    Replayed,
    /// 410, nothing counted.
    TooOld,
}

/// Decides the fate of the next batch.
type Decide = Arc<dyn Fn() -> Fate + Send + Sync>;

/// The request that was sent under a token, with the items that were counted.
struct Sent {
    /// The issue time and the body, which may not change.
    request: (Option<String>, Vec<u8>),
    counted: BTreeSet<usize>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) counters: BTreeMap<String, i128>,
    tokens: BTreeMap<String, Sent>,
    pub(crate) heads: Vec<String>,
    /// The body of `/v1/cluster`, if it is not the default one.
    pub(crate) cluster: Option<Value>,
}

pub(crate) struct FakeGateway {
    pub(crate) address: SocketAddr,
    pub(crate) state: Arc<Mutex<State>>,
}

impl FakeGateway {
    /// `decide` is given the number of the batch, from 0.
    pub(crate) fn start(decide: impl Fn(u64) -> Fate + Send + Sync + 'static) -> Self {
        let batches = AtomicU64::new(0);
        let decide: Decide = Arc::new(move || decide(batches.fetch_add(1, Ordering::Relaxed)));
        Self::listen(Arc::default(), decide)
    }

    /// Two gateways of one cluster: their batches are numbered together.
    pub(crate) fn start_two(decide: impl Fn(u64) -> Fate + Send + Sync + 'static) -> [Self; 2] {
        let batches = AtomicU64::new(0);
        let decide: Decide = Arc::new(move || decide(batches.fetch_add(1, Ordering::Relaxed)));
        let state = Arc::<Mutex<State>>::default();
        [Self::listen(state.clone(), decide.clone()), Self::listen(state, decide)]
    }

    fn listen(state: Arc<Mutex<State>>, decide: Decide) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (shared, decide) = (shared.clone(), decide.clone());
                // The thread ends with its connection.
                std::thread::spawn(move || serve(stream.unwrap(), &shared, &decide));
            }
        });
        Self { address, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Fate {
    fn counts(self) -> bool {
        match self {
            Self::Deadline { counted } | Self::Drop { counted } => counted,
            Self::Refuse(_) | Self::OtherServer(_) | Self::Replayed | Self::TooOld => false,
            Self::Apply | Self::Cut | Self::Parts | Self::BadInput | Self::Limit(_) => true,
        }
    }
}

impl State {
    /// Returns whether this item of the request was not counted yet under its token, if it has one.
    /// `None` if the token belongs to another request.
    fn may_count(&mut self, head: &str, body: &[u8], item: usize) -> Option<bool> {
        let header = |name: &str| {
            let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let Some(token) = header("idempotency-key") else { return Some(true) };
        assert!(token.len() > 2 && token.starts_with('"') && token.ends_with('"'), "{token}");
        let request = (header("idempotency-issued-at"), body.to_vec());
        let new = Sent { request: request.clone(), counted: BTreeSet::new() };
        let sent = self.tokens.entry(token).or_insert(new);
        (sent.request == request).then(|| sent.counted.insert(item))
    }
}

fn problem(status: u16, kind: &str, outcome: &str) -> Vec<u8> {
    answer(status, &json!({ "type": format!("/problems/{kind}"), "outcome": outcome }).to_string())
}

fn other_server(status: u16) -> Vec<u8> {
    let headers = "Content-Type: text/html\r\nLocation: https://elsewhere/\r\n";
    answer_with(status, headers, "<html>it is not what you want</html>")
}

fn serve(stream: TcpStream, state: &Mutex<State>, decide: &Decide) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let (first, head, body) = read_request(&mut reader)?;
        let mut words = first.split(' ');
        let (method, path) = (words.next()?, words.next()?);
        let parts: Vec<_> = path.split('/').skip(1).collect();
        match (method, &parts[..]) {
            ("POST", ["v1", "counters", _, "increment"]) => {
                let bytes = increment_batch(&body, head, state, decide)?;
                let cut = bytes.1;
                stream.write_all(&bytes.0).ok()?;
                if cut {
                    return None;
                }
            }
            ("POST", ["v1", "counters", namespace, key, "increment"]) => {
                let parsed: Value = serde_json::from_slice(&body).unwrap_or(json!({}));
                let delta = parsed["delta"].as_i64().unwrap_or(1);
                let mut state = state.lock().unwrap();
                let fate = decide();
                if fate.counts() && state.may_count(&head, &body, 0) == Some(true) {
                    *state.counters.entry((*key).to_owned()).or_default() += i128::from(delta);
                }
                let value = state.counters.get(*key).copied().unwrap_or(0);
                state.heads.push(head);
                let text = format!(
                    "{{\"namespace\":\"{namespace}\",\"key\":\"x\",\"applied\":{delta},\"value\":{value}}}"
                );
                let bytes = match fate {
                    Fate::Refuse(status) => problem(status, "frozen", "not-applied"),
                    Fate::Deadline { .. } => problem(504, "deadline", "unknown"),
                    Fate::Drop { .. } => return None,
                    Fate::OtherServer(status) => other_server(status),
                    _ => answer(200, &text),
                };
                stream.write_all(&bytes).ok()?;
            }
            ("POST", ["v1", "counters", _, "get"]) => {
                if let Fate::OtherServer(status) = decide() {
                    stream.write_all(&other_server(status)).ok()?;
                    continue;
                }
                let parsed: Value = serde_json::from_slice(&body).unwrap();
                let state = state.lock().unwrap();
                let counters: Vec<_> = parsed["keys"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|key| {
                        let name = name_of(key);
                        let value = state.counters.get(&name).copied().unwrap_or(0);
                        let name = json!(name);
                        format!("{{\"key\":{name},\"value\":{value}}}")
                    })
                    .collect();
                let text = format!("{{\"counters\":[{}]}}", counters.join(","));
                stream.write_all(&answer(200, &text)).ok()?;
            }
            ("GET", ["v1", "cluster"]) => {
                let cluster = json!({
                    "cluster": "fake",
                    "nodes": [{"name": "node-1", "state": "up", "boot": 1, "address": "a", "zone": ""}],
                    "shards": [
                        {"id": 0, "state": "open", "epoch": 1, "primary": "node-1", "isr": ["node-1"]},
                        {"id": 1, "state": "frozen", "epoch": 1, "primary": "node-1",
                         "isr": ["node-1", "node-2"]}]
                });
                let parsed = state.lock().unwrap().cluster.clone();
                stream.write_all(&answer(200, &parsed.unwrap_or(cluster).to_string())).ok()?;
            }
            _ => stream.write_all(&problem(404, "not-found", "not-applied")).ok()?,
        }
    }
}

/// The name of a JSON key in the map: base64 keys keep their base64, with a prefix.
fn name_of(item: &Value) -> String {
    match (item.as_str(), item["key"].as_str(), item["key_base64"].as_str()) {
        (Some(key), ..) | (_, Some(key), _) => key.to_owned(),
        (_, _, Some(base64)) => format!("base64:{base64}"),
        _ => panic!("an item without a key: {item}"),
    }
}

/// Keys and deltas of a batch, in either form.
fn items_of(head: &str, body: &[u8]) -> Vec<(String, i128)> {
    if !head.to_ascii_lowercase().contains("content-type: text/plain") {
        let parsed: Value = serde_json::from_slice(body).unwrap();
        let items = parsed["increments"].as_array().unwrap().iter();
        return items.map(|item| (name_of(item), item["delta"].as_i64().unwrap().into())).collect();
    }
    let lines = body.strip_suffix(b"\n").unwrap_or(body).split(|&byte| byte == b'\n');
    let lines = lines.map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let item = |line: &[u8]| {
        let tab = line.iter().rposition(|&byte| byte == b'\t');
        let split = tab.map(|at| (&line[..at], std::str::from_utf8(&line[at + 1..])));
        let (key, delta) = match split {
            Some((key, Ok(delta))) if delta.parse::<i128>().is_ok() => {
                (key, delta.parse().unwrap())
            }
            _ => (line, 1),
        };
        assert!((1..=1024).contains(&key.len()), "a key of {} bytes", key.len());
        let name = std::str::from_utf8(key).map(str::to_owned);
        (name.unwrap_or_else(|_| format!("bytes:{}", key.escape_ascii())), delta)
    };
    lines.filter(|line| !line.is_empty()).map(item).collect()
}

/// The answer, and whether the connection ends after it.
fn increment_batch(
    body: &[u8],
    head: String,
    state: &Mutex<State>,
    decide: &Decide,
) -> Option<(Vec<u8>, bool)> {
    let items = items_of(&head, body);
    let mut state = state.lock().unwrap();
    state.heads.push(head.clone());
    let mut reused = false;
    // Counts an item; returns whether it was not counted before.
    let mut count = |index: usize| {
        let (name, delta) = &items[index];
        let may = state.may_count(&head, body, index);
        match may {
            Some(true) => *state.counters.entry(name.clone()).or_default() += delta,
            Some(false) => {}
            None => reused = true,
        }
        may == Some(true)
    };
    let all = 0..items.len();
    let applied_with = |headers: &str, applied: usize, failed: Vec<Value>| {
        let accepted = items.len();
        let body = json!({ "accepted": accepted, "applied": applied, "failed": failed });
        answer_with(200, headers, &body.to_string())
    };
    let applied = |applied: usize, failed: Vec<Value>| applied_with("", applied, failed);
    let fail = |index: usize, kind: &str, outcome: &str| json!({ "index": index, "type": kind, "outcome": outcome });
    let answered = match decide() {
        Fate::Apply => {
            let fresh = all.filter(|&index| count(index)).count();
            Some((applied_with(if fresh == 0 { REPLAYED } else { "" }, items.len(), vec![]), false))
        }
        Fate::Refuse(status) => Some((problem(status, "frozen", "not-applied"), false)),
        Fate::Deadline { counted } => {
            if counted {
                for index in all {
                    count(index);
                }
            }
            Some((problem(504, "deadline", "unknown"), false))
        }
        Fate::Drop { counted } => {
            if counted {
                for index in all {
                    count(index);
                }
            }
            None
        }
        Fate::Cut => {
            for index in all {
                count(index);
            }
            let mut bytes = applied(items.len(), vec![]);
            bytes.truncate(bytes.len() - 3);
            Some((bytes, true))
        }
        Fate::Parts => {
            let mut failed = Vec::new();
            for index in all {
                match index {
                    _ if index % 3 == 0 => failed.push(fail(index, "/frozen", "not-applied")),
                    _ if index % 5 == 0 => {
                        failed.push(fail(index, "/deadline", "unknown"));
                        if index % 10 == 0 {
                            count(index);
                        }
                    }
                    _ => drop(count(index)),
                }
            }
            Some((applied(items.len() - failed.len(), failed), false))
        }
        Fate::BadInput => {
            let mut failed = Vec::new();
            for index in all {
                if items[index].0.starts_with("bad") {
                    failed.push(fail(index, "/bad-input", "not-applied"));
                } else {
                    count(index);
                }
            }
            Some((applied(items.len() - failed.len(), failed), false))
        }
        Fate::Replayed => Some((applied_with(REPLAYED, items.len(), vec![]), false)),
        Fate::OtherServer(status) => Some((other_server(status), false)),
        Fate::Limit(bytes) if body.len() > bytes => Some((other_server(413), false)),
        Fate::Limit(_) => {
            for index in all {
                count(index);
            }
            Some((applied(items.len(), vec![]), false))
        }
        Fate::TooOld => Some((problem(410, "token-too-old", "unknown"), false)),
    };
    if reused { Some((problem(422, "token-reused", "not-applied"), false)) } else { answered }
}
