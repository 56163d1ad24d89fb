//! Bodies of many items: JSON, a JSON object per line, or plain lines.

use engine::key::{CounterKey, KEY_BYTES_MAX};
use engine::ops::{Op, OpKind};

use super::json::{self, Item, Wrong};
use super::{BodyType, ITEMS_MAX, NotInteger, integer, name_problem};
use crate::problem::{Kind, Problem};

/// What an answer says of an item that failed, without its key and the detail.
const ANSWER_BYTES: usize = 128;

/// An item that makes no sense, or was not applied.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FailedItem {
    pub index: u32,
    /// As far as it was understood.
    pub key: Option<Vec<u8>>,
    pub problem: Problem,
}

/// The items of one request, sorted into those that were understood and those that were not.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Batch {
    /// What was understood, in order.
    pub ops: Vec<Op>,
    /// The place of each of them among the items, from 0.
    pub indexes: Vec<u32>,
    /// What was not, in order.
    pub failed: Vec<FailedItem>,
}

impl Batch {
    /// What its operations do not tell of the request: a hash of the items that make no sense, 0 if there are none.
    pub(crate) fn also(&self) -> u64 {
        if self.failed.is_empty() {
            return 0;
        }
        let mut bytes = Vec::new();
        for FailedItem { index, key, problem } in &self.failed {
            bytes.extend_from_slice(&index.to_le_bytes());
            for part in [key.as_deref().unwrap_or_default(), problem.detail.as_bytes()] {
                bytes.extend_from_slice(&part.len().to_le_bytes());
                bytes.extend_from_slice(part);
            }
        }
        engine::key::hash(&bytes) as u64
    }

    /// About as many bytes as its items that make no sense take, here and in the answer: many times what they take in the
    /// body.
    pub(crate) fn failed_bytes(&self) -> usize {
        let one = |FailedItem { key, problem, .. }: &FailedItem| {
            let key = key.as_ref().map_or(0, Vec::len);
            size_of::<FailedItem>() + ANSWER_BYTES + 2 * (key + problem.detail.len())
        };
        self.failed.iter().map(one).sum()
    }

    fn items(&self) -> usize {
        self.ops.len() + self.failed.len()
    }

    fn index(&self) -> u32 {
        u32::try_from(self.items()).expect("a body of 8 MiB has fewer items")
    }

    fn add(&mut self, namespace: &str, key: &[u8], delta: i64) {
        let index = self.index();
        match CounterKey::new(namespace.as_bytes(), key) {
            Ok(counter) => {
                let kind = OpKind::Add { delta: i128::from(delta) };
                self.ops.push(Op { counter, kind });
                self.indexes.push(index);
            }
            Err(error) => {
                let problem = name_problem(error, key.len());
                // Too long to be worth repeating, or empty.
                self.failed.push(FailedItem { index, key: None, problem });
            }
        }
    }

    fn fail(&mut self, key: Option<&[u8]>, wrong: Wrong) {
        // One that is no key is not repeated: it may be too long, and the answer's document has none that is empty.
        let key = key.filter(|key| (1..=KEY_BYTES_MAX).contains(&key.len())).map(<[u8]>::to_vec);
        let index = self.index();
        self.failed.push(FailedItem { index, key, problem: wrong.problem() });
    }

    fn take(&mut self, namespace: &str, item: &Item<'_>) {
        let key = item.key.as_deref();
        match (&item.wrong, key) {
            (Some(wrong), _) => self.fail(key, wrong.clone()),
            (None, Some(_)) if item.bare => {
                self.fail(
                    key,
                    Wrong::new("key", "an item is an object with \"key\" and \"delta\""),
                );
            }
            (None, Some(key)) => self.add(namespace, key, item.delta.unwrap_or(1)),
            (None, None) => self.fail(None, Wrong::new("key", "is missing")),
        }
    }
}

/// The items of a batch of increments. An error means that nothing can be understood, and nothing is applied.
pub fn increments(namespace: &str, body_type: BodyType, body: &[u8]) -> Result<Batch, Problem> {
    let mut batch = Batch::default();
    match body_type {
        BodyType::Json => {
            json::items(body, "increments", |item| batch.take(namespace, &item))?;
        }
        BodyType::NdJson => {
            for line in lines(body).filter(|line| !line.trim_ascii().is_empty()) {
                batch.take(namespace, &json::item(line));
            }
        }
        BodyType::Text => {
            for line in lines(body).filter(|line| !line.is_empty()) {
                match split(line) {
                    Ok((key, delta)) => batch.add(namespace, key, delta),
                    Err((key, why)) => batch.fail(Some(key), Wrong::new("delta", why.detail())),
                }
            }
        }
    }
    limited(batch.items())?;
    Ok(batch)
}

/// The keys of a request for many values: any that makes no sense fails it as a whole.
pub fn keys(namespace: &str, body: &[u8]) -> Result<Vec<CounterKey>, Problem> {
    let mut keys = Vec::new();
    let mut wrong = None;
    let mut items = 0;
    json::items(body, "keys", |item| {
        let index = items;
        items += 1;
        match key(namespace, item) {
            Ok(counter) => keys.push(counter),
            Err(problem) => {
                let field = problem.field.as_deref().unwrap_or("key");
                let field = format!("keys[{index}].{field}");
                wrong.get_or_insert_with(|| Problem::bad_input(field, problem.detail.clone()));
            }
        }
    })?;
    limited(items)?;
    wrong.map_or(Ok(keys), Err)
}

fn key(namespace: &str, item: Item<'_>) -> Result<CounterKey, Problem> {
    if let Some(wrong) = item.wrong {
        return Err(wrong.problem());
    }
    if item.delta.is_some() {
        return Err(Problem::bad_input("delta", "does not belong to a read"));
    }
    let key = item.key.ok_or_else(|| Problem::bad_input("key", "is missing"))?;
    CounterKey::new(namespace.as_bytes(), &key).map_err(|error| name_problem(error, key.len()))
}

fn limited(items: usize) -> Result<(), Problem> {
    if items <= ITEMS_MAX {
        return Ok(());
    }
    let detail = format!("a body has at most 100,000 items, this one has {items}");
    Err(Problem::new(Kind::TooLarge, detail))
}

/// Up to each LF, one CR before it dropped. What follows the last LF is a line too.
fn lines(body: &[u8]) -> impl Iterator<Item = &[u8]> {
    body.split_inclusive(|&byte| byte == b'\n').map(|line| match line {
        [line @ .., b'\r', b'\n'] | [line @ .., b'\n'] => line,
        line => line,
    })
}

/// A key and what is asked of it, or what is wrong with its delta.
type Split<'a> = Result<(&'a [u8], i64), (&'a [u8], NotInteger)>;

/// `key<TAB>delta`, split at the last TAB if an integer follows; else all of it is the key, and 1 is meant.
fn split(line: &[u8]) -> Split<'_> {
    let Some(tab) = line.iter().rposition(|&byte| byte == b'\t') else {
        return Ok((line, 1));
    };
    match integer(&line[tab + 1..]) {
        Ok(delta) => Ok((&line[..tab], delta)),
        Err(NotInteger::Form) => Ok((line, 1)),
        Err(why @ NotInteger::Range) => Err((&line[..tab], why)),
    }
}
