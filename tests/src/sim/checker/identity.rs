//! A store is one process at a time, and never one with less than it has acknowledged: a disk that
//! was rolled back, or whose copy has served since, never serves.

use std::collections::BTreeMap;

use engine::ids::{Boot, StoreBoot, StoreId};

use super::Violation;

const PROMISE: &str = "identity";

/// The newest boot of each store that has served.
#[derive(Default)]
pub struct Identities(BTreeMap<StoreId, Boot>);

impl Identities {
    /// A process is about to serve. `outdated`: its disk is an image older than the last start that
    /// served.
    pub fn serves(&mut self, me: StoreBoot, outdated: bool, violations: &mut Vec<Violation>) {
        if outdated {
            let detail = format!("{me:?} serves from an older image of its disk");
            violations.push(Violation { promise: PROMISE, detail });
        }
        let before = self.0.insert(me.store, me.boot);
        if before.is_some_and(|before| before >= me.boot) {
            let detail = format!("{me:?} serves after {before:?}");
            violations.push(Violation { promise: PROMISE, detail });
        }
    }
}
