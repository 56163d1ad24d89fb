//! Load on a running cluster over HTTP, and what that load costs.
//!
//! [`http`] is a client that does one thing more than usual: it tells a request of which not one
//! byte left this process from one whose fate nobody knows. `dkc count` and the other client
//! commands stand on it too. [`load`] is a closed loop over it, [`histogram`] keeps the latencies
//! and [`cpu`] reads from `/proc` what each role spent.
//!
//! A closed loop hides the wait of requests it did not send while it waited for an answer. So its
//! p99 is what *these* clients saw, never what users at a fixed arrival rate would see.

pub mod cpu;
pub mod histogram;
pub mod http;
pub mod load;
