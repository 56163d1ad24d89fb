//! Bodies of many items: JSON, newline-delimited JSON, or plain lines.

use engine::key::{CounterKey, KEY_BYTES_MAX, NameMaker};
use engine::ops::{Op, OpKind};

use super::integer::{NotInteger, integer, looks_numeric};
use super::json::{self, JsonItem};
use super::{BodyType, ITEMS_MAX, mark, name_problem};
use crate::problem::{Kind, Problem};

/// The names of a request share buffers of this size.
const NAMES_BYTES: usize = 1024;
/// The size of a failed item in an answer, without its key and detail.
const ANSWER_BYTES: usize = 128;

/// An item of a batch that is malformed or was not applied.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FailedItem {
    /// The position of the item in the body, from 0.
    pub index: u32,
    /// The key, if it could be parsed.
    pub key: Option<Vec<u8>>,
    /// The reason.
    pub problem: Problem,
}

/// The items of one request, divided into valid and malformed ones.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct IncrementBatch {
    /// The operations of the valid items, in order.
    pub ops: Vec<Op>,
    /// The position in the body of each operation, from 0.
    pub indexes: Vec<u32>,
    /// The malformed items, in order.
    pub failed: Vec<FailedItem>,
}

impl IncrementBatch {
    /// A hash of the malformed items, 0 without any. It makes the fingerprint of a request
    /// complete, which otherwise has only the operations. The hash includes the position, the key
    /// and the wrong field of each item, but not the detail: another build may have another text,
    /// and the same request must keep its fingerprint.
    pub(crate) fn rejected_hash(&self) -> u64 {
        if self.failed.is_empty() {
            return 0;
        }
        let mut bytes = Vec::new();
        for FailedItem { index, key, problem } in &self.failed {
            bytes.extend_from_slice(&index.to_le_bytes());
            let field = problem.field.as_deref().unwrap_or_default();
            for part in [key.as_deref().unwrap_or_default(), field.as_bytes()] {
                bytes.extend_from_slice(&part.len().to_le_bytes());
                bytes.extend_from_slice(part);
            }
        }
        engine::key::hash(&bytes) as u64
    }
}

impl FailedItem {
    /// The approximate memory of the item, here and in the answer: many times its size in the body.
    fn bytes(&self) -> usize {
        let field = self.problem.field.as_ref().map_or(0, |field| field.len());
        let key = self.key.as_ref().map_or(0, Vec::len);
        size_of::<Self>() + ANSWER_BYTES + 2 * (key + self.problem.detail.len() + field)
    }
}

/// The parser of a batch.
struct BatchParser<R> {
    names: NameMaker,
    /// Is called with the memory of each malformed item, and refuses the request if there is not
    /// enough.
    room: R,
    batch: IncrementBatch,
}

impl<R: FnMut(usize) -> Result<(), Problem>> BatchParser<R> {
    /// The position of the next item.
    fn index(&self) -> Result<u32, Problem> {
        let items = self.batch.ops.len() + self.batch.failed.len();
        one_more(items)?;
        Ok(u32::try_from(items).expect("there are at most 100,000"))
    }

    fn add(&mut self, key: &[u8], delta: i64) -> Result<(), Problem> {
        let index = self.index()?;
        match self.names.name(key) {
            Ok(counter) => {
                let kind = OpKind::Add { delta: i128::from(delta) };
                self.batch.ops.push(Op { counter, kind });
                self.batch.indexes.push(index);
                Ok(())
            }
            Err(error) => {
                let problem = name_problem(error, key.len());
                // The answer does not repeat a key that is too long or empty.
                self.failed(FailedItem { index, key: None, problem })
            }
        }
    }

    fn fail(&mut self, key: Option<&[u8]>, problem: Problem) -> Result<(), Problem> {
        // The answer does not repeat an invalid key: it may be too long, and the OpenAPI document
        // does not allow an empty one.
        let key = key.filter(|key| (1..=KEY_BYTES_MAX).contains(&key.len())).map(<[u8]>::to_vec);
        let index = self.index()?;
        self.failed(FailedItem { index, key, problem })
    }

    fn failed(&mut self, item: FailedItem) -> Result<(), Problem> {
        (self.room)(item.bytes())?;
        self.batch.failed.push(item);
        Ok(())
    }

