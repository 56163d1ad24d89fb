//! The choices of a seed about clients with tokens.

use engine::shard::idempotency::TokenSettings;

use super::super::rng::Rng;

/// The choices of a seed about tokens.
#[derive(Clone, Debug)]
pub struct TokenPlan {
    pub clients: usize,
    pub settings: TokenSettings,
    /// The number of counters of a request; mostly few, otherwise more than one message holds.
    pub counters: u64,
    /// Tokens come fast, so that one namespace takes all the room for records.
    pub hurry: bool,
    pub rng: Rng,
}

impl TokenPlan {
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed.rotate_left(16) ^ 0x01DE_4907_37C7);
        let short = rng.percent(50);
        let tight = rng.percent(25);
        Self {
            clients: if rng.percent(70) { rng.between(1, 4) as usize } else { 0 },
            settings: TokenSettings {
                window_ms: if short { rng.between(300, 3_000) } else { 3_600_000 },
                buckets: rng.between(2, 32) as u32,
                // Room for a few records of each shard, or for all.
                bytes_max: if tight { rng.between(300, 9_000) } else { 8 << 30 },
                namespaces_max: if rng.percent(20) { rng.between(1, 2) as u32 } else { 64 },
            },
            counters: if rng.percent(15) { rng.between(6, 80) } else { rng.between(2, 5) },
            hurry: tight && rng.percent(60),
            rng,
        }
    }

    /// The time for which a report of shard time is used: far below the window.
    pub fn time_valid_ms(&self) -> u64 {
        (self.settings.window_ms / 8).min(1_000)
    }

    /// Returns whether records are dropped within a run.
    pub fn is_short(&self) -> bool {
        self.settings.window_ms < 3_600_000
    }
}
