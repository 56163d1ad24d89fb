//! The machine-readable contract: an OpenAPI 3.1 document at `GET /openapi.json`.
//!
//! The names and statuses of problems and the limits are taken from the code that defines them.
//! Only the assignment of problems to requests is written here, and the tests in
//! `tests/http/table/` check that it matches the answers of a gateway in both directions.
//!
//! The document does not express the whole contract. It describes a batch that is valid as a whole,
//! while a malformed item fails alone, with status 200. And keys are bytes, while the document has
//! text.

use std::sync::LazyLock;

use bytes::Bytes;
use engine::batcher::Outcome;
use engine::key::{KEY_BYTES_MAX, NAMESPACE_BYTES_MAX};
use serde_json::{Map, Value, json};

use crate::problem::{Kind, TYPE_PREFIX, outcome_name};
use crate::request::{ITEMS_MAX, TIMEOUT_DEFAULT, TIMEOUT_MS_MAX, TOKEN_BYTES_MAX};

/// The document as it is served.
pub(crate) fn text() -> Bytes {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| document().to_string().into());
    TEXT.clone()
}

/// The problems of a valid write.
const WRITE: &[Kind] = &[
    Kind::TokenReused,
    Kind::TokenTooOld,
    Kind::Quota,
    Kind::Overloaded,
    Kind::Frozen,
    Kind::NoPrimary,
    Kind::NoSession,
    Kind::NoSpace,
    Kind::Stopping,
    Kind::Deadline,
    Kind::SessionLost,
    Kind::Internal,
];
/// The problems of a valid read. A refused read has 503, whatever the reason.
const READ: &[Kind] = &[Kind::NoPrimary, Kind::Deadline, Kind::Internal];
/// The problems of a request with a body.
const BODY: &[Kind] = &[Kind::TooLarge];
/// The problems of any invalid request.
const ANY: &[Kind] = &[
    Kind::BadInput,
    Kind::ForbiddenOrigin,
    Kind::UrlTooLong,
    Kind::UnsupportedMediaType,
    Kind::ExpectationFailed,
];

fn document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "DistributedKeyCounter",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Exact counters. A write has one of three outcomes: applied (200), \
                not-applied (safe to send again) or unknown (it may have been applied, or may be \
                yet: send it again with the same Idempotency-Key, and it counts once). Every \
                problem has it in `outcome`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": {
            "/v1/counters/{namespace}/{key}": {
                "parameters": [parameter("namespace"), parameter("key"), parameter("timeout")],
                "get": read_one(),
                "head": head(&read_one()),
                "delete": delete(),
            },
            "/v1/counters/{namespace}/{key}/increment": {
                "parameters": [parameter("namespace"), parameter("key"), parameter("timeout")],
                "post": increment(),
            },
            "/v1/counters/{namespace}/increment": {
                "parameters": [parameter("namespace"), parameter("timeout")],
                "post": increment_many(),
            },
            "/v1/counters/{namespace}/get": {
                "parameters": [parameter("namespace"), parameter("timeout")],
                "post": read_many(),
            },
            "/v1/cluster": page(
                "cluster",
                "The cluster: nodes, shards and their primaries",
                "application/json",
                schema("Cluster"),
            ),
            "/livez": livez(),
            "/readyz": readyz(),
            "/metrics": page("metrics", "Metrics for Prometheus", "text/plain", text_schema()),
            "/openapi.json": page(
                "openapi",
                "This document",
                "application/json",
                json!({"type": "object"}),
            ),
        },
        "components": {
            "parameters": parameters(),
            "responses": {
                "NotFound": problem_response(
                    &[Kind::NotFound],
                    "Any path that is not in this document",
                ),
                "MethodNotAllowed": problem_response(
                    &[Kind::MethodNotAllowed],
                    "Any method that a path does not have",
                ),
            },
            "schemas": schemas(),
        },
    })
}

// ---- requests -----------------------------------------------------------------------------------

