//! Dropping idempotency records when their time is over (DESIGN §7).
//!
//! Shard time is the only clock that counts: it moves with entries, so a shard that nobody writes to
//! would keep its records for ever. While it has any, its primary orders an `expire` once in a
//! bucket's length: that drops what may be dropped, or else only moves the time. Whether it has an
//! effect is judged where it is applied.

use crate::entry::Body;
use crate::ids::ShardId;
use crate::node::{Effect, Node};

impl Node {
    pub(super) fn expire_if_due(&mut self, effects: &mut Vec<Effect>) {
        if self.now < self.next_expire {
            return;
        }
        let limits = self.settings.limits();
        self.next_expire = self.now.plus_ms(limits.bucket_ms());
        let led = self.replicas.values().filter(|replica| {
            let takes = |primary: &crate::replica::primary::Primary| {
                primary.active && !primary.frozen && primary.stepping_down.is_none()
            };
            replica.trust.is_working() && replica.primary().is_some_and(takes)
        });
        let due: Vec<(ShardId, Vec<u64>)> = led
            .map(|replica| {
                let buckets = replica.state.tokens.to_expire(&limits, replica.log.last().time);
                (replica.shard, buckets)
            })
            .collect();
        for (shard, buckets) in due {
            for bucket in buckets {
                self.order(shard, Body::Expire { bucket }, effects);
            }
        }
    }
}
