//! The counter table (memtable): committed changes between two flushes.
//!
//! Counters are packed one behind the other into *chunks* of memory, each with its sum and its
//! name; a hash index has a word for each: 32 bits of its hash, and where it is. So a counter with
//! a short name takes 35 to 45 bytes, memory is taken as it is used, and growing moves nothing but
//! the index. The name is compared, never only the hash.
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
//! flush. A table that follows another begins with an index of the size that the other one needed
//! ([`Table::successor`]), so in a steady state nothing is moved at all.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::ids::Slot;
use crate::key;
use crate::memory;
use crate::planted::Planted;
use crate::shard::idempotency::{RecordId, TokenRecord};

/// The bytes of a counter before its name: the lower half of its sum, then the length of its name
/// and its flags; if it is wide, then the upper half of its sum.
const HEAD_BYTES: usize = 10;
const WIDE_BYTES: usize = 8;
/// A counter begins at a multiple of this many bytes of its chunk.
const UNIT_BYTES: usize = 8;
/// The bits of an address that are the unit within the chunk.
const UNIT_BITS: u32 = 20;
const CHUNK_BYTES_MIN: usize = 4 << 10;
const CHUNK_BYTES_MAX: usize = UNIT_BYTES << UNIT_BITS;
/// The most bytes of counters, by the bits of an address. (Chunks are numbered from 1.)
pub const TABLE_BYTES_MAX: usize = CHUNK_BYTES_MAX << (31 - UNIT_BITS);
/// The number of words of the smallest index.
const WORDS_MIN: usize = 64;
/// The number of counters whose memory is requested at once. What is requested long before it is
/// used leaves the nearest cache again.
pub const PREFETCHED: usize = 32;
/// The bytes that a record takes in the map, without its values.
const RECORD_BYTES: usize = memory::of_map::<RecordId, TokenRecord>(6) / 6;

/// A flag beside the length of a name: the sum is a value, not a delta.
const ABSOLUTE: u16 = 1 << 15;
/// A flag beside it: the sum has 128 bits, not 64.
const WIDE: u16 = 1 << 14;

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

/// The upper 32 bits of a counter's hash. The slot is its upper half.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Tag(u32);

impl Tag {
    fn of(hash: u128) -> Self {
        Self((hash >> 96) as u32)
    }

    /// The place of this tag in an index of so many words, a power of two. A node may hold few
    /// slots, so all bits of the tag count (Fibonacci hashing).
    fn home(self, words: usize) -> usize {
        let spread = u64::from(self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((spread >> 32) as usize * words) >> 32
    }
}

/// One word of the index: a counter's tag, then its address. 0 is empty,
/// since no address is 0.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
struct Word(u64);

impl Word {
    fn new(tag: Tag, chunk: usize, at: usize) -> Self {
        let address = (chunk as u64 + 1) << UNIT_BITS | (at / UNIT_BYTES) as u64;
        assert!(address <= u64::from(u32::MAX), "a table takes at most TABLE_BYTES_MAX");
        Self(u64::from(tag.0) << 32 | address)
    }

    fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn tag(self) -> Tag {
        Tag((self.0 >> 32) as u32)
    }

    fn slot(self) -> Slot {
        Slot((self.0 >> 48) as u16)
    }

    /// The chunk, and the offset of the counter in it.
    fn place(self) -> (usize, usize) {
        let address = self.0 as u32;
        let unit = address & ((1 << UNIT_BITS) - 1);
        ((address >> UNIT_BITS) as usize - 1, unit as usize * UNIT_BYTES)
    }
}

/// A table that is being filled.
#[derive(Clone, Default)]
pub struct Table {
    /// The hash index: a power of two of words, at most three quarters of them used, so that a
    /// probe always ends; or none.
    words: Vec<u64>,
    /// The counters. A chunk never grows beyond its capacity.
    chunks: Vec<Vec<u8>>,
    /// The capacity of all chunks together.
    chunk_bytes: usize,
    len: usize,
    records: BTreeMap<RecordId, TokenRecord>,
    record_bytes: usize,
}

impl Table {
    /// An empty table, which takes no memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty table with an index for as many counters as this one has.
    pub fn successor(&self) -> Self {
        // The memory comes zeroed from the system, and takes no room before it is used.
        let words = match self.len {
            0 => 0,
            len => (len + len / 3 + 1).next_power_of_two().max(WORDS_MIN),
        };
        Self { words: vec![0; words], ..Self::default() }
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
        memory::allocated(size_of_val(self.words.as_slice()))
            + memory::allocated(self.chunks.capacity() * size_of::<Vec<u8>>())
            + self.chunk_bytes
            + self.record_bytes
    }

