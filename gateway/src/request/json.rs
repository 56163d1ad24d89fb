//! JSON bodies, read in one pass and without building values.
//!
//! A body of many items is *readable* when it is well-formed and holds its list; what stands in an item is judged item by
//! item, so that one wrong item fails alone. Hence the visitors here accept any value where a key or a delta belongs and
//! note what is wrong with it, instead of ending the whole parse with an error as derived ones would.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;

use super::NotInteger;
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
    let wrong = read(
        body,
        "body",
        Object(|name: &str, value: Value<'_>| match name {
            "delta" if told.delta.is_none() => {
                told.delta = Some(value.integer("delta")?);
                Ok(())
            }
            "return" if !told.returning => match value {
                Value::Text(text) if text == "value" => {
                    told.returning = true;
                    Ok(())
                }
                _ => Err(Wrong::new("return", "can only be \"value\"")),
            },
            _ => Err(unexpected(name)),
        }),
    )?;
    wrong.map_or(Ok(told), |wrong| Err(wrong.problem()))
}

/// `{"increments": [ITEM, …]}` or `{"keys": [ITEM, …]}`: hands each item on as it comes.
pub(super) fn items(
    body: &[u8],
    list: &'static str,
    take: impl FnMut(Item<'_>),
) -> Result<(), Problem> {
    let inside = Cell::new("body");
    let whole = Whole { list, inside: &inside, take };
    let mut from = serde_json::Deserializer::from_slice(body);
    let read = whole.deserialize(&mut from).and_then(|wrong| from.end().map(|()| wrong));
    match read {
        Ok(None) => Ok(()),
        Ok(Some(wrong)) => Err(wrong.problem()),
        Err(error) => Err(unreadable(inside.get(), &error)),
    }
}

/// One item by itself, as a line of NDJSON is.
pub(super) fn item(line: &[u8]) -> Item<'_> {
    serde_json::from_slice(line).unwrap_or_else(|error| {
        let wrong = Wrong::new("body", format!("is not JSON: {error}"));
        Item { wrong: Some(wrong), ..Item::default() }
    })
}

fn read<'de, S: DeserializeSeed<'de>>(
    body: &'de [u8],
    field: &'static str,
    seed: S,
) -> Result<S::Value, Problem> {
    let mut from = serde_json::Deserializer::from_slice(body);
    let value = seed.deserialize(&mut from).and_then(|value| from.end().map(|()| value));
    value.map_err(|error| unreadable(field, &error))
}

fn unreadable(field: &'static str, error: &serde_json::Error) -> Problem {
    // Of the two, only wrong data can be blamed on a field.
    match error.classify() {
        Category::Data => Problem::bad_input(field, error.to_string()),
        _ => Problem::bad_input("body", format!("is not JSON: {error}")),
    }
}

fn unexpected(name: &str) -> Wrong {
    Wrong::new(name.to_owned(), "is not known here, or is there twice")
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
    fn take(&mut self, name: &str, value: Value<'a>) -> Result<(), Wrong> {
        match name {
            "key" | "key_base64" if self.key.is_some() => Err(Wrong::new("key", "is there twice")),
            "key" => {
                let Value::Text(text) = value else {
                    return Err(Wrong::new("key", "is no string"));
                };
                self.key = Some(bytes(text));
                Ok(())
            }
            "key_base64" => {
                let decoded = match value {
                    Value::Text(text) => BASE64.decode(text.as_bytes()).ok(),
                    _ => None,
                };
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

impl<'de> Deserialize<'de> for Item<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = Item<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an item")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Item<'de>, A::Error> {
                let mut item = Item::default();
                item.wrong = members(map, |name, value| item.take(name, value))?;
                Ok(item)
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Item<'de>, E> {
                let key = Some(Cow::Borrowed(text.as_bytes()));
                Ok(Item { key, bare: true, ..Item::default() })
            }

            fn visit_str<E>(self, text: &str) -> Result<Item<'de>, E> {
                let key = Some(Cow::Owned(text.as_bytes().to_vec()));
                Ok(Item { key, bare: true, ..Item::default() })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Item<'de>, A::Error> {
                skip(seq)?;
                Ok(no_item())
            }

            fn visit_bool<E>(self, _: bool) -> Result<Item<'de>, E> {
                Ok(no_item())
            }

            fn visit_u64<E>(self, _: u64) -> Result<Item<'de>, E> {
                Ok(no_item())
            }

            fn visit_i64<E>(self, _: i64) -> Result<Item<'de>, E> {
                Ok(no_item())
            }

            fn visit_f64<E>(self, _: f64) -> Result<Item<'de>, E> {
                Ok(no_item())
            }

            fn visit_unit<E>(self) -> Result<Item<'de>, E> {
                Ok(no_item())
            }
        }
        from.deserialize_any(ItemVisitor)
    }
}

