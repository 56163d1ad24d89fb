//! Names of stores, for logs and metrics. Nothing is decided by them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use engine::ids::StoreId;

/// Shared by who hears of names and who shows them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Names {
    names: Arc<Mutex<BTreeMap<StoreId, String>>>,
}

impl Names {
    pub fn note(&self, store: StoreId, name: &str) {
        self.lock().insert(store, name.to_owned());
    }

    /// The store's name; its uuid if no name was heard of.
    pub fn of(&self, store: StoreId) -> String {
        self.lock().get(&store).cloned().unwrap_or_else(|| store.to_string())
    }

    /// Several, with commas between them.
    pub fn of_all(&self, stores: &[StoreId]) -> String {
        stores.iter().map(|&store| self.of(store)).collect::<Vec<_>>().join(",")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<StoreId, String>> {
        // Nobody panics while holding it: it is only looked up and changed.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
