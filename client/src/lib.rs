//! A client of the HTTP API (docs/http.md) that never counts twice.
//!
//! [`HttpConnection`] distinguishes a request of which not one byte left this process from a
//! request whose outcome is unknown. [`failure`] and [`failed_items`] distinguish the same for an
//! answer, so that together they decide what may be retried. [`Gateways`] applies both to requests
//! to a cluster with several gateways. `dkc count`, `dkc incr`, `dkc bench` and the other commands
//! are built on them.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use client::{CallFailure, Counter, Gateways, IdempotencyHeaders, Url, fresh_id, parse};
//!
//! # async fn count() -> Result<(), Box<dyn std::error::Error>> {
//! let urls = [Url::parse("http://10.0.0.1:8080")?, Url::parse("http://10.0.0.2:8080")?];
//! let mut gateways = Gateways::new(&urls);
//!
//! // The token makes the increment safe to send again: it is applied once, by whichever gateway.
//! let token = IdempotencyHeaders { key: fresh_id()?, issued_at_ms: None };
//! let path = "/v1/counters/likes/video-1/increment";
//! let body = br#"{"delta": 1, "return": "value"}"#;
//! match gateways.write(path, &token, body, Duration::from_secs(30)).await {
//!     Ok(answer) => println!("{} likes", parse::<Counter>(&answer)?.value),
//!     Err(CallFailure::Unknown(why)) => println!("it may have been counted: {why}"),
//!     Err(failure) => println!("it was not counted: {failure}"),
//! }
//! # Ok(())
//! # }
//! ```

mod answer;
mod gateways;
mod http;

pub use answer::{CallFailure, Counter, KeyField, failed_items, failure, parse};
pub use gateways::{DEADLINE, GRACE, Gateways, fresh_id, unanswered};
pub use http::{
    CallError, HttpConnection, HttpRequest, HttpResponse, IdempotencyHeaders, Media, Url,
    percent_encode,
};
