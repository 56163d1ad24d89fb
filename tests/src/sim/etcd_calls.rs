//! Calls of etcd on their way, and the watches: the delays, losses and outages around the contents
//! of [`etcd`](super::etcd).

use std::collections::BTreeMap;

use super::core::Core;
use super::coverage::Path;
use super::etcd::{
    Call, EtcdHealth, EtcdKey, EtcdSnapshot, EtcdValue, PendingCall, Reply, Watcher, Write,
};
use super::event::{ProcessInput, SimEvent};
use super::place::{Place, ProcessId};

/// The time that a client waits for an answer.
const CALL_TIMEOUT: u64 = 400_000;

impl Core {
    /// Calls etcd. `Etcd` or `EtcdTimeout` comes back under the returned number; after a time-out
    /// the call may still take effect.
    pub fn etcd(&mut self, from: ProcessId, call: Call) -> u64 {
        self.etcd.next_call += 1;
        let number = self.etcd.next_call;
        let gives_up_at = self.now + CALL_TIMEOUT;
        let compared = matches!(call, Call::Read(_) | Call::List | Call::Txn { .. });
        let asks = self.etcd.histories.entry(from).or_default().before_call();
        let history = asks.ok().filter(|_| compared);
        if (compared && history.is_none()) || self.etcd.is_left_behind(from) {
            self.input_after(CALL_TIMEOUT, from, ProcessInput::EtcdTimeout { call: number });
            return number;
        }
        if !self.net.is_blocked(from.place, Place::Etcd) {
            let mut delay = self.delay() * 2 + self.lag(from.place, Place::Etcd);
            if self.plan.slow_etcd && self.rng.percent(3) {
                delay += self.rng.between(10_000, CALL_TIMEOUT * 3);
            }
            delay += self.etcd_takes_its_time();
            let era = self.etcd.kept.era;
            let asked = PendingCall { number, call, history, gives_up_at, era };
            self.after(delay, SimEvent::EtcdArrives { from, asked });
        }
        self.input_after(CALL_TIMEOUT, from, ProcessInput::EtcdTimeout { call: number });
        number
    }

    pub fn etcd_arrives(&mut self, from: ProcessId, asked: PendingCall) {
        if self.etcd.is_lost() || asked.era != self.etcd.kept.era {
            return;
        }
        match self.etcd.health {
            EtcdHealth::Up => {}
            EtcdHealth::Stopped => return self.etcd.waiting.push((from, asked)),
            EtcdHealth::Dead => return,
        }
        let PendingCall { number, call, history, gives_up_at, era: _ } = asked;
        if let Some(asked) = history {
            self.etcd_is_right_for(asked);
        }
        let before = self.etcd.history.len();
        let leases = matches!(call, Call::Grant { .. });
        if let Call::Txn { writes, .. } = &call
            && self.trace.prints()
        {
            let line = format!("etcd: {from:?} writes {writes:?}");
            self.trace.note(self.now, || line);
        }
        let reply = self.etcd.perform(self.now, call);
        if matches!(reply, Reply::Txn { done: true, .. }) && self.now > gives_up_at {
            self.oracle.coverage.reached(Path::LateTxn);
        }
        if leases && let Reply::Granted { lease } = reply {
            let ends = self.etcd.kept.leases[&lease].ends;
            self.at(ends, SimEvent::EtcdLeases);
        }
        self.etcd_changed(before);
        let seen = self.etcd.histories.entry(from).or_default();
        let revision = self.etcd.kept.revision;
        let goes_on = history.is_none_or(|asked| match reply {
            Reply::Txn { done: true, .. } => seen.check_write(asked, revision).is_ok(),
            _ => seen.check_answer(asked, revision).is_ok(),
        });
        if !goes_on {
            self.oracle.coverage.reached(Path::EtcdWentBack);
            return;
        }
        let lost = self.plan.slow_etcd && self.rng.percent(2);
        if lost || self.net.is_blocked(Place::Etcd, from.place) {
            return;
        }
        let delay = self.delay() * 2 + self.lag(Place::Etcd, from.place);
        let delay = delay + self.etcd_takes_its_time();
        self.input_after(delay, from, ProcessInput::Etcd { call: number, reply });
    }

    /// Often about as long as a client waits: some calls take effect after that, and some answers
    /// come too late.
    fn etcd_takes_its_time(&mut self) -> u64 {
        match self.etcd.slow && self.rng.percent(40) {
            true => self.rng.between(10_000, CALL_TIMEOUT * 2),
            false => 0,
        }
    }

    /// An operator writes, if etcd answers.
    pub fn etcd_write(&mut self, write: Write) {
        let answers = self.etcd.health == EtcdHealth::Up && !self.etcd.is_lost();
        if answers && !self.etcd.is_restored() {
            let before = self.etcd.history.len();
            self.etcd.write(vec![write]);
            self.etcd_changed(before);
        }
    }

