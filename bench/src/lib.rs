//! Generates load on a running cluster, or on what others would use instead, and measures its
//! cost.
//!
//! [`load`] runs clients of any kind in a closed or an open loop: [`dkc`] over HTTP, [`redis`] over
//! RESP, [`etcd`] over its JSON gateway. [`keys`] chooses the counters, [`histogram`] records the
//! latencies. [`cpu`] and [`memory`] read what the processes used from `/proc`, [`metrics`] what
//! they counted, and [`disk`] what they wrote. [`hello`] and [`fsync`] are the yardsticks of a
//! machine: a server without a service, and three disk writers at once. [`chart`] draws results.

pub mod chart;
pub mod cpu;
pub mod disk;
pub mod dkc;
pub mod etcd;
pub mod fsync;
pub mod hello;
pub mod histogram;
pub mod keys;
pub mod load;
pub mod memory;
pub mod metrics;
pub mod redis;
pub mod schedule;
