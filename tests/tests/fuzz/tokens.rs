//! Under one token nothing is applied twice, whatever clocks show and however long an attempt is in
//! flight.
//!
//! A shard with its clock and its records, as a primary moves them, and clients that obey their
//! part of the contract: they state when a request was issued and may send at any time, or they
//! state nothing and send within the window. Windows, buckets, rates of clocks, jumps of the wall
//! clock by days and delays are drawn. The test must fail without each of the rules that make this
//! hold.

use std::collections::BTreeMap;

use engine::ids::{Now, Slots, TimeMs};
use engine::planted::Planted;
use engine::replica::clock::ShardClock;
use engine::shard::idempotency::{
    Buckets, IssueTime, Scope, Tag, TokenLimits, TokenRecord, TokenSettings, TokenVerdict,
    TokenedRequest,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::config;

/// All times in thousandths of a window, so that they interact whatever the window is.
#[derive(Clone, Debug)]
enum Step {
    /// Real time passes, and the primary orders an entry at its end: an `expire` if one is due.
    Pass(u64),
    /// The wall clock is set forwards or backwards by this much.
    SetWallClock(i64),
    /// Another primary takes over.
    Takeover,
    /// A client sends, and its attempt is in flight for `delay`. Its own clock is ahead by `ahead`
    /// at the first one.
    Send { token: u8, delay: u64, ahead: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let far = prop_oneof![Just(1_000i64), Just(100_000), Just(1_000_000_000)];
    prop_oneof![
        6 => (1..1_300u64).prop_map(Step::Pass),
        6 => (1..90u64).prop_map(Step::Pass),
        2 => (far, -1_000..1_000i64).prop_map(|(far, part)| Step::SetWallClock(far * part / 1_000)),
        1 => Just(Step::Takeover),
        9 => (0..6u8, prop_oneof![Just(0), 0..1_500u64], prop_oneof![Just(0), 0..9_000u64])
            .prop_map(|(token, delay, ahead)| Step::Send { token, delay, ahead }),
    ]
}

fn settings() -> impl Strategy<Value = TokenSettings> {
    let window = prop_oneof![300..5_000u64, Just(3_600_000), Just(604_800_000)];
    (window, 1..40u32).prop_map(|(window_ms, buckets)| TokenSettings {
        window_ms,
        buckets,
        ..TokenSettings::default()
    })
}

/// An attempt in flight: the earliest time at which it is applied, in real time.
struct Attempt {
    due_ms: u64,
    token: u8,
    issued: IssueTime,
}

struct World {
    limits: TokenLimits,
    real_ms: u64,
    wall_ahead_ms: i64,
    clock: ShardClock,
    time: TimeMs,
    buckets: Buckets,
    records: BTreeMap<u8, TokenRecord>,
    under_way: Vec<Attempt>,
    /// For each token: when it was first sent, in real time, and the stated issue time.
    first: BTreeMap<u8, (u64, TimeMs)>,
    done: BTreeMap<u8, u32>,
}

impl World {
    fn new(settings: TokenSettings, planted: Option<Planted>) -> Self {
        let limits = TokenLimits { settings, planted };
        Self {
            limits,
            real_ms: 0,
            wall_ahead_ms: 0,
            clock: ShardClock::new(Now(0)),
            time: TimeMs(0),
            buckets: Buckets::default(),
            records: BTreeMap::new(),
            under_way: Vec::new(),
            first: BTreeMap::new(),
            done: BTreeMap::new(),
        }
    }

    fn wall(&self) -> TimeMs {
        TimeMs((1_700_000_000_000 + self.real_ms).saturating_add_signed(self.wall_ahead_ms))
    }

    fn of_window(&self, thousandths: u64) -> u64 {
        (self.limits.settings.window_ms * thousandths / 1_000).max(1)
    }

    /// The primary orders an entry.
    fn entry(&mut self) {
        let (wall, now) = (self.wall(), Now(self.real_ms * 1_000));
        let next = self.clock.next(self.time, Some(wall), now, self.limits.leap_ms());
        self.buckets.advance_time(&self.limits, self.time, next);
        self.time = next;
        for bucket in self.buckets.to_expire(&self.limits, self.time) {
            self.buckets.expire(&self.limits, self.time, bucket);
        }
        let (due, later) = std::mem::take(&mut self.under_way)
            .into_iter()
            .partition(|attempt| attempt.due_ms <= self.real_ms);
        self.under_way = later;
        Vec::into_iter(due).for_each(|attempt| self.apply(&attempt));
    }

    fn apply(&mut self, attempt: &Attempt) {
        let tag = Tag { scope: Scope::Counter, hash: attempt.token.into(), fingerprint: 1 };
        let asked = TokenedRequest { tag, issued: attempt.issued, namespace: b"n", values: 0 };
        let found = self.records.get(&attempt.token);
        let verdict = self.buckets.judge(&self.limits, (Slots::ALL, self.time), asked, found);
        if let TokenVerdict::Apply { bucket } = verdict {
            self.buckets.add(&self.limits, b"n", bucket, (1, 40));
            let record = TokenRecord { bucket, fingerprint: 1, values: vec![] };
            self.records.insert(attempt.token, record);
            *self.done.entry(attempt.token).or_default() += 1;
        }
    }

    /// Tokens of even numbers state when they were issued.
    fn send(&mut self, token: u8, delay: u64, ahead: u64) {
        let stated = TimeMs(self.wall().0 + self.of_window(ahead));
        let now = (self.real_ms, stated);
        let (began, issued) = *self.first.entry(token).or_insert(now);
        let issued = match token.is_multiple_of(2) {
            true => IssueTime::Stated(issued),
            false => IssueTime::Arrived(self.time),
        };
        if token % 2 == 1 && self.real_ms - began > self.limits.settings.window_ms {
            return;
        }
        let due_ms = self.real_ms + if delay == 0 { 0 } else { self.of_window(delay) };
        self.under_way.push(Attempt { due_ms, token, issued });
        self.entry();
    }

    /// A primary orders an entry this often where there are records.
    fn pass(&mut self, thousandths: u64) {
        let end = self.real_ms + self.of_window(thousandths);
        while self.real_ms < end {
            self.real_ms = end.min(self.real_ms + self.limits.bucket_ms());
            self.entry();
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Pass(thousandths) => self.pass(thousandths),
            Step::SetWallClock(thousandths) => {
                let window = i128::from(self.limits.settings.window_ms);
                let by = window * i128::from(thousandths) / 1_000;
                let century = 3_000_000_000_000i128;
                let ahead = i128::from(self.wall_ahead_ms) + by;
                self.wall_ahead_ms = ahead.clamp(-century / 2, century) as i64;
            }
            Step::Takeover => self.clock = ShardClock::new(Now(self.real_ms * 1_000)),
            Step::Send { token, delay, ahead } => self.send(token, delay, ahead),
        }
    }
}

/// Returns the token that was applied twice, if there is one.
fn twice(settings: TokenSettings, steps: Vec<Step>, planted: Option<Planted>) -> Option<u8> {
    let mut world = World::new(settings, planted);
    for step in steps {
        world.step(step);
    }
    world.done.iter().find(|(_, times)| **times > 1).map(|(&token, _)| token)
}

#[test]
fn under_one_token_nothing_is_done_twice() {
    TestRunner::new(config())
        .run(&(settings(), vec(step(), 0..60)), |(settings, steps)| {
            prop_assert_eq!(twice(settings, steps, None), None);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

/// Each of the rules is needed, and the test notices when it is missing.
#[cfg(feature = "planted-bugs")]
#[test]
fn without_one_of_the_rules_something_is() {
    for planted in [
        Planted::BucketIgnoresIssueTime,
        Planted::IssueTimeClamped,
        Planted::LeapAgesRecords,
        Planted::ExpireTooEarly,
        Planted::IssueTimeNotJudged,
    ] {
        let found = TestRunner::new(config()).run(
            &(settings(), vec(step(), 0..60)),
            |(settings, steps)| {
                prop_assert_eq!(twice(settings, steps, Some(planted)), None);
                Ok(())
            },
        );
        assert!(found.is_err(), "{planted:?} is not missed");
    }
}
