//! Requests with an `Idempotency-Key`: each is sent at least three times, through both gateways in
//! turn, until its outcome is definite. Sometimes the same key is then sent with another request,
//! which must be refused and never counted.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::request::{SendOutcome, WorkloadRequest};
use super::{Caller, Pools};
use crate::chaos::recorder::Recorder;
use crate::sim::history::{Ask, OpOutcome};

const SENDS_MIN: u32 = 3;
/// The time after which a request is given up, with an unknown outcome.
const PATIENCE: Duration = Duration::from_secs(90);
const DEADLINE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);
/// The percentage of applied requests whose token is used again for another request.
const REUSED_PERCENT: u64 = 25;
const REUSE_PATIENCE: Duration = Duration::from_secs(20);

/// The knowledge about one operation of a request after some sends.
#[derive(Clone, Copy, Default)]
struct KnownOutcome {
    first: Option<OpOutcome>,
    /// True if some send may have been applied, or may still be.
    any_unknown: bool,
}

impl KnownOutcome {
    fn is_definite(&self) -> bool {
        self.first.is_some() || !self.any_unknown
    }
}

impl Caller {
    pub(super) fn with_token(&mut self, request: &WorkloadRequest) {
        let ids = self.ask(request);
        let token = format!("\"op-{}\"", ids[0]);
        let begun = Instant::now();
        let mut gateway = self.rng.index(self.clients.len());
        let mut known = vec![KnownOutcome::default(); ids.len()];
        let mut sends = Vec::new();
        for number in 1.. {
            let deadline = if number == 1 { self.deadline() } else { DEADLINE };
            let sent = self.send(gateway, request, Some(&token), deadline);
            self.shared.counts.sends_with_token.fetch_add(1, Ordering::Relaxed);
            sends.push(sent.record.clone());
            if sent.reused > 0 {
                self.shared.surprise(format!("token {token} has no other request: {sends:?}"));
            }
            self.compare(&token, &known, &sent);
            for (at, &outcome) in sent.outcomes.iter().enumerate() {
                match outcome {
                    OpOutcome::Applied(_) if known[at].first.is_none() => {
                        known[at].first = Some(outcome);
                        self.shared.recorder.answer(ids[at], outcome, &json!(sends));
                    }
                    OpOutcome::Unknown => known[at].any_unknown = true,
                    _ => {}
                }
            }
            let definite = known.iter().all(KnownOutcome::is_definite);
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
                // "Not applied" is about one send, not about earlier ones with the same token.
                let outcome =
                    if known.any_unknown { OpOutcome::Unknown } else { OpOutcome::NotApplied };
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

    /// Checks that later answers under a token equal the first one and are marked as replays, and
    /// that the first one is not marked.
    fn compare(&self, token: &str, known: &[KnownOutcome], sent: &SendOutcome) {
        let mut any_new = false;
        for (known, outcome) in known.iter().zip(&sent.outcomes) {
            let OpOutcome::Applied(_) = outcome else { continue };
            match known.first {
                Some(first) if first != *outcome => self
                    .shared
                    .surprise(format!("token {token} was answered {first:?}, then {outcome:?}")),
                Some(_) => {}
                None => any_new = true,
            }
            if known.is_definite() && known.first.is_none() && sent.is_replay {
                self.shared
                    .surprise(format!("token {token}: a replay of a request that was not applied"));
            }
        }
        if all_applied(sent) && !any_new {
            self.shared.counts.replays.fetch_add(1, Ordering::Relaxed);
            if !sent.is_replay {
                self.shared.surprise(format!("token {token}: a replay that is not marked as one"));
            }
        }
    }

    /// Sends another request with a token that was applied. It is in the history as not applied,
    /// whatever the outcome of its sends: the client may get no answer, but it must never be
    /// counted.
    fn reuse(&mut self, token: &str, other: &WorkloadRequest) {
        let ids = self.ask(other);
        let begun = Instant::now();
        let mut gateway = self.rng.index(self.clients.len());
        let mut sends: Vec<Value> = Vec::new();
        let mut outcomes = vec![OpOutcome::NotApplied; ids.len()];
        loop {
            let sent = self.send(gateway, other, Some(token), DEADLINE);
            self.shared.counts.sends_with_token.fetch_add(1, Ordering::Relaxed);
            sends.push(sent.record.clone());
            for (known, outcome) in outcomes.iter_mut().zip(&sent.outcomes) {
                if matches!(outcome, OpOutcome::Applied(_)) {
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
    /// Returns another request for the same counters, so that the same shards know the token.
    /// Returns `None` if one of the counters has had all its adds.
    fn another(
        &mut self,
        request: &WorkloadRequest,
        recorder: &Recorder,
    ) -> Option<WorkloadRequest> {
        let mut digit = |counter| {
            let at = self.digits.iter().position(|&(used, _)| used == counter)?;
            Some(self.take_digit(at, recorder))
        };
        match *request {
            WorkloadRequest::Many { ref items } => {
                let items = items.iter().map(|&(counter, _)| digit(counter));
                Some(WorkloadRequest::Many { items: items.collect::<Option<_>>()? })
            }
            WorkloadRequest::One { counter, ask: Ask::Delete } => {
                Some(WorkloadRequest::One { counter, ask: Ask::Add { delta: 1 } })
            }
            WorkloadRequest::One { counter, .. } => {
                let (counter, delta) = digit(counter)?;
                Some(WorkloadRequest::One { counter, ask: Ask::Add { delta } })
            }
        }
    }
}

fn all_applied(sent: &SendOutcome) -> bool {
    sent.outcomes.iter().all(|outcome| matches!(outcome, OpOutcome::Applied(_)))
}
