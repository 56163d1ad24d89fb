//! Catching up: followers that lag by more than this node keeps in memory are fed from its log on
//! disk.
//!
//! ```text
//!   ReadLog: who wants what, from which block on  ──▶  log
//!   LogRead: one block's entries for all of them  ◀──
//!      └─▶ to each follower, as far as its window allows; then the next block
//! ```
//!
//! One read is in flight at a time, whatever the number of lagging shards, and it reads the block
//! that comes next in the log for all of them: so a block is read once, not once for each shard. A
//! follower takes part while half of the window of its connection is free. That half is reserved
//! for what is read; new entries use the other half.
//!
//! Every part moves the follower on or ends this way of feeding it: what the log does not contain,
//! or what does not follow the follower's log, is not read again. The follower gets a snapshot
//! then.

use std::collections::{BTreeMap, BTreeSet};

use crate::entry::{Body, Entry, Position};
use crate::ids::{Epoch, ShardId, StoreId};
use crate::message::Slice;
use crate::node::event::Effect;
use crate::node::peers::Peers;
use crate::node::settings::Settings;
use crate::node::shared::NodeTurn;
use crate::node::shared::Shards;
use crate::planted::Planted;
use crate::replica::primary::Feed;
use crate::replica::{Replica, ReplicaRole};
use crate::store::log::catch_up::{LogPart, WantedEntries};
use crate::store::log::scan::LogLocation;

#[derive(Clone, Debug, Default)]
pub(super) struct CatchUp {
    /// Followers that are fed this way, or were at the last check.
    lagging: BTreeMap<StoreId, BTreeSet<ShardId>>,
    /// The read in flight: the epoch in which each shard wanted something of it.
    reading: Option<BTreeMap<ShardId, Epoch>>,
    /// The followers that the read in flight is for.
    readers: BTreeSet<StoreId>,
    /// The block that was read last.
    at: LogLocation,
}

impl CatchUp {
    /// Returns the part of a window of this size that is reserved for the read in flight.
    pub(in crate::node) fn reserved(&self, store: StoreId, window_bytes: usize) -> usize {
        if self.readers.contains(&store) { window_bytes.div_ceil(2) } else { 0 }
    }

    pub(in crate::node) fn begin(&mut self, store: StoreId, shard: ShardId) {
        self.lagging.entry(store).or_default().insert(shard);
    }
}

impl Peers {
    /// Reads the next block if one is wanted, there is room to send its entries, and no read is in
    /// flight.
    pub(in crate::node) fn read_log_if_due(&mut self, turn: &mut NodeTurn<'_>) {
        if self.catch_up.reading.is_some() || self.catch_up.lagging.is_empty() {
            return;
        }
        let mut lagging = std::mem::take(&mut self.catch_up.lagging);
        let (mut wanted, mut readers) = (Vec::new(), BTreeSet::new());
        let half = turn.settings.sizes.window_bytes.div_ceil(2);
        for (&store, shards) in &mut lagging {
            if self.room_of(store, turn.settings) >= half {
                shards.retain(|&shard| {
                    let want = wanted_of(turn.shards, store, shard);
                    wanted.extend(want);
                    want.is_some()
                });
                readers.extend((!shards.is_empty()).then_some(store));
            }
        }
        lagging.retain(|_, shards| !shards.is_empty());
        self.catch_up.lagging = lagging;
        wanted.sort_by_key(|one: &WantedEntries| (one.shard, one.after.seq, one.after.chain));
        wanted.dedup();
        if wanted.is_empty() {
            return;
        }
        let epoch = |one: &WantedEntries| Some((one.shard, turn.shards.epoch_led(one.shard)?));
        self.catch_up.reading = Some(wanted.iter().filter_map(epoch).collect());
        self.catch_up.readers = readers;
        let sizes = turn.settings.sizes;
        let bytes_max = sizes.read_log_bytes.min(sizes.message_bytes).min(half);
        turn.effects.push(Effect::ReadLog { wanted, from: self.catch_up.at, bytes_max });
    }

    /// Returns the bytes that may be sent to the follower now. For a follower that is gone it is
    /// the whole window: its wants are dropped when they are checked.
    fn room_of(&self, store: StoreId, settings: &Settings) -> usize {
        let connection = self.dialled_to.get(&store).and_then(|conn| self.dialled.get(conn));
        let window_bytes = settings.sizes.window_bytes;
        connection.map_or(window_bytes, |connection| connection.room(window_bytes))
    }

