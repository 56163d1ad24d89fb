//! A client's ledger: the adds it sent, and the outcome of each.
//!
//! The i-th add to a counter has delta 4^i, so a value read shows exactly which adds it holds, and
//! one that was applied twice shows as a digit above 1. The ledger is a file written as things
//! happen, so it survives the process; each line is one write, which a kill may cut short.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use engine::key::CounterKey;

/// The last add that a counter takes: 4^60 leaves room in an i128.
pub(crate) const ADDS_MAX: u32 = 60;

pub(crate) struct Ledger {
    file: File,
    pub(crate) counters: BTreeMap<u32, Counter>,
    /// The last group of each store that was reported as durable.
    pub(crate) durable: [u64; 2],
}

/// Bit i stands for the i-th add.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Counter {
    pub(crate) sent: u64,
    /// Acknowledged, or seen by a read: it must be there for ever.
    pub(crate) there: u64,
    /// Seen to be missing by a read after its session had ended: it must never come back.
    pub(crate) gone: u64,
}

impl Counter {
    pub(crate) fn next_add(&self) -> Option<u32> {
        let next = 64 - self.sent.leading_zeros();
        (next < ADDS_MAX).then_some(next)
    }
}

pub(crate) fn counter_key(counter: u32) -> CounterKey {
    // Some names are too long for a line of the table.
    let tail = if counter.is_multiple_of(7) { "-a-long-name".repeat(4) } else { String::new() };
    CounterKey::new(b"ns", format!("{counter}{tail}").as_bytes()).unwrap()
}

pub(crate) fn delta(add: u32) -> i128 {
    1 << (2 * add)
}

impl Ledger {
    pub(crate) fn open(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        // The process may have died within the last line: the next line must not continue it.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64).unwrap();
        let mut ledger = Self { file, counters: BTreeMap::new(), durable: [0; 2] };
        for line in text[..whole].lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| words[at].parse::<u64>().unwrap();
            match words[0] {
                "durable" => ledger.durable[number(1) as usize] = number(2),
                word => ledger.note(word, number(1) as u32, number(2)),
            }
        }
        ledger
    }

    fn note(&mut self, word: &str, counter: u32, adds: u64) {
        let counter = self.counters.entry(counter).or_default();
        match word {
            "sent" => counter.sent |= adds,
            "there" => counter.there |= adds,
            "gone" => counter.gone |= adds,
            other => panic!("unknown word in the ledger: {other}"),
        }
    }

    fn write(&mut self, text: &str) {
        self.file.write_all(text.as_bytes()).unwrap();
    }

    /// Writes what happened to these adds, in one step.
    pub(crate) fn note_adds(&mut self, word: &str, adds: &[(u32, u32)]) {
        let line = |&(counter, add): &(u32, u32)| format!("{word} {counter} {}\n", 1u64 << add);
        let text: String = adds.iter().map(line).collect();
        self.write(&text);
        for &(counter, add) in adds {
            self.note(word, counter, 1 << add);
        }
    }

    pub(crate) fn durable(&mut self, store: usize, group: u64) {
        self.write(&format!("durable {store} {group}\n"));
        self.durable[store] = group;
    }

    /// Checks the value of a read, once nothing is in flight. The outcome of every add is known
    /// after it.
    pub(crate) fn check(&mut self, counter: u32, value: i128) {
        let known = self.counters[&counter];
        let mut seen = 0u64;
        for add in 0..64 {
            match (value >> (2 * add)) & 3 {
                0 => {}
                1 => seen |= 1 << add,
                _ => panic!("counter {counter}: add {add} was applied twice, value {value:x}"),
            }
        }
        let lost = known.there & !seen;
        assert_eq!(lost, 0, "counter {counter}: acknowledged adds are gone (bits {lost:x})");
        let strange = seen & !known.sent;
        assert_eq!(strange, 0, "counter {counter}: adds nobody sent (bits {strange:x})");
        let back = seen & known.gone;
        assert_eq!(back, 0, "counter {counter}: adds came back (bits {back:x})");
        let words = [("there", seen & !known.there), ("gone", known.sent & !seen & !known.gone)];
        for (word, adds) in words {
            if adds != 0 {
                self.write(&format!("{word} {counter} {adds}\n"));
                self.note(word, counter, adds);
            }
        }
    }
}
