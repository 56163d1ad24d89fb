//! Effects that a driver performs, and answers that it reports, later than it could or in another
//! order.
//!
//! docs/design.md#order-of-effects states what must keep its order: each such [`Stream`] does.
//! Everything else is free: it may be performed, or reported, at any time and in any order.

use std::collections::BTreeMap;

use engine::ids::Conn;

use super::rng::Rng;

/// Effects or answers that keep the order in which they were given.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Stream {
    /// Writes and trims of the log.
    Log,
    /// Changes and copies of the state.
    State,
    /// Messages on a connection, and its end.
    Conn(Conn),
    /// The groups that have become durable.
    Durable,
    /// The answers to changes of the state: with each the view moves on that loads see.
    Changes,
    /// The processes that are registered.
    Peers,
    /// All effects of a batcher.
    Batcher,
}

/// Something that is late.
#[derive(Debug, Eq, PartialEq)]
pub enum Late<E, V> {
    Effect(E),
    /// An event that reports an answer.
    Answer(V),
}

/// Something that waits for its time.
struct LateItem<T> {
    stream: Option<Stream>,
    item: T,
    /// The number of events that were handled before.
    handled: u64,
}

/// All that is late at one process.
pub struct LateItems<T> {
    /// The number of events that were handled so far.
    pub handled: u64,
    next: u64,
    waiting: BTreeMap<u64, LateItem<T>>,
    /// The number of items of each stream that wait, and the time of the last one.
    streams: BTreeMap<Stream, (usize, u64)>,
}

impl<T> Default for LateItems<T> {
    fn default() -> Self {
        Self { handled: 0, next: 0, waiting: BTreeMap::new(), streams: BTreeMap::new() }
    }
}

impl<T> LateItems<T> {
    /// Returns whether what comes next in this stream has to wait for what is late in it.
    pub fn waits(&self, stream: Option<Stream>) -> bool {
        stream.is_some_and(|stream| self.streams.contains_key(&stream))
    }

    /// Keeps an item until `at`, or until what comes before it in its stream. Returns its number
    /// and its time.
    pub fn keep(&mut self, stream: Option<Stream>, at: u64, item: T) -> (u64, u64) {
        let mut at = at;
        if let Some(stream) = stream {
            let (count, last) = self.streams.entry(stream).or_default();
            at = at.max(*last);
            (*count, *last) = (*count + 1, at);
        }
        self.next += 1;
        self.waiting.insert(self.next, LateItem { stream, item, handled: self.handled });
        (self.next, at)
    }

    /// The time of an item has come. Returns it, and whether an event was handled since it was
    /// kept.
    pub fn take(&mut self, number: u64) -> Option<(T, bool)> {
        let LateItem { stream, item, handled } = self.waiting.remove(&number)?;
        if let Some(stream) = stream
            && let Some((count, _)) = self.streams.get_mut(&stream)
        {
            *count -= 1;
            if *count == 0 {
                self.streams.remove(&stream);
            }
        }
        Some((item, handled < self.handled))
    }
}

/// Shuffles items, but for those of one stream among themselves. Returns whether any two were
/// swapped.
pub fn shuffle<T>(items: &mut Vec<(Option<Stream>, T)>, rng: &mut Rng) -> bool {
    let mut rest = std::mem::take(items);
    let mut swapped = false;
    while !rest.is_empty() {
        let any = rng.index(rest.len());
        let of_stream = rest[any].0.and_then(|_| rest.iter().position(|it| it.0 == rest[any].0));
        let at = of_stream.unwrap_or(any);
        swapped |= at > 0;
        items.push(rest.remove(at));
    }
    swapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_keep_their_order_and_nothing_else_does() {
        let mut rng = Rng::new(1);
        let mut swapped = 0;
        for _ in 0..100 {
            let (log, free) = (Some(Stream::Log), None);
            let mut items = vec![(log, 1), (free, 10), (log, 2), (free, 11), (log, 3)];
            swapped += u64::from(shuffle(&mut items, &mut rng));
            let of = |stream| items.iter().filter(move |it| it.0 == stream).map(|it| it.1);
            assert_eq!(of(log).collect::<Vec<_>>(), [1, 2, 3]);
            assert_eq!(of(free).sum::<u64>(), 21);
        }
        assert!(swapped > 80, "{swapped} of 100");
    }

    #[test]
    fn what_follows_a_late_item_of_its_stream_comes_after_it() {
        let mut late = LateItems::default();
        assert!(!late.waits(Some(Stream::Log)));
        let (first, _) = late.keep(Some(Stream::Log), 100, 'a');
        assert!(late.waits(Some(Stream::Log)) && !late.waits(Some(Stream::State)));
        assert_eq!(late.keep(Some(Stream::Log), 50, 'b'), (first + 1, 100));
        assert_eq!(late.keep(None, 50, 'c'), (first + 2, 50));
        late.handled += 1;
        assert_eq!(late.take(first), Some(('a', true)));
        assert_eq!(late.take(first + 1), Some(('b', true)));
        assert!(!late.waits(Some(Stream::Log)));
    }
}
