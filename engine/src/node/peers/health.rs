//! The health of the peers, as this node observes it: one state for each peer, not for each shard.
//!
//! A peer is *silent* when for a second nothing came from it, or no connection to it could be made
//! (its messages may still reach this node, and yet it can't be fed), or it has not acknowledged a
//! message, or it reports that its disk has not answered; or at once when its address refused two
//! connections after a reset (a killed process). Silence is the reason to eject a peer, but no
//! proof of its death: whatever the silent peer still does is fenced by epochs.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Now, StoreId, TimeMs};

/// Observations of the peers and of etcd, and what peers report.
#[derive(Clone, Debug, Default)]
pub(in crate::node) struct PeerHealth {
    last_message: BTreeMap<StoreId, Now>,
    unacked_since: BTreeMap<StoreId, Now>,
    /// Since when there has been no connection to the peer.
    disconnected_since: BTreeMap<StoreId, Now>,
    /// The age of the last fsync of each peer, as reported, in milliseconds.
    fsync_age_ms: BTreeMap<StoreId, u64>,
    /// The wall clock of each peer, as reported, and when the report came.
    walls: BTreeMap<StoreId, (TimeMs, Now)>,
    /// The free bytes of each peer, as reported.
    room_bytes: BTreeMap<StoreId, u64>,
    refused: BTreeSet<StoreId>,
    /// Peers that report a full disk.
    full: BTreeSet<StoreId>,
    /// When etcd last answered a request of this node.
    etcd_answered: Option<Now>,
}

impl PeerHealth {
    /// Records that a message came from the peer.
    pub(in crate::node) fn note_alive(&mut self, store: StoreId, now: Now) {
        self.last_message.insert(store, now);
        self.refused.remove(&store);
    }

    /// Records what the peer reports of its disk: the age of its last fsync in milliseconds,
    /// whether it is full, and its free bytes.
    pub(in crate::node) fn note_disk(
        &mut self,
        store: StoreId,
        fsync_age_ms: u64,
        full: bool,
        room_bytes: u64,
    ) {
        self.fsync_age_ms.insert(store, fsync_age_ms);
        self.room_bytes.insert(store, room_bytes);
        match full {
            true => self.full.insert(store),
            false => self.full.remove(&store),
        };
    }

    /// Returns whether the peer reports a full disk.
    pub(in crate::node) fn is_full(&self, store: StoreId) -> bool {
        self.full.contains(&store)
    }

    /// Records the peer's wall clock.
    pub(in crate::node) fn note_wall(&mut self, store: StoreId, wall: TimeMs, now: Now) {
        self.walls.insert(store, (wall, now));
    }

    /// Returns the peer's wall clock now, if it has run on since the last report. `None` without a
    /// report.
    pub(in crate::node) fn wall(&self, store: StoreId, now: Now) -> Option<TimeMs> {
        let (wall, reported) = self.walls.get(&store)?;
        Some(TimeMs(wall.0.saturating_add(now.ms_since(*reported))))
    }

    /// Returns the free bytes of the peer, as it last reported; no limit without a report.
    pub(in crate::node) fn room(&self, store: StoreId) -> u64 {
        self.room_bytes.get(&store).copied().unwrap_or(u64::MAX)
    }

    /// Records when the oldest message was sent that the peer has not acknowledged; `None` if it
    /// has acknowledged all.
    pub(in crate::node) fn note_unacked(&mut self, store: StoreId, since: Option<Now>) {
        match since {
            Some(since) => self.unacked_since.insert(store, since),
            None => self.unacked_since.remove(&store),
        };
    }

    /// Records that the peer's address refused connections: the process is gone.
    pub(in crate::node) fn note_refused(&mut self, store: StoreId) {
        self.refused.insert(store);
    }

    /// Begins to wait for a peer from which nothing has come yet.
    pub(in crate::node) fn expect(&mut self, store: StoreId, now: Now) {
        self.last_message.entry(store).or_insert(now);
    }

    /// Records that there is no connection by which to feed the peer.
    pub(in crate::node) fn note_disconnected(&mut self, store: StoreId, now: Now) {
        self.disconnected_since.entry(store).or_insert(now);
    }

    /// Records that there is a connection to the peer again.
    pub(in crate::node) fn note_connected(&mut self, store: StoreId) {
        self.disconnected_since.remove(&store);
    }

