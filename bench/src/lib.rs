//! Generates load on a running cluster over HTTP, and measures its cost.
//!
//! [`load`] is a closed loop over the connections of the crate `client`, [`histogram`] records the
//! latencies, and [`cpu`] reads the CPU time of each role from `/proc`.
//!
//! A closed loop hides the waiting time of the requests that it did not send while it waited for a
//! response (coordinated omission). So its p99 is the latency of *these* clients, not the latency
//! of users at a fixed arrival rate.

pub mod cpu;
pub mod histogram;
pub mod load;
