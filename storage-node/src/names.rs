//! Names of stores, for logs and metrics. No decision depends on them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use engine::ids::StoreId;

/// The names of all known stores. Clones are cheap and share the names.
#[derive(Clone, Debug, Default)]
pub struct StoreNames {
    names: Arc<Mutex<BTreeMap<StoreId, String>>>,
}

impl StoreNames {
    /// Notes the name of a store.
    pub fn note(&self, store: StoreId, name: &str) {
        self.lock().insert(store, name.to_owned());
    }

    /// Returns the store's name, or its UUID if the name is not known.
    pub fn of(&self, store: StoreId) -> String {
        self.lock().get(&store).cloned().unwrap_or_else(|| store.to_string())
    }

    /// Returns the names of several stores, separated by commas.
    pub fn of_all(&self, stores: &[StoreId]) -> String {
        stores.iter().map(|&store| self.of(store)).collect::<Vec<_>>().join(",")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<StoreId, String>> {
        // Nothing panics while the lock is held: the map is only looked up and changed.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
