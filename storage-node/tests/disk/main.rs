//! The disk of a storage node on real files: what is durable stays, wherever the process dies.

mod client;
mod copies;
mod kills;
mod ledger;
mod opening;
mod pair;
#[allow(unreachable_pub, reason = "shared with chaos")]
#[path = "../../../tests/src/chaos/power.rs"]
mod power;
mod running;
mod scrubbing;
mod shortages;
mod torn;
