//! Dropping idempotency records when their time is over.
//!
//! Shard time is the only clock that counts. It moves with entries, so a shard without writes would
//! keep its records for ever. While it has any, its primary orders an `expire` once in a bucket's
//! length: that drops what may be dropped, or otherwise only moves the time. The effect is decided
//! where it is applied.

use crate::entry::Body;
use crate::ids::ShardId;
use crate::node::{Effect, Node};
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::primary::Primary;

impl Node {
    pub(super) fn expire_if_due(&mut self, effects: &mut Vec<Effect>) {
        if self.now < self.next_expire {
            return;
        }
        let limits = self.settings.limits();
        self.next_expire = self.now.plus_ms(limits.bucket_ms());
        let led = self.replicas.values().filter(|replica| self.takes_expiry(replica));
        let due: Vec<(ShardId, Vec<u64>)> = led
            .map(|replica| {
                let buckets = replica.state.tokens.to_expire(&limits, replica.log.last().time);
                (replica.shard, buckets)
            })
            .collect();
        for (shard, buckets) in due {
            for bucket in buckets {
                let seq = self.order(shard, Body::ExpireTokens { bucket }, effects);
                let primary = self.replicas.get_mut(&shard).and_then(Replica::primary_mut);
                if let Some((primary, seq)) = primary.zip(seq) {
                    primary.expiry = seq;
                }
            }
        }
    }

    /// Returns whether an `expire` may be ordered for the shard: the one before is applied. Until
    /// then the same one would be ordered again, and a shard that commits slower than that would
    /// never finish.
    fn takes_expiry(&self, replica: &Replica) -> bool {
        let again = Planted::ExpiryPilesUp.is_in(self.settings.planted);
        let takes = |primary: &Primary| {
            let done = again || replica.state.applied.seq >= primary.expiry;
            primary.active && !primary.frozen && primary.stepping_down.is_none() && done
        };
        replica.trust.is_working() && replica.primary().is_some_and(takes)
    }
}