fn increment() -> Value {
    let delta = json!({"name": "delta", "in": "query", "schema": schema("Delta"),
        "description": "The amount to add; here or in the body, not in both. 1 if in neither."});
    let returning = json!({"name": "return", "in": "query", "schema": {"const": "value"},
        "description": "Return the new value too; here or in the body, not in both."});
    operation(
        "increment",
        "Add to one counter",
        json!({
            "parameters":
                [delta, returning, parameter("exact"), parameter("token"), parameter("issued")],
            "requestBody": {"required": false, "content":
                {"application/json": {"schema": schema("IncrementBody")}}},
        }),
        write_ok(&[("application/json", schema("Applied")), ("text/plain", decimal())]),
        &[BODY, WRITE],
    )
}

fn increment_many() -> Value {
    let lines = "A line is `key` or `key<TAB>delta`, split at its last TAB if an integer follows; \
        anything else there that looks like a number is refused";
    operation(
        "incrementMany",
        "Add to many counters; each item succeeds or fails by itself",
        json!({
            "parameters": [parameter("token"), parameter("issued")],
            "requestBody": {"required": true, "content": {
                "application/json": {"schema": schema("IncrementManyBody")},
                "application/x-ndjson":
                    {"schema": {"type": "string", "description": "An Increment per line"}},
                "text/plain": {"schema": {"type": "string", "description": lines}},
            }},
        }),
        write_ok(&[("application/json", schema("Batch"))]),
        &[BODY, WRITE],
    )
}

/// The parameters of a read: how old its values may be.
fn read_parameters() -> Value {
    json!([
        {"name": "consistency", "in": "query",
            "schema": {"enum": ["linearizable", "bounded"], "default": "linearizable"}},
        {"name": "max_staleness_ms", "in": "query", "description": "Only with consistency=bounded",
            "schema": {"type": "integer", "minimum": 0, "maximum": i64::MAX, "default": 1000}},
        parameter("exact"),
    ])
}

fn read_one() -> Value {
    operation(
        "read",
        "Read one counter; one that was never touched is 0",
        json!({"parameters": read_parameters()}),
        ok(&[("application/json", schema("Value")), ("text/plain", decimal())]),
        &[READ],
    )
}

fn read_many() -> Value {
    operation(
        "readMany",
        "Read many counters, in the order of the keys",
        json!({"parameters": read_parameters(), "requestBody": {"required": true,
            "content": {"application/json": {"schema": schema("ReadManyBody")}}}}),
        ok(&[("application/json", schema("Values"))]),
        &[BODY, READ],
    )
}

fn delete() -> Value {
    operation(
        "delete",
        "Set one counter to 0 and return its last value",
        json!({"parameters": [parameter("exact"), parameter("token"), parameter("issued")]}),
        write_ok(&[("application/json", schema("Deleted")), ("text/plain", decimal())]),
        &[WRITE],
    )
}

fn page(id: &str, summary: &str, media: &str, schema: Value) -> Value {
    let get = operation(id, summary, json!({}), ok(&[(media, schema)]), &[]);
    json!({"head": head(&get), "get": get})
}

fn livez() -> Value {
    let mut page = page("livez", "Whether the process is alive", "text/plain", text_schema());
    page["options"] = probe(&page["get"]);
    page
}

fn readyz() -> Value {
    let summary = "Whether this gateway has started and is not stopping; if not, the reason";
    let mut page = page("readyz", summary, "text/plain", text_schema());
    let all = json!([{
        "name": "all",
        "in": "query",
        "allowEmptyValue": true,
        "schema": text_schema(),
        "description":
            "Strict: also whether this gateway is connected to the primary of every shard",
    }]);
    let not_ready = json!({"description": "Not ready: the reason",
        "content": {"text/plain": {"schema": text_schema()}}});
    (page["get"]["parameters"], page["get"]["responses"]["503"]) = (all, not_ready);
    page["head"] = head(&page["get"]);
    page["options"] = probe(&page["get"]);
    page
}

