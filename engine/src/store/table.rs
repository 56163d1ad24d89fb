//! The counter table (memtable): committed changes between two flushes, one cache line per counter.
//!
//! The table uses open addressing with linear probing: a counter's entry holds 64 bits of its hash,
//! its sum and its name up to 38 bytes; a longer name lies in an arena, and the entry has its
//! offset. So a hot counter costs one memory access. The name is compared, never only the hash.
//!
//! A [`Cell::Delta`] is not a value: it must be added to what lies below, which is the sealed
//! table, then the state. [`Cell::Absolute`] hides everything below.
//!
//! **Arithmetic wraps** (mod 2^128), here, in the state's merges and in the digest alike. Deltas
//! are i64 and sums i128, so no real counter gets there; but the order in which deltas are folded
//! differs between replicas (flushes and compactions are independent), and only wrapping is
//! associative: with saturation two replicas could disagree.
//!
//! **The table also holds the idempotency records** written since the last flush. They are few, so
//! they are in an ordered map. They share the table's budget and its flush, since an effect and its
//! record must reach the state in one step.
//!
//! Nothing is ever removed: a table is filled, sealed, written and dropped. Sorting is left to the
//! flush. Doubling moves every entry, so a node that must avoid long pauses gives the table its
//! capacity at the start.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::ids::Slot;
use crate::key;
use crate::memory;
use crate::planted::Planted;
use crate::shard::idempotency::{RecordId, TokenRecord};

/// The longest name kept in the entry itself.
const INLINE_BYTES: usize = 38;
const ENTRY_BYTES: usize = 64;
/// The bytes that a record takes in the map, without its values.
const RECORD_BYTES: usize = memory::of_map::<RecordId, TokenRecord>(6) / 6;
/// The number of entries of an empty table without a stated capacity.
const ENTRIES_MIN: usize = 64;
/// The bytes that such a table takes.
pub const EMPTY_BYTES: usize = ENTRIES_MIN * ENTRY_BYTES;

const DELTA: u8 = 1;
const ABSOLUTE: u8 = 2;
const LONG: u8 = 4;

/// The table's information about one counter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cell {
    /// A change to be added to what lies below.
    Delta(i128),
    /// A value that hides everything below.
    Absolute(i128),
}

impl Cell {
    /// Combines this cell with one below it.
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

/// One counter. `flags` 0 is an empty entry. For a long name `name` begins with its offset in the
/// arena (u64) and its length (u16), both little-endian.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct TableEntry {
    sum: i128,
    hash: u64,
    flags: u8,
    len: u8,
    name: [u8; INLINE_BYTES],
}

const _: () = assert!(size_of::<TableEntry>() == ENTRY_BYTES, "a counter is one cache line");

impl TableEntry {
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
    /// The hash table: a power of two of entries, at most three quarters of them used, so that a
    /// probe always ends.
    entries: Vec<TableEntry>,
    arena: Vec<u8>,
    len: usize,
    records: BTreeMap<RecordId, TokenRecord>,
    record_bytes: usize,
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl Table {
    /// An empty table.
    pub fn new() -> Self {
        Self::with_capacity(0)
    }

    /// A table that takes this many counters without moving any.
    pub fn with_capacity(counters: usize) -> Self {
        let entries = (counters + counters / 3 + 1).next_power_of_two().max(ENTRIES_MIN);
        Self {
            entries: vec![TableEntry::EMPTY; entries],
            arena: Vec::new(),
            len: 0,
            records: BTreeMap::new(),
            record_bytes: 0,
        }
    }

    /// The number of counters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there is no counter.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes of memory that the table takes.
    pub fn bytes(&self) -> usize {
        self.entries.len() * ENTRY_BYTES
            + memory::allocated(self.arena.capacity())
            + self.record_bytes
    }

    /// Like [`Table::bytes`], recounted by looking at every record.
    fn walked_bytes(&self) -> usize {
        let values =
            |record: &TokenRecord| memory::allocated(record.values.capacity() * size_of::<i128>());
        memory::allocated(self.entries.capacity() * ENTRY_BYTES)
            + memory::allocated(self.arena.capacity())
            + memory::of_map::<RecordId, TokenRecord>(self.records.len())
            + self.records.values().map(values).sum::<usize>()
    }

    /// Returns whether the next new counter would double the table, and so move every entry.
    pub fn is_full(&self) -> bool {
        (self.len + 1) * 4 > self.entries.len() * 3
    }

    /// Returns whether the table holds as much as fits into `bytes_max`: it takes more already, or
    /// would with the next counter.
    pub fn fills(&self, bytes_max: usize) -> bool {
        let entries = if self.is_full() { self.entries.len() * ENTRY_BYTES } else { 0 };
        // One entry of the log may add thousands of long names, so the arena counts as full at
        // three quarters, too.
        let arena_full = self.arena.len() > self.arena.capacity() / 4 * 3;
        let arena = if arena_full { self.arena.capacity() } else { 0 };
        self.bytes() + entries + arena > bytes_max
    }

    /// Adds `delta` to the counter. `hash` is [`key::hash`] of its name, which the caller has.
    pub fn add(&mut self, name: &[u8], hash: u128, delta: i128) {
        let entry = self.entry(name, hash);
        entry.sum = entry.sum.wrapping_add(delta);
    }

    /// Sets the counter, which hides everything below.
    pub fn set(&mut self, name: &[u8], hash: u128, value: i128) {
        let entry = self.entry(name, hash);
        entry.sum = value;
        entry.flags = (entry.flags & LONG) | ABSOLUTE;
    }

    /// The counter's cell. `hash` is [`key::hash`] of its name.
    pub fn get(&self, name: &[u8], hash: u128) -> Option<Cell> {
        let entry = &self.entries[self.find(name, stored(hash))];
        (!entry.is_empty()).then(|| entry.cell())
    }

    /// Stores a record in place of an older one under the same id.
    pub fn put_record(&mut self, id: RecordId, mut record: TokenRecord) {
        // The values were filled by pushing, and would take room for four where there is one.
        record.values.shrink_to_fit();
        let values =
            |record: &TokenRecord| memory::allocated(size_of_val(record.values.as_slice()));
        let bytes = |record: &TokenRecord| RECORD_BYTES + values(record);
        self.record_bytes += bytes(&record);
        if let Some(old) = self.records.insert(id, record) {
            self.record_bytes -= bytes(&old);
        }
    }

    /// The record with this id.
    pub fn record(&self, id: RecordId) -> Option<&TokenRecord> {
        self.records.get(&id)
    }

    /// Ends the filling of the table.
    pub fn seal(self) -> SealedTable {
        SealedTable { table: self }
    }

    /// The index of the counter, or of the empty entry where it belongs.
    fn find(&self, name: &[u8], hash: u64) -> usize {
        let mask = self.entries.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let entry = &self.entries[at];
            if entry.is_empty() || (entry.hash == hash && entry.name(&self.arena) == name) {
                return at;
            }
            at = (at + 1) & mask;
        }
    }

