//! The counter table: committed changes between two flushes, one cache line per counter.
//!
//! Open addressing with linear probing: a counter's line holds 64 bits of its hash, its sum and its
//! name up to 38 bytes; a longer name lies in an arena and the line says where. So a hot counter
//! costs one memory access. The name is compared, never only the hash.
//!
//! What a newcomer gets wrong: a [`Cell::Delta`] is not a value. It is to be added to whatever lies
//! below: the frozen table, then the state. [`Cell::Absolute`] hides everything below.
//!
//! **Arithmetic wraps** (mod 2^128), here, in the state's merges and in the digest alike. Deltas are
//! i64 and sums i128, so no real counter gets there; but the order in which deltas are folded
//! differs between replicas (flushes and compactions do as they like), and only wrapping is
//! associative: with saturation two replicas could disagree.
//!
//! **Beside the counters lie the idempotency records** written since the last flush: few, so in an
//! ordered map. They share the table's budget and its fate, since an effect and its record must
//! reach the state in one step.
//!
//! Nothing is ever removed: a table is filled, frozen, written and dropped. Sorting is left to the
//! flush. Doubling moves every line, so a node that cares about its longest pause gives the table
//! its capacity at the start.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::idempotency::{Record, RecordId};
use crate::ids::Slot;
use crate::key;
use crate::memory;
use crate::planted::Planted;

/// The longest name kept in the line itself.
const INLINE_BYTES: usize = 38;
const LINE_BYTES: usize = 64;
/// What a record takes in the map beside the lines, without its values.
const RECORD_BYTES: usize = memory::of_map::<RecordId, Record>(6) / 6;
/// Lines of an empty table without a stated capacity.
const LINES_MIN: usize = 64;
/// What such a table takes.
pub const EMPTY_BYTES: usize = LINES_MIN * LINE_BYTES;

const DELTA: u8 = 1;
const ABSOLUTE: u8 = 2;
const LONG: u8 = 4;

/// What the table knows of one counter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cell {
    /// To be added to what lies below.
    Delta(i128),
    /// Hides everything below.
    Absolute(i128),
}

impl Cell {
    /// This cell on top of one below it.
    pub fn over(self, below: Self) -> Self {
        match (self, below) {
            (Self::Absolute(value), _) => Self::Absolute(value),
            (Self::Delta(delta), Self::Absolute(value)) => {
                Self::Absolute(value.wrapping_add(delta))
            }
            (Self::Delta(delta), Self::Delta(value)) => Self::Delta(value.wrapping_add(delta)),
        }
    }

    /// The counter's value when the state below holds `base` (a counter never touched is 0).
    pub fn value(self, base: Option<i128>) -> i128 {
        match self {
            Self::Absolute(value) => value,
            Self::Delta(delta) => base.unwrap_or(0).wrapping_add(delta),
        }
    }
}

/// One counter. `flags` 0 is an empty line. For a long name `name` begins with its place in the
/// arena (u64) and its length (u16), both little-endian.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line {
    sum: i128,
    hash: u64,
    flags: u8,
    len: u8,
    name: [u8; INLINE_BYTES],
}

const _: () = assert!(size_of::<Line>() == LINE_BYTES, "a counter is one cache line");

impl Line {
    const EMPTY: Self = Self { sum: 0, hash: 0, flags: 0, len: 0, name: [0; INLINE_BYTES] };

    fn is_empty(&self) -> bool {
        self.flags == 0
    }

    fn name<'a>(&'a self, arena: &'a [u8]) -> &'a [u8] {
        if self.flags & LONG == 0 {
            return &self.name[..usize::from(self.len)];
        }
        let mut at = [0; 8];
        at.copy_from_slice(&self.name[..8]);
        let at = u64::from_le_bytes(at) as usize;
        let len = usize::from(u16::from_le_bytes([self.name[8], self.name[9]]));
        &arena[at..at + len]
    }

    fn cell(&self) -> Cell {
        if self.flags & ABSOLUTE != 0 { Cell::Absolute(self.sum) } else { Cell::Delta(self.sum) }
    }

    fn slot(&self) -> Slot {
        Slot((self.hash >> 48) as u16)
    }
}

