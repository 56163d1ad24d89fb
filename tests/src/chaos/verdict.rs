//! The result of a run: checks every promise and prints the table.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use super::nemesis::FaultSpan;
use super::probes::{longest_gap, silences};
use crate::cluster::load::Probe;
use crate::sim::checker::{self, Violation};
use crate::sim::history::{Ask, ClientHistory, OpOutcome};

/// The time after a fault during which it still explains a silence: an election, a lease that
/// expires.
const AFTERMATH: Duration = Duration::from_secs(3);

/// The promises as named in the table, each with the names that the checkers give to its
/// violations.
const PROMISES: &[(&str, &[&str])] = &[
    ("lost", &["lost"]),
    ("doubled", &["twice"]),
    ("counted though refused", &["not-applied"]),
    ("stale, or in no order", &["linearizable"]),
    ("bounded read too old", &["bounded"]),
    ("outside applied ≤ value ≤ applied + unknown", &["bounds"]),
    ("answers against the contract", &["answers"]),
    ("processes that ended by themselves, or not as they should", &["ends"]),
    ("not healed, or copies that differ", &["heals"]),
    ("silent for long though no fault explains it", &["silence"]),
    ("whole copies sent again and again", &["copies"]),
];

/// Returns every violation that a client could observe.
pub fn judge(history: &ClientHistory, probes: &[Probe]) -> Vec<Violation> {
    let mut violations = Vec::new();
    checker::lost::check(history, &mut violations);
    checker::twice::check(history, &mut violations);
    checker::refused::check(history, &mut violations);
    checker::linearizable::check(history, &mut violations);
    checker::bounded::check(history, &mut violations);
    let wrong = probes.iter().flat_map(|probe| &probe.wrong);
    violations.extend(wrong.map(|detail| broken("bounds", detail)));
    violations
}

/// The maximum silence of a shard while no fault is active; a tenth of it is usual. Time during
/// which this machine was stalled does not count.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Returns the shards that were silent for too long, with no fault in `spans` that explains it.
pub fn judge_silence(
    probes: &[Probe],
    spans: &[FaultSpan],
    stalled: impl Fn(Instant, Instant) -> Duration,
) -> Vec<Violation> {
    let faults: Vec<_> = spans.iter().map(reach).collect();
    let mut violations = Vec::new();
    for probe in probes {
        for (begun, ended) in silences(probe, &faults) {
            let length = (ended - begun).saturating_sub(stalled(begun, ended));
            if length > SILENCE_MAX {
                let seconds = length.as_secs_f32();
                let detail = format!("{}: no answer for {seconds:.1} s, with no fault", probe.key);
                violations.push(broken("silence", &detail));
            }
        }
    }
    violations
}

/// The maximum number of snapshots of a shard that a node receives, and the same again per fault. A
/// snapshot whose transfer is interrupted or late is sent once more; one that never succeeds would
/// be sent for ever, which heals nothing and wears the disk.
const COPIES_MAX: usize = 2;

/// Returns the shards of which a node has received too many snapshots. `logs` has name and log of
/// each node.
pub fn judge_copies(logs: &[(String, String)], faults: usize) -> Vec<Violation> {
    let most = COPIES_MAX * (1 + faults);
    let mut violations = Vec::new();
    for (node, log) in logs {
        let mut received: BTreeMap<&str, usize> = BTreeMap::new();
        for line in log.lines().filter(|line| line.contains("snapshot received")) {
            let shard = line.split_whitespace().find(|word| word.starts_with("shard="));
            *received.entry(shard.unwrap_or("no shard")).or_default() += 1;
        }
        for (shard, count) in received.into_iter().filter(|&(_, count)| count > most) {
            let detail = format!("{node}: {count} copies of {shard} after {faults} faults");
            violations.push(broken("copies", &detail));
        }
    }
    violations
}

pub fn broken(promise: &'static str, detail: &str) -> Violation {
    Violation { promise, detail: detail.to_owned() }
}

/// The contents of the table.
pub struct RunSummary<'a> {
    pub history: &'a ClientHistory,
    pub probes: &'a [Probe],
    pub spans: &'a [FaultSpan],
    pub violations: &'a [Violation],
    /// Further lines with counts from elsewhere.
    pub facts: &'a [(&'static str, String)],
}

