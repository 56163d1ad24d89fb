//! Ctrl-C and SIGTERM, which both end a count within three seconds: this is the usual end of
//! `tail -F log | dkc count hits`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use process::{ProcessExit, StopSignals};

use super::shared::{CountContext, Stop};
use crate::exit::CommandExit;
use crate::output::note;

/// For this long after a signal, lines that were read may still be sent and answers are awaited.
const STOP_PATIENCE: Duration = Duration::from_millis(2_300);
/// The report may take this much longer; it does not come if reading the input hangs.
const REPORT_PATIENCE: Duration = Duration::from_millis(500);

/// Handles signals: the first one ends the reading and lets the lines read so far be counted, the
/// second one exits at once.
pub(super) fn stop_at_signal(
    shared: Arc<CountContext>,
) -> Result<impl Future<Output = ()>, ProcessExit> {
    let mut signals = StopSignals::new()?;
    Ok(async move {
        signals.next().await;
        shared.closed.store(true, Ordering::Relaxed);
        note!(
            "\nstopping: counting the lines read so far (press Ctrl-C again to exit at once \
             without a report)",
        );
        let again = signals.next();
        tokio::pin!(again);
        if tokio::time::timeout(STOP_PATIENCE, &mut again).await.is_err() {
            shared.stop(Stop::Waiting);
            if tokio::time::timeout(REPORT_PATIENCE, &mut again).await.is_err() {
                note!("no report: reading the input hangs");
            }
        }
        std::process::exit(CommandExit::Unknown as i32);
    })
}