/// A table that is being filled.
#[derive(Clone)]
pub struct Table {
    /// A power of two of them, at most three quarters full, so that a probe always ends.
    lines: Vec<Line>,
    arena: Vec<u8>,
    len: usize,
    records: BTreeMap<RecordId, Record>,
    record_bytes: usize,
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl Table {
    pub fn new() -> Self {
        Self::with_capacity(0)
    }

    /// A table that takes this many counters without moving any.
    pub fn with_capacity(counters: usize) -> Self {
        let lines = (counters + counters / 3 + 1).next_power_of_two().max(LINES_MIN);
        Self {
            lines: vec![Line::EMPTY; lines],
            arena: Vec::new(),
            len: 0,
            records: BTreeMap::new(),
            record_bytes: 0,
        }
    }

    /// Counters in it.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory it takes.
    pub fn bytes(&self) -> usize {
        self.lines.len() * LINE_BYTES + memory::allocated(self.arena.capacity()) + self.record_bytes
    }

    /// The same, by looking at every record.
    fn walked_bytes(&self) -> usize {
        let values =
            |record: &Record| memory::allocated(record.values.capacity() * size_of::<i128>());
        memory::allocated(self.lines.capacity() * LINE_BYTES)
            + memory::allocated(self.arena.capacity())
            + memory::of_map::<RecordId, Record>(self.records.len())
            + self.records.values().map(values).sum::<usize>()
    }

    /// The next new counter may double the table, and so move every line.
    pub fn is_full(&self) -> bool {
        (self.len + 1) * 4 > self.lines.len() * 3
    }

    /// It holds as much as fits into `bytes_max`: it takes more, or would with the next counter.
    pub fn fills(&self, bytes_max: usize) -> bool {
        let lines = if self.is_full() { self.lines.len() * LINE_BYTES } else { 0 };
        // Long names may come by the thousand in one entry, so the arena counts as full at three quarters, too.
        let arena_full = self.arena.len() > self.arena.capacity() / 4 * 3;
        let arena = if arena_full { self.arena.capacity() } else { 0 };
        self.bytes() + lines + arena > bytes_max
    }

    /// Adds `delta` to the counter. `hash` is [`key::hash`] of its name, which the caller has.
    pub fn add(&mut self, name: &[u8], hash: u128, delta: i128) {
        let line = self.line(name, hash);
        line.sum = line.sum.wrapping_add(delta);
    }

    /// Sets the counter, whatever lies below.
    pub fn set(&mut self, name: &[u8], hash: u128, value: i128) {
        let line = self.line(name, hash);
        line.sum = value;
        line.flags = (line.flags & LONG) | ABSOLUTE;
    }

    pub fn get(&self, name: &[u8], hash: u128) -> Option<Cell> {
        let line = &self.lines[self.find(name, stored(hash))];
        (!line.is_empty()).then(|| line.cell())
    }

    /// Puts a record in the place of whatever was there.
    pub fn put_record(&mut self, id: RecordId, mut record: Record) {
        // It was filled by pushing, and would hold room for four values where there is one.
        record.values.shrink_to_fit();
        let values = |record: &Record| memory::allocated(size_of_val(record.values.as_slice()));
        let bytes = |record: &Record| RECORD_BYTES + values(record);
        self.record_bytes += bytes(&record);
        if let Some(old) = self.records.insert(id, record) {
            self.record_bytes -= bytes(&old);
        }
    }

    pub fn record(&self, id: RecordId) -> Option<&Record> {
        self.records.get(&id)
    }

    pub fn freeze(self) -> Frozen {
        Frozen { table: self }
    }

    /// Where the counter is, or the empty line where it belongs.
    fn find(&self, name: &[u8], hash: u64) -> usize {
        let mask = self.lines.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let line = &self.lines[at];
            if line.is_empty() || (line.hash == hash && line.name(&self.arena) == name) {
                return at;
            }
            at = (at + 1) & mask;
        }
    }

    /// The counter's line; a new one is a delta of 0.
    fn line(&mut self, name: &[u8], hash: u128) -> &mut Line {
        debug_assert_eq!(hash, key::hash(name), "the hash is the name's");
        let hash = stored(hash);
        let mut at = self.find(name, hash);
        if self.lines[at].is_empty() {
            if self.is_full() {
                self.double();
                at = self.find(name, hash);
            }
            self.lines[at] = self.new_line(name, hash);
            self.len += 1;
        }
        &mut self.lines[at]
    }

    fn new_line(&mut self, name: &[u8], hash: u64) -> Line {
        let mut line = Line { hash, flags: DELTA, ..Line::EMPTY };
        if name.len() <= INLINE_BYTES {
            line.name[..name.len()].copy_from_slice(name);
            line.len = name.len() as u8;
        } else {
            let len = u16::try_from(name.len()).expect("a checked name is at most 1,089 bytes");
            line.flags |= LONG;
            line.name[..8].copy_from_slice(&(self.arena.len() as u64).to_le_bytes());
            line.name[8..10].copy_from_slice(&len.to_le_bytes());
            self.arena.extend_from_slice(name);
        }
        line
    }

