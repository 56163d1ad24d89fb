//! Who answers: kept per node pair, never per shard.
//!
//! A peer is *silent* when for a second nothing came from it, or no connection to it could be made
//! (it may still reach this node: then it is heard, and yet can't be fed), or it has owed an ack for
//! a second, or it says that its disk has not answered for a second; or at once when its address refused two
//! connections after a reset (a killed process). Silence is the reason to eject, never a proof of
//! death: whatever the silent peer still does is fenced by epochs.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Now, StoreId, TimeMs};

#[derive(Clone, Debug, Default)]
pub struct Health {
    heard: BTreeMap<StoreId, Now>,
    owes_since: BTreeMap<StoreId, Now>,
    /// There is no connection to it.
    cut_since: BTreeMap<StoreId, Now>,
    /// What a peer said of its disk: age of its last fsync, in milliseconds.
    fsync_age_ms: BTreeMap<StoreId, u64>,
    /// What a peer's wall clock said, and when.
    walls: BTreeMap<StoreId, (TimeMs, Now)>,
    /// Bytes that a peer says it has room for.
    room_bytes: BTreeMap<StoreId, u64>,
    refused: BTreeSet<StoreId>,
    /// Peers whose disks have no room.
    full: BTreeSet<StoreId>,
    /// Etcd last confirmed this node's lease.
    etcd_heard: Option<Now>,
}

impl Health {
    /// Something came from the peer.
    pub fn heard(&mut self, store: StoreId, now: Now) {
        self.heard.insert(store, now);
        self.refused.remove(&store);
    }

    pub fn said_fsync_age(&mut self, store: StoreId, age_ms: u64) {
        self.fsync_age_ms.insert(store, age_ms);
    }

    pub fn said_full(&mut self, store: StoreId, full: bool) {
        match full {
            true => self.full.insert(store),
            false => self.full.remove(&store),
        };
    }

    pub fn is_full(&self, store: StoreId) -> bool {
        self.full.contains(&store)
    }

    pub fn said_wall(&mut self, store: StoreId, wall: TimeMs, now: Now) {
        self.walls.insert(store, (wall, now));
    }

    /// What the peer's wall clock says now, if it goes on as it was heard last.
    pub fn wall(&self, store: StoreId, now: Now) -> Option<TimeMs> {
        let (wall, heard) = self.walls.get(&store)?;
        Some(TimeMs(wall.0.saturating_add(now.ms_since(*heard))))
    }

    pub fn said_room(&mut self, store: StoreId, bytes: u64) {
        self.room_bytes.insert(store, bytes);
    }

    /// Bytes that a peer has room for, as it last said; no limit if it has said nothing.
    pub fn room(&self, store: StoreId) -> u64 {
        self.room_bytes.get(&store).copied().unwrap_or(u64::MAX)
    }

    /// The oldest message that the peer has not acknowledged was sent then.
    pub fn owes(&mut self, store: StoreId, since: Option<Now>) {
        match since {
            Some(since) => self.owes_since.insert(store, since),
            None => self.owes_since.remove(&store),
        };
    }

    pub fn refused(&mut self, store: StoreId) {
        self.refused.insert(store);
    }

    /// Begins to wait for a peer that has not been heard of yet.
    pub fn expect(&mut self, store: StoreId, now: Now) {
        self.heard.entry(store).or_insert(now);
    }

    /// There is no connection by which to feed the peer.
    pub fn cut(&mut self, store: StoreId, now: Now) {
        self.cut_since.entry(store).or_insert(now);
    }

    /// There is one again.
    pub fn joined(&mut self, store: StoreId) {
        self.cut_since.remove(&store);
    }

    pub fn etcd_heard(&mut self, now: Now) {
        self.etcd_heard = Some(now);
    }

    /// Etcd has answered lately.
    pub fn is_etcd_heard(&self, now: Now, within_ms: u64) -> bool {
        self.etcd_heard.is_some_and(|heard| now.ms_since(heard) < within_ms)
    }

    /// This process itself was away (stopped, or starved): nobody can be blamed for the silence.
    pub fn forgive(&mut self, now: Now) {
        self.heard.values_mut().for_each(|heard| *heard = now);
        self.owes_since.values_mut().for_each(|since| *since = now);
        self.cut_since.values_mut().for_each(|since| *since = now);
    }

    pub fn is_silent(&self, store: StoreId, now: Now, silent_after_ms: u64) -> bool {
        let long = |since: Option<&Now>| {
            since.is_some_and(|&since| now.ms_since(since) >= silent_after_ms)
        };
        let stalled = self.fsync_age_ms.get(&store).is_some_and(|&age| age >= silent_after_ms);
        self.refused.contains(&store)
            || long(self.heard.get(&store))
            || long(self.owes_since.get(&store))
            || long(self.cut_since.get(&store))
            || stalled
    }

    pub fn silent(&self, now: Now, silent_after_ms: u64) -> Vec<StoreId> {
        let silent = |store: &StoreId| self.is_silent(*store, now, silent_after_ms);
        self.heard.keys().copied().filter(silent).collect()
    }

    /// Somebody else hears this node: a peer, or etcd. If nobody does, it is this node that is cut
    /// off, and it must not eject the others.
    pub fn hears_anybody(&self, now: Now, silent_after_ms: u64) -> bool {
        let peer = self.heard.keys().any(|&store| !self.is_silent(store, now, silent_after_ms));
        peer || self.is_etcd_heard(now, 2 * silent_after_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: StoreId = StoreId(1);

    #[track_caller]
    fn check(prepare: impl Fn(&mut Health), at_ms: u64, want: bool) {
        let mut health = Health::default();
        prepare(&mut health);
        assert_eq!(health.is_silent(A, Now(at_ms * 1000), 1000), want);
    }

    #[test]
    fn silence_has_five_reasons() {
        check(|health| health.heard(A, Now(0)), 999, false);
        check(|health| health.heard(A, Now(0)), 1000, true);
        let owes = |health: &mut Health| {
            health.heard(A, Now(900_000));
            health.owes(A, Some(Now(0)));
        };
        check(owes, 999, false);
        check(owes, 1000, true);
        // A peer that reaches this node, but is not reached by it (seed 18576).
        let cut = |health: &mut Health| {
            health.cut(A, Now(0));
            health.heard(A, Now(900_000));
        };
        check(cut, 999, false);
        check(cut, 1000, true);
        let stalled = |health: &mut Health| {
            health.heard(A, Now(0));
            health.said_fsync_age(A, 1000);
        };
        check(stalled, 1, true);
        let refused = |health: &mut Health| {
            health.heard(A, Now(0));
            health.refused(A);
        };
        check(refused, 1, true);
    }

    #[test]
    fn a_process_that_was_away_blames_nobody() {
        let away = |health: &mut Health| {
            health.heard(A, Now(0));
            health.owes(A, Some(Now(0)));
            health.forgive(Now(60_000_000));
        };
        check(away, 60_500, false);
    }

    #[test]
    fn a_node_that_nobody_hears_is_the_one_cut_off() {
        let mut health = Health::default();
        health.heard(A, Now(0));
        assert!(health.hears_anybody(Now(1), 1000));
        assert!(!health.hears_anybody(Now(5_000_000), 1000));
        health.etcd_heard(Now(4_000_000));
        assert!(health.hears_anybody(Now(5_000_000), 1000));
    }
}
