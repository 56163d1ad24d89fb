//! The counter table (a plain map until the real one is merged).
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the table knows of one counter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cell {
    /// To be added to what lies below.
    Delta(i128),
    /// Hides everything below.
    Absolute(i128),
}

impl Cell {
    /// The value, given what lies below.
    pub fn over(self, below: i128) -> i128 {
        match self {
            Self::Delta(delta) => below.wrapping_add(delta),
            Self::Absolute(value) => value,
        }
    }
}

#[derive(Debug, Default)]
pub struct Table {
    cells: BTreeMap<Vec<u8>, Cell>,
}

impl Table {
    pub fn add(&mut self, name: &[u8], _hash: u128, delta: i128) {
        let cell = self.cells.entry(name.to_vec()).or_insert(Cell::Delta(0));
        *cell = match *cell {
            Cell::Delta(d) => Cell::Delta(d.wrapping_add(delta)),
            Cell::Absolute(v) => Cell::Absolute(v.wrapping_add(delta)),
        };
    }
    pub fn set(&mut self, name: &[u8], _hash: u128, value: i128) {
        self.cells.insert(name.to_vec(), Cell::Absolute(value));
    }
    pub fn get(&self, name: &[u8], _hash: u128) -> Option<Cell> {
        self.cells.get(name).copied()
    }
    pub fn bytes(&self) -> usize {
        self.cells.len() * 64
    }
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }
    pub fn freeze(self) -> Frozen {
        Frozen(self)
    }
}

/// A table that no longer changes: what a flush writes.
#[derive(Debug)]
pub struct Frozen(Table);

impl Frozen {
    pub fn cells(&self) -> impl Iterator<Item = (&[u8], Cell)> {
        self.0.cells.iter().map(|(name, &cell)| (name.as_slice(), cell))
    }
}

/// Active over frozen: what has not reached the state yet.
#[derive(Debug, Default)]
pub struct Tables {
    pub active: Table,
    pub frozen: Option<Arc<Frozen>>,
}

impl Tables {
    pub fn cell(&self, name: &[u8], hash: u128) -> Option<Cell> {
        let upper = self.active.get(name, hash);
        let lower = self.frozen.as_ref().and_then(|f| f.0.get(name, hash));
        match (upper, lower) {
            (Some(Cell::Delta(d)), Some(Cell::Delta(e))) => Some(Cell::Delta(d.wrapping_add(e))),
            (Some(Cell::Delta(d)), Some(Cell::Absolute(v))) => {
                Some(Cell::Absolute(v.wrapping_add(d)))
            }
            (Some(cell), _) => Some(cell),
            (None, lower) => lower,
        }
    }
}
