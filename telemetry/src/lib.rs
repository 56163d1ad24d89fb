//! What every role shows of itself: its log, whether it is ready, its metrics.
//!
//! Knows nothing of counters. A role sets up its log with [`logs`], says by [`Health`] what it still waits for, and puts
//! its metrics into a [`Metrics`]; [`serve`] answers `/livez`, `/readyz` and `/metrics` on an address of their own, and
//! [`grpc`] says the same, and what is served there, on its gRPC port. [`files`] keeps connections from using up what else
//! needs a file, and [`Vital`] a process from living on without a task that it needs.

mod clock;
pub mod exposition;
pub mod files;
mod grpc;
mod health;
mod log;
mod metrics;
mod server;
mod vital;

pub use clock::Clock;
pub use grpc::grpc;
pub use health::Health;
pub use log::{Format, Level, Log, LogOptions, logs};
pub use metrics::Metrics;
pub use prometheus_client;
pub use server::{Page, page, serve};
pub use vital::{Failures, Vital, vital};
