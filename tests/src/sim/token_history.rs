//! The requests of clients with a token and their answers: all that a checker of tokens needs.

use engine::batcher::{Failure, Outcome, WriteResult};
use engine::ids::TimeMs;
use engine::ops::Op;

/// The outcome of one operation of one send.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TokenOpOutcome {
    Applied(Option<i128>),
    NotApplied(Option<Failure>),
    Unknown(Option<Failure>),
}

impl TokenOpOutcome {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Applied(_) => "applied",
            Self::NotApplied(Some(Failure::TokenReused)) => "reused",
            Self::NotApplied(Some(Failure::TokenQuota)) => "quota",
            Self::NotApplied(_) => "not-applied",
            Self::Unknown(Some(Failure::TokenTooOld)) => "too-old",
            Self::Unknown(_) => "unknown",
        }
    }
}

/// The requests of a client under one token, and their answers.
#[derive(Clone, Debug)]
pub struct TokenCase {
    /// The counter of each operation.
    pub counters: Vec<usize>,
    /// The deltas of the request, and of the other one.
    pub deltas: [Vec<i64>; 2],
    pub returning: bool,
    /// The issue time that the client states in every attempt, if it does.
    pub issued: Option<TimeMs>,
    /// The sum of the clocks' leaps when the token was new.
    pub leapt: u64,
    /// `true` if it is of the modest namespace.
    pub modest: bool,
    /// The time of the first send.
    pub began: u64,
    pub attempts: Vec<Attempt>,
}

#[derive(Clone, Debug)]
pub struct Attempt {
    /// `true` if this is the other one of the two requests.
    pub other: bool,
    pub asked: u64,
    /// The step of the answer, and its outcomes.
    pub answer: Option<(u64, Vec<TokenOpOutcome>)>,
    pub replayed: usize,
}

/// Reads the outcomes from the answer to a send.
pub fn outcomes_of(ops: &[Op], result: &WriteResult) -> Vec<TokenOpOutcome> {
    let mut outcomes = vec![TokenOpOutcome::Applied(None); ops.len()];
    for &(index, value) in &result.values {
        outcomes[index as usize] = TokenOpOutcome::Applied(Some(value));
    }
    for &(index, failure) in &result.failed {
        outcomes[index as usize] = match failure.outcome() {
            Outcome::NotApplied => TokenOpOutcome::NotApplied(Some(failure)),
            Outcome::Unknown => TokenOpOutcome::Unknown(Some(failure)),
        };
    }
    outcomes
}
