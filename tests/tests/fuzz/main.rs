//! Bytes that reach the engine from outside (sockets, disk, etcd), made at random and by damaging
//! valid ones.
//!
//! Three promises: what a codec wrote reads back the same; no bytes make a decoder panic, and what
//! it does accept it writes and reads back the same; and applying a log has the same result as a
//! plain map, under one token only once. Frames on the wire are in `proto/tests/crossing.rs`, HTTP
//! bodies in `gateway/src/request/fuzz.rs`.
//!
//! The cases are the same in every run, so that `./test` is reproducible; `PROPTEST_RNG_SEED=N
//! PROPTEST_CASES=M` explores others, as `./test --full` does. A failure prints the smallest input
//! that shows it.

mod apply;
mod bytes;
mod codecs;
mod log;
mod tokens;
mod values;

use proptest::test_runner::{Config, RngSeed};

/// The number of cases, and their seed.
fn config() -> Config {
    let mut config = Config { failure_persistence: None, ..Config::default() };
    if matches!(config.rng_seed, RngSeed::Random) {
        config.rng_seed = RngSeed::Fixed(1);
    }
    config
}
