//! Dropping idempotency records when their time is over.
//!
//! Shard time is the only clock that counts. It moves with entries, so a shard without writes would
//! keep its records for ever. While it has any, its primary orders an `expire` once in a bucket's
//! length: that drops what may be dropped, or otherwise only moves the time. The effect is decided
//! where it is applied.

use crate::entry::Body;
use crate::ids::ShardId;
use crate::node::peers::health::PeerHealth;
use crate::node::retention::Retention;
use crate::node::shared::NodeTurn;
use crate::planted::Planted;
use crate::replica::Replica;
use crate::replica::primary::Primary;

impl Retention {
    /// Orders what drops old records, once in a bucket's length.
    pub(in crate::node) fn expire_if_due(&mut self, turn: &mut NodeTurn<'_>, peers: &PeerHealth) {
        if turn.now < self.next_expire {
            return;
        }
        let limits = turn.settings.limits();
        self.next_expire = turn.now.plus_ms(limits.bucket_ms());
        let led = turn.shards.iter().filter(|replica| takes_expiry(turn, replica));
        let due: Vec<(ShardId, Vec<u64>)> = led
            .map(|replica| {
                let buckets = replica.state.tokens.to_expire(&limits, replica.log.last().time);
                (replica.shard, buckets)
            })
            .collect();
        for (shard, buckets) in due {
            for bucket in buckets {
                let seq = turn.order(peers, shard, Body::ExpireTokens { bucket });
                if let Some((primary, seq)) = turn.shards.primary_mut(shard).zip(seq) {
                    primary.expiry = seq;
                }
            }
        }
    }
}

/// Returns whether an `expire` may be ordered for the shard: the one before is applied. Until
/// then the same one would be ordered again, and a shard that commits slower than that would
/// never finish.
fn takes_expiry(turn: &NodeTurn<'_>, replica: &Replica) -> bool {
    let again = turn.planted(Planted::ExpiryPilesUp);
    let takes = |primary: &Primary| {
        let done = again || replica.state.applied.seq >= primary.expiry;
        primary.active && !primary.frozen && primary.stepping_down.is_none() && done
    };
    replica.trust.is_working() && replica.primary().is_some_and(takes)
}
