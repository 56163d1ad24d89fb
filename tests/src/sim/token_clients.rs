//! Clients that send with a token, and send again: after an answer and without one, through any
//! gateway, at once and long after, now and then another request under the same token.
//!
//! Each has one token at a time, on counters that only clients of this kind write to. A token's
//! request has a digit of its own in each of its counters, and so has the *other* request that may
//! be sent under the same token: so a value shows which of the two was applied, and how often (see
//! [`tokens`](super::checker::tokens)).
//!
//! The promise depends on the client's part of the contract: it states when the token was issued,
//! the same every time, and may then send as late as it likes; or it does not, and stops well
//! within the window. The choices come from a stream of their own, so that the runs of other
//! clients stay what they are.

use std::collections::BTreeMap;

use bytes::Bytes;
use engine::batcher::Failure;
use engine::ids::TimeMs;
use engine::ops::{Op, OpKind};
use engine::shard::idempotency::{ClientToken, Scope};

use super::clients::REST;
use super::core::Core;
use super::coverage::Path;
use super::event::SimEvent;
use super::history::{ClientHistory, CounterUse, DIGITS_MAX};
use super::place::Place;
use super::plan::tokens::TokenPlan;
use super::request::{TokenReply, TokenSend};
use super::rng::Rng;
use super::token_history::{Attempt, TokenCase, TokenOpOutcome};

/// The clients' wall clock at the start: ahead of every node's.
const WALL_CLOCK_START: u64 = 1_700_000_002_000;

pub struct TokenClients {
    pub cases: Vec<TokenCase>,
    pub plan: TokenPlan,
    rng: Rng,
    counters: Vec<usize>,
    /// Counters of a separate namespace with few requests, which begins once there is no room for
    /// more records of the other one.
    modest: Vec<usize>,
    crowded: bool,
    /// The current token of each client, and the number of sends that are left.
    busy: BTreeMap<usize, (usize, u64)>,
    open: usize,
}

impl TokenClients {
    pub fn new(core: &mut Core, history: &mut ClientHistory) -> Self {
        let plan = core.plan.tokens.clone();
        let mut rng = plan.rng.clone();
        let counters = match plan.clients {
            0 => Vec::new(),
            _ => (0..plan.counters).map(|_| history.new_counter(CounterUse::Tokens)).collect(),
        };
        let modest = match plan.hurry && plan.clients > 0 {
            true => vec![history.new_counter_in(b"modest", CounterUse::Tokens)],
            false => Vec::new(),
        };
        for client in 0..plan.clients {
            let first = rng.between(200_000, 400_000);
            core.after(first, SimEvent::TokenClient { client });
        }
        let (cases, busy) = (Vec::new(), BTreeMap::new());
        Self { cases, plan, rng, counters, modest, crowded: false, busy, open: 0 }
    }

    pub fn is_idle(&self) -> bool {
        self.open == 0
    }

