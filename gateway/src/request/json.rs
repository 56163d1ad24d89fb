//! JSON bodies, read in one pass over what is written and without building values.
//!
//! A body is *readable* when it is JSON by RFC 8259, is UTF-8 and holds its list. What stands in an item is judged item by
//! item, so that one wrong item fails alone. Hence every piece is first taken as it is written and only then understood:
//! half of a surrogate pair and a number beyond all types are JSON, and no reason to refuse the items beside them. A list,
//! a line of NDJSON and a list of keys all come here, so the same item is the same in each.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;

use super::{integer, mark};
use crate::problem::Problem;

/// The usual alphabet, with its padding or without.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What is wrong with one part of a body.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Wrong {
    pub(super) field: Cow<'static, str>,
    pub(super) detail: Cow<'static, str>,
}

impl Wrong {
    pub(super) fn new(
        field: impl Into<Cow<'static, str>>,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { field: field.into(), detail: detail.into() }
    }

    pub(super) fn problem(self) -> Problem {
        Problem::bad_input(self.field, self.detail)
    }
}

/// `{"delta": 5, "return": "value"}`
#[derive(Default)]
pub(super) struct IncrementBody {
    pub(super) delta: Option<i64>,
    pub(super) returning: bool,
}

pub(super) fn increment_body(body: &[u8]) -> Result<IncrementBody, Problem> {
    let mut told = IncrementBody::default();
    let members = Members(|name: &str, value: Written<'_>| match name {
        "delta" if told.delta.is_none() => {
            told.delta = Some(value.integer("delta")?);
            Ok(())
        }
        "return" if !told.returning && value.text("return").is_ok_and(|text| text == "value") => {
            told.returning = true;
            Ok(())
        }
        "return" if !told.returning => Err(Wrong::new("return", "can only be \"value\"")),
        _ => Err(unexpected(name)),
    });
    let wrong = read(body, &Cell::new("body"), members)?;
    wrong.map_or(Ok(told), |wrong| Err(wrong.problem()))
}

/// `{"increments": [ITEM, …]}` or `{"keys": [ITEM, …]}`: hands each item on as it comes, until one is refused.
pub(super) fn items(
    body: &[u8],
    list: &'static str,
    take: impl FnMut(Item<'_>) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let (inside, refused) = (Cell::new("body"), Cell::new(None));
    let wrong = read(body, &inside, Whole { list, inside: &inside, refused: &refused, take });
    match (refused.take(), wrong) {
        (Some(problem), _) => Err(problem),
        (None, wrong) => wrong?.map_or(Ok(()), |wrong| Err(wrong.problem())),
    }
}

/// One item by itself, as a line of NDJSON is.
pub(super) fn item(line: &[u8]) -> Item<'_> {
    if line.starts_with(mark::UTF_8) {
        return Item::wrong(Wrong::new("body", mark::IN_JSON));
    }
    match serde_json::from_slice::<&RawValue>(line) {
        Ok(written) => Item::of(written.get()),
        Err(error) => Item::wrong(Wrong::new("body", format!("is not JSON: {error}"))),
    }
}

/// `inside`: where the parse is, for the error that ends it.
fn read<'de, S: DeserializeSeed<'de>>(
    body: &'de [u8],
    inside: &Cell<&'static str>,
    seed: S,
) -> Result<S::Value, Problem> {
    mark::refuse_wide(body)?;
    if body.starts_with(mark::UTF_8) {
        return Err(Problem::bad_input("body", mark::IN_JSON));
    }
    let mut from = serde_json::Deserializer::from_slice(body);
    let value = seed.deserialize(&mut from).and_then(|value| from.end().map(|()| value));
    value.map_err(|error| match error.classify() {
        // Of the two, only wrong data can be blamed on a field.
        Category::Data => Problem::bad_input(inside.get(), error.to_string()),
        _ => Problem::bad_input("body", format!("is not JSON: {error}")),
    })
}

fn unexpected(name: &str) -> Wrong {
    Wrong::new(name.to_owned(), "is not known here, or is there twice")
}

/// One value, as it is written.
#[derive(Clone, Copy)]
struct Written<'a>(&'a str);

impl<'a> Written<'a> {
    fn integer(self, field: &'static str) -> Result<i64, Wrong> {
        integer(self.0.as_bytes()).map_err(|why| Wrong::new(field, why.detail()))
    }

    /// What a string says.
    fn text(self, field: &'static str) -> Result<Cow<'a, str>, Wrong> {
        if !self.0.starts_with('"') {
            return Err(Wrong::new(field, "is no string"));
        }
        self.unescaped().ok_or_else(|| {
            let detail = "has half of a surrogate pair, which is no character; \"key_base64\" takes any bytes";
            Wrong::new(field, detail)
        })
    }

    /// What stands between the quotes. None: that is no text, but half of a surrogate pair.
    fn unescaped(self) -> Option<Cow<'a, str>> {
        let inner = self.0.strip_prefix('"')?.strip_suffix('"')?;
        if !inner.contains('\\') {
            return Some(Cow::Borrowed(inner));
        }
        serde_json::from_str(self.0).ok().map(Cow::Owned)
    }
}

