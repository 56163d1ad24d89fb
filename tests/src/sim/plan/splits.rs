//! The times at which an operator splits shards.

use std::sync::OnceLock;

use super::super::rng::Rng;

/// Returns whether shards are split in every run: `DKC_SIM_SPLITS=1`, to explore splits.
fn splits_always() -> bool {
    static ALWAYS: OnceLock<bool> = OnceLock::new();
    *ALWAYS.get_or_init(|| std::env::var_os("DKC_SIM_SPLITS").is_some())
}

/// The splits of a run. They have a stream of their own, so that runs without a split are as they
/// were before there were any.
#[derive(Clone, Debug)]
pub struct SplitPlan {
    /// The interval between two attempts; `None`: this run has none.
    pub every: Option<u64>,
    /// The number of splits that are wanted at most.
    pub most: u64,
    pub rng: Rng,
}

impl SplitPlan {
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed.rotate_left(37) ^ 0x5B11_7000_5EED);
        let every = rng.between(50_000, 800_000);
        let most = rng.between(1, 5);
        let splits = rng.percent(20) || splits_always();
        Self { every: splits.then_some(every), most, rng }
    }
}