    /// Like [`Table::bytes`], recounted by looking at everything in it.
    fn walked_bytes(&self) -> usize {
        let values =
            |record: &TokenRecord| memory::allocated(record.values.capacity() * size_of::<i128>());
        memory::allocated(self.words.capacity() * size_of::<u64>())
            + memory::allocated(self.chunks.capacity() * size_of::<Vec<u8>>())
            + self.chunks.iter().map(|chunk| memory::allocated(chunk.capacity())).sum::<usize>()
            + memory::of_map::<RecordId, TokenRecord>(self.records.len())
            + self.records.values().map(values).sum::<usize>()
    }

    /// Returns whether the table holds as much as fits into `bytes_max`: it soon has to grow, and
    /// may not. An empty table is never full.
    pub fn fills(&self, bytes_max: usize) -> bool {
        // One entry of the log may add thousands of counters, so both parts count as full before
        // they are.
        let index = if self.len > self.words.len() / 32 * 23 { self.words.len() * 8 } else { 0 };
        let chunk_is_full = |chunk: &Vec<u8>| chunk.len() > chunk.capacity() / 4 * 3;
        let chunk = self.chunks.last().filter(|chunk| chunk_is_full(chunk));
        let growth = index + chunk.map_or(0, |_| self.next_chunk_bytes());
        (growth > 0 || self.record_bytes > 0) && self.bytes() + growth > bytes_max
    }

    /// The bytes of content, and how many there may be in a table of `bytes_max`: how far the table
    /// is filled.
    pub fn filled(&self, bytes_max: usize) -> (usize, usize) {
        let unused = self.chunks.last().map_or(0, |chunk| chunk.capacity() - chunk.len());
        let content = self.chunk_bytes + self.record_bytes;
        let content_max = bytes_max.saturating_sub(self.bytes() - content);
        (content - unused, content_max.max(CHUNK_BYTES_MIN))
    }

    /// Adds `delta` to the counter. `hash` is [`key::hash`] of its name, which the caller has.
    pub fn add(&mut self, name: &[u8], hash: u128, delta: i128) {
        self.change(name, hash, |cell| Cell::Delta(delta).over(cell));
    }

    /// Sets the counter, which hides everything below.
    pub fn set(&mut self, name: &[u8], hash: u128, value: i128) {
        self.change(name, hash, |_| Cell::Absolute(value));
    }

    /// The counter's cell. `hash` is [`key::hash`] of its name.
    pub fn get(&self, name: &[u8], hash: u128) -> Option<Cell> {
        let at = self.find(name, Tag::of(hash)).ok()?;
        Some(self.read(Word(self.words[at])).1)
    }