impl RunSummary<'_> {
    pub fn table(&self) -> String {
        let mut text = String::new();
        self.operations(&mut text);
        self.faults(&mut text);
        for (fact, value) in self.facts {
            line(&mut text, fact, value);
        }
        for (promise, names) in PROMISES {
            let count = self.violations.iter().filter(|one| names.contains(&one.promise)).count();
            line(&mut text, promise, &count.to_string());
        }
        text
    }

    fn operations(&self, text: &mut String) {
        let mut by_kind: BTreeMap<&str, [u64; 3]> = BTreeMap::new();
        for op in &self.history.ops {
            let kind = match (op.ask, op.answer) {
                (Ask::Add { .. }, _) => "adds",
                (Ask::AddReturning { .. }, _) => "adds that return the value",
                (Ask::Delete, _) => "deletes",
                (Ask::Read, _) => "reads",
            };
            let at = match op.answer {
                Some((_, OpOutcome::Applied(_) | OpOutcome::Stale { .. })) => 0,
                Some((_, OpOutcome::NotApplied)) => 1,
                Some((_, OpOutcome::Unknown)) | None => 2,
            };
            by_kind.entry(kind).or_default()[at] += 1;
        }
        let mut probed = [0; 3];
        for op in self.probes.iter().flat_map(|probe| &probe.ops) {
            use crate::cluster::http::HttpOutcome::{Applied, NotApplied, Unknown};
            probed[match op.outcome {
                Applied => 0,
                NotApplied(_) => 1,
                Unknown(_) => 2,
            }] += 1;
        }
        by_kind.insert("probes of each shard", probed);
        row(text, ["operations", "applied", "not applied", "unknown"]);
        let mut total = [0; 3];
        for (kind, counts) in by_kind {
            let [applied, refused, unknown] = counts.map(|count| count.to_string());
            row(text, [kind, &applied, &refused, &unknown]);
            total = [0, 1, 2].map(|at| total[at] + counts[at]);
        }
        let [applied, refused, unknown] = total.map(|count| count.to_string());
        row(text, ["all", &applied, &refused, &unknown]);
    }

    fn faults(&self, text: &mut String) {
        let mut by_kind: BTreeMap<&str, Vec<(Instant, Instant)>> = BTreeMap::new();
        for span in self.spans {
            by_kind.entry(span.kind).or_default().push(reach(span));
        }
        text.push('\n');
        row(text, ["faults", "times", "longest without an answer", "of these alone"]);
        for (kind, spans) in &by_kind {
            let others = self.spans.iter().filter(|other| other.kind != *kind).map(reach);
            let others: Vec<_> = others.collect();
            let gap = |gap: Duration| match gap {
                Duration::ZERO => "-".to_owned(),
                gap => format!("{:.1} s", gap.as_secs_f32()),
            };
            let longest = gap(longest_gap(self.probes, spans, &[]));
            let alone = gap(longest_gap(self.probes, spans, &others));
            row(text, [kind, &spans.len().to_string(), &longest, &alone]);
        }
        row(text, ["all", &self.spans.len().to_string(), "", ""]);
        text.push('\n');
    }
}

/// Returns the time during which a fault may explain a silence.
fn reach(span: &FaultSpan) -> (Instant, Instant) {
    (span.begun, span.healed + AFTERMATH)
}

fn row(text: &mut String, [first, a, b, c]: [&str; 4]) {
    writeln!(text, "{first:<30} {a:>10} {b:>26} {c:>15}").expect("memory");
}

fn line(text: &mut String, what: &str, value: &str) {
    writeln!(text, "{what:<60} {value}").expect("memory");
}