    fn double(&mut self) {
        let doubled = vec![Line::EMPTY; self.lines.len() * 2];
        let old = std::mem::replace(&mut self.lines, doubled);
        let mask = self.lines.len() - 1;
        for line in old.into_iter().filter(|line| !line.is_empty()) {
            let mut at = line.hash as usize & mask;
            while !self.lines[at].is_empty() {
                at = (at + 1) & mask;
            }
            self.lines[at] = line;
        }
    }
}

/// The upper half: the slot is its top 16 bits, the place in the table its lowest.
fn stored(hash: u128) -> u64 {
    (hash >> 64) as u64
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({} counters)", self.len)
    }
}

/// A table that no longer changes: what a flush writes.
#[derive(Clone, Default)]
pub struct Frozen {
    table: Table,
}

impl fmt::Debug for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frozen({} counters)", self.table.len)
    }
}

impl Frozen {
    pub fn get(&self, name: &[u8], hash: u128) -> Option<Cell> {
        self.table.get(name, hash)
    }

    pub fn len(&self) -> usize {
        self.table.len
    }

    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    pub fn bytes(&self) -> usize {
        self.table.bytes()
    }

    /// Every record, in the order of the state's keys: by slot, then by hash.
    pub fn records(&self) -> impl Iterator<Item = (RecordId, &Record)> {
        self.table.records.iter().map(|(&id, record)| (id, record))
    }

    /// Every counter, in the order of the state's keys: by slot, then by name.
    pub fn sorted(&self) -> impl Iterator<Item = (Slot, &[u8], Cell)> {
        let arena = &self.table.arena;
        let mut lines: Vec<&Line> =
            self.table.lines.iter().filter(|line| !line.is_empty()).collect();
        lines.sort_unstable_by(|a, b| {
            a.slot().cmp(&b.slot()).then_with(|| a.name(arena).cmp(b.name(arena)))
        });
        lines.into_iter().map(|line| (line.slot(), line.name(arena), line.cell()))
    }
}

/// What lies above the state: the table being filled, over the one being flushed.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    pub active: Table,
    pub frozen: Option<Arc<Frozen>>,
}

impl Tables {
    /// What both together know of the counter.
    pub fn cell(&self, name: &[u8], hash: u128) -> Option<Cell> {
        let below = self.frozen.as_ref().and_then(|frozen| frozen.get(name, hash));
        match (self.active.get(name, hash), below) {
            (Some(above), Some(below)) => Some(above.over(below)),
            (above, below) => above.or(below),
        }
    }

    /// The counter's value, over `base` from a state without the flush of `frozen`.
    pub fn value(&self, base: Option<i128>, name: &[u8], hash: u128) -> i128 {
        self.cell(name, hash).map_or(base.unwrap_or(0), |cell| cell.value(base))
    }

    /// The newest record here, whether its bucket lives or not: what lies below is older.
    pub fn record(&self, id: RecordId, planted: Option<Planted>) -> Option<&Record> {
        let skipped = Planted::RecordNotInFrozen.is_in(planted);
        let frozen = self.frozen.as_ref().filter(|_| !skipped);
        self.active.record(id).or_else(|| frozen?.table.record(id))
    }

    /// What both take of memory, as counted.
    pub fn bytes(&self) -> usize {
        self.active.bytes() + self.frozen.as_ref().map_or(0, |frozen| frozen.bytes())
    }

