//! Ctrl-C and SIGTERM. Both mean the same: the usual end of `tail -F log | dkc count hits`, and within three seconds.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::shared::{Shared, Stop};
use crate::exit::Exit;
use crate::output;

/// How long after a signal what was read may still be sent, and its answer be waited for.
const STOP_PATIENCE: Duration = Duration::from_millis(2_300);
/// How much longer the report may take. An input whose reading hangs can keep it from coming.
const REPORT_PATIENCE: Duration = Duration::from_millis(500);

/// The first signal ends the reading, and lets what was read be counted; the second does not wait.
pub(super) fn stop_at_signal(shared: Arc<Shared>) -> io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        signalled(&mut interrupt, &mut terminate).await;
        shared.closed.store(true, Ordering::Relaxed);
        output::note("\nstopping: counting what was read (Ctrl-C again: don't wait, no report)");
        let again = signalled(&mut interrupt, &mut terminate);
        tokio::pin!(again);
        if tokio::time::timeout(STOP_PATIENCE, &mut again).await.is_err() {
            shared.stop(Stop::Waiting);
            if tokio::time::timeout(REPORT_PATIENCE, &mut again).await.is_err() {
                output::note("no report: the input does not answer");
            }
        }
        std::process::exit(Exit::Unknown as i32);
    })
}

async fn signalled(one: &mut Signal, other: &mut Signal) {
    tokio::select! {
        _ = one.recv() => {}
        _ = other.recv() => {}
    }
}