/// The same operation with OPTIONS, which HAProxy uses: its answer is the status alone. Problems
/// have a body.
fn probe(get: &Value) -> Value {
    let mut probe = get.clone();
    probe["operationId"] =
        json!(format!("{}Probe", get["operationId"].as_str().unwrap_or_default()));
    for status in ["200", "503"] {
        let response = probe["responses"].get_mut(status).and_then(Value::as_object_mut);
        response.map(|response| response.remove("content"));
    }
    probe
}

/// An operation. `more` has the parameters and the body, `kinds` the possible problems.
fn operation(id: &str, summary: &str, more: Value, ok: Value, kinds: &[&[Kind]]) -> Value {
    let mut responses = Map::from_iter([("200".to_owned(), ok)]);
    let kinds = [ANY, &kinds.concat()].concat();
    for kind in &kinds {
        let status = kind.status();
        let same: Vec<_> = kinds.iter().copied().filter(|kind| kind.status() == status).collect();
        responses.insert(status.as_str().to_owned(), problem_response(&same, ""));
    }
    let mut operation = json!({"operationId": id, "summary": summary, "responses": responses});
    for (name, value) in more.as_object().into_iter().flatten() {
        operation[name] = value.clone();
    }
    operation
}

/// The same operation with HEAD: no answer has a body.
fn head(get: &Value) -> Value {
    let mut head = get.clone();
    head["operationId"] = json!(format!("{}Head", get["operationId"].as_str().unwrap_or_default()));
    for (_, response) in head["responses"].as_object_mut().into_iter().flatten() {
        response.as_object_mut().map(|response| response.remove("content"));
    }
    head
}

fn parameter(name: &str) -> Value {
    json!({"$ref": format!("#/components/parameters/{name}")})
}

fn parameters() -> Value {
    json!({
        "namespace": {"name": "namespace", "in": "path", "required": true,
            "schema": {"type": "string",
                "pattern": format!("^[a-z0-9_.-]{{1,{NAMESPACE_BYTES_MAX}}}$")}},
        "key": {"name": "key", "in": "path", "required": true, "schema": schema("Key"),
            "description": "Any bytes, percent-encoded: `%2F` is a slash within the key. `.` and \
                `..` are keys."},
        "timeout": {"name": "Request-Timeout-Ms", "in": "header",
            "description": "The time for which the client waits for the outcome",
            "schema": {"type": "integer", "minimum": 1, "maximum": TIMEOUT_MS_MAX,
                "default": TIMEOUT_DEFAULT.as_millis() as u64}},
        "exact": {"name": "value", "in": "query", "schema": {"const": "string"},
            "description": "Every value as a string too, `value_string`: exact where numbers have \
                53 bits, as in JavaScript. On an increment only with return=value."},
        "token": {"name": "Idempotency-Key", "in": "header",
            "description": "A String of RFC 8941: the same request with the same key is applied \
                once, and answered as it was first",
            "schema": {"type": "string",
                "pattern": format!("^\"([ !#-\\[\\]-~]|\\\\[\"\\\\]){{1,{TOKEN_BYTES_MAX}}}\"$")}},
        "issued": {"name": "Idempotency-Issued-At", "in": "header",
            "description": "Only with Idempotency-Key: the time at which the request was made \
                first, in ms since 1970, the same each time; no more than 5 minutes ahead of the \
                gateway's clock",
            "schema": {"type": "integer", "minimum": 0, "maximum": i64::MAX}},
    })
}

// ---- answers ------------------------------------------------------------------------------------

fn ok(content: &[(&str, Value)]) -> Value {
    let content: Map<_, _> = content
        .iter()
        .map(|(media, schema)| ((*media).to_owned(), json!({"schema": schema})))
        .collect();
    json!({"description": "Success", "content": content})
}

/// The answer to a write.
fn write_ok(content: &[(&str, Value)]) -> Value {
    let mut response = ok(content);
    response["headers"] = json!({"Idempotent-Replayed": {"schema": {"const": "true"},
        "description":
            "The request was applied earlier with the same key; this is the answer of then"}});
    response
}

