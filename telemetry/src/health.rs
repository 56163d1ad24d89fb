//! The readiness of a process: ready, or the reason why not.

use tokio::sync::watch;

/// The readiness of a process, shared by the parts that know of a reason and the pages that show
/// it. Clones are cheap and share it.
#[derive(Clone, Debug)]
pub struct Health {
    reason: watch::Sender<Option<String>>,
}

impl Health {
    /// Creates a health that is not ready, for this reason: a word that an operator can look up
    /// (`etcd`, `meta`, `identity` …).
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: watch::Sender::new(Some(reason.into())) }
    }

    /// Marks the process as ready.
    pub fn ready(&self) {
        self.set(None);
    }

    /// Marks the process as not ready, for this reason.
    pub fn not_ready(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()));
    }

    /// Returns why the process is not ready, or `None` if it is ready.
    pub fn reason(&self) -> Option<String> {
        self.reason.borrow().clone()
    }

    /// Follows [`reason`](Self::reason). The receiver ends when the last clone of this is dropped.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<String>> {
        self.reason.subscribe()
    }

    fn set(&self, reason: Option<String>) {
        // Some callers set the same reason repeatedly: watchers are woken only by a change.
        self.reason.send_if_modified(|shown| {
            let changed = *shown != reason;
            *shown = reason;
            changed
        });
    }
}
