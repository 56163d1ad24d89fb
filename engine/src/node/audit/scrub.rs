//! Scrubs: everything on the disk is read, and compared with what was written to it.

use std::collections::BTreeSet;

use crate::ids::{Now, ShardId, Slots, TimeMs};
use crate::message::ScrubStatus;
use crate::node::audit::digests::mark_corrupt;
use crate::node::audit::{Audit, on_own_damage};
use crate::node::event::{AuditFinding, Effect, ScrubbedShard};
use crate::node::peers::Peers;
use crate::node::settings::Settings;
use crate::node::shared::NodeTurn;

/// The scrub in flight, the next one, and the result of the last one.
#[derive(Clone, Debug, Default)]
pub(super) struct Scrubbing {
    in_flight: Option<(u64, BTreeSet<ShardId>)>,
    /// The next scrub; without shards in it: of everything.
    wanted: Option<ScrubRequest>,
    next: Option<Now>,
    status: ScrubStatus,
    /// The number of scrubs that have ended, and of copies that they found damaged.
    ended: u64,
    damages: u64,
}

#[derive(Clone, Debug)]
struct ScrubRequest {
    shards: BTreeSet<ShardId>,
    bytes_per_s: u64,
}

impl Audit {
    /// Requests a scrub of these shards, or of all shards on this node if none is named, to begin
    /// when the scrub in flight has ended.
    pub(in crate::node) fn request_scrub(
        &mut self,
        settings: &Settings,
        shards: impl IntoIterator<Item = ShardId>,
        bytes_per_s: u64,
    ) {
        let shards: BTreeSet<ShardId> = shards.into_iter().collect();
        let bytes_per_s = if bytes_per_s > 0 { bytes_per_s } else { settings.scrub_bytes_per_s };
        match &mut self.scrubbing.wanted {
            Some(wanted) if !wanted.shards.is_empty() && !shards.is_empty() => {
                wanted.shards.extend(shards);
            }
            Some(wanted) => wanted.shards.clear(),
            none => *none = Some(ScrubRequest { shards, bytes_per_s }),
        }
    }

    pub(in crate::node) fn scrub_if_due(&mut self, turn: &mut NodeTurn<'_>) {
        if let Some(every_ms) = turn.settings.scrub_every_ms {
            // The first one comes sooner: a node that is restarted every day is scrubbed, too.
            let next = *self.scrubbing.next.get_or_insert(turn.now.plus_ms(every_ms / 8));
            if turn.now >= next {
                self.scrubbing.next = Some(turn.now.plus_ms(every_ms));
                self.request_scrub(turn.settings, [], 0);
            }
        }
        if self.scrubbing.in_flight.is_some() {
            return;
        }
        let Some(ScrubRequest { shards, bytes_per_s }) = self.scrubbing.wanted.take() else {
            return;
        };
        let scrub = turn.fresh_id();
        let held = turn.shards.iter().filter(|replica| shards.contains(&replica.shard));
        let slots: Vec<Slots> = held.map(|replica| replica.slots).collect();
        self.scrubbing.in_flight = Some((scrub, shards));
        self.scrubbing.status.running = true;
        turn.effects.push(Effect::Scrub { scrub, shards: slots, bytes_per_s });
    }

    pub(in crate::node) fn on_scrubbed(
        &mut self,
        turn: &mut NodeTurn<'_>,
        peers: &mut Peers,
        scrub: u64,
        found: Vec<ScrubbedShard>,
    ) {
        let Some((_, asked)) = self.scrubbing.in_flight.take_if(|(number, _)| *number == scrub)
        else {
            return;
        };
        let mut damaged = Vec::new();
        for on_disk in &found {
            if let Some(why) = damage_of(turn, on_disk) {
                damaged.push(on_disk.point.shard);
                on_own_damage(turn, peers, on_disk.point.shard, why);
            }
        }
        let held: Vec<ShardId> = turn.shards.iter().map(|replica| replica.shard).collect();
        for shard in held.into_iter().filter(|shard| asked.is_empty() || asked.contains(shard)) {
            resolve_dispute(turn, peers, shard);
        }
        let shards = found.len() as u64;
        turn.effects
            .push(Effect::Audit(AuditFinding::Scrubbed { shards, damaged: damaged.clone() }));
        self.scrubbing.ended += 1;
        self.scrubbing.damages += damaged.len() as u64;
        self.scrubbing.status = ScrubStatus { running: false, ended: turn.wall, shards, damaged };
    }

    /// Returns the status of the last scrub.
    pub(in crate::node) fn scrub_status(&self) -> ScrubStatus {
        self.scrubbing.status.clone()
    }

    /// Returns the number of scrubs that have ended, and of copies that they found damaged.
    pub(in crate::node) fn scrubs(&self) -> (u64, u64) {
        (self.scrubbing.ended, self.scrubbing.damages)
    }

    #[cfg(test)]
    pub(in crate::node) fn scrub_in_flight(&self) -> Option<u64> {
        self.scrubbing.in_flight.as_ref().map(|(scrub, _)| *scrub)
    }
}

/// Returns how the disk differs from what was written to it. A copy that has been replaced
/// since can't be compared.
fn damage_of(turn: &NodeTurn<'_>, found: &ScrubbedShard) -> Option<&'static str> {
    let replica = turn.shards.get(found.point.shard)?;
    if !replica.trust.exists() || replica.copy != found.copy {
        return None;
    }
    if found.counters != found.point.counters {
        return Some("the counters on its disk differ from its digest");
    }
    let known = replica.points.iter().chain([&replica.flushed_point]);
    let known = known.copied().find(|point| point.seq == found.point.seq)?;
    (known != found.point).then_some("its record on disk differs from what was written")
}

/// Resolves a dispute after a scrub of this node's own copy: if it is good, the copies that
/// differ from it are wrong.
fn resolve_dispute(turn: &mut NodeTurn<'_>, peers: &Peers, shard: ShardId) {
    let Some(replica) = turn.shards.get_mut(shard) else { return };
    let well = replica.trust.is_working();
    let Some(primary) = replica.primary_mut() else { return };
    for (store, own) in std::mem::take(&mut primary.disputed) {
        if well {
            mark_corrupt(turn, peers, store, own);
        }
    }
}

impl ScrubStatus {
    /// Returns whether a scrub has ended since this node started.
    pub fn has_ended(&self) -> bool {
        self.ended != TimeMs(0)
    }
}
