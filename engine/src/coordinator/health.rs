//! Who answers: the coordinator's own probes, and who else complains.
//!
//! Every store's newest process is probed all the time, so that the answer is there when it is
//! needed. A process is *dead* (for promotion; nothing else follows from it) in three ways:
//!
//! * **By proof**: its address refused twice, 50 ms apart, or another process answered there. Nobody
//!   needs to complain.
//! * **By its own word**: it is about to end, and says so ahead.
//! * **By agreement**: the last probe failed in any way, *and* there is a complaint: its lease is gone,
//!   or a peer or a gateway says that it does not answer. Silence alone may be the coordinator's own:
//!   if nobody else misses the process, it is left alone.
//!
//! A wrong verdict costs a promotion, which is always safe.

use std::collections::BTreeMap;

use crate::coordinator::story::{Cause, Story};
use crate::coordinator::{Effect, ProbeResult, Timing, Turn};
use crate::ids::{Boot, Now, StoreBoot, StoreId};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// Not answered yet.
    Unknown,
    Alive,
    Dead(Cause),
}

#[derive(Debug)]
struct Watched {
    boot: Boot,
    verdict: Verdict,
    /// Refusals in a row.
    refusals: u32,
    /// The probe under way, and when it was sent.
    probe: Option<(u64, Now)>,
    next_probe: Now,
    /// Somebody complained last.
    blamed: Option<Now>,
    /// Its end has been told as part of the story.
    told_dead: bool,
}

#[derive(Debug)]
pub(super) struct Health {
    timing: Timing,
    watched: BTreeMap<StoreId, Watched>,
    looked: Now,
}

impl Health {
    pub(super) fn new(timing: Timing) -> Self {
        Self { timing, watched: BTreeMap::new(), looked: Now(0) }
    }

    /// These processes are to be probed, and no others.
    pub(super) fn expect(&mut self, now: Now, processes: &[StoreBoot]) {
        let expected = |store: &StoreId| processes.iter().any(|process| process.store == *store);
        self.watched.retain(|store, _| expected(store));
        for process in processes {
            let known = self.watched.get(&process.store);
            if known.is_some_and(|watched| watched.boot >= process.boot) {
                continue;
            }
            let watched = Watched {
                boot: process.boot,
                verdict: Verdict::Unknown,
                refusals: 0,
                probe: None,
                next_probe: now,
                blamed: None,
                told_dead: known.is_some_and(|watched| watched.told_dead),
            };
            self.watched.insert(process.store, watched);
        }
    }

    /// Somebody says that this store does not answer: it is asked at once.
    pub(super) fn blame(&mut self, now: Now, store: StoreId) {
        if let Some(watched) = self.watched.get_mut(&store) {
            watched.blamed = Some(now);
            if watched.verdict == Verdict::Alive {
                watched.next_probe = now;
            }
        }
    }

    /// It says that it is about to end. True if that is news.
    pub(super) fn leaves(&mut self, process: StoreBoot) -> bool {
        let watched = self.watched.get_mut(&process.store);
        let watched = watched.filter(|watched| watched.boot == process.boot);
        watched.is_some_and(|watched| watched.settle(Verdict::Dead(Cause::Leaving)))
    }

    /// Its lease is gone: it is asked at once.
    pub(super) fn ask(&mut self, now: Now, store: StoreId) {
        if let Some(watched) = self.watched.get_mut(&store) {
            watched.next_probe = now;
        }
    }

    pub(super) fn verdict(&self, store: StoreId) -> Verdict {
        self.watched.get(&store).map_or(Verdict::Unknown, |watched| watched.verdict)
    }

    /// The process of this store that answers.
    pub(super) fn alive(&self, store: StoreId) -> Option<StoreBoot> {
        let watched = self.watched.get(&store)?;
        (watched.verdict == Verdict::Alive).then_some(StoreBoot { store, boot: watched.boot })
    }

    /// Every process has answered, or has had its time to.
    pub(super) fn is_settled(&self) -> bool {
        self.watched.values().all(|watched| watched.verdict != Verdict::Unknown)
    }

    /// Why the store's newest process is dead, if it is. `registered`: its lease lives.
    pub(super) fn death(&self, now: Now, store: StoreId, registered: bool) -> Option<Cause> {
        let watched = self.watched.get(&store)?;
        let Verdict::Dead(cause) = watched.verdict else { return None };
        let blamed = watched.blamed.is_some_and(|at| now.ms_since(at) < self.timing.complaint_ms);
        let proven = match cause {
            Cause::Refused => watched.refusals >= 2,
            Cause::Replaced | Cause::Leaving => true,
            Cause::Silent | Cause::DiskStalled => false,
        };
        (proven || blamed || !registered).then_some(cause)
    }

    // ---- probes --------------------------------------------------------------------------------

    /// True if a verdict changed.
    pub(super) fn probed(&mut self, turn: &mut Turn<'_>, probe: u64, result: ProbeResult) -> bool {
        let asked = |watched: &Watched| watched.probe.is_some_and(|(number, _)| number == probe);
        let Some((&store, watched)) = self.watched.iter_mut().find(|(_, watched)| asked(watched))
        else {
            return false; // Too late, or about a process that is no longer of interest.
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
        watched.settle(cause.map_or(Verdict::Alive, Verdict::Dead)) || refused
    }

    /// Sends the probes that are due, and gives up those that take too long. True if a verdict
    /// changed.
    pub(super) fn look(&mut self, turn: &mut Turn<'_>) -> bool {
        let (now, settings) = (turn.now, turn.settings);
        if now.ms_since(self.looked) >= self.timing.away_ms {
            // This process was away: answers may wait behind this event.
            self.watched.values_mut().for_each(|watched| watched.probe = None);
        }
        self.looked = now;
        let mut changed = false;
        for (&store, watched) in &mut self.watched {
            if let Some((_, sent)) = watched.probe
                && now >= sent.plus_ms(settings.probe_timeout_ms)
            {
                watched.probe = None;
                watched.refusals = 0;
                changed |= watched.settle(Verdict::Dead(Cause::Silent));
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
        let due = |watched: &Watched| match watched.probe {
            Some((_, sent)) => sent.plus_ms(probe_timeout_ms),
            None => watched.next_probe,
        };
        self.watched.values().map(due).min()
    }

    /// Tells who died and who is back, each once.
    pub(super) fn tell(
        &mut self,
        turn: &mut Turn<'_>,
        registered: impl Fn(StoreId) -> bool,
    ) -> bool {
        let mut news = false;
        for store in self.watched.keys().copied().collect::<Vec<_>>() {
            let death = self.death(turn.now, store, registered(store));
            let Some(watched) = self.watched.get_mut(&store) else { continue };
            let process = StoreBoot { store, boot: watched.boot };
            let story = match death {
                Some(why) if !watched.told_dead => Story::Died { process, why },
                None if watched.told_dead && watched.verdict == Verdict::Alive => {
                    Story::Returned { process }
                }
                _ => continue,
            };
            watched.told_dead = death.is_some();
            turn.effects.push(Effect::Story(story));
            news = true;
        }
        news
    }
}

impl Watched {
    fn settle(&mut self, verdict: Verdict) -> bool {
        // It answers until it has ended, which proves nothing. Only another process returns.
        if self.verdict == Verdict::Dead(Cause::Leaving) {
            return false;
        }
        let changed = self.verdict != verdict;
        self.verdict = verdict;
        changed
    }
}