/// Histories with one violation each, since a verdict that never reports a violation is worthless.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::history::{CounterUse, DIGITS_MAX};

    /// A request and its outcome; the requests are sequential.
    type Exchange = (Ask, OpOutcome);

    const APPLIED: OpOutcome = OpOutcome::Applied(None);

    fn add(digit: u32) -> Ask {
        assert!(digit < DIGITS_MAX);
        Ask::Add { delta: 1 << (2 * digit) }
    }

    fn value(value: i128) -> OpOutcome {
        OpOutcome::Applied(Some(value))
    }

    /// Each operation takes a step and a microsecond.
    fn history(used: CounterUse, exchanges: &[Exchange]) -> ClientHistory {
        let mut history = ClientHistory::default();
        let counter = history.new_counter(used);
        for (at, &(ask, outcome)) in (0..).zip(exchanges) {
            let id = history.ask(2 * at, counter, ask);
            history.answer(2 * at + 1, 2 * at + 1, id, outcome);
        }
        history
    }

    #[track_caller]
    fn check(used: CounterUse, exchanges: &[Exchange], want: &[&str]) {
        let violations = judge(&history(used, exchanges), &[]);
        let mut promises: Vec<_> = violations.iter().map(|one| one.promise).collect();
        promises.dedup();
        assert_eq!(promises, want, "{violations:?}");
        let known = |name| PROMISES.iter().any(|(_, names)| names.contains(name));
        assert!(promises.iter().all(known), "the table leaves out one of {promises:?}");
    }

    #[test]
    fn a_true_history_breaks_nothing() {
        let exchanges = [
            (add(0), APPLIED),
            (add(1), OpOutcome::NotApplied),
            (add(2), OpOutcome::Unknown),
            (Ask::Read, value(1)),
            (Ask::Read, value(0x11)),
            (Ask::AddReturning { delta: 0x40 }, value(0x51)),
        ];
        check(CounterUse::Digits, &exchanges, &[]);
        let exchanges = [
            (Ask::AddReturning { delta: 5 }, value(5)),
            (Ask::Delete, value(5)),
            (Ask::Read, value(0)),
        ];
        check(CounterUse::Mixed, &exchanges, &[]);
    }

    #[test]
    fn a_lost_add_is_noticed() {
        check(CounterUse::Digits, &[(add(0), APPLIED), (Ask::Read, value(0))], &["lost"]);
    }

    #[test]
    fn an_add_counted_twice_is_noticed() {
        check(CounterUse::Digits, &[(add(0), APPLIED), (Ask::Read, value(2))], &["twice"]);
        // The effect of a forgotten token: the client sent one operation.
        let exchanges = [(Ask::AddReturning { delta: 3 }, value(3)), (Ask::Read, value(6))];
        check(CounterUse::Mixed, &exchanges, &["linearizable"]);
    }

    #[test]
    fn a_refused_add_that_counts_is_noticed() {
        let exchanges = [(add(0), OpOutcome::NotApplied), (Ask::Read, value(1))];
        check(CounterUse::Digits, &exchanges, &["not-applied"]);
        check(CounterUse::Mixed, &exchanges, &["linearizable"]);
    }

    #[test]
    fn a_value_that_no_requests_explain_is_noticed() {
        check(CounterUse::Digits, &[(add(0), APPLIED), (Ask::Read, value(5))], &["not-applied"]);
    }

    #[test]
    fn a_read_that_forgets_an_earlier_one_is_noticed() {
        let exchanges =
            [(add(0), OpOutcome::Unknown), (Ask::Read, value(1)), (Ask::Read, value(0))];
        check(CounterUse::Digits, &exchanges, &["linearizable"]);
    }

    #[test]
    fn a_delete_that_deleted_nothing_is_noticed() {
        let exchanges = [(add(0), APPLIED), (Ask::Delete, value(1)), (Ask::Read, value(1))];
        check(CounterUse::Mixed, &exchanges, &["linearizable"]);
    }

    #[test]
    fn a_bounded_read_older_than_its_stated_age_is_noticed() {
        let old = OpOutcome::Stale { value: 0, as_of: 10 };
        check(CounterUse::Digits, &[(add(0), APPLIED), (Ask::Read, old)], &["bounded"]);
        let young = OpOutcome::Stale { value: 0, as_of: 0 };
        check(CounterUse::Digits, &[(add(0), APPLIED), (Ask::Read, young)], &[]);
    }

    /// A prober gets answers at 100 s and at 130 s. `fault` is the time of a fault, `stalled` the
    /// time in seconds during which this machine was stalled.
    #[track_caller]
    fn check_silence(fault: (u64, u64), stalled: u64, want: usize) {
        use crate::cluster::http::HttpOutcome::Applied;
        let zero = Instant::now();
        let at = |second| zero + Duration::from_secs(second);
        let op = |second| crate::cluster::load::ProbeOp {
            sent: at(second),
            done: at(second),
            is_read: false,
            outcome: Applied,
        };
        let probe = Probe { ops: vec![op(100), op(130), op(131)], ..Probe::default() };
        let span = FaultSpan { kind: "kill", begun: at(fault.0), healed: at(fault.1) };
        let stalls = |_, _| Duration::from_secs(stalled);
        assert_eq!(judge_silence(&[probe], &[span], stalls).len(), want);
    }

    #[test]
    fn a_silence_that_no_fault_explains_is_noticed() {
        check_silence((10, 20), 0, 1);
        check_silence((140, 150), 0, 1);
        check_silence((110, 111), 0, 0);
        // The silence is within the aftermath of the fault.
        check_silence((90, 99), 0, 0);
        check_silence((10, 20), 11, 0);
    }

    #[test]
    fn copies_sent_again_and_again_are_noticed() {
        let log = |count: usize| {
            let line = "INFO snapshot received shard=3 transfer=7 from=00ff\n".repeat(count);
            [("node-1".to_owned(), format!("{line}INFO snapshot received shard=4 transfer=1\n"))]
        };
        assert_eq!(judge_copies(&log(6), 2).len(), 0);
        assert_eq!(judge_copies(&log(7), 2).len(), 1);
        assert_eq!(judge_copies(&log(7), 3).len(), 0);
    }

    #[test]
    fn a_probe_outside_its_bounds_is_noticed() {
        let mut probe = Probe { applied: 2, unknown: 1, ..Probe::default() };
        probe.check(2);
        probe.check(3);
        assert_eq!(judge(&ClientHistory::default(), std::slice::from_ref(&probe)).len(), 0);
        probe.check(1);
        probe.check(4);
        let violations = judge(&ClientHistory::default(), &[probe]);
        assert_eq!(violations.iter().filter(|one| one.promise == "bounds").count(), 2);
    }
}
