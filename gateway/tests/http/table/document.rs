//! Compares answers with the OpenAPI document: every answer is in it, and each of its answers
//! occurred.

use std::collections::BTreeSet;

use gateway::problem::{Kind, TYPE_PREFIX};
use serde_json::Value;

/// An answer: the path in the form of the document, method, status and media type.
pub(crate) type DocumentedAnswer = (String, String, String, String);

pub(crate) struct Document(Value);

impl Document {
    #[track_caller]
    pub(crate) fn new(document: Value) -> Self {
        assert_eq!(document["openapi"], "3.1.0");
        let types = &document["components"]["schemas"]["ProblemType"]["enum"];
        let all = Kind::ALL.map(|kind| format!("{TYPE_PREFIX}{}", kind.name()));
        assert_eq!(types, &Value::from(all.to_vec()), "the types of problems");
        let document = Self(document);
        document.check_references(&document.0);
        document
    }

    #[track_caller]
    fn check_references(&self, part: &Value) {
        match part {
            Value::Object(members) => {
                if let Some(to) = members.get("$ref") {
                    let at = to.as_str().and_then(|to| to.strip_prefix('#')).expect("a reference");
                    assert!(self.0.pointer(at).is_some(), "nothing at {to}");
                }
                members.values().for_each(|part| self.check_references(part));
            }
            Value::Array(parts) => parts.iter().for_each(|part| self.check_references(part)),
            _ => {}
        }
    }

    /// Finds an answer in the document. `None` for an answer that belongs to no operation: the path
    /// or the method does not exist.
    #[track_caller]
    pub(crate) fn find(
        &self,
        method: &str,
        target: &str,
        status: u16,
        media: &str,
    ) -> Option<DocumentedAnswer> {
        let media = media.split(';').next().unwrap_or_default();
        let method = method.to_lowercase();
        let Some((path, operation)) = self.operation(&method, target) else {
            let response = match status {
                404 => "NotFound",
                405 => "MethodNotAllowed",
                // The URL is too long to be a path of the document.
                414 => return None,
                _ => panic!("{method} {target} is not in the document, and was answered {status}"),
            };
            let contents = &self.0["components"]["responses"][response]["content"];
            assert!(contents[media].is_object() || method == "head", "{response} has no {media}");
            return None;
        };
        let response = &operation["responses"][status.to_string()];
        assert!(response.is_object(), "{method} {path} has no {status} in the document");
        let bare = response["content"].is_null();
        let media = if bare { "" } else { media };
        assert!(
            bare || response["content"][media].is_object(),
            "{method} {path} {status} has no {media} in the document"
        );
        Some((path, method, status.to_string(), media.to_owned()))
    }

    /// The most specific path that matches and has the method.
    fn operation(&self, method: &str, target: &str) -> Option<(String, &Value)> {
        let target = target
            .strip_prefix("http://")
            .map_or(target, |rest| &rest[rest.find('/').unwrap_or(0)..]);
        let target: Vec<_> = target.split('?').next().unwrap_or_default().split('/').collect();
        let fits = |path: &str| {
            let parts: Vec<_> = path.split('/').collect();
            let same = |(part, given): (&&str, &&str)| part.starts_with('{') || part == given;
            parts.len() == target.len() && parts.iter().zip(&target).all(same)
        };
        let paths = self.0["paths"].as_object().expect("paths").iter();
        paths
            .filter(|(path, item)| fits(path) && item[method].is_object())
            .min_by_key(|(path, _)| path.matches('{').count())
            .map(|(path, item)| (path.clone(), &item[method]))
    }

    /// Checks that every answer of the document occurred, except for 500, which is always a bug.
    #[track_caller]
    pub(crate) fn check_complete(&self, seen: &BTreeSet<DocumentedAnswer>) {
        let mut documented = BTreeSet::new();
        for (path, item) in self.0["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("an item") {
                for (status, response) in operation["responses"].as_object().into_iter().flatten() {
                    let medias = response["content"]
                        .as_object()
                        .map(|content| content.keys().cloned().collect());
                    for media in medias.unwrap_or_else(|| vec![String::new()]) {
                        documented.insert((path.clone(), method.clone(), status.clone(), media));
                    }
                }
            }
        }
        let never: Vec<_> =
            documented.difference(seen).filter(|(.., status, _)| status != "500").collect();
        assert!(never.is_empty(), "in the document, and no row has it: {never:#?}");
    }
}
