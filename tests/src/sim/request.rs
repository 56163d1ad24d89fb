//! The requests of clients on their way to a gateway, and the answers on their way back.

use engine::key::CounterKey;
use engine::ops::Op;
use engine::shard::idempotency::ClientToken;

use super::history::{Ask, OpOutcome};
use super::token_history::TokenOpOutcome;

/// An operation on its way to a gateway.
#[derive(Clone, Debug)]
pub struct ClientRequest {
    pub id: usize,
    pub counter: CounterKey,
    pub ask: Ask,
    /// For a read: a value of at most this age is enough.
    pub max_staleness_ms: Option<u64>,
    /// Virtual time at which the gateway answers with what it knows by then.
    pub deadline: u64,
}

/// The answer on its way back.
#[derive(Clone, Copy, Debug)]
pub struct ClientReply {
    pub id: usize,
    pub outcome: OpOutcome,
}

/// One send, on its way to a gateway.
#[derive(Clone, Debug)]
pub struct TokenSend {
    pub token: usize,
    pub attempt: usize,
    pub ops: Vec<Op>,
    pub with: ClientToken,
    pub deadline: u64,
}

#[derive(Clone, Debug)]
pub struct TokenReply {
    pub token: usize,
    pub attempt: usize,
    /// One outcome per operation; `None` without an answer.
    pub outcomes: Option<Vec<TokenOpOutcome>>,
    pub replayed: usize,
}

impl TokenReply {
    pub fn of(send: &TokenSend, outcomes: Option<Vec<TokenOpOutcome>>) -> Self {
        Self { token: send.token, attempt: send.attempt, outcomes, replayed: 0 }
    }
}
