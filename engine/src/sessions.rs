//! Exactly once, shard side: which batch of which session has been applied (DESIGN §7).
//!
//! Rows and the newest collection are replicated state: they change only at apply, so every
//! replica judges a batch alike, and a duplicate is answered only once its original is committed.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Bseq, Revision, SessionId};

/// The sessions that a shard knows.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Sessions {
    pub collection: Collection,
    pub rows: BTreeMap<SessionId, Row>,
}

/// Sessions ≤ `r` that are not in `l` are expired, for ever: ids are never reused.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Collection {
    pub r: Revision,
    pub l: BTreeSet<SessionId>,
}

/// What a shard remembers of one session.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Row {
    /// The last batch applied.
    pub last: Bseq,
    /// Results below it have been dropped: the worker knows them.
    pub answered_below: Bseq,
    /// Results at or above it. One batch is undecided at a time, so this is at most one.
    pub results: BTreeMap<Bseq, BatchResult>,
}

/// What a decided batch did.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum BatchResult {
    /// `values[i]` answers the i-th op that asks for one: empty costs no row space.
    Applied {
        values: Vec<i128>,
    },
    Malformed,
}
