//! What one worker holds for its clients: bodies as they come in, answers until they are taken; and its limit.
//!
//! A newcomer would count bodies only. But 200 KB of lines that make no sense are answered with 16 MB, one reason for each,
//! and a client that never reads makes us hold them: so what was a body's is counted on until its answer has gone.
//!
//! Whatever changed nothing is refused when it would go beyond the limit. What was applied has to be answered: it may go
//! beyond, and whoever comes next is refused. What is small is always taken: else one who reads slowly, and holds all there
//! is, would shut out everybody. He does not hold it for long either: an answer has as much time as its size is worth.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use crate::problem::{Kind, Problem};

/// Bodies and answers up to this size are never refused: a connection costs as much anyway.
const SMALL_BYTES_MAX: usize = 32 * 1024;
/// hyper is given an answer in such pieces. It keeps, for as long as a connection lasts, a buffer as large as the largest
/// piece that it was ever given.
const PIECE_BYTES_MAX: usize = 16 * 1024;
/// A client takes an answer at least so fast, or it is cut off.
const BYTES_PER_SECOND_MIN: usize = 64 * 1024;

/// The sum for one worker, and its limit.
#[derive(Clone)]
pub(crate) struct Held {
    bytes: Rc<Cell<usize>>,
    max: usize,
}

/// What one request has of it, until dropped.
pub(crate) struct Counted {
    all: Held,
    mine: usize,
}

impl Held {
    pub(crate) fn new(max: usize) -> Self {
        Self { bytes: Rc::default(), max }
    }

    pub(crate) fn nothing(&self) -> Counted {
        Counted { all: self.clone(), mine: 0 }
    }
}

impl Counted {
    pub(crate) fn bytes(&self) -> usize {
        self.mine
    }

    /// So many more, if there is room, or if it is little.
    pub(crate) fn add(&mut self, bytes: usize) -> Result<(), Problem> {
        let is_small = self.mine + bytes <= SMALL_BYTES_MAX;
        if !is_small && self.all.bytes.get() + bytes > self.all.max {
            let detail = "this gateway holds too many large bodies and answers already";
            return Err(Problem::new(Kind::Overloaded, detail));
        }
        self.set(self.mine + bytes);
        Ok(())
    }

    /// So many from now on, which are there: they can't be refused.
    pub(crate) fn set(&mut self, bytes: usize) {
        self.all.bytes.set(self.all.bytes.get() - self.mine + bytes);
        self.mine = bytes;
    }

    /// An answer that can still be refused, in the place of what it answers.
    pub(crate) fn answer(&mut self, bytes: usize) -> Result<(), Problem> {
        self.set(0);
        self.add(bytes)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The body of an answer: whole before its first byte leaves, counted until its last one has.
pub struct Answer {
    left: Bytes,
    taken: usize,
    held: Option<Keeping>,
}

/// What an answer is counted in, and how long it may be there.
struct Keeping {
    _counted: Counted,
    since: Instant,
    /// How long its client may pause.
    patience: Duration,
}

impl Keeping {
    /// Its client has taken less of it by now than it must.
    fn is_over(&self, taken: usize) -> bool {
        let worth = Duration::from_secs_f64(taken as f64 / BYTES_PER_SECOND_MIN as f64);
        self.since.elapsed() > self.patience + worth
    }
}

impl Answer {
    pub(crate) fn new(bytes: impl Into<Bytes>) -> Self {
        Self { left: bytes.into(), taken: 0, held: None }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.left.len()
    }

    /// It is what is counted here, and `patience` is how long its client may pause.
    pub(crate) fn count(&mut self, counted: Counted, patience: Duration) {
        self.held = Some(Keeping { _counted: counted, since: Instant::now(), patience });
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let piece = self.left.len().min(PIECE_BYTES_MAX);
        if piece == 0 {
            return Poll::Ready(None);
        }
        if self.taken > 0 && self.held.as_ref().is_some_and(|held| held.is_over(self.taken)) {
            return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
        }
        self.taken += piece;
        let piece = self.left.split_to(piece);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_answer_leaves_in_small_pieces_and_is_counted_to_its_end() {
        let whole: Vec<u8> = (0..100_000u32).map(|number| number as u8).collect();
        let held = Held::new(MAX);
        let mut counted = held.nothing();
        assert!(counted.answer(whole.len()).is_ok());
        let mut answer = Answer::new(whole.clone());
        answer.count(counted, Duration::from_secs(75));
        let mut taken = Vec::new();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        while !answer.is_end_stream() {
            assert_eq!(answer.size_hint().exact(), Some((whole.len() - taken.len()) as u64));
            let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut answer).poll_frame(&mut cx) else {
                panic!("it is all there");
            };
            let piece = frame.into_data().expect("it has no trailers");
            assert!(piece.len() <= PIECE_BYTES_MAX);
            taken.extend_from_slice(&piece);
            assert_eq!(held.bytes.get(), whole.len());
        }
        assert_eq!(taken, whole);
        assert!(matches!(Pin::new(&mut answer).poll_frame(&mut cx), Poll::Ready(None)));
        drop(answer);
        assert_eq!(held.bytes.get(), 0);
    }

    /// 64 KiB a second, and a pause.
    #[test]
    fn an_answer_has_as_much_time_as_its_size_is_worth() {
        let long_ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        let over = |seconds, taken| {
            let since = long_ago(seconds);
            let patience = Duration::from_secs(10);
            Keeping { _counted: Held::new(MAX).nothing(), since, patience }.is_over(taken)
        };
        assert!(!over(9, 1) && over(11, 1));
        assert!(!over(19, 10 * BYTES_PER_SECOND_MIN) && over(21, 10 * BYTES_PER_SECOND_MIN));
        let mut answer = Answer::new(vec![0; 3 * PIECE_BYTES_MAX]);
        answer.count(Held::new(MAX).nothing(), Duration::ZERO);
        answer.held.as_mut().unwrap().since = long_ago(1);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut poll = || Pin::new(&mut answer).poll_frame(&mut cx);
        assert!(matches!(poll(), Poll::Ready(Some(Ok(_)))), "it takes the first piece");
        assert!(matches!(poll(), Poll::Ready(Some(Err(_)))), "which is worth 250 ms");
    }

    const MAX: usize = 64 << 20;

    #[test]
    fn beyond_the_limit_only_what_is_small_or_was_applied_is_taken() {
        let held = Held::new(MAX);
        let (mut first, mut second) = (held.nothing(), held.nothing());
        assert!(first.add(MAX - 10).is_ok());
        assert!(second.add(10).is_ok());
        // A small body is taken all the same, a large one is not.
        assert!(second.add(SMALL_BYTES_MAX - 10).is_ok());
        assert_eq!(second.add(1).map_err(|problem| problem.kind), Err(Kind::Overloaded));
        // Its own body makes room for its answer.
        assert!(second.answer(SMALL_BYTES_MAX + 1).is_err());
        assert_eq!(second.bytes(), 0);
        assert!(second.answer(SMALL_BYTES_MAX).is_ok());
        second.set(1 << 20);
        assert!(first.add(1).is_err());
        drop(second);
        assert!(first.add(10).is_ok());
        assert_eq!(first.bytes(), MAX);
    }
}