fn no_item<'a>() -> Item<'a> {
    let wrong = Wrong::new("key", "an item is an object with \"key\" or \"key_base64\"");
    Item { wrong: Some(wrong), ..Item::default() }
}

/// Any value, as far as it matters here.
enum Value<'a> {
    Text(Cow<'a, str>),
    Integer(i64),
    NoInteger(NotInteger),
    Other,
}

impl Value<'_> {
    fn integer(self, field: &'static str) -> Result<i64, Wrong> {
        match self {
            Self::Integer(integer) => Ok(integer),
            Self::NoInteger(why) => Err(Wrong::new(field, why.detail())),
            Self::Text(_) | Self::Other => Err(Wrong::new(field, NotInteger::Form.detail())),
        }
    }
}

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ValueVisitor;
        impl<'de> Visitor<'de> for ValueVisitor {
            type Value = Value<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Value<'de>, E> {
                Ok(Value::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Value<'de>, E> {
                Ok(Value::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Value<'de>, E> {
                Ok(Value::Integer(number))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Value<'de>, E> {
                Ok(i64::try_from(number)
                    .map_or(Value::NoInteger(NotInteger::Range), Value::Integer))
            }

            /// Whole numbers beyond u64 come here too, and so does `-0`.
            fn visit_f64<E>(self, number: f64) -> Result<Value<'de>, E> {
                Ok(if number == 0.0 && number.is_sign_negative() {
                    Value::Integer(0)
                } else if number.abs() >= 2f64.powi(63) {
                    Value::NoInteger(NotInteger::Range)
                } else {
                    Value::NoInteger(NotInteger::Form)
                })
            }

            fn visit_bool<E>(self, _: bool) -> Result<Value<'de>, E> {
                Ok(Value::Other)
            }

            fn visit_unit<E>(self) -> Result<Value<'de>, E> {
                Ok(Value::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Value<'de>, A::Error> {
                skip(seq)?;
                Ok(Value::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Value::Other)
            }
        }
        from.deserialize_any(ValueVisitor)
    }
}

fn skip<'de, A: SeqAccess<'de>>(mut seq: A) -> Result<(), A::Error> {
    while seq.next_element::<IgnoredAny>()?.is_some() {}
    Ok(())
}

/// The name of a member: borrowed unless it was written with escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl<'de> Visitor<'de> for NameVisitor {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(text.to_owned())))
            }
        }
        from.deserialize_str(NameVisitor)
    }
}

/// Goes through an object to its end, whatever is found wrong on the way; returns the first such thing.
fn members<'de, A: MapAccess<'de>>(
    mut map: A,
    mut take: impl FnMut(&str, Value<'de>) -> Result<(), Wrong>,
) -> Result<Option<Wrong>, A::Error> {
    let mut wrong = None;
    while let Some(Name(name)) = map.next_key()? {
        let taken = take(&name, map.next_value()?);
        if let (None, Err(first)) = (&wrong, taken) {
            wrong = Some(first);
        }
    }
    Ok(wrong)
}

/// An object whose members go to a closure.
struct Object<T>(T);

impl<'de, T: FnMut(&str, Value<'de>) -> Result<(), Wrong>> DeserializeSeed<'de> for Object<T> {
    type Value = Option<Wrong>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<Wrong>, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, T: FnMut(&str, Value<'de>) -> Result<(), Wrong>> Visitor<'de> for Object<T> {
    type Value = Option<Wrong>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<Wrong>, A::Error> {
        members(map, self.0)
    }
}

/// A body of many items: an object with one member, the list.
struct Whole<'a, T> {
    list: &'static str,
    /// Where the parse is, for the error that ends it.
    inside: &'a Cell<&'static str>,
    take: T,
}

impl<'de, T: FnMut(Item<'_>)> DeserializeSeed<'de> for Whole<'_, T> {
    type Value = Option<Wrong>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<Wrong>, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, T: FnMut(Item<'_>)> Visitor<'de> for Whole<'_, T> {
    type Value = Option<Wrong>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with {:?}", self.list)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Option<Wrong>, A::Error> {
        let (mut wrong, mut seen) = (None, false);
        while let Some(Name(name)) = map.next_key()? {
            if name == self.list && !seen {
                seen = true;
                self.inside.set(self.list);
                map.next_value_seed(List(&mut self.take))?;
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

struct List<'a, T>(&'a mut T);

impl<'de, T: FnMut(Item<'_>)> DeserializeSeed<'de> for List<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de, T: FnMut(Item<'_>)> Visitor<'de> for List<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(item) = seq.next_element::<Item<'de>>()? {
            (self.0)(item);
        }
        Ok(())
    }
}
