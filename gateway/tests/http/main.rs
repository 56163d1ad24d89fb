//! Tests of a real gateway with real sockets and a real etcd, and with fake nodes that count in a
//! map.

#[path = "../../../metastore/tests/contract/calls.rs"]
mod calls;
mod client;
mod cluster;
#[path = "../../../metastore/tests/contract/etcd.rs"]
mod etcd;
#[path = "../../../telemetry/src/exposition.rs"]
mod exposition;
mod node;

mod crowd;
mod failures;
mod life;
mod overload;
mod pages;
mod relayed;
mod speed;
mod table;
mod wire;
