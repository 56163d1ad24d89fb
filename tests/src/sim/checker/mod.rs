//! The promises, one file each, and the report of a broken one.
//!
//! Some are checked from inside while a run goes on ([`one_primary`], [`logs_match`],
//! [`in_sync_set`], [`logged_records`], [`never_back`], [`digests`], [`session_rows`], [`answers`],
//! [`memory`], [`floor`], [`limits`], [`moves`], [`status`]); the others check, at the end, the
//! requests of the clients and their answers. Those know nothing of replicas or logs, so they can't
//! share a mistake with what they check.

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
pub mod logged_records;
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

use std::collections::BTreeSet;

use super::history::ClientHistory;
use super::plan::Plan;
use super::token_history::TokenCase;

/// A broken promise.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Violation {
    pub promise: &'static str,
    pub detail: String,
}

/// Everything that clients could observe in a run, and the facts on which the promises depend.
pub struct RunFacts<'a> {
    pub history: &'a ClientHistory,
    pub tokens: &'a [TokenCase],
    pub plan: &'a Plan,
    /// The nodes whose wall clocks were set.
    pub clocks_set: &'a BTreeSet<usize>,
    /// All clocks have leapt.
    pub leapt: bool,
}

/// Checks everything that a client could observe.
pub fn judge(run: &RunFacts<'_>) -> Vec<Violation> {
    let history = run.history;
    let mut violations = Vec::new();
    lost::check(history, &mut violations);
    twice::check(history, &mut violations);
    refused::check(history, &mut violations);
    linearizable::check(history, &mut violations);
    bounded::check(history, &mut violations);
    tokens::check(run, &mut violations);
    // One violation of each promise is enough.
    violations.dedup_by_key(|violation| violation.promise);
    violations
}
