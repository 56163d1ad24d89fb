//! Parts of reads that wait to be sent, by who is to be asked.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::bounded::Bound;
use crate::ids::{Now, ShardId, StoreId};
use crate::key::CounterKey;
use crate::router::Window;

/// Who is asked for a shard's values: its primary, or a backup.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Way {
    pub shard: ShardId,
    pub backup: Option<StoreId>,
}

impl Way {
    pub(super) fn primary(shard: ShardId) -> Self {
        Self { shard, backup: None }
    }

    /// Everybody who may be asked for a shard.
    pub(super) fn all(shard: ShardId) -> RangeInclusive<Self> {
        Self::primary(shard)..=Self { shard, backup: Some(StoreId(u128::MAX)) }
    }
}

/// What one request asks of one shard.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    pub indexes: Vec<u32>,
    pub keys: Vec<CounterKey>,
    /// None: linearizable.
    pub bound: Option<Bound>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    /// By request.
    pub waiting: BTreeMap<u64, Part>,
    /// Messages without an answer, and when they were sent.
    pub on_the_way: Vec<(u64, Now)>,
    pub retry_at: Now,
    pub refusals: u32,
    /// A backup that lately could not answer: others are asked first.
    pub shunned_until: Now,
}

impl Queue {
    pub(super) fn blocked_until(&self, now: Now, window: Window) -> Option<Now> {
        if self.retry_at > now {
            return Some(self.retry_at);
        }
        let ends = self.on_the_way.iter().map(|&(_, sent)| Now(sent.0.saturating_add(window.us)));
        let counting: Vec<Now> = ends.filter(|&end| end > now).collect();
        counting.iter().min().copied().filter(|_| counting.len() >= window.messages)
    }

    /// The parts of one message, closed at so many bytes of names, and the age that all of them are content with.
    pub(super) fn take(&mut self, bytes_max: usize) -> (Vec<(u64, Part)>, Option<u64>) {
        let max_staleness_ms =
            |part: &Part| part.bound.as_ref().map(|bound| bound.max_staleness_ms);
        let bound = self.waiting.first_key_value().and_then(|(_, part)| max_staleness_ms(part));
        let mut bytes = 0;
        let fits = |_: &u64, part: &mut Part| {
            let fits = bytes < bytes_max && max_staleness_ms(part) == bound;
            if fits {
                bytes += part.keys.iter().map(|key| key.name().len()).sum::<usize>();
            }
            fits
        };
        (self.waiting.extract_if(.., fits).collect(), bound)
    }
}