    /// The counter's entry; a new one is a delta of 0.
    fn entry(&mut self, name: &[u8], hash: u128) -> &mut TableEntry {
        debug_assert_eq!(hash, key::hash(name), "the hash is the name's");
        let hash = stored(hash);
        let mut at = self.find(name, hash);
        if self.entries[at].is_empty() {
            if self.is_full() {
                self.double();
                at = self.find(name, hash);
            }
            self.entries[at] = self.new_entry(name, hash);
            self.len += 1;
        }
        &mut self.entries[at]
    }

    fn new_entry(&mut self, name: &[u8], hash: u64) -> TableEntry {
        let mut entry = TableEntry { hash, flags: DELTA, ..TableEntry::EMPTY };
        if name.len() <= INLINE_BYTES {
            entry.name[..name.len()].copy_from_slice(name);
            entry.len = name.len() as u8;
        } else {
            let len = u16::try_from(name.len()).expect("a checked name is at most 1,089 bytes");
            entry.flags |= LONG;
            entry.name[..8].copy_from_slice(&(self.arena.len() as u64).to_le_bytes());
            entry.name[8..10].copy_from_slice(&len.to_le_bytes());
            self.arena.extend_from_slice(name);
        }
        entry
    }

    fn double(&mut self) {
        let doubled = vec![TableEntry::EMPTY; self.entries.len() * 2];
        let old = std::mem::replace(&mut self.entries, doubled);
        let mask = self.entries.len() - 1;
        for entry in old.into_iter().filter(|entry| !entry.is_empty()) {
            let mut at = entry.hash as usize & mask;
            while !self.entries[at].is_empty() {
                at = (at + 1) & mask;
            }
            self.entries[at] = entry;
        }
    }
}

/// The upper half of a hash: the slot is its top 16 bits, the index in the table its lowest.
fn stored(hash: u128) -> u64 {
    (hash >> 64) as u64
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({} counters)", self.len)
    }
}

/// A table that no longer changes: the content of a flush.
#[derive(Clone, Default)]
pub struct SealedTable {
    table: Table,
}

impl fmt::Debug for SealedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedTable({} counters)", self.table.len)
    }
}

impl SealedTable {
    /// The counter's cell. `hash` is [`key::hash`] of its name.
    pub fn get(&self, name: &[u8], hash: u128) -> Option<Cell> {
        self.table.get(name, hash)
    }

    /// The number of counters.
    pub fn len(&self) -> usize {
        self.table.len
    }

    /// Returns whether there is no counter.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The bytes of memory that the table takes.
    pub fn bytes(&self) -> usize {
        self.table.bytes()
    }

    /// All records, in the order of the state's keys: by slot, then by hash.
    pub fn records(&self) -> impl Iterator<Item = (RecordId, &TokenRecord)> {
        self.table.records.iter().map(|(&id, record)| (id, record))
    }

