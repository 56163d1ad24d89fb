//! Whether a process is ready, and if not, what it waits for.

use tokio::sync::watch;

/// Shared by whoever learns of a reason and whoever is asked. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Health {
    reason: watch::Sender<Option<String>>,
}

impl Health {
    /// Not ready yet, for this reason: a word that a person can look up (`etcd`, `meta`, `identity` …).
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: watch::Sender::new(Some(reason.into())) }
    }

    /// Nothing is waited for any more.
    pub fn ready(&self) {
        self.set(None);
    }

    pub fn not_ready(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()));
    }

    /// Why the process is not ready. None: it is.
    pub fn reason(&self) -> Option<String> {
        self.reason.borrow().clone()
    }

    /// Follows [`reason`](Self::reason). Ends when the last clone of this has gone.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<String>> {
        self.reason.subscribe()
    }

    fn set(&self, reason: Option<String>) {
        // Said again and again by some: who follows it is woken only by news.
        self.reason.send_if_modified(|shown| {
            let news = *shown != reason;
            *shown = reason;
            news
        });
    }
}
