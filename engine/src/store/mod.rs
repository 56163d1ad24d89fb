//! What is on disk: bytes in, bytes out, so that the simulator tears the real bytes.
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
pub(crate) mod testing {
    //! Random numbers for tests: a seed gives the same run everywhere.

    /// splitmix64.
    pub(crate) struct Random(u64);

    impl Random {
        pub(crate) fn new(seed: u64) -> Self {
            Self(seed)
        }

        pub(crate) fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }

        /// Below `end`, which is not 0.
        pub(crate) fn below(&mut self, end: u64) -> u64 {
            self.next() % end
        }
    }
}
