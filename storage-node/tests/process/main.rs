//! Real storage nodes: processes with an etcd, RocksDB and sockets of their own. The test takes the
//! part of the coordinator, by writing records, and of a gateway worker, over gRPC.
//!
//! A node is this test binary, started again to run [`node_process`] alone: `storage_node::run` is
//! tested with nothing around it.

#[path = "../../../metastore/tests/contract/calls.rs"]
mod calls;
mod damage;
mod driver;
#[path = "../../../metastore/tests/contract/etcd.rs"]
mod etcd;
#[path = "../../../telemetry/src/exposition.rs"]
mod exposition;
mod harness;
mod identity;
mod outside;
#[allow(dead_code, unreachable_pub, reason = "shared with chaos, which uses all of it")]
#[path = "../../../tests/src/chaos/power.rs"]
mod power;
mod replication;
mod serving;
mod worker;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The node that a test has started; nothing when the tests are run.
#[test]
fn node_process() {
    if std::env::var_os(harness::IS_NODE).is_some() {
        std::process::exit(harness::node_main().into());
    }
}
