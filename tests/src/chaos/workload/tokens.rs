//! Requests with an `Idempotency-Key`: sent three times at least, through both gateways in turn, and
//! again until what became of them is definite; and then, now and then, the same key with another
//! request, which must be refused and never counted.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::request::{Request, Sent};
use super::{Caller, Pools};
use crate::chaos::recorder::Recorder;
use crate::sim::history::{Ask, Outcome};

const SENDS_MIN: u32 = 3;
/// A request whose outcome is not known by then is given up: unknown.
const PATIENCE: Duration = Duration::from_secs(90);
const DEADLINE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);
/// Of a hundred requests that were applied, so many lend their token to another.
const REUSED_PERCENT: u64 = 25;
const REUSE_PATIENCE: Duration = Duration::from_secs(20);

/// What is known of one operation of a request, after some sends.
#[derive(Clone, Copy, Default)]
struct Known {
    first: Option<Outcome>,
    /// Some send may have been applied, or may be yet.
    any_unknown: bool,
}

impl Known {
    fn is_definite(&self) -> bool {
        self.first.is_some() || !self.any_unknown
    }
}

impl Caller {
    pub(super) fn with_token(&mut self, request: &Request) {
        let ids = self.ask(request);
        let token = format!("\"op-{}\"", ids[0]);
        let begun = Instant::now();
        let mut gateway = self.rng.index(self.clients.len());
        let mut known = vec![Known::default(); ids.len()];
        let mut sends = Vec::new();
        for number in 1.. {
            let deadline = if number == 1 { self.deadline() } else { DEADLINE };
            let sent = self.send(gateway, request, Some(&token), deadline);
            self.shared.counts.sends_with_token.fetch_add(1, Ordering::Relaxed);
            sends.push(sent.told.clone());
            if sent.reused > 0 {
                self.shared.surprise(format!("token {token} is nobody else's: {sends:?}"));
            }
            self.compare(&token, &known, &sent);
            for (at, &outcome) in sent.outcomes.iter().enumerate() {
                match outcome {
                    Outcome::Applied(_) if known[at].first.is_none() => {
                        known[at].first = Some(outcome);
                        self.shared.recorder.answer(ids[at], outcome, &json!(sends));
                    }
                    Outcome::Unknown => known[at].any_unknown = true,
                    _ => {}
                }
            }
            let definite = known.iter().all(Known::is_definite);
            if definite && number >= SENDS_MIN || begun.elapsed() > PATIENCE {
                break;
            }
            if !all_applied(&sent) {
                std::thread::sleep(PAUSE);
            }
            gateway = (gateway + 1) % self.clients.len();
        }
        for (id, known) in ids.iter().zip(&known) {
            if known.first.is_none() {
                // "Not applied" speaks of one request, not of those before it with the same token.
                let outcome =
                    if known.any_unknown { Outcome::Unknown } else { Outcome::NotApplied };
                self.shared.recorder.answer(*id, outcome, &json!(sends));
            }
        }
        let applied = known.iter().all(|known| known.first.is_some());
        if applied && self.rng.percent(REUSED_PERCENT) {
            let other = self.shared.pools().another(request, &self.shared.recorder);
            if let Some(other) = other {
                self.reuse(&token, &other);
            }
        }
    }

    /// A token's later answers are the first one's, and say that they are; the first one's does not.
    fn compare(&self, token: &str, known: &[Known], sent: &Sent) {
        let mut any_new = false;
        for (known, outcome) in known.iter().zip(&sent.outcomes) {
            let Outcome::Applied(_) = outcome else { continue };
            match known.first {
                Some(first) if first != *outcome => self
                    .shared
                    .surprise(format!("token {token} was told {first:?}, then {outcome:?}")),
                Some(_) => {}
                None => any_new = true,
            }
            if known.is_definite() && known.first.is_none() && sent.is_replay {
                self.shared.surprise(format!("token {token}: a replay of what never was"));
            }
        }
        if all_applied(sent) && !any_new {
            self.shared.counts.replays.fetch_add(1, Ordering::Relaxed);
            if !sent.is_replay {
                self.shared.surprise(format!("token {token}: a replay that does not say so"));
            }
        }
    }

    /// Another request with a token that was applied. It is in the history as not applied whatever
    /// its sends are told: its client may not know, but nothing of it is ever counted.
    fn reuse(&mut self, token: &str, other: &Request) {
        let ids = self.ask(other);
        let begun = Instant::now();
        let mut gateway = self.rng.index(self.clients.len());
        let mut sends: Vec<Value> = Vec::new();
        let mut outcomes = vec![Outcome::NotApplied; ids.len()];
        loop {
            let sent = self.send(gateway, other, Some(token), DEADLINE);
            self.shared.counts.sends_with_token.fetch_add(1, Ordering::Relaxed);
            sends.push(sent.told.clone());
            for (known, outcome) in outcomes.iter_mut().zip(&sent.outcomes) {
                if matches!(outcome, Outcome::Applied(_)) {
                    *known = *outcome;
                    self.shared.surprise(format!("token {token} was applied for another request"));
                }
            }
            if sent.reused == ids.len() {
                self.shared.counts.reused.fetch_add(1, Ordering::Relaxed);
                break;
            }
            if begun.elapsed() > REUSE_PATIENCE {
                break;
            }
            std::thread::sleep(PAUSE);
            gateway = (gateway + 1) % self.clients.len();
        }
        for (id, outcome) in ids.into_iter().zip(outcomes) {
            self.shared.recorder.answer(id, outcome, &json!({"reuses": token, "sends": sends}));
        }
    }
}

impl Pools {
    /// Another request that the same token may be tried with: for the same counters, so that the
    /// same shards know the token. None if one of them has had all its adds.
    fn another(&mut self, request: &Request, recorder: &Recorder) -> Option<Request> {
        let mut digit = |counter| {
            let at = self.digits.iter().position(|&(used, _)| used == counter)?;
            Some(self.take_digit(at, recorder))
        };
        match *request {
            Request::Many { ref items } => {
                let items = items.iter().map(|&(counter, _)| digit(counter));
                Some(Request::Many { items: items.collect::<Option<_>>()? })
            }
            Request::One { counter, ask: Ask::Delete } => {
                Some(Request::One { counter, ask: Ask::Add { delta: 1 } })
            }
            Request::One { counter, .. } => {
                let (counter, delta) = digit(counter)?;
                Some(Request::One { counter, ask: Ask::Add { delta } })
            }
        }
    }
}

fn all_applied(sent: &Sent) -> bool {
    sent.outcomes.iter().all(|outcome| matches!(outcome, Outcome::Applied(_)))
}