    fn take(&mut self, item: JsonItem<'_>) -> Result<(), Problem> {
        let key = item.key.as_deref();
        match (item.wrong, key) {
            (Some(wrong), _) => self.fail(key, wrong),
            (None, Some(_)) if item.bare => {
                let detail = "an item is an object with \"key\" and \"delta\"";
                self.fail(key, Problem::bad_input("key", detail))
            }
            (None, Some(key)) => self.add(key, item.delta.unwrap_or(1)),
            (None, None) => self.fail(None, Problem::bad_input("key", "is missing")),
        }
    }

    /// Makes room for as many operations as the body has lines.
    fn reserve_lines(&mut self, body: &[u8]) {
        let lines = memchr::memchr_iter(b'\n', body).count() + 1;
        self.batch.ops.reserve_exact(lines.min(ITEMS_MAX));
        self.batch.indexes.reserve_exact(lines.min(ITEMS_MAX));
    }

    fn line(&mut self, line: &[u8]) -> Result<(), Problem> {
        match split(line) {
            Ok((key, delta)) => self.add(key, delta),
            Err((key, why)) => self.fail(Some(key), Problem::bad_input("delta", why.detail())),
        }
    }
}

/// Parses the body of a batch of increments. An error means that nothing is applied: the body is
/// not readable, has too many items, or there is not enough memory. `room` is called with the
/// memory of each malformed item.
pub fn increments(
    namespace: &str,
    body_type: BodyType,
    body: &[u8],
    room: impl FnMut(usize) -> Result<(), Problem>,
) -> Result<IncrementBatch, Problem> {
    mark::refuse_wide(body)?;
    let names = names(namespace)?;
    let mut parser = BatchParser { names, room, batch: IncrementBatch::default() };
    match body_type {
        BodyType::Json => json::items(body, "increments", |item| parser.take(item))?,
        BodyType::NdJson => {
            let lines = || lines(body).filter(|line| !line.trim_ascii().is_empty());
            few_enough(body, lines())?;
            parser.reserve_lines(body);
            lines().try_for_each(|line| parser.take(json::item(line)))?;
        }
        BodyType::Text => {
            let body = body.strip_prefix(mark::UTF_8).unwrap_or(body);
            let lines = || lines(body).filter(|line| !line.is_empty());
            few_enough(body, lines())?;
            parser.reserve_lines(body);
            lines().try_for_each(|line| parser.line(line))?;
        }
    }
    Ok(parser.batch)
}

/// Parses the body of a read of many counters. A single malformed key fails the request.
pub fn keys(namespace: &str, body: &[u8]) -> Result<Vec<CounterKey>, Problem> {
    let mut names = names(namespace)?;
    let mut keys = Vec::new();
    let mut wrong = None;
    let mut items = 0;
    json::items(body, "keys", |item| {
        one_more(items)?;
        match key(&mut names, item) {
            Ok(counter) => keys.push(counter),
            Err(problem) => {
                let field = problem.field.as_deref().unwrap_or("key");
                let field = format!("keys[{items}].{field}");
                wrong.get_or_insert_with(|| Problem::bad_input(field, problem.detail.clone()));
            }
        }
        items += 1;
        Ok(())
    })?;
    wrong.map_or(Ok(keys), Err)
}

fn key(names: &mut NameMaker, item: JsonItem<'_>) -> Result<CounterKey, Problem> {
    if let Some(wrong) = item.wrong {
        return Err(wrong);
    }
    if item.delta.is_some() {
        return Err(Problem::bad_input("delta", "does not belong to a read"));
    }
    let key = item.key.ok_or_else(|| Problem::bad_input("key", "is missing"))?;
    names.name(&key).map_err(|error| name_problem(error, key.len()))
}

fn names(namespace: &str) -> Result<NameMaker, Problem> {
    let names = NameMaker::new(namespace.as_bytes(), NAMES_BYTES);
    names.map_err(|error| name_problem(error, 0))
}

/// Refuses another item after the first `items`. Items beyond the limit are not parsed.
fn one_more(items: usize) -> Result<(), Problem> {
    if items < ITEMS_MAX {
        return Ok(());
    }
    Err(Problem::new(Kind::TooLarge, "a body has at most 100,000 items, this one has more"))
}