    /// Ends the leases that were not kept alive.
    pub fn etcd_leases(&mut self) {
        if self.etcd.health != EtcdHealth::Up {
            return;
        }
        let before = self.etcd.history.len();
        let now = self.now;
        let ended: Vec<u64> = self
            .etcd
            .kept
            .leases
            .iter()
            .filter(|(_, l)| l.ends <= now)
            .map(|(&id, _)| id)
            .collect();
        for lease in ended {
            self.etcd.revoke(lease);
        }
        if let Some(next) = self.etcd.kept.leases.values().map(|lease| lease.ends).min() {
            self.at(next, SimEvent::EtcdLeases);
        }
        self.etcd_changed(before);
    }

    /// Revokes every lease though its process is well.
    pub fn etcd_wipe_leases(&mut self) {
        let before = self.etcd.history.len();
        for lease in self.etcd.kept.leases.keys().copied().collect::<Vec<_>>() {
            self.etcd.revoke(lease);
        }
        self.etcd_changed(before);
    }

    /// Revokes one lease though its process is well.
    pub fn etcd_revoke_one(&mut self) {
        let leases: Vec<u64> = self.etcd.kept.leases.keys().copied().collect();
        if let Some(lease) = self.rng.pick(&leases) {
            self.etcd_revoke(lease);
        }
    }

    pub fn etcd_revoke(&mut self, lease: u64) {
        let before = self.etcd.history.len();
        self.etcd.revoke(lease);
        self.etcd_changed(before);
    }

    /// Another of etcd's members leads: the time to live of every lease starts again, and some have
    /// got longer.
    pub fn etcd_prolong_leases(&mut self) {
        let now = self.now;
        let longer = self.rng.between(0, 3_000_000);
        for lease in self.etcd.kept.leases.values_mut() {
            lease.ends = lease.ends.max(now + lease.ttl + longer);
        }
    }

    /// The watches of these places end, and are made again some time later with the contents of
    /// that time: the changes in between are not delivered.
    pub fn etcd_break_watches(&mut self, of: impl Fn(Place) -> bool) {
        for at in 0..self.etcd.watchers.len() {
            let watcher = &mut self.etcd.watchers[at];
            if watcher.seen != usize::MAX && of(watcher.process.place) {
                watcher.broken = true;
                self.etcd_relist_later(at);
            }
        }
    }

    fn etcd_relist_later(&mut self, at: usize) {
        let watcher = &mut self.etcd.watchers[at];
        let waits = watcher.missed.is_some();
        watcher.missed.get_or_insert(watcher.seen);
        if !waits {
            let after = self.rng.between(10_000, 1_500_000);
            self.after(after, SimEvent::EtcdRelist { watcher: at });
        }
    }

    /// Reads everything again: delivers the current state of all that was missed.
    pub fn etcd_relist(&mut self, at: usize) -> Option<(ProcessId, ProcessInput)> {
        let process = self.etcd.watchers[at].process;
        let cut_off = self.net.is_blocked(Place::Etcd, process.place)
            || self.net.is_blocked(process.place, Place::Etcd);
        let watcher = &mut self.etcd.watchers[at];
        if watcher.seen == usize::MAX {
            return None;
        }
        if cut_off || self.etcd.health != EtcdHealth::Up || self.etcd.deaf.contains(&process.place)
        {
            let again = self.rng.between(10_000, 300_000);
            self.after(again, SimEvent::EtcdRelist { watcher: at });
            return None;
        }
        let asks = self.etcd.histories.entry(process).or_default().before_call();
        if let Ok(asked) = asks {
            self.etcd_is_right_for(asked);
        }
        let revision = self.etcd.kept.revision;
        let history = self.etcd.histories.entry(process).or_default();
        if asks.and_then(|asked| history.check_answer(asked, revision)).is_err() {
            self.oracle.coverage.reached(Path::EtcdWentBack);
            self.etcd.watchers[at].seen = usize::MAX;
            return None;
        }
        let watcher = &mut self.etcd.watchers[at];
        watcher.broken = false;
        let from = watcher.missed.take().unwrap_or(watcher.seen);
        watcher.seen = self.etcd.history.len();
        let shards = watcher.shards;
        let mut newest = BTreeMap::new();
        for event in &self.etcd.history[from..] {
            if matches!(event.key, EtcdKey::Shard(_)) == shards {
                newest.insert(event.key, event.clone());
            }
        }
        let events: Vec<_> = newest.into_values().collect();
        (!events.is_empty()).then_some((process, ProcessInput::Watched(events)))
    }

