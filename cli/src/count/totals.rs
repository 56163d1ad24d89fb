//! Adds up what became of batches, and shows how far the count has come.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::journal::Notes;
use super::lines::Lines;
use super::pending::Outcome;
use super::progress::{Progress, Stand};
use super::report::Report;
use super::shared::Shared;
use crate::client::{TOLD_AFTER, names};
use crate::output;

const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Takes outcomes until all senders are gone.
pub(super) async fn total(
    mut outcomes: mpsc::Receiver<Outcome>,
    shared: &Shared,
    mut progress: Progress,
    mut notes: Option<Notes>,
    begun: Instant,
) -> Report {
    let mut report = Report::default();
    let (mut unknown, mut not_applied) = (Lines::default(), Lines::default());
    let mut failed = Lines::default();
    let mut show = tokio::time::interval(SHOW_EVERY);
    let mut silence = Silence { is_told: false };
    loop {
        let outcome = tokio::select! {
            outcome = outcomes.recv() => outcome,
            _ = show.tick() => {
                silence.look(shared, &mut progress);
                progress.show(&stand(shared, report.lines, begun));
                continue;
            }
        };
        let Some(outcome) = outcome else { break };
        if let Some(notes) = &mut notes
            && outcome.is_final
            && !outcome.is_resumed
            && let Err(error) = notes.decided(&outcome)
        {
            // The next run asks the service again.
            report.reasons.note(&format!("not noted in the journal: {error}"));
        }
        if outcome.is_resumed {
            report.resumed += outcome.lines;
        }
        if outcome.is_replayed {
            report.replayed += outcome.lines;
        }
        report.lines += outcome.lines;
        report.skipped += outcome.skipped;
        report.applied += outcome.applied;
        unknown.append(&outcome.unknown);
        not_applied.append(&outcome.not_applied);
        failed.append(&outcome.failed);
        report.reasons.append(outcome.reasons);
    }
    progress.clear();
    report.unknown = unknown.ranges();
    report.not_applied = not_applied.ranges();
    report.failed = failed.ranges();
    report.seconds = begun.elapsed().as_secs_f64();
    report.per_second = report.applied as f64 / report.seconds.max(1e-9);
    report
}

fn stand(shared: &Shared, lines: u64, begun: Instant) -> Stand {
    Stand {
        lines,
        bytes: shared.bytes_read.load(Ordering::Relaxed),
        elapsed: begun.elapsed(),
        waiting: shared.waiting.load(Ordering::Relaxed),
        reason: shared.reason.lock().expect("no panic holds it").clone(),
    }
}

/// A time in which nothing is decided. Whoever started the count is told whom it waits for, once each time.
struct Silence {
    is_told: bool,
}

impl Silence {
    fn look(&mut self, shared: &Shared, progress: &mut Progress) {
        let waits = shared.busy.lock().expect("no panic holds it").waits();
        let Some(waits) = waits.filter(|&waits| waits >= TOLD_AFTER) else {
            if std::mem::take(&mut self.is_told) {
                shared.reason.lock().expect("no panic holds it").clear();
                progress.clear();
                output::note("it goes on");
            }
            return;
        };
        if std::mem::replace(&mut self.is_told, true) {
            return;
        }
        let reason = shared.reason.lock().expect("no panic holds it").clone();
        let reason = if reason.is_empty() { "no answer yet".to_owned() } else { reason };
        let left = shared.give_up.saturating_sub(waits).as_secs();
        let give_up = shared.give_up.as_secs();
        progress.clear();
        output::note(&format!(
            "nothing is counted for {:.1} s now: waiting for {} ({reason}); giving up in {left} s (--give-up {give_up})",
            waits.as_secs_f64(),
            names(&shared.urls)
        ));
    }
}
