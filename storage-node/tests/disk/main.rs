//! The disk of a storage node on real files: what is durable stays, wherever the process dies.

mod client;
mod copies;
mod kills;
mod ledger;
mod opening;
mod pair;
mod running;
mod scrubbing;
mod torn;
