//! Followers that lag by more than this node keeps in memory are fed from its log on disk.
//!
//! ```text
//!   ReadLog: who wants what, from which block on  ──▶  log
//!   LogRead: one block's entries for all of them  ◀──
//!      └─▶ to each follower, as far as its window allows; then the next block
//! ```
//!
//! One read is under way at a time, whatever the number of shards that lag, and it takes the block that comes next in
//! the log for all of them: so a block is read once, not once for each shard. A follower takes part while half of the
//! window of its connection is free. That half is kept for what is read; entries that come meanwhile have the other one.
//!
//! Every part moves the follower on or ends this way of feeding it: what the log does not hold, or what does not
//! follow what the follower has, is not asked for again. The follower gets a whole copy then.

use std::collections::{BTreeMap, BTreeSet};

use crate::entry::{Body, Entry, Position};
use crate::ids::{Epoch, ShardId, StoreId};
use crate::message::Slice;
use crate::node::{Effect, Node};
use crate::planted::Planted;
use crate::replica::primary::Feed;
use crate::replica::{Replica, Role};
use crate::store::log::catch_up::{LogPart, Wanted};
use crate::store::log::scan::Place;

#[derive(Clone, Debug, Default)]
pub(super) struct CatchUp {
    /// Followers that are fed this way, or were when it was last looked.
    lagging: BTreeMap<StoreId, BTreeSet<ShardId>>,
    /// The read that is under way: the epoch in which each shard wanted something of it.
    reading: Option<BTreeMap<ShardId, Epoch>>,
    /// The followers that it is for.
    readers: BTreeSet<StoreId>,
    /// The block that was read last.
    at: Place,
}

impl CatchUp {
    /// Of a window of this size, what is kept free for the read under way.
    pub(super) fn reserved(&self, store: StoreId, window_bytes: usize) -> usize {
        if self.readers.contains(&store) { window_bytes.div_ceil(2) } else { 0 }
    }

    pub(super) fn begin(&mut self, store: StoreId, shard: ShardId) {
        self.lagging.entry(store).or_default().insert(shard);
    }
}

impl Node {
    /// Asks for the next block if one is wanted, there is room to send what is in it, and none is being read.
    pub(super) fn read_log_if_due(&mut self, effects: &mut Vec<Effect>) {
        if self.catch_up.reading.is_some() || self.catch_up.lagging.is_empty() {
            return;
        }
        let mut lagging = std::mem::take(&mut self.catch_up.lagging);
        let (mut wanted, mut readers) = (Vec::new(), BTreeSet::new());
        let half = self.settings.sizes.window_bytes.div_ceil(2);
        for (&store, shards) in &mut lagging {
            if self.room_of(store) >= half {
                shards.retain(|&shard| {
                    let want = self.wanted(store, shard);
                    wanted.extend(want);
                    want.is_some()
                });
                readers.extend((!shards.is_empty()).then_some(store));
            }
        }
        lagging.retain(|_, shards| !shards.is_empty());
        self.catch_up.lagging = lagging;
        wanted.sort_by_key(|one: &Wanted| (one.shard, one.after.seq, one.after.chain));
        wanted.dedup();
        if wanted.is_empty() {
            return;
        }
        let epoch = |one: &Wanted| Some((one.shard, self.epoch_led(one.shard)?));
        self.catch_up.reading = Some(wanted.iter().filter_map(epoch).collect());
        self.catch_up.readers = readers;
        let sizes = self.settings.sizes;
        let bytes_max = sizes.read_log_bytes.min(sizes.message_bytes).min(half);
        effects.push(Effect::ReadLog { wanted, from: self.catch_up.at, bytes_max });
    }

    /// Bytes that may be sent to the follower now. One that is gone wants nothing, which is seen by looking.
    fn room_of(&self, store: StoreId) -> usize {
        let link = self.dialled_to.get(&store).and_then(|conn| self.dialled.get(conn));
        let window_bytes = self.settings.sizes.window_bytes;
        link.map_or(window_bytes, |link| link.room(window_bytes))
    }

    fn wanted(&self, store: StoreId, shard: ShardId) -> Option<Wanted> {
        let follower = self.replicas.get(&shard)?.primary()?.followers.get(&store)?;
        let after = follower.sent;
        matches!(follower.feed, Feed::FromLog { .. }).then_some(Wanted { shard, after })
    }

    fn epoch_led(&self, shard: ShardId) -> Option<Epoch> {
        Some(self.replicas.get(&shard)?.primary()?.epoch)
    }

    /// A block was read: what is in it for each follower is sent. What was wanted in an earlier epoch is not: this node's
    /// log may have been cut and gone on otherwise since, with the position that it was wanted after still in it.
    pub(super) fn on_log_read(
        &mut self,
        at: Place,
        parts: Vec<LogPart>,
        effects: &mut Vec<Effect>,
    ) {
        let asked = self.catch_up.reading.take().unwrap_or_default();
        let mut ready = std::mem::take(&mut self.catch_up.readers);
        // One large entry may have taken its half and this one: the block is read again for it.
        ready.retain(|&store| self.room_of(store) > 0);
        self.catch_up.at = at;
        let mut slices: BTreeMap<StoreId, Vec<Slice>> = BTreeMap::new();
        for part in parts {
            let is_of_now = self.epoch_led(part.shard) == asked.get(&part.shard).copied();
            if !is_of_now && !Planted::OldReadIsSent.is_in(self.settings.planted) {
                continue;
            }
            let Some(replica) = self.replicas.get_mut(&part.shard) else { continue };
            let planted = self.settings.planted;
            for (store, slice) in feed_from(replica, &part, &ready, planted) {
                slices.entry(store).or_default().extend(slice);
                self.to_send.insert((store, part.shard));
            }
        }
        for (store, slices) in slices {
            self.send_append(store, slices, effects);
        }
    }
}

/// What each follower that wanted this part and is `ready` is sent. One that gets nothing needs a whole copy.
fn feed_from(
    replica: &mut Replica,
    part: &LogPart,
    ready: &BTreeSet<StoreId>,
    planted: Option<Planted>,
) -> Vec<(StoreId, Option<Slice>)> {
    let (shard, slots, commit) = (replica.shard, replica.slots, replica.commit);
    let base = replica.log.base();
    // Above it memory has them.
    let below = |entry: &&Entry| entry.seq <= base.seq;
    let entries: Vec<_> = part.entries.iter().take_while(below).cloned().collect();
    let is_sound = is_the_log(&entries, part.prev, base);
    let Role::Primary(primary) = &mut replica.role else { return Vec::new() };
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

/// What the disk gave is the log that this replica has: it follows `prev` without a gap, is intact, and meets what is in
/// memory if it reaches that far.
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