    /// Records that etcd has answered a request of this node.
    pub(in crate::node) fn note_etcd_answer(&mut self, now: Now) {
        self.etcd_answered = Some(now);
    }

    /// Returns whether etcd has answered within the last `within_ms`.
    pub(in crate::node) fn has_etcd_answered(&self, now: Now, within_ms: u64) -> bool {
        self.etcd_answered.is_some_and(|answered| now.ms_since(answered) < within_ms)
    }

    /// Resets the time-outs after a pause of this process (stopped, or starved): the silence of the
    /// peers proves nothing.
    pub(in crate::node) fn reset_after_pause(&mut self, now: Now) {
        self.last_message.values_mut().for_each(|last| *last = now);
        self.unacked_since.values_mut().for_each(|since| *since = now);
        self.disconnected_since.values_mut().for_each(|since| *since = now);
    }

    /// Returns whether the peer is silent: see the module's documentation.
    pub(in crate::node) fn is_silent(
        &self,
        store: StoreId,
        now: Now,
        silent_after_ms: u64,
    ) -> bool {
        let long = |since: Option<&Now>| {
            since.is_some_and(|&since| now.ms_since(since) >= silent_after_ms)
        };
        let stalled = self.fsync_age_ms.get(&store).is_some_and(|&age| age >= silent_after_ms);
        self.refused.contains(&store)
            || long(self.last_message.get(&store))
            || long(self.unacked_since.get(&store))
            || long(self.disconnected_since.get(&store))
            || stalled
    }

    /// Returns the peers that are silent.
    pub(in crate::node) fn silent(&self, now: Now, silent_after_ms: u64) -> Vec<StoreId> {
        let silent = |store: &StoreId| self.is_silent(*store, now, silent_after_ms);
        self.last_message.keys().copied().filter(silent).collect()
    }

    /// Returns whether this node has contact to a peer or to etcd. Without any it is this node that
    /// is cut off, and it must not eject the others.
    pub(in crate::node) fn has_contact(&self, now: Now, silent_after_ms: u64) -> bool {
        let peer =
            self.last_message.keys().any(|&store| !self.is_silent(store, now, silent_after_ms));
        peer || self.has_etcd_answered(now, 2 * silent_after_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: StoreId = StoreId(1);

    #[track_caller]
    fn check(prepare: impl Fn(&mut PeerHealth), at_ms: u64, want: bool) {
        let mut health = PeerHealth::default();
        prepare(&mut health);
        assert_eq!(health.is_silent(A, Now(at_ms * 1000), 1000), want);
    }

    #[test]
    fn silence_has_five_reasons() {
        check(|health| health.note_alive(A, Now(0)), 999, false);
        check(|health| health.note_alive(A, Now(0)), 1000, true);
        let unacked = |health: &mut PeerHealth| {
            health.note_alive(A, Now(900_000));
            health.note_unacked(A, Some(Now(0)));
        };
        check(unacked, 999, false);
        check(unacked, 1000, true);
        // A peer whose messages reach this node, but that this node can't connect to.
        let cut = |health: &mut PeerHealth| {
            health.note_disconnected(A, Now(0));
            health.note_alive(A, Now(900_000));
        };
        check(cut, 999, false);
        check(cut, 1000, true);
        let stalled = |health: &mut PeerHealth| {
            health.note_alive(A, Now(0));
            health.note_disk(A, 1000, false, 0);
        };
        check(stalled, 1, true);
        let refused = |health: &mut PeerHealth| {
            health.note_alive(A, Now(0));
            health.note_refused(A);
        };
        check(refused, 1, true);
    }

    #[test]
    fn a_pause_of_this_process_resets_the_time_outs() {
        let away = |health: &mut PeerHealth| {
            health.note_alive(A, Now(0));
            health.note_unacked(A, Some(Now(0)));
            health.reset_after_pause(Now(60_000_000));
        };
        check(away, 60_500, false);
    }

    #[test]
    fn a_node_without_any_contact_is_the_one_cut_off() {
        let mut health = PeerHealth::default();
        health.note_alive(A, Now(0));
        assert!(health.has_contact(Now(1), 1000));
        assert!(!health.has_contact(Now(5_000_000), 1000));
        health.note_etcd_answer(Now(4_000_000));
        assert!(health.has_contact(Now(5_000_000), 1000));
    }
}
