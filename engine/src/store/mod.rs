//! The formats on disk: bytes in, bytes out, so that the simulator tears the real bytes.
//!
//! Two things are on disk: the log ([`log`], append-only segment files) and the state ([`layout`],
//! rows of one RocksDB column family, changed only by ingesting sorted files). Committed changes
//! gather in the counter [`table`] between two flushes. [`recovery`] = shard records from the
//! state, then replay of the log above them.

pub mod layout;
pub mod log;
pub mod recovery;
pub mod table;

#[cfg(test)]
pub(crate) mod testing;
