//! JSON bodies, parsed in one pass and without an intermediate tree of values.
//!
//! A body is *readable* if it is JSON by RFC 8259, is UTF-8 and has its list. The items are checked
//! one by one, so that a malformed item fails alone. Therefore every value is first taken as raw
//! text and interpreted afterwards: half of a surrogate pair and a number beyond all types are
//! JSON, and no reason to refuse the other items. A list, a line of NDJSON and a list of keys use
//! the same code, so an item means the same in each.

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

/// The standard alphabet, with padding or without.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The body of a single increment: `{"delta": 5, "return": "value"}`.
#[derive(Default)]
pub(super) struct IncrementBody {
    pub(super) delta: Option<i64>,
    pub(super) returning: bool,
}

/// Parses the body of a single increment.
pub(super) fn increment_body(body: &[u8]) -> Result<IncrementBody, Problem> {
    let mut parsed = IncrementBody::default();
    let members = ObjectMembers(|name: &str, value: RawJson<'_>| match name {
        "delta" if parsed.delta.is_none() => {
            parsed.delta = Some(value.integer("delta")?);
            Ok(())
        }
        "return" if !parsed.returning && value.text("return").is_ok_and(|text| text == "value") => {
            parsed.returning = true;
            Ok(())
        }
        "return" if !parsed.returning => Err(Problem::bad_input("return", "can only be \"value\"")),
        _ => Err(unexpected(name)),
    });
    let wrong = read(body, &Cell::new("body"), members)?;
    wrong.map_or(Ok(parsed), Err)
}

/// Parses `{"increments": [ITEM, …]}` or `{"keys": [ITEM, …]}` and passes each item to `take`,
/// until it refuses one.
pub(super) fn items(
    body: &[u8],
    list: &'static str,
    take: impl FnMut(JsonItem<'_>) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let (inside, refused) = (Cell::new("body"), Cell::new(None));
    let wrong = read(body, &inside, ListBody { list, inside: &inside, refused: &refused, take });
    match (refused.take(), wrong) {
        (Some(problem), _) => Err(problem),
        (None, wrong) => wrong?.map_or(Ok(()), Err),
    }
}

/// Parses a single item: a line of NDJSON.
pub(super) fn item(line: &[u8]) -> JsonItem<'_> {
    if line.starts_with(mark::UTF_8) {
        return JsonItem::wrong(Problem::bad_input("body", mark::IN_JSON));
    }
    match serde_json::from_slice::<&RawValue>(line) {
        Ok(written) => JsonItem::of(written.get()),
        Err(error) => JsonItem::wrong(Problem::bad_input("body", format!("is not JSON: {error}"))),
    }
}

/// Parses a body. `inside` is the part of the body that is being parsed, for the error that ends
/// it.
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
        // A type error belongs to a field, a syntax error to the body.
        Category::Data => Problem::bad_input(inside.get(), error.to_string()),
        _ => Problem::bad_input("body", format!("is not JSON: {error}")),
    })
}

fn unexpected(name: &str) -> Problem {
    Problem::bad_input(name.to_owned(), "is not known here, or is present twice")
}

/// The raw text of one value.
#[derive(Clone, Copy)]
struct RawJson<'a>(&'a str);

impl<'a> RawJson<'a> {
    fn integer(self, field: &'static str) -> Result<i64, Problem> {
        integer(self.0.as_bytes()).map_err(|why| Problem::bad_input(field, why.detail()))
    }

    /// The content of a string.
    fn text(self, field: &'static str) -> Result<Cow<'a, str>, Problem> {
        if !self.0.starts_with('"') {
            return Err(Problem::bad_input(field, "is not a string"));
        }
        self.unescaped().ok_or_else(|| {
            let detail = "has half of a surrogate pair, which is not a character; \
                          \"key_base64\" takes any bytes";
            Problem::bad_input(field, detail)
        })
    }

    /// The unescaped text between the quotes. `None` if it has half of a surrogate pair.
    fn unescaped(self) -> Option<Cow<'a, str>> {
        let inner = self.0.strip_prefix('"')?.strip_suffix('"')?;
        if !inner.contains('\\') {
            return Some(Cow::Borrowed(inner));
        }
        serde_json::from_str(self.0).ok().map(Cow::Owned)
    }
}

/// One element of a list, and the first mistake in it.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct JsonItem<'a> {
    pub(super) key: Option<Cow<'a, [u8]>>,
    pub(super) delta: Option<i64>,
    /// The element is a plain string, not an object.
    pub(super) bare: bool,
    pub(super) wrong: Option<Problem>,
}

impl<'a> JsonItem<'a> {
    fn wrong(wrong: Problem) -> Self {
        Self { wrong: Some(wrong), ..Self::default() }
    }

    /// Interprets a value. `written` must be valid JSON.
    fn of(written: &'a str) -> Self {
        Self::in_short_form(written).unwrap_or_else(|| Self::of_any(written))
    }

    /// Interprets a value in the form that most programs write, `{"key":"a","delta":5}`, which
    /// needs no second parse. Returns `None` for any other.
    fn in_short_form(written: &'a str) -> Option<Self> {
        let rest = written.strip_prefix("{\"key\":\"")?;
        let end = memchr::memchr2(b'"', b'\\', rest.as_bytes())?;
        let (key, rest) = rest.split_at(end);
        let rest = rest.strip_prefix('"')?.strip_suffix('}')?;
        let delta = match rest.strip_prefix(",\"delta\":") {
            Some(delta) => Some(integer(delta.as_bytes()).ok()?),
            None if rest.is_empty() => None,
            None => return None,
        };
        let key = Some(Cow::Borrowed(key.as_bytes()));
        Some(Self { key, delta, ..Self::default() })
    }