    /// The same, by looking at all that they hold.
    pub fn walked_bytes(&self) -> usize {
        let frozen = self.frozen.as_ref().map_or(0, |frozen| frozen.table.walked_bytes());
        self.active.walked_bytes() + frozen
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::store::testing::Random;

    fn name(number: u64, long: bool) -> Vec<u8> {
        let tail = if long { "-".repeat(40) } else { String::new() };
        format!("ns\0{number}{tail}").into_bytes()
    }

    /// The table against an ordered map, over growth, long names and both kinds of cell.
    #[test]
    fn the_table_agrees_with_a_map() {
        let mut random = Random::new(7);
        for round in 0..20 {
            let mut table = Table::new();
            let mut map: BTreeMap<(u16, Vec<u8>), Cell> = BTreeMap::new();
            for _ in 0..2_000 {
                let number = random.below(if round % 2 == 0 { 40 } else { 3_000 });
                let name = name(number, number.is_multiple_of(5));
                let hash = key::hash(&name);
                let value = i128::from(random.next() as i64) << random.below(64);
                let id = (key::slot_of(hash).0, name.clone());
                if random.below(8) == 0 {
                    table.set(&name, hash, value);
                    map.insert(id, Cell::Absolute(value));
                } else {
                    table.add(&name, hash, value);
                    let below = map.get(&id).copied().unwrap_or(Cell::Delta(0));
                    map.insert(id.clone(), Cell::Delta(value).over(below));
                }
                assert_eq!(table.get(&name, hash), map.get(&id_of(&name)).copied());
            }
            assert_eq!(table.len(), map.len());
            let frozen = table.freeze();
            let got: Vec<_> =
                frozen.sorted().map(|(slot, name, cell)| ((slot.0, name.to_vec()), cell)).collect();
            assert_eq!(got, map.into_iter().collect::<Vec<_>>());
        }
    }

    fn id_of(name: &[u8]) -> (u16, Vec<u8>) {
        (key::slot_of(key::hash(name)).0, name.to_vec())
    }

    /// Two names with one hash are two counters: only a compare of the name tells.
    #[test]
    fn equal_hashes_are_told_apart_by_name() {
        let mut table = Table::new();
        let hash = stored(key::hash(b"ns\0a"));
        let at = table.find(b"ns\0b", hash);
        table.lines[at] = table.new_line(b"ns\0b", hash);
        table.len += 1;
        table.add(b"ns\0a", key::hash(b"ns\0a"), 1);
        assert_eq!(table.get(b"ns\0a", key::hash(b"ns\0a")), Some(Cell::Delta(1)));
        assert_eq!(table.len(), 2);
    }

    #[track_caller]
    fn check(active: Option<Cell>, frozen: Option<Cell>, base: Option<i128>, want: i128) {
        let (name, hash) = (b"ns\0k".as_slice(), key::hash(b"ns\0k"));
        let table = |cell| {
            let mut table = Table::new();
            match cell {
                Some(Cell::Delta(delta)) => table.add(name, hash, delta),
                Some(Cell::Absolute(value)) => table.set(name, hash, value),
                None => {}
            }
            table
        };
        let tables =
            Tables { active: table(active), frozen: Some(Arc::new(table(frozen).freeze())) };
        assert_eq!(tables.value(base, name, hash), want);
    }

    #[test]
    fn active_lies_over_frozen_over_state() {
        check(None, None, None, 0);
        check(None, None, Some(7), 7);
        check(Some(Cell::Delta(1)), None, Some(7), 8);
        check(Some(Cell::Delta(1)), Some(Cell::Delta(2)), Some(7), 10);
        check(Some(Cell::Delta(1)), Some(Cell::Absolute(2)), Some(7), 3);
        check(Some(Cell::Absolute(1)), Some(Cell::Delta(2)), Some(7), 1);
        check(None, Some(Cell::Absolute(0)), Some(7), 0);
    }

    #[test]
    fn sums_wrap() {
        check(Some(Cell::Delta(1)), None, Some(i128::MAX), i128::MIN);
        check(Some(Cell::Delta(1)), Some(Cell::Delta(i128::MAX)), None, i128::MIN);
    }

    #[test]
    fn the_newer_record_is_found_and_its_size_counts() {
        let id = RecordId { slot: Slot(1), hash: 2 };
        let record = |bucket| Record { bucket, fingerprint: 0, values: vec![7] };
        let mut tables = Tables::default();
        let before = tables.bytes();
        tables.active.put_record(id, record(1));
        assert_eq!(tables.bytes(), before + RECORD_BYTES + 16);
        tables.active.put_record(id, record(1));
        assert_eq!(tables.bytes(), before + RECORD_BYTES + 16);
        tables.frozen = Some(Arc::new(std::mem::take(&mut tables.active).freeze()));
        assert_eq!(tables.record(id, None), Some(&record(1)));
        tables.active.put_record(id, record(2));
        assert_eq!(tables.record(id, None), Some(&record(2)));
    }

    /// A table is flushed before it takes more than it may, not after: both its parts grow by doubling.
    #[test]
    fn a_table_is_full_before_it_outgrows_its_limit() {
        for long in [false, true] {
            let (mut table, bytes_max) = (Table::new(), 200_000);
            let mut number = 0;
            while !table.fills(bytes_max) {
                number += 1;
                table.add(&name(number, long), key::hash(&name(number, long)), 1);
            }
            assert!(table.bytes() <= bytes_max, "{} bytes", table.bytes());
            assert!(number >= 700, "{number} counters");
        }
    }

    #[test]
    fn a_stated_capacity_never_moves() {
        let mut table = Table::with_capacity(1_000);
        let bytes = table.bytes();
        for number in 0..1_000 {
            table.add(&name(number, false), key::hash(&name(number, false)), 1);
        }
        assert_eq!(table.bytes(), bytes);
    }
}
