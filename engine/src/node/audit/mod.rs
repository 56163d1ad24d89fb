//! Audits: whether the copies of a shard are equal, and whether this disk contains what was written
//! to it.
//!
//! ```text
//!   follower ── digests, every 1,024 entries, at barriers, at rest ──▶ primary ──▶ mark_corrupt
//!   Scrub ──▶ driver reads every block ──▶ Scrubbed: rows, record ──▶ compare with the flush
//! ```
//!
//! **Which side is right.** Replicas with the same log have the same state, so of copies that
//! differ at one seq the minority is wrong. Without a majority (mostly with two copies) the primary
//! scrubs its own disk: if the scrub finds damage, the primary's copy is wrong; if not, the other
//! one is, since the answers to clients came from the primary. A wrong copy takes no more entries,
//! serves no reads, and is replaced by a snapshot; a wrong primary asks for its replacement.
//! Nothing is decided while other followers have yet to report their digest.
//!
//! A digest is kept up to date from the *log*, so corruption of a row does not change it. The scrub
//! finds that. Corruption that a checksum shows never comes here: it ends the process.

mod digests;
mod scrub;

use crate::ids::ShardId;
use crate::node::peers::Peers;
use crate::node::shared::NodeTurn;

pub(super) use digests::{on_marked_corrupt, unsent_digests};

#[derive(Clone, Debug, Default)]
pub(super) struct Audit {
    scrubbing: scrub::Scrubbing,
    digest_mismatches: u64,
}

impl Audit {
    /// Returns the number of follower digests that differed from this node's own at the same seq.
    pub(in crate::node) fn digest_mismatches(&self) -> u64 {
        self.digest_mismatches
    }
}

/// Stops this node's own copy, which is wrong: it takes no entries and serves no reads. A primary
/// asks for its replacement; a follower reports the damage by its next reject, and the announcement
/// causes one even if nothing is written.
fn on_own_damage(turn: &mut NodeTurn<'_>, peers: &mut Peers, shard: ShardId, why: &'static str) {
    let Some((replica, mut replica_turn)) = turn.replica_in_turn(shard) else { return };
    replica.stop(&mut replica_turn, why);
    turn.shards.to_advance.insert(shard);
    turn.shards.to_report = true;
    peers.announce_copy(turn, shard);
}
