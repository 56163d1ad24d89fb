//! The use that a seed makes of the freedom of drivers (docs/design.md#order-of-effects).

use super::super::draws::Draws;
use super::super::rng::Rng;

/// The use of that freedom in a run. Its random stream is separate from the others, so that seeds
/// without it keep their runs.
#[derive(Clone, Debug)]
pub struct ReorderPlan {
    pub on: bool,
    /// The percentage of effects and answers that are late.
    pub(super) late_percent: u64,
    /// The longest lateness of most of them.
    pub(super) late_max: u64,
    pub rng: Rng,
}

/// This stream leaves the recorded seeds of rare planted bugs as they were before there was one.
const STREAM: u64 = 0x5EED_3EC5;

/// The longest lateness of the others, if anything waits for its turn behind them.
const VERY_LATE: u64 = 100_000;
/// The same if nothing does.
const VERY_LATE_ALONE: u64 = 1_000_000;

impl ReorderPlan {
    pub fn from_seed(seed: u64, draws: &mut Draws) -> Self {
        let mut rng = Rng::new(seed.rotate_left(37) ^ STREAM);
        let on = rng.below(3) == 0;
        // Often and by little, or seldom and by much: a run in which all is slow is not busy.
        let (late_percent, late_max) = [(30, 300), (10, 3_000), (3, 30_000)][rng.index(3)];
        draws.note("reorder", on.into(), 0);
        draws.note("reorder_late_us", if on { late_max } else { 0 }, 0);
        Self { on, late_percent, late_max, rng }
    }

    /// The lateness of the next effect or answer; `None`: it is not late. `alone`: it has no turn
    /// in a stream.
    pub fn lateness(&mut self, alone: bool) -> Option<u64> {
        if !self.on || !self.rng.percent(self.late_percent) {
            return None;
        }
        let most = match self.rng.below(200) {
            0 if alone => VERY_LATE_ALONE,
            0 => VERY_LATE,
            _ => self.late_max,
        };
        Some(self.rng.between(1, most))
    }

    /// Returns whether a query that may stay unanswered stays so.
    pub fn is_unanswered(&mut self) -> bool {
        self.on && self.rng.percent(2)
    }
}
