//! The signals that every role gives of itself: its log, its readiness, its metrics.
//!
//! This crate knows nothing of counters. A role sets up its log with [`logs`], reports by
//! [`Health`] what it waits for, and puts its metrics into a [`Metrics`]; [`serve`] answers
//! `/livez`, `/readyz` and `/metrics` on an address of their own, and [`grpc`] serves health and
//! reflection on the role's gRPC port. [`files`] keeps connections from using up the files that
//! everything else needs, and [`CriticalTasks`] keeps a process from living on without a task that
//! it needs.

mod clock;
mod critical_tasks;
#[cfg(test)]
mod exposition;
pub mod files;
mod grpc;
mod health;
mod log;
mod metrics;
mod server;

pub use clock::{Clock, wall_clock_ms};
pub use critical_tasks::{CriticalTasks, TaskFailures, critical_tasks};
pub use grpc::grpc;
pub use health::Health;
pub use log::{LogFormat, LogGuard, LogLevel, LogOptions, logs};
pub use metrics::{Metrics, metric};
pub use prometheus_client;
pub use server::{TextPage, page, serve};