/// Refuses a body with too many lines, before any is parsed. A short body can't have too many.
fn few_enough<'a>(body: &[u8], mut lines: impl Iterator<Item = &'a [u8]>) -> Result<(), Problem> {
    if body.len() > 2 * ITEMS_MAX && lines.nth(ITEMS_MAX).is_some() {
        return one_more(ITEMS_MAX);
    }
    Ok(())
}

/// The lines of a body. Each ends at an LF or at the end of the body, without the LF or one CR
/// before it.
fn lines(body: &[u8]) -> impl Iterator<Item = &[u8]> {
    body.split_inclusive(|&byte| byte == b'\n').map(|line| {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        line.strip_suffix(b"\r").unwrap_or(line)
    })
}

/// The key and the delta of a line, or the key and the mistake in the delta.
type LineParts<'a> = Result<(&'a [u8], i64), (&'a [u8], NotInteger)>;

/// Splits `key<TAB>delta` at the last TAB, if an integer follows. Other text that looks like a
/// number is an invalid delta, since it was hardly meant to be a part of the key. In any other
/// case, the whole line is the key, and the delta is 1.
fn split(line: &[u8]) -> LineParts<'_> {
    let Some(tab) = line.iter().rposition(|&byte| byte == b'\t') else {
        return Ok((line, 1));
    };
    let (key, last) = (&line[..tab], &line[tab + 1..]);
    match integer(last) {
        Ok(delta) => Ok((key, delta)),
        Err(NotInteger::Form) if !looks_numeric(last) => Ok((line, 1)),
        Err(why) => Err((key, why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hash is part of records that outlive a build: a request that is repeated through a newer
    /// gateway must have the same hash.
    #[test]
    fn the_hash_of_malformed_items_is_golden() {
        #[track_caller]
        fn check(body_type: BodyType, body: &str, want: u64) {
            let batch = increments("ns", body_type, body.as_bytes(), |_| Ok(())).unwrap();
            assert_eq!(batch.rejected_hash(), want, "{body}");
        }
        check(BodyType::Text, "a\n", 0);
        check(BodyType::Text, "a\nb\t1.5\n", GOLDEN[0]);
        check(BodyType::NdJson, "{\"key\":\"a\"}\n{\"key\":\"b\",\"delta\":\"x\"}", GOLDEN[0]);
        let list = r#"{"increments":[{"key":"a"},{"key":"b","delta":1e400}]}"#;
        check(BodyType::Json, list, GOLDEN[0]);
        check(BodyType::NdJson, "x\n", GOLDEN[1]);
        check(BodyType::Json, r#"{"increments":[{"key":"b","delat":5}]}"#, GOLDEN[2]);
    }

    const GOLDEN: [u64; 3] =
        [14_058_007_857_810_406_569, 2_113_402_453_858_228_916, 15_237_282_713_297_260_791];

    #[test]
    fn the_first_item_too_many_ends_the_parse_in_every_form() {
        for (body_type, start, item, end) in [
            (BodyType::Json, "{\"increments\":[0", ",0", ""),
            (BodyType::NdJson, "x\n", "x\n", "\n"),
            (BodyType::Text, "x\n", "x\n", "\n"),
        ] {
            let body = format!("{start}{}{end}", item.repeat(2 * ITEMS_MAX));
            let mut asked = 0;
            let room = |_| {
                asked += 1;
                Ok(())
            };
            let read = increments("ns", body_type, body.as_bytes(), room);
            assert_eq!(read.map_err(|problem| problem.kind), Err(Kind::TooLarge), "{body_type:?}");
            assert!(asked <= ITEMS_MAX, "{body_type:?}: {asked} items were parsed");
        }
        let body = format!("{{\"keys\":[0{}", ",0".repeat(2 * ITEMS_MAX));
        let read = keys("ns", body.as_bytes());
        assert_eq!(read.map_err(|problem| problem.kind), Err(Kind::TooLarge));
    }

    #[test]
    fn where_there_is_no_room_the_parse_ends() {
        let mut left = 10_000_usize;
        let room = |bytes: usize| {
            left = left.checked_sub(bytes).ok_or_else(|| Problem::new(Kind::Overloaded, ""))?;
            Ok(())
        };
        let body = "x\n".repeat(1000);
        let read = increments("ns", BodyType::NdJson, body.as_bytes(), room);
        assert_eq!(read.map_err(|problem| problem.kind), Err(Kind::Overloaded));
    }
}
