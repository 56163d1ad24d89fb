//! Adds up the outcomes of batches, and shows the progress.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::journal::JournalWriter;
use super::lines::LineSet;
use super::pending::BatchOutcome;
use super::progress::{ProgressBar, ProgressState};
use super::report::CountReport;
use super::shared::CountContext;
use crate::args::{NOTICE_AFTER, names};
use crate::output::note;

/// The interval at which the progress is redrawn.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Adds up outcomes until all senders are dropped.
pub(super) async fn total(
    mut outcomes: mpsc::Receiver<BatchOutcome>,
    shared: &CountContext,
    mut progress: ProgressBar,
    mut journal: Option<JournalWriter>,
    begun: Instant,
) -> CountReport {
    let mut report = CountReport::default();
    let (mut unknown, mut not_applied) = (LineSet::default(), LineSet::default());
    let mut failed = LineSet::default();
    let mut show = tokio::time::interval(SHOW_EVERY);
    let mut stall = StallNotice { is_printed: false };
    loop {
        let outcome = tokio::select! {
            outcome = outcomes.recv() => outcome,
            _ = show.tick() => {
                stall.check(shared, &mut progress);
                progress.show(&progress_state(shared, report.lines, begun));
                continue;
            }
        };
        let Some(outcome) = outcome else { break };
        if let Some(journal) = &mut journal
            && outcome.is_final
            && !outcome.is_resumed
            && let Err(error) = journal.decided(&outcome)
        {
            // The next run sends the batch again.
            report.reasons.note(&format!("not recorded in the journal: {error}"));
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

fn progress_state(shared: &CountContext, lines: u64, begun: Instant) -> ProgressState {
    ProgressState {
        lines,
        bytes: shared.bytes_read.load(Ordering::Relaxed),
        elapsed: begun.elapsed(),
        waiting: shared.waiting.load(Ordering::Relaxed),
        reason: shared.reason.lock().expect("no panic holds it").clone(),
    }
}

/// Prints once per stall, a time in which no batch is decided, which gateways have not answered.
struct StallNotice {
    is_printed: bool,
}

impl StallNotice {
    fn check(&mut self, shared: &CountContext, progress: &mut ProgressBar) {
        let stalled_for = shared.stall.lock().expect("no panic holds it").stalled_for();
        let Some(stalled_for) = stalled_for.filter(|&time| time >= NOTICE_AFTER) else {
            if std::mem::take(&mut self.is_printed) {
                shared.reason.lock().expect("no panic holds it").clear();
                progress.clear();
                note!("counting continues");
            }
            return;
        };
        if std::mem::replace(&mut self.is_printed, true) {
            return;
        }
        let reason = shared.reason.lock().expect("no panic holds it").clone();
        let reason = if reason.is_empty() { "no answer yet".to_owned() } else { reason };
        let left = shared.give_up.saturating_sub(stalled_for).as_secs();
        let give_up = shared.give_up.as_secs();
        progress.clear();
        note!(
            "no progress for {:.1} s: waiting for {} ({reason}); giving up in {left} s (--give-up \
             {give_up})",
            stalled_for.as_secs_f64(),
            names(&shared.urls)
        );
    }
}