    /// Requests the memory of these counters, so that it is near when they are changed: the waits
    /// for several of them overlap.
    pub fn prefetch(&self, hashes: &[u128]) {
        if self.words.is_empty() {
            return;
        }
        for hashes in hashes.chunks(PREFETCHED) {
            let mut words = [Word::default(); PREFETCHED];
            for (word, &hash) in words.iter_mut().zip(hashes) {
                *word = Word(self.words[Tag::of(hash).home(self.words.len())]);
            }
            let first_bytes = words.iter().filter(|word| !word.is_empty()).map(|word| {
                let (chunk, at) = word.place();
                self.chunks[chunk][at]
            });
            std::hint::black_box(first_bytes.fold(0, |sum: u8, byte| sum ^ byte));
        }
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

    /// The index of the counter's word, or of the empty one where it belongs.
    fn find(&self, name: &[u8], tag: Tag) -> Result<usize, usize> {
        if self.words.is_empty() {
            return Err(0);
        }
        let mask = self.words.len() - 1;
        let mut at = tag.home(self.words.len());
        loop {
            let word = Word(self.words[at]);
            if word.is_empty() {
                return Err(at);
            }
            if word.tag() == tag && self.read(word).0 == name {
                return Ok(at);
            }
            at = (at + 1) & mask;
        }
    }

    /// The name and the cell of the counter at this word.
    fn read(&self, word: Word) -> (&[u8], Cell) {
        let (chunk, at) = word.place();
        let counter = &self.chunks[chunk][at..];
        let (low, rest) = counter.split_first_chunk().expect("a counter begins with its sum");
        let (head, mut name) = rest.split_first_chunk().expect("then comes its head");
        let (low, head) = (i64::from_le_bytes(*low), u16::from_le_bytes(*head));
        let mut sum = i128::from(low);
        if head & WIDE != 0 {
            let (high, rest) = name.split_first_chunk().expect("a wide counter has an upper half");
            sum = i128::from(i64::from_le_bytes(*high)) << 64 | i128::from(low as u64);
            name = rest;
        }
        let cell = if head & ABSOLUTE != 0 { Cell::Absolute(sum) } else { Cell::Delta(sum) };
        (&name[..usize::from(head & !(ABSOLUTE | WIDE))], cell)
    }

    /// Changes the counter; a new one is a delta of 0.
    fn change(&mut self, name: &[u8], hash: u128, change: impl FnOnce(Cell) -> Cell) {
        debug_assert_eq!(hash, key::hash(name), "the hash is the name's");
        let tag = Tag::of(hash);
        let at = self.find(name, tag).unwrap_or_else(|at| self.insert(name, tag, at));
        let word = Word(self.words[at]);
        let cell = change(self.read(word).1);
        if !self.write(word, cell) {
            // The narrow one stays unused until the table is dropped. Few sums need more than 64
            // bits.
            let wide = self.push(name, tag, WIDE);
            self.words[at] = wide.0;
            self.write(wide, cell);
        }
    }

    /// Stores the cell of the counter at this word. Returns `false` if it is too narrow for it.
    fn write(&mut self, word: Word, cell: Cell) -> bool {
        let (chunk, at) = word.place();
        let counter = &mut self.chunks[chunk][at..];
        let (sum, flags) = match cell {
            Cell::Delta(sum) => (sum, 0),
            Cell::Absolute(sum) => (sum, ABSOLUTE),
        };
        let head = u16::from_le_bytes([counter[8], counter[9]]);
        let is_wide = head & WIDE != 0;
        if !is_wide && i64::try_from(sum).is_err() {
            return false;
        }
        counter[..8].copy_from_slice(&(sum as u64).to_le_bytes());
        counter[8..HEAD_BYTES].copy_from_slice(&(head & !ABSOLUTE | flags).to_le_bytes());
        if is_wide {
            counter[HEAD_BYTES..HEAD_BYTES + WIDE_BYTES]
                .copy_from_slice(&((sum >> 64) as u64).to_le_bytes());
        }
        true
    }

    /// Adds a counter, whose word belongs at this index. Returns the index that it has then.
    fn insert(&mut self, name: &[u8], tag: Tag, at: usize) -> usize {
        let word = self.push(name, tag, 0);
        let at = if (self.len + 1) * 4 > self.words.len() * 3 {
            self.double();
            self.empty(tag)
        } else {
            at
        };
        self.words[at] = word.0;
        self.len += 1;
        at
    }

    /// Appends a counter, a delta of 0, to the last chunk, or to a new one.
    fn push(&mut self, name: &[u8], tag: Tag, flags: u16) -> Word {
        let sums = if flags & WIDE != 0 { WIDE_BYTES } else { 0 };
        let bytes = (HEAD_BYTES + sums + name.len()).next_multiple_of(UNIT_BYTES);
        let has_room = |chunk: &Vec<u8>| chunk.capacity() - chunk.len() >= bytes;
        if !self.chunks.last().is_some_and(has_room) {
            let next = self.next_chunk_bytes();
            self.chunks.push(Vec::with_capacity(next));
            self.chunk_bytes += next;
        }
        let number = self.chunks.len() - 1;
        let chunk = &mut self.chunks[number];
        let at = chunk.len();
        let len = u16::try_from(name.len()).expect("a checked name is at most 1,089 bytes");
        chunk.extend_from_slice(&[0; 8]);
        chunk.extend_from_slice(&(len | flags).to_le_bytes());
        chunk.extend_from_slice(&[0; WIDE_BYTES][..sums]);
        chunk.extend_from_slice(name);
        chunk.resize(at + bytes, 0);
        Word::new(tag, number, at)
    }

    /// Chunks grow with the table, so that little of the last one is unused, and there are few.
    fn next_chunk_bytes(&self) -> usize {
        (self.chunk_bytes / 32).next_power_of_two().clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
    }

    /// The index of the empty word where a new counter belongs.
    fn empty(&self, tag: Tag) -> usize {
        let mask = self.words.len() - 1;
        let mut at = tag.home(self.words.len());
        while self.words[at] != 0 {
            at = (at + 1) & mask;
        }
        at
    }

    fn double(&mut self) {
        let doubled = vec![0; (self.words.len() * 2).max(WORDS_MIN)];
        let old = std::mem::replace(&mut self.words, doubled);
        for word in old.into_iter().filter(|&word| word != 0) {
            let at = self.empty(Word(word).tag());
            self.words[at] = word;
        }
    }
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
    pub fn sorted(&self) -> Sorted<'_> {
        let mut words = Vec::with_capacity(self.table.len);
        words.extend(self.table.words.iter().filter(|&&word| word != 0).map(|&word| Word(word)));
        // The tags begin with the slot, so what is left is to sort within slots.
        words.sort_unstable();
        Sorted { table: &self.table, words, next: 0, of_slot: Vec::new() }
    }
}

/// The counters of a table, in the order of the state's keys.
pub struct Sorted<'a> {
    table: &'a Table,
    words: Vec<Word>,
    /// The index of the first word of the next slot.
    next: usize,
    /// The counters of the slot that are left, in reverse.
    of_slot: Vec<(&'a [u8], Cell)>,
}

impl<'a> Iterator for Sorted<'a> {
    type Item = (Slot, &'a [u8], Cell);

    fn next(&mut self) -> Option<Self::Item> {
        if self.of_slot.is_empty() {
            self.read_slot()?;
        }
        let slot = self.words[self.next - 1].slot();
        self.of_slot.pop().map(|(name, cell)| (slot, name, cell))
    }
}

impl Sorted<'_> {
    fn read_slot(&mut self) -> Option<()> {
        let slot = self.words.get(self.next)?.slot();
        let rest = &self.words[self.next..];
        let count = rest.iter().take_while(|word| word.slot() == slot).count();
        self.of_slot.extend(rest[..count].iter().map(|&word| self.table.read(word)));
        self.of_slot.sort_unstable_by(|a, b| b.0.cmp(a.0));
        self.next += count;
        Some(())
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
    /// Seals the active table, which becomes the one that is being flushed; another one begins.
    pub fn seal(&mut self) -> Arc<SealedTable> {
        let next = self.active.successor();
        let sealed = Arc::new(std::mem::replace(&mut self.active, next).seal());
        self.sealed = Some(sealed.clone());
        sealed
    }

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
        table.double();
        let tag = Tag::of(key::hash(b"ns\0a"));
        let at = table.find(b"ns\0b", tag).expect_err("it is not there yet");
        table.insert(b"ns\0b", tag, at);
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
        tables.active.put_record(id, record(1));
        assert_eq!(tables.bytes(), RECORD_BYTES + 16);
        tables.active.put_record(id, record(1));
        assert_eq!(tables.bytes(), RECORD_BYTES + 16);
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

    /// The index of a table is as large as that of the one before it came to be, and no larger.
    #[test]
    fn a_successor_never_moves() {
        let fill = |mut table: Table| {
            (0..1_000).for_each(|n| table.add(&name(n, false), key::hash(&name(n, false)), 1));
            table
        };
        let first = fill(Table::new());
        let empty = first.successor();
        assert_eq!(empty.words.len(), first.words.len());
        assert!(!empty.fills(0), "an empty table is never full");
        assert_eq!(empty.successor().bytes(), 0);
        assert_eq!(fill(empty).bytes(), first.bytes());
    }
}
