//! Failure detection: the coordinator's own probes, and complaints by others.
//!
//! Every store's newest process is probed all the time, so that the result is at hand when it is
//! needed. A process is *dead* (for promotion; nothing else follows from it) in three ways:
//!
//! * **By proof**: its address refused twice, 50 ms apart, or another process answered there. No
//!   complaint is needed.
//! * **By announcement**: it has announced its shutdown.
//! * **By agreement**: the last probe failed in any way, *and* there is a complaint: its lease is
//!   gone, or a peer or a gateway reports that it does not answer. Silence alone may be the
//!   coordinator's own fault: without a complaint the process is left alone.
//!
//! A wrong result costs a promotion, which is always safe.

use std::collections::BTreeMap;

use crate::coordinator::decision::{Cause, Decision};
use crate::coordinator::{CoordinatorTiming, CoordinatorTurn, Effect, ProbeResult};
use crate::ids::{Boot, Now, StoreBoot, StoreId};

/// The finding of the probes of one process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Liveness {
    /// No probe has ended yet.
    Unknown,
    /// The last probe was answered in order.
    Alive,
    /// The last probe failed, or the process has announced its shutdown.
    Dead(Cause),
}

/// The newest process of one store, and its probes.
#[derive(Debug)]
struct ProbedStore {
    boot: Boot,
    liveness: Liveness,
    /// The number of consecutive refusals.
    refusals: u32,
    /// The probe in flight, and when it was sent.
    probe: Option<(u64, Now)>,
    next_probe: Now,
    /// The time of the last complaint.
    suspected_at: Option<Now>,
    /// The death of the process has been logged.
    logged_dead: bool,
}

/// All processes that are probed. See the module.
#[derive(Debug)]
pub(super) struct FailureDetector {
    timing: CoordinatorTiming,
    watched: BTreeMap<StoreId, ProbedStore>,
    /// The time of the last review, by which a pause of this process is noticed.
    reviewed_at: Now,
}

impl FailureDetector {
    pub(super) fn new(timing: CoordinatorTiming) -> Self {
        Self { timing, watched: BTreeMap::new(), reviewed_at: Now(0) }
    }

    /// Probes these processes and no others from now on.
    pub(super) fn set_watched(&mut self, now: Now, processes: &[StoreBoot]) {
        let expected = |store: &StoreId| processes.iter().any(|process| process.store == *store);
        self.watched.retain(|store, _| expected(store));
        for process in processes {
            let known = self.watched.get(&process.store);
            if known.is_some_and(|watched| watched.boot >= process.boot) {
                continue;
            }
            let watched = ProbedStore {
                boot: process.boot,
                liveness: Liveness::Unknown,
                refusals: 0,
                probe: None,
                next_probe: now,
                suspected_at: None,
                logged_dead: known.is_some_and(|watched| watched.logged_dead),
            };
            self.watched.insert(process.store, watched);
        }
    }

    /// Notes a complaint that the store does not answer: it is probed at once.
    pub(super) fn suspect(&mut self, now: Now, store: StoreId) {
        if let Some(watched) = self.watched.get_mut(&store) {
            watched.suspected_at = Some(now);
            if watched.liveness == Liveness::Alive {
                watched.next_probe = now;
            }
        }
    }

    /// Notes that the process has announced its shutdown. Returns whether that is new.
    pub(super) fn note_leaving(&mut self, process: StoreBoot) -> bool {
        let watched = self.watched.get_mut(&process.store);
        let watched = watched.filter(|watched| watched.boot == process.boot);
        watched.is_some_and(|watched| watched.settle(Liveness::Dead(Cause::Leaving)))
    }

    /// Probes the store at once, since its lease is gone.
    pub(super) fn probe_now(&mut self, now: Now, store: StoreId) {
        if let Some(watched) = self.watched.get_mut(&store) {
            watched.next_probe = now;
        }
    }

    pub(super) fn liveness(&self, store: StoreId) -> Liveness {
        self.watched.get(&store).map_or(Liveness::Unknown, |watched| watched.liveness)
    }

    /// The process of this store, if it answers.
    pub(super) fn alive(&self, store: StoreId) -> Option<StoreBoot> {
        let watched = self.watched.get(&store)?;
        (watched.liveness == Liveness::Alive).then_some(StoreBoot { store, boot: watched.boot })
    }

    /// Returns whether every process has answered, or has had time to.
    pub(super) fn all_probed(&self) -> bool {
        self.watched.values().all(|watched| watched.liveness != Liveness::Unknown)
    }