    /// Etcd continues: leases that ran out meanwhile end first, then waiting calls take effect.
    pub fn etcd_resume(&mut self) {
        self.etcd.health = EtcdHealth::Up;
        self.etcd_leases();
        for (from, asked) in std::mem::take(&mut self.etcd.waiting) {
            self.etcd_arrives(from, asked);
        }
        for watcher in 0..self.etcd.watchers.len() {
            self.etcd_wake(watcher);
        }
    }

    /// Ends a restore before etcd answers a process that has seen nothing newer than the snapshot,
    /// and so could not detect it: the operator has put etcd right by then.
    fn etcd_is_right_for(&mut self, asked: u64) {
        if asked <= self.etcd.kept.revision {
            self.etcd_put_right();
        }
    }

    fn etcd_observed(&mut self, process: ProcessId) {
        let revision = self.etcd.kept.revision;
        self.etcd.histories.entry(process).or_default().observe(revision);
    }

    /// An operator restores etcd from this snapshot: later changes are gone, for as long as no
    /// process notices.
    pub fn etcd_restore(&mut self, mut image: EtcdSnapshot) {
        for lease in image.leases.values_mut() {
            lease.ends = self.now + lease.ttl;
        }
        self.etcd.real = Some(std::mem::replace(&mut self.etcd.kept, image));
        self.etcd_break_watches(|_| true);
        self.after(0, SimEvent::EtcdLeases);
    }

    /// Etcd has its real contents again, and the answers of the snapshot in between were never part
    /// of them.
    pub fn etcd_put_right(&mut self) {
        if let Some(real) = self.etcd.real.take() {
            self.etcd.kept = real;
            self.after(0, SimEvent::EtcdLeases);
            self.after(0, SimEvent::EtcdPutRight);
        }
    }

    /// Delivers to the process all that exists first, and every change from here on, some time
    /// later.
    pub fn etcd_watch(&mut self, process: ProcessId) {
        for shards in [false, true] {
            let (seen, pending, missed, broken) = (0, false, None, false);
            let watcher = Watcher { process, shards, seen, pending, missed, broken };
            self.etcd.watchers.push(watcher);
            self.etcd_wake(self.etcd.watchers.len() - 1);
        }
    }

    pub fn etcd_unwatch(&mut self, process: ProcessId) {
        for watcher in &mut self.etcd.watchers {
            if watcher.process == process {
                watcher.pending = true;
                watcher.seen = usize::MAX;
            }
        }
    }

    pub(super) fn etcd_changed(&mut self, before: usize) {
        for at in before..self.etcd.history.len() {
            match self.etcd.history[at].value.as_ref().map(|versioned| &versioned.value) {
                Some(EtcdValue::Shard(config)) => self.oracle.record_written(config),
                Some(EtcdValue::Loss(_)) => self.oracle.coverage.reached(Path::LossAccepted),
                _ => {}
            }
        }
        if before < self.etcd.history.len() {
            for watcher in 0..self.etcd.watchers.len() {
                self.etcd_wake(watcher);
            }
        }
    }

    fn etcd_wake(&mut self, at: usize) {
        let watcher = &mut self.etcd.watchers[at];
        if watcher.pending || watcher.seen >= self.etcd.history.len() {
            return;
        }
        watcher.pending = true;
        let (shards, place) = (watcher.shards, watcher.process.place);
        let mut lag = self.delay() * 2 + self.lag(Place::Etcd, place);
        if self.plan.slow_etcd && self.rng.percent(10) {
            let lag_max = if shards { 2_000_000 } else { 500_000 };
            lag += self.rng.between(1_000, lag_max);
        }
        self.after(lag, SimEvent::EtcdWatch { watcher: at });
    }

    pub fn etcd_watched(&mut self, at: usize) -> Option<(ProcessId, ProcessInput)> {
        let watcher = &mut self.etcd.watchers[at];
        let process = watcher.process;
        if watcher.seen == usize::MAX {
            return None;
        }
        watcher.pending = false;
        if watcher.broken {
            return None;
        }
        if self.net.is_blocked(Place::Etcd, process.place) {
            watcher.pending = true;
            let again = self.rng.between(10_000, 300_000);
            self.after(again, SimEvent::EtcdWatch { watcher: at });
            return None;
        }
        if self.etcd.health != EtcdHealth::Up {
            return None;
        }
        if self.etcd.forgets && self.rng.percent(30) {
            self.etcd_relist_later(at);
            self.etcd.watchers[at].seen = self.etcd.history.len();
            return None;
        }
        self.etcd_observed(process);
        let watcher = &mut self.etcd.watchers[at];
        let shards = watcher.shards;
        let events = self.etcd.history[watcher.seen..].iter();
        let events: Vec<_> = events
            .filter(|event| matches!(event.key, EtcdKey::Shard(_)) == shards)
            .cloned()
            .collect();
        watcher.seen = self.etcd.history.len();
        (!events.is_empty()).then_some((process, ProcessInput::Watched(events)))
    }
}