    /// The number of outcomes by kind, to see that each kind was reached.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        let attempts = self.cases.iter().flat_map(|case| &case.attempts);
        for attempt in attempts.filter(|attempt| attempt.answer.is_some()) {
            if attempt.replayed > 0 {
                *counts.entry("replayed").or_default() += 1;
            }
            for outcome in attempt.answer.iter().flat_map(|(_, outcomes)| outcomes) {
                *counts.entry(outcome.kind()).or_default() += 1;
            }
        }
        counts
    }

    /// A client sends: once more under its token, or under a new one.
    pub fn ask(&mut self, core: &mut Core, history: &mut ClientHistory, client: usize) {
        if core.now >= core.plan.load_until {
            return;
        }
        if core.at_rest {
            return core.after(REST, SimEvent::TokenClient { client });
        }
        let (token, left) = match self.busy.remove(&client) {
            Some((token, left)) if left > 0 && self.may_repeat(core, token) => (token, left - 1),
            _ => (self.new_case(core, history), self.sends()),
        };
        self.busy.insert(client, (token, left));
        self.send(core, history, client, token);
    }

    /// A client that does not state when its token was issued stops well within the window: a leap
    /// may be longer than that.
    fn may_repeat(&self, core: &Core, token: usize) -> bool {
        let case = &self.cases[token];
        case.issued.is_some() || case.leapt == core.leapt
    }

    /// The number of sends under a new token.
    fn sends(&mut self) -> u64 {
        if self.plan.hurry { self.rng.below(2) } else { self.rng.below(5) }
    }

    fn new_case(&mut self, core: &Core, history: &mut ClientHistory) -> usize {
        let at = self.rng.index(self.counters.len());
        let mut counters = vec![self.counters[at]];
        if self.rng.percent(40) {
            counters.extend(self.counters.iter().copied().filter(|_| self.rng.percent(60)));
        }
        counters.sort();
        counters.dedup();
        let modest = self.crowded && self.rng.percent(10);
        if modest {
            counters = vec![self.modest[0]];
        }
        for counter in &mut counters {
            // Two digits to a token, and two items on the first counter of some.
            if history.counters[*counter].adds + 4 > DIGITS_MAX {
                let worn = *counter;
                let namespace: &[u8] = if modest { b"modest" } else { b"sim" };
                let all = if modest { &mut self.modest } else { &mut self.counters };
                *counter = history.new_counter_in(namespace, CounterUse::Tokens);
                all.retain(|&known| known != worn);
                all.push(*counter);
            }
        }
        if counters.len() > 1 && self.rng.percent(50) {
            counters.push(counters[0]);
        }
        let mut digit = |&counter: &usize| {
            let adds = &mut history.counters[counter].adds;
            *adds += 1;
            1i64 << (2 * (*adds - 1))
        };
        let deltas =
            [counters.iter().map(&mut digit).collect(), counters.iter().map(&mut digit).collect()];
        let says = self.plan.is_short() && self.rng.percent(85) || self.rng.percent(30);
        let issued = says.then(|| TimeMs(WALL_CLOCK_START + core.clock() / 1_000));
        let returning = counters.len() == 1 && self.rng.percent(40);
        let attempts = Vec::new();
        let (began, leapt) = (core.now, core.leapt);
        self.cases.push(TokenCase {
            counters,
            deltas,
            returning,
            issued,
            leapt,
            modest,
            began,
            attempts,
        });
        self.cases.len() - 1
    }

    fn send(&mut self, core: &mut Core, history: &ClientHistory, client: usize, token: usize) {
        let other = !self.cases[token].attempts.is_empty() && self.rng.percent(15);
        let ops = self.ops(history, token, other);
        let case = &mut self.cases[token];
        let attempt = case.attempts.len();
        case.attempts.push(Attempt { other, asked: core.step, answer: None, replayed: 0 });
        let scope = if case.counters.len() == 1 { Scope::Counter } else { Scope::Batch };
        let name = Bytes::from(format!("token-{token}"));
        let with = ClientToken { scope, token: name, issued: case.issued, extra: 0 };
        let patience = self.rng.between(50_000, 1_200_000);
        let delay = self.rng.between(100, 2_000);
        let deadline = core.now + delay + patience;
        let to = Place::Gateway(self.rng.below(u64::from(core.plan.gateways)) as u8);
        self.open += 1;
        let send = Box::new(TokenSend { token, attempt, ops, with, deadline });
        // If a gateway forgets a client, this is its answer, as with the others.
        let unanswered = TokenReply::of(&send, None);
        core.after(delay, SimEvent::TokenRequest { to, send });
        core.after(patience + 2_000_000, SimEvent::TokenAnswered(unanswered));
        self.next(core, client, token, delay + patience);
    }

    /// Schedules the client's next send: before an answer is possible, after it, or much later.
    fn next(&mut self, core: &mut Core, client: usize, token: usize, patience: u64) {
        let case = &self.cases[token];
        let window = self.plan.settings.window_ms * 1_000;
        let after = match self.rng.below(4) {
            _ if self.plan.hurry => self.rng.between(100, 20_000),
            0 => self.rng.between(100, 20_000),
            3 if case.issued.is_some() && self.plan.is_short() => {
                self.rng.between(window, 4 * window)
            }
            _ => self.rng.between(1_000, patience + 100_000),
        };
        // Without an issue time the last attempt is sent within the window of the first one.
        let patience_max = 1_300_000;
        if case.issued.is_none() && core.now + after + patience_max > case.began + window {
            self.busy.remove(&client);
        }
        core.after(after, SimEvent::TokenClient { client });
    }

    fn ops(&self, history: &ClientHistory, token: usize, other: bool) -> Vec<Op> {
        let case = &self.cases[token];
        let deltas = case.deltas[usize::from(other)].iter();
        let op = |(&counter, &delta): (&usize, &i64)| {
            let delta = i128::from(delta);
            let kind = match case.returning {
                true => OpKind::AddReturning { delta },
                false => OpKind::Add { delta },
            };
            let counter = history.counters[counter].key.clone();
            Op { counter, kind }
        };
        case.counters.iter().zip(deltas).map(op).collect()
    }

    pub fn answered(&mut self, core: &mut Core, answered: TokenReply) {
        let case = &mut self.cases[answered.token];
        let attempt = &mut case.attempts[answered.attempt];
        if attempt.answer.is_some() {
            return;
        }
        core.trace.note(core.now, || format!("token client: {answered:?}"));
        self.open -= 1;
        let unanswered = || vec![TokenOpOutcome::Unknown(None); case.counters.len()];
        let outcomes = answered.outcomes.unwrap_or_else(unanswered);
        let includes = |what| outcomes.contains(&what);
        if includes(TokenOpOutcome::NotApplied(Some(Failure::TokenQuota))) {
            self.crowded |= self.plan.hurry;
            core.oracle.coverage.reached(Path::ShareTaken);
        } else if case.modest && matches!(outcomes[0], TokenOpOutcome::Applied(_)) {
            core.oracle.coverage.reached(Path::ShareLeft);
        }
        attempt.answer = Some((core.step, outcomes));
        attempt.replayed = answered.replayed;
    }
}
