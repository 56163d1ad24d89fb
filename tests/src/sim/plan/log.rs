//! The sizes of the log.

use engine::store::log::group::SEGMENT_BYTES;
use engine::store::log::index::BLOCK_BYTES;

use super::super::draws::Draws;

/// Sizes as a seed draws them.
#[derive(Clone, Copy, Debug)]
pub struct LogSizes {
    /// The size at which a segment ends; 0: each group has a segment of its own.
    pub segment_bytes: usize,
    pub block_bytes: usize,
    pub keep_bytes: usize,
    /// Room beyond what is kept, for a few groups; without it nothing can begin.
    pub slack_bytes: usize,
}

impl Default for LogSizes {
    fn default() -> Self {
        Self {
            segment_bytes: SEGMENT_BYTES,
            block_bytes: BLOCK_BYTES,
            keep_bytes: 1 << 30,
            slack_bytes: 8 << 10,
        }
    }
}

impl LogSizes {
    pub fn draw(draws: &mut Draws) -> Self {
        let shipped = Self::default();
        let drawn = draws.log_size("segment_bytes", 64, shipped.segment_bytes);
        Self {
            segment_bytes: if drawn < 128 { 0 } else { drawn },
            block_bytes: draws.size("block_bytes", 1, shipped.block_bytes),
            keep_bytes: draws.log_size("log_keep_bytes", 1, shipped.keep_bytes),
            slack_bytes: shipped.slack_bytes,
        }
    }

    /// The room beyond what is kept; as shipped, as much again as is kept.
    pub fn spare_bytes(self) -> usize {
        self.keep_bytes.max(self.slack_bytes)
    }
}