/// One element of a list: what it says, and the first thing that is wrong with it.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Item<'a> {
    pub(super) key: Option<Cow<'a, [u8]>>,
    pub(super) delta: Option<i64>,
    /// A plain string, not an object.
    pub(super) bare: bool,
    pub(super) wrong: Option<Wrong>,
}

impl<'a> Item<'a> {
    fn wrong(wrong: Wrong) -> Self {
        Self { wrong: Some(wrong), ..Self::default() }
    }

    /// `written` is JSON.
    fn of(written: &'a str) -> Self {
        let mut item = Self::default();
        item.wrong = match written.as_bytes().first() {
            Some(b'{') => {
                let members = Members(|name: &str, value: Written<'a>| item.take(name, value));
                let read = members.deserialize(&mut serde_json::Deserializer::from_str(written));
                read.unwrap_or_else(|error| Some(Wrong::new("body", error.to_string())))
            }
            Some(b'"') => {
                item.bare = true;
                item.take("key", Written(written)).err()
            }
            _ => Some(Wrong::new("key", "an item is an object with \"key\" or \"key_base64\"")),
        };
        item
    }

    fn take(&mut self, name: &str, value: Written<'a>) -> Result<(), Wrong> {
        match name {
            "key" | "key_base64" if self.key.is_some() => Err(Wrong::new("key", "is there twice")),
            "key" => {
                self.key = Some(bytes(value.text("key")?));
                Ok(())
            }
            "key_base64" => {
                let text = value.text("key_base64").ok();
                let decoded = text.and_then(|text| BASE64.decode(text.as_bytes()).ok());
                let decoded = decoded.ok_or_else(|| Wrong::new("key_base64", "is no base64"))?;
                self.key = Some(Cow::Owned(decoded));
                Ok(())
            }
            "delta" if self.delta.is_none() => {
                self.delta = Some(value.integer("delta")?);
                Ok(())
            }
            _ => Err(unexpected(name)),
        }
    }
}

fn bytes(text: Cow<'_, str>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
        Cow::Owned(text) => Cow::Owned(text.into_bytes()),
    }
}

/// The next name of an object; as it stands between its quotes if that is no text.
fn next_name<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Cow<'de, str>>, A::Error> {
    let name = map.next_key::<&'de RawValue>()?.map(RawValue::get);
    Ok(name.map(|name| Written(name).unescaped().unwrap_or(Cow::Borrowed(name.trim_matches('"')))))
}

/// An object whose members go to a closure, all of them, whatever is found wrong on the way. Gives the first such thing.
struct Members<T>(T);

impl<'de, T: FnMut(&str, Written<'de>) -> Result<(), Wrong>> DeserializeSeed<'de> for Members<T> {
    type Value = Option<Wrong>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<Wrong>, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, T: FnMut(&str, Written<'de>) -> Result<(), Wrong>> Visitor<'de> for Members<T> {
    type Value = Option<Wrong>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Option<Wrong>, A::Error> {
        let mut wrong = None;
        while let Some(name) = next_name(&mut map)? {
            let value = map.next_value::<&'de RawValue>()?;
            let taken = (self.0)(&name, Written(value.get()));
            wrong = wrong.or(taken.err());
        }
        Ok(wrong)
    }
}

/// A body of many items: an object with one member, the list.
struct Whole<'a, T> {
    list: &'static str,
    inside: &'a Cell<&'static str>,
    /// Why an item was not taken: that ends the parse.
    refused: &'a Cell<Option<Problem>>,
    take: T,
}

impl<'de, T: FnMut(Item<'_>) -> Result<(), Problem>> DeserializeSeed<'de> for Whole<'_, T> {
    type Value = Option<Wrong>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<Wrong>, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, T: FnMut(Item<'_>) -> Result<(), Problem>> Visitor<'de> for Whole<'_, T> {
    type Value = Option<Wrong>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with {:?}", self.list)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Option<Wrong>, A::Error> {
        let (mut wrong, mut seen) = (None, false);
        while let Some(name) = next_name(&mut map)? {
            if name == self.list && !seen {
                seen = true;
                self.inside.set(self.list);
                map.next_value_seed(List { refused: self.refused, take: &mut self.take })?;
                self.inside.set("body");
            } else {
                map.next_value::<IgnoredAny>()?;
                wrong.get_or_insert_with(|| unexpected(&name));
            }
        }
        if !seen {
            wrong.get_or_insert_with(|| Wrong::new(self.list, "is missing"));
        }
        Ok(wrong)
    }
}

struct List<'a, T> {
    refused: &'a Cell<Option<Problem>>,
    take: &'a mut T,
}

impl<'de, T: FnMut(Item<'_>) -> Result<(), Problem>> DeserializeSeed<'de> for List<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de, T: FnMut(Item<'_>) -> Result<(), Problem>> Visitor<'de> for List<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(written) = seq.next_element::<&'de RawValue>()? {
            if let Err(problem) = (self.take)(Item::of(written.get())) {
                self.refused.set(Some(problem));
                return Err(A::Error::custom("an item was refused"));
            }
        }
        Ok(())
    }
}