fn problem_response(kinds: &[Kind], description: &str) -> Value {
    let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
    let description =
        if description.is_empty() { names.join(", ") } else { description.to_owned() };
    let mut response = json!({
        "description": description,
        "content": {"application/problem+json": {"schema": schema("Problem")}},
    });
    if kinds.iter().any(|&kind| crate::problem::Problem::new(kind, "").is_retryable()) {
        response["headers"] = json!({"Retry-After": {"required": true,
            "description": "Whole seconds after which to try again",
            "schema": {"type": "integer", "minimum": 1}}});
    }
    if kinds.contains(&Kind::MethodNotAllowed) {
        response["headers"] = json!({"Allow": {"required": true, "schema": {"type": "string"}}});
    }
    response
}

// ---- schemas ------------------------------------------------------------------------------------

fn schema(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn text_schema() -> Value {
    json!({"type": "string"})
}

/// The body of an answer with `Accept: text/plain`.
fn decimal() -> Value {
    json!({"type": "string", "pattern": "^-?[0-9]+$"})
}

/// An object with these members, of which the optional ones end in `?`, and no others.
fn object<const N: usize>(members: [(&str, Value); N]) -> Value {
    let required: Vec<_> =
        members.iter().map(|(name, _)| *name).filter(|name| !name.ends_with('?')).collect();
    let properties: Map<_, _> = members
        .iter()
        .map(|(name, schema)| (name.trim_end_matches('?').to_owned(), schema.clone()))
        .collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

/// An object that names its key in one of two ways.
fn keyed(mut object: Value) -> Value {
    object["properties"]["key"] = schema("Key");
    object["properties"]["key_base64"] = schema("KeyBase64");
    object["oneOf"] = json!([{"required": ["key"]}, {"required": ["key_base64"]}]);
    object
}

fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

/// Base64 with its padding or without.
const BASE64_PATTERN: &str = concat!(
    "^([A-Za-z0-9+/]{4})*",
    "([A-Za-z0-9+/][AQgw](==)?|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=?)?$"
);

fn schemas() -> Value {
    let integer = || json!({"type": "integer"});
    let value = || schema("Number");
    let exact = || schema("NumberString");
    let count = || json!({"type": "integer", "minimum": 0});
    let string = || json!({"type": "string"});
    let problems: Vec<_> =
        Kind::ALL.iter().map(|kind| format!("{TYPE_PREFIX}{}", kind.name())).collect();
    let outcomes = [Outcome::NotApplied, Outcome::Unknown].map(outcome_name);
    json!({
        "Key": {"type": "string", "minLength": 1, "maxLength": KEY_BYTES_MAX,
            "description": "1 to 1,024 bytes of UTF-8"},
        "KeyBase64": {"type": "string", "contentEncoding": "base64", "pattern": BASE64_PATTERN,
            "minLength": 2,
            "description": "A key of any bytes. Answers use it for keys that are not UTF-8."},
        "Delta": {"type": "integer", "minimum": i64::MIN, "maximum": i64::MAX, "default": 1},
        // 2^127 is exact as a double, 2^127 - 1 is not.
        "Number": {"type": "integer",
            "minimum": i128::MIN as f64, "exclusiveMaximum": i128::MAX as f64,
            "description": "128 bits with a sign: it may not fit int64, nor a double exactly. See \
                value=string."},
        "NumberString": {"type": "string", "pattern": "^-?[0-9]{1,39}$",
            "description": "The same number in decimal, if value=string was requested"},
        "IncrementBody": object([
            ("delta?", schema("Delta")),
            ("return?", json!({"const": "value"})),
        ]),
        "Increment": keyed(object([("delta?", schema("Delta"))])),
        "IncrementManyBody": object([("increments", json!({"type": "array",
            "items": schema("Increment"), "maxItems": ITEMS_MAX}))]),
        "ReadManyBody": object([("keys", json!({"type": "array", "maxItems": ITEMS_MAX,
            "items": {"oneOf": [schema("Key"), keyed(object([]))]}}))]),
        "Applied": keyed(object([
            ("namespace", string()), ("applied", schema("Delta")), ("value?", value()),
            ("value_string?", exact()),
        ])),
        "Value": keyed(object([
            ("namespace", string()), ("value", value()), ("value_string?", exact()),
            ("staleness_ms?", count()),
        ])),
        "Deleted": keyed(object([("value", value()), ("value_string?", exact())])),
        "Values": object([
            ("counters", list(keyed(object([("value", value()), ("value_string?", exact())])))),
            ("staleness_ms?", count()),
        ]),
        "Batch": object([
            ("accepted", count()), ("applied", count()), ("failed", list(schema("FailedItem"))),
        ]),
        "ProblemType": {"type": "string", "enum": problems},
        "Outcome": {"type": "string", "enum": outcomes},
        "FailedItem": object([
            ("index", count()), ("key?", schema("Key")), ("key_base64?", schema("KeyBase64")),
            ("type", schema("ProblemType")), ("outcome", schema("Outcome")), ("detail", string()),
            ("field?", string()),
        ]),
        "Problem": object([
            ("type", schema("ProblemType")), ("title", string()), ("status", integer()),
            ("outcome", schema("Outcome")), ("detail", string()), ("field?", string()),
            // The members below: of a batch whose items all failed for the same reason.
            ("accepted?", count()), ("applied?", json!({"const": 0})),
            ("failed?", list(schema("FailedItem"))),
        ]),
        "Cluster": cluster(),
    })
}

/// The page about the cluster. Its objects may get more members.
fn cluster() -> Value {
    let grows = |mut object: Value| {
        object["additionalProperties"] = json!(true);
        object
    };
    let count = || json!({"type": "integer", "minimum": 0});
    let string = || json!({"type": "string"});
    let replica = grows(object([
        ("node", string()),
        ("last", count()),
        ("applied", count()),
        ("digest", json!({"type": "string", "pattern": "^[0-9a-f]{32}$"})),
        ("digest_at", count()),
    ]));
    let standings = json!(["silent", "disk-full", "no-copy", "lost-data", "copying", "behind"]);
    let records = grows(object([("count", count()), ("bytes", count()), ("bytes_max", count())]));
    let hindrance = grows(object([("node", string()), ("standing", json!({"enum": standings}))]));
    let shard = grows(object([
        ("id", count()),
        ("slots", json!({"type": "array", "items": count(), "minItems": 2, "maxItems": 2})),
        ("epoch", count()),
        ("version", count()),
        ("state", json!({"enum": ["open", "frozen", "no-primary"]})),
        ("primary", string()),
        ("isr", list(string())),
        ("learners", list(string())),
        ("hindered_by", list(hindrance)),
        ("records?", records),
        ("replicas", list(replica)),
        ("digests_agree", json!({"type": "boolean"})),
    ]));
    let node = grows(object([
        ("name", string()),
        ("uuid", string()),
        ("boot", count()),
        ("zone", string()),
        ("address", string()),
        ("state", json!({"enum": ["up", "down", "draining", "suspect", "unknown"]})),
        ("disk_full", json!({"type": "boolean"})),
    ]));
    let given_up = grows(object([
        ("node", string()),
        ("uuid", string()),
        ("last", json!({"type": ["integer", "null"], "minimum": 0})),
    ]));
    let loss = grows(object([
        ("shard", count()),
        ("epoch", count()),
        ("primary", string()),
        ("last", count()),
        ("given_up", list(given_up)),
        ("by", json!({"type": ["string", "null"]})),
        ("at_ms", json!({"type": ["integer", "null"], "minimum": 0})),
    ]));
    let idempotency = grows(object([("window_ms", count()), ("bytes_max", count())]));
    grows(object([
        ("cluster", string()),
        ("incarnation", json!({"type": ["integer", "null"]})),
        ("idempotency?", idempotency),
        ("nodes", list(node)),
        ("shards", list(shard)),
        ("losses", list(loss)),
    ]))
}