    /// Sends what was read to each follower. What was wanted in an earlier epoch is not sent: since
    /// then this node's log may have been cut and continued otherwise, with the position that it
    /// was wanted after still in it.
    pub(in crate::node) fn on_log_read(
        &mut self,
        turn: &mut NodeTurn<'_>,
        at: LogLocation,
        parts: Vec<LogPart>,
    ) {
        let asked = self.catch_up.reading.take().unwrap_or_default();
        let mut ready = std::mem::take(&mut self.catch_up.readers);
        // One large entry may have used its half and this one: the block is read again for it.
        ready.retain(|&store| self.room_of(store, turn.settings) > 0);
        self.catch_up.at = at;
        let mut slices: BTreeMap<StoreId, Vec<Slice>> = BTreeMap::new();
        for part in parts {
            let is_of_now = turn.shards.epoch_led(part.shard) == asked.get(&part.shard).copied();
            if !is_of_now && !turn.planted(Planted::OldReadIsSent) {
                continue;
            }
            let Some(replica) = turn.shards.get_mut(part.shard) else { continue };
            let planted = turn.settings.planted;
            for (store, slice) in feed_from(replica, &part, &ready, planted) {
                slices.entry(store).or_default().extend(slice);
                turn.shards.mark_follower(store, part.shard);
            }
        }
        for (store, slices) in slices {
            self.send_append(turn, store, slices);
        }
    }
}

/// Returns what the follower wants of the log on disk, if it is fed from there.
fn wanted_of(shards: &Shards, store: StoreId, shard: ShardId) -> Option<WantedEntries> {
    let follower = shards.primary(shard)?.followers.get(&store)?;
    let after = follower.sent;
    matches!(follower.feed, Feed::FromLog { .. }).then_some(WantedEntries { shard, after })
}

/// Returns a slice for each follower that wanted this part and is `ready`; a follower without one
/// needs a snapshot.
fn feed_from(
    replica: &mut Replica,
    part: &LogPart,
    ready: &BTreeSet<StoreId>,
    planted: Option<Planted>,
) -> Vec<(StoreId, Option<Slice>)> {
    let (shard, slots, commit) = (replica.shard, replica.slots, replica.commit);
    let base = replica.log.base();
    // The entries above `base` are in memory.
    let below = |entry: &&Entry| entry.seq <= base.seq;
    let entries: Vec<_> = part.entries.iter().take_while(below).cloned().collect();
    let is_sound = is_the_log(&entries, part.prev, base);
    let ReplicaRole::Primary(primary) = &mut replica.role else { return Vec::new() };
    let (epoch, commit) = (primary.epoch, primary.announced(commit));
    let mut out = Vec::new();
    for (&store, follower) in &mut primary.followers {
        let Feed::FromLog { opening } = follower.feed else { continue };
        if follower.sent != part.prev || !ready.contains(&store) {
            continue;
        }
        let Some(last) = entries.last().filter(|_| is_sound).map(Entry::position) else {
            if !Planted::EmptyReadGoesOn.is_in(planted) {
                follower.feed = Feed::NeedsSnapshot;
            }
            out.push((store, None));
            continue;
        };
        let (prev, copy, entries) = (follower.sent, follower.copy, entries.clone());
        follower.sent = last;
        follower.feed = match last.seq >= base.seq {
            true => Feed::Streaming { opening: false },
            false => Feed::FromLog { opening: false },
        };
        let resume = opening;
        let slice = Slice { shard, slots, epoch, copy, prev, commit, resume, entries };
        out.push((store, Some(slice)));
    }
    out
}

/// Returns whether the entries from the disk are this replica's log: they follow `prev` without a
/// gap, are intact, and meet what is in memory if they reach that far.
fn is_the_log(entries: &[Entry], prev: Position, base: Position) -> bool {
    let mut at = prev;
    for entry in entries {
        let intact = match &entry.body {
            Body::Ops(batch) => batch.is_intact(),
            _ => true,
        };
        if !intact || !entry.follows(at) {
            return false;
        }
        at = entry.position();
    }
    at.seq != base.seq || at.chain == base.chain
}