    /// The cause of death of the store's newest process, if it is dead. `registered`: its lease
    /// lives.
    pub(super) fn death(&self, now: Now, store: StoreId, registered: bool) -> Option<Cause> {
        let watched = self.watched.get(&store)?;
        let Liveness::Dead(cause) = watched.liveness else { return None };
        let suspected =
            watched.suspected_at.is_some_and(|at| now.ms_since(at) < self.timing.complaint_ms);
        let proven = match cause {
            Cause::Refused => watched.refusals >= 2,
            Cause::Replaced | Cause::Leaving => true,
            Cause::Silent | Cause::DiskStalled => false,
        };
        (proven || suspected || !registered).then_some(cause)
    }

    // ---- probes --------------------------------------------------------------------------------

    /// Takes the result of a probe. Returns whether it changed a process's liveness, or was a
    /// refusal.
    pub(super) fn on_probed(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        probe: u64,
        result: ProbeResult,
    ) -> bool {
        let asked =
            |watched: &ProbedStore| watched.probe.is_some_and(|(number, _)| number == probe);
        let Some((&store, watched)) = self.watched.iter_mut().find(|(_, watched)| asked(watched))
        else {
            return false; // The answer is late, or about a process that is no longer probed.
        };
        let me = StoreBoot { store, boot: watched.boot };
        let cause = match result {
            ProbeResult::Alive { from, .. } if from != me => Some(Cause::Replaced),
            ProbeResult::Alive { fsync_age_ms, .. } => {
                let stalled = fsync_age_ms >= turn.settings.fsync_age_max_ms;
                stalled.then_some(Cause::DiskStalled)
            }
            ProbeResult::Refused => Some(Cause::Refused),
            ProbeResult::Silent => Some(Cause::Silent),
        };
        watched.probe = None;
        let refused = cause == Some(Cause::Refused);
        watched.refusals = if refused { watched.refusals + 1 } else { 0 };
        if watched.refusals == 1 {
            watched.next_probe =
                watched.next_probe.min(turn.now.plus_ms(self.timing.refused_again_ms));
        }
        watched.settle(cause.map_or(Liveness::Alive, Liveness::Dead)) || refused
    }

    /// Sends the probes that are due, and gives up those that take too long. True if a liveness
    /// changed.
    pub(super) fn send_due_probes(&mut self, turn: &mut CoordinatorTurn<'_>) -> bool {
        let (now, settings) = (turn.now, turn.settings);
        if now.ms_since(self.reviewed_at) >= self.timing.own_pause_ms {
            // This process was paused: answers may be queued behind this event.
            self.watched.values_mut().for_each(|watched| watched.probe = None);
        }
        self.reviewed_at = now;
        let mut changed = false;
        for (&store, watched) in &mut self.watched {
            if let Some((_, sent)) = watched.probe
                && now >= sent.plus_ms(settings.probe_timeout_ms)
            {
                watched.probe = None;
                watched.refusals = 0;
                changed |= watched.settle(Liveness::Dead(Cause::Silent));
            }
            if watched.probe.is_none() && now >= watched.next_probe {
                let probe = turn.fresh_id();
                watched.probe = Some((probe, now));
                watched.next_probe = now.plus_ms(settings.probe_every_ms);
                let to = StoreBoot { store, boot: watched.boot };
                turn.effects.push(Effect::Probe { probe, to });
            }
        }
        changed
    }

    pub(super) fn next_deadline(&self, probe_timeout_ms: u64) -> Option<Now> {
        let due = |watched: &ProbedStore| match watched.probe {
            Some((_, sent)) => sent.plus_ms(probe_timeout_ms),
            None => watched.next_probe,
        };
        self.watched.values().map(due).min()
    }

    /// Logs who died and who is back, each once. Returns whether there was any such change.
    pub(super) fn log_changes(
        &mut self,
        turn: &mut CoordinatorTurn<'_>,
        registered: impl Fn(StoreId) -> bool,
    ) -> bool {
        let mut news = false;
        for store in self.watched.keys().copied().collect::<Vec<_>>() {
            let death = self.death(turn.now, store, registered(store));
            let Some(watched) = self.watched.get_mut(&store) else { continue };
            let process = StoreBoot { store, boot: watched.boot };
            let decision = match death {
                Some(why) if !watched.logged_dead => Decision::Died { process, why },
                None if watched.logged_dead && watched.liveness == Liveness::Alive => {
                    Decision::Returned(process)
                }
                _ => continue,
            };
            watched.logged_dead = death.is_some();
            turn.effects.push(Effect::Decision(decision));
            news = true;
        }
        news
    }
}

impl ProbedStore {
    /// Sets the liveness. Returns whether it changed.
    fn settle(&mut self, liveness: Liveness) -> bool {
        // A leaving process answers until it has ended, which proves nothing. Only another process
        // of the store can return.
        if self.liveness == Liveness::Dead(Cause::Leaving) {
            return false;
        }
        let changed = self.liveness != liveness;
        self.liveness = liveness;
        changed
    }
}
