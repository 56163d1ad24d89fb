//! The leaps of time that a seed makes.

use super::super::draws::Draws;

/// The times and lengths of the leaps.
#[derive(Clone, Debug, Default)]
pub struct LeapPlan {
    pub all: Vec<(u64, u64)>,
}

impl LeapPlan {
    pub fn draw(draws: &mut Draws, until: u64) -> Self {
        let count = if draws.rng.percent(20) { draws.rng.between(1, 2) } else { 0 };
        let leap = |_| {
            let at = draws.rng.between(500_000, until);
            (at, draws.log_uniform(1_000_000, 3 * 24 * 3_600_000_000))
        };
        let all: Vec<_> = (0..count).map(leap).collect();
        let far = all.iter().map(|(_, far)| far / 1_000).max().unwrap_or(0);
        draws.note("leap_ms", far, 0);
        Self { all }
    }
}
