//! The queue of a run: future events in the order of (time, number).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Events with the times at which they happen. Events of one time come in the order in which they
/// were added.
pub struct EventQueue<E> {
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    slab: Vec<Option<E>>,
    free: Vec<usize>,
    next: u64,
}

impl<E> Default for EventQueue<E> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), slab: Vec::new(), free: Vec::new(), next: 0 }
    }
}

impl<E> EventQueue<E> {
    pub fn push(&mut self, at: u64, event: E) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            self.slab.len() - 1
        });
        self.slab[slot] = Some(event);
        self.next += 1;
        self.heap.push(Reverse((at, self.next, slot)));
    }

    /// The next event, with its time and its number.
    pub fn pop(&mut self) -> Option<(u64, u64, E)> {
        let Reverse((at, number, slot)) = self.heap.pop()?;
        self.free.push(slot);
        let event = self.slab[slot].take().expect("a slot in the heap is in use");
        Some((at, number, event))
    }
}
