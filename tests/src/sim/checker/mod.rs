//! The promises, one file each, and the report of a broken one.
//!
//! Some are checked from inside while a run goes on ([`one_primary`], [`logs_match`],
//! [`in_sync_set`], [`never_back`], [`digests`], [`session_rows`], [`answers`], [`memory`],
//! [`floor`], [`limits`], [`moves`], [`status`]); the others check, at the end, the requests of the
//! clients and their answers. Those know nothing of replicas or logs, so they can't share a mistake
//! with what they check.

pub mod answers;
pub mod bounded;
pub mod damage;
pub mod digests;
pub mod digits;
pub mod durable;
pub mod floor;
pub mod heals;
pub mod identity;
pub mod in_sync_set;
pub mod limits;
pub mod linearizable;
pub mod logs_match;
pub mod lost;
pub mod memory;
pub mod moves;
pub mod never_back;
pub mod one_primary;
pub mod refused;
pub mod session_rows;
pub mod status;
pub mod tokens;
pub mod twice;

use super::core::Core;
use super::history::ClientHistory;
use super::token_clients::TokenClients;

/// A broken promise.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Violation {
    pub promise: &'static str,
    pub detail: String,
}

/// Checks everything that a client could observe.
pub fn judge(history: &ClientHistory, clients: &TokenClients, core: &Core) -> Vec<Violation> {
    let mut violations = Vec::new();
    lost::check(history, &mut violations);
    twice::check(history, &mut violations);
    refused::check(history, &mut violations);
    linearizable::check(history, &mut violations);
    bounded::check(history, &mut violations);
    tokens::check(history, clients, core, &mut violations);
    // One violation of each promise is enough.
    violations.dedup_by_key(|violation| violation.promise);
    violations
}
