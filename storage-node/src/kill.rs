//! Points at which a test kills the process: the kill loop dies at each of them.
//!
//! The points exist only with the feature `kill-points`, which only that test enables; otherwise
//! these functions are empty. `DKC_KILL=name:n` kills the process by SIGKILL when the point is
//! reached for the n-th time, so nothing is flushed, unwound or cleaned up.

/// The names of all points, so that the test covers every one of them.
pub const POINTS: &[&str] = &[
    "open.rewritten",
    "open.cleaned",
    "open.dropped-stale",
    "spare.half-made",
    "spare.made",
    "roll.begun",
    "roll.header",
    "roll.renamed",
    "group.begun",
    "group.half-written",
    "group.written",
    "group.synced",
    "trim.begun",
    "trim.deleted",
    "flush.begun",
    "ingest.begun",
    "ingest.during",
    "ingest.done",
    "state.changed",
    "stage.rows",
    "stage.finished",
    "install.begun",
    "install.files",
    "drop.begun",
];

/// Kills the process if this point is due.
#[inline]
pub fn point(name: &'static str) {
    #[cfg(feature = "kill-points")]
    if armed::is_due(name) {
        armed::die();
    }
    let _ = name;
}

/// Runs `last` and kills the process if this point is due.
#[inline]
pub fn point_after(name: &'static str, last: impl FnOnce()) {
    #[cfg(feature = "kill-points")]
    if armed::is_due(name) {
        last();
        armed::die();
    }
    let _ = (name, last);
}

/// Kills the process some microseconds from now (`DKC_KILL_US`) if this point is due, in the middle
/// of the call that follows.
#[inline]
pub fn point_during(name: &'static str) {
    #[cfg(feature = "kill-points")]
    if armed::is_due(name) {
        armed::die_soon();
    }
    let _ = name;
}

#[cfg(feature = "kill-points")]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;
    use std::time::Duration;

    struct KillPlan {
        name: String,
        left: AtomicU64,
    }

    fn plan() -> Option<&'static KillPlan> {
        static PLAN: OnceLock<Option<KillPlan>> = OnceLock::new();
        let read = || {
            let text = std::env::var("DKC_KILL").ok()?;
            let (name, times) = text.split_once(':').expect("DKC_KILL=name:n");
            let left = times.parse().expect("DKC_KILL=name:n");
            Some(KillPlan { name: name.into(), left: AtomicU64::new(left) })
        };
        PLAN.get_or_init(read).as_ref()
    }

    pub(super) fn is_due(name: &'static str) -> bool {
        assert!(super::POINTS.contains(&name), "{name} is in the list of points");
        plan()
            .is_some_and(|plan| plan.name == name && plan.left.fetch_sub(1, Ordering::AcqRel) == 1)
    }

    pub(super) fn die() -> ! {
        let me = rustix::process::getpid();
        let sent = rustix::process::kill_process(me, rustix::process::Signal::KILL);
        sent.expect("a process may kill itself");
        // The signal is on its way; nothing else may happen meanwhile.
        loop {
            thread::park();
        }
    }

    pub(super) fn die_soon() {
        let wait = std::env::var("DKC_KILL_US").ok().and_then(|us| us.parse().ok()).unwrap_or(0);
        thread::spawn(move || {
            thread::sleep(Duration::from_micros(wait));
            die();
        });
    }
}
