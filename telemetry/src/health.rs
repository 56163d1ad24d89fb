//! Whether a process is ready, and if not, what it waits for.

use std::sync::{Arc, Mutex};

/// Shared by whoever learns of a reason and whoever is asked. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Health {
    reason: Arc<Mutex<Option<String>>>,
}

impl Health {
    /// Not ready yet, for this reason: a word that a person can look up (`etcd`, `meta`, `identity` …).
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: Arc::new(Mutex::new(Some(reason.into()))) }
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
        self.lock().clone()
    }

    fn set(&self, reason: Option<String>) {
        *self.lock() = reason;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        // Nobody panics while holding it: it is only read and replaced.
        self.reason.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