    fn of_any(written: &'a str) -> Self {
        let mut item = Self::default();
        item.wrong = match written.as_bytes().first() {
            Some(b'{') => {
                let members =
                    ObjectMembers(|name: &str, value: RawJson<'a>| item.take(name, value));
                let read = members.deserialize(&mut serde_json::Deserializer::from_str(written));
                read.unwrap_or_else(|error| Some(Problem::bad_input("body", error.to_string())))
            }
            Some(b'"') => {
                item.bare = true;
                item.take("key", RawJson(written)).err()
            }
            _ => Some(Problem::bad_input(
                "key",
                "an item is an object with \"key\" or \"key_base64\"",
            )),
        };
        item
    }

    fn take(&mut self, name: &str, value: RawJson<'a>) -> Result<(), Problem> {
        match name {
            "key" | "key_base64" if self.key.is_some() => {
                Err(Problem::bad_input("key", "is present twice"))
            }
            "key" => {
                self.key = Some(bytes(value.text("key")?));
                Ok(())
            }
            "key_base64" => {
                let text = value.text("key_base64").ok();
                let decoded = text.and_then(|text| BASE64.decode(text.as_bytes()).ok());
                let decoded =
                    decoded.ok_or_else(|| Problem::bad_input("key_base64", "is not base64"))?;
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

/// The next name of an object. A name with half of a surrogate pair is returned in its raw form.
fn next_name<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Cow<'de, str>>, A::Error> {
    let name = map.next_key::<&'de RawValue>()?.map(RawValue::get);
    Ok(name.map(|name| RawJson(name).unescaped().unwrap_or(Cow::Borrowed(name.trim_matches('"')))))
}

/// Parses an object and passes all its members to a closure, also after a mistake. Returns the
/// first mistake.
struct ObjectMembers<T>(T);

impl<'de, T: FnMut(&str, RawJson<'de>) -> Result<(), Problem>> DeserializeSeed<'de>
    for ObjectMembers<T>
{
    type Value = Option<Problem>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<Problem>, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, T: FnMut(&str, RawJson<'de>) -> Result<(), Problem>> Visitor<'de> for ObjectMembers<T> {
    type Value = Option<Problem>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Option<Problem>, A::Error> {
        let mut wrong = None;
        while let Some(name) = next_name(&mut map)? {
            let value = map.next_value::<&'de RawValue>()?;
            let taken = (self.0)(&name, RawJson(value.get()));
            wrong = wrong.or(taken.err());
        }
        Ok(wrong)
    }
}

/// Parses a body of many items: an object with one member, the list.
struct ListBody<'a, T> {
    list: &'static str,
    inside: &'a Cell<&'static str>,
    /// The reason why an item was refused, which ends the parse.
    refused: &'a Cell<Option<Problem>>,
    take: T,
}

impl<'de, T: FnMut(JsonItem<'_>) -> Result<(), Problem>> DeserializeSeed<'de> for ListBody<'_, T> {
    type Value = Option<Problem>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<Problem>, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, T: FnMut(JsonItem<'_>) -> Result<(), Problem>> Visitor<'de> for ListBody<'_, T> {
    type Value = Option<Problem>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with {:?}", self.list)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Option<Problem>, A::Error> {
        let (mut wrong, mut seen) = (None, false);
        while let Some(name) = next_name(&mut map)? {
            if name == self.list && !seen {
                seen = true;
                self.inside.set(self.list);
                map.next_value_seed(ItemList { refused: self.refused, take: &mut self.take })?;
                self.inside.set("body");
            } else {
                map.next_value::<IgnoredAny>()?;
                wrong.get_or_insert_with(|| unexpected(&name));
            }
        }
        if !seen {
            wrong.get_or_insert_with(|| Problem::bad_input(self.list, "is missing"));
        }
        Ok(wrong)
    }
}

/// Parses the list and passes each item to `take`.
struct ItemList<'a, T> {
    refused: &'a Cell<Option<Problem>>,
    take: &'a mut T,
}

impl<'de, T: FnMut(JsonItem<'_>) -> Result<(), Problem>> DeserializeSeed<'de> for ItemList<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de, T: FnMut(JsonItem<'_>) -> Result<(), Problem>> Visitor<'de> for ItemList<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(written) = seq.next_element::<&'de RawValue>()? {
            if let Err(problem) = (self.take)(JsonItem::of(written.get())) {
                self.refused.set(Some(problem));
                return Err(A::Error::custom("an item was refused"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_form_means_what_it_means_by_the_long_way() {
        for (written, is_short) in [
            (r#"{"key":"a"}"#, true),
            (r#"{"key":"","delta":5}"#, true),
            ("{\"key\":\"\u{e4} {}:,\",\"delta\":-9223372036854775808}", true),
            (r#"{"key":"a","delta":9223372036854775808}"#, false),
            (r#"{"key":"a","delta":1.0}"#, false),
            (r#"{"key":"a","delta":"5"}"#, false),
            (r#"{"key":"a","delta":5 }"#, false),
            (r#"{"key":"a","delta":5,"delta":6}"#, false),
            (r#"{"key":"a","key":"b"}"#, false),
            (r#"{"key":"a\"b","delta":5}"#, false),
            (r#"{"key": "a"}"#, false),
            (r#"{"delta":5,"key":"a"}"#, false),
            (r#"["key"]"#, false),
            ("{}", false),
        ] {
            let short = JsonItem::in_short_form(written);
            assert_eq!(short.is_some(), is_short, "{written}");
            if let Some(item) = short {
                assert_eq!(item, JsonItem::of_any(written), "{written}");
            }
        }
    }
}