    /// All counters, in the order of the state's keys: by slot, then by name.
    pub fn sorted(&self) -> impl Iterator<Item = (Slot, &[u8], Cell)> {
        let arena = &self.table.arena;
        let mut entries: Vec<&TableEntry> =
            self.table.entries.iter().filter(|entry| !entry.is_empty()).collect();
        entries.sort_unstable_by(|a, b| {
            a.slot().cmp(&b.slot()).then_with(|| a.name(arena).cmp(b.name(arena)))
        });
        entries.into_iter().map(|entry| (entry.slot(), entry.name(arena), entry.cell()))
    }
}

/// The tables above the state: the one that is being filled, over the one that is being flushed.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// The table that is being filled.
    pub active: Table,
    /// The table that is being flushed, if any.
    pub sealed: Option<Arc<SealedTable>>,
}

impl Tables {
    /// The counter's cell in both tables together.
    pub fn cell(&self, name: &[u8], hash: u128) -> Option<Cell> {
        let below = self.sealed.as_ref().and_then(|sealed| sealed.get(name, hash));
        match (self.active.get(name, hash), below) {
            (Some(above), Some(below)) => Some(above.over(below)),
            (above, below) => above.or(below),
        }
    }

    /// The counter's value, over `base` from a state without the flush of `sealed`.
    pub fn value(&self, base: Option<i128>, name: &[u8], hash: u128) -> i128 {
        self.cell(name, hash).map_or(base.unwrap_or(0), |cell| cell.value(base))
    }

    /// The newest record in the tables, whether its bucket is live or not: what lies below is
    /// older.
    pub fn record(&self, id: RecordId, planted: Option<Planted>) -> Option<&TokenRecord> {
        let skipped = Planted::RecordNotInFrozen.is_in(planted);
        let sealed = self.sealed.as_ref().filter(|_| !skipped);
        self.active.record(id).or_else(|| sealed?.table.record(id))
    }

    /// The bytes of memory that both take, as counted.
    pub fn bytes(&self) -> usize {
        self.active.bytes() + self.sealed.as_ref().map_or(0, |sealed| sealed.bytes())
    }

    /// Like [`Tables::bytes`], recounted by looking at everything in them.
    pub fn walked_bytes(&self) -> usize {
        let sealed = self.sealed.as_ref().map_or(0, |sealed| sealed.table.walked_bytes());
        self.active.walked_bytes() + sealed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::store::testing::SplitMix64;

    fn name(number: u64, long: bool) -> Vec<u8> {
        let tail = if long { "-".repeat(40) } else { String::new() };
        format!("ns\0{number}{tail}").into_bytes()
    }

    /// Compares the table with an ordered map, over growth, long names and both kinds of cell.
    #[test]
    fn the_table_agrees_with_a_map() {
        let mut random = SplitMix64::new(7);
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
            let sealed = table.seal();
            let got: Vec<_> =
                sealed.sorted().map(|(slot, name, cell)| ((slot.0, name.to_vec()), cell)).collect();
            assert_eq!(got, map.into_iter().collect::<Vec<_>>());
        }
    }

    fn id_of(name: &[u8]) -> (u16, Vec<u8>) {
        (key::slot_of(key::hash(name)).0, name.to_vec())
    }

    /// Two names with one hash are two counters: only a comparison of the names distinguishes them.
    #[test]
    fn equal_hashes_are_distinguished_by_name() {
        let mut table = Table::new();
        let hash = stored(key::hash(b"ns\0a"));
        let at = table.find(b"ns\0b", hash);
        table.entries[at] = table.new_entry(b"ns\0b", hash);
        table.len += 1;
        table.add(b"ns\0a", key::hash(b"ns\0a"), 1);
        assert_eq!(table.get(b"ns\0a", key::hash(b"ns\0a")), Some(Cell::Delta(1)));
        assert_eq!(table.len(), 2);
    }

    #[track_caller]
    fn check(active: Option<Cell>, sealed: Option<Cell>, base: Option<i128>, want: i128) {
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
        let tables = Tables { active: table(active), sealed: Some(Arc::new(table(sealed).seal())) };
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
        let record = |bucket| TokenRecord { bucket, fingerprint: 0, values: vec![7] };
        let mut tables = Tables::default();
        let before = tables.bytes();
        tables.active.put_record(id, record(1));
        assert_eq!(tables.bytes(), before + RECORD_BYTES + 16);
        tables.active.put_record(id, record(1));
        assert_eq!(tables.bytes(), before + RECORD_BYTES + 16);
        tables.sealed = Some(Arc::new(std::mem::take(&mut tables.active).seal()));
        assert_eq!(tables.record(id, None), Some(&record(1)));
        tables.active.put_record(id, record(2));
        assert_eq!(tables.record(id, None), Some(&record(2)));
    }

    /// A table is flushed before it takes more than it may, not after, since both its parts grow by
    /// doubling.
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
