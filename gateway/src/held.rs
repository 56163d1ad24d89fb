//! What one worker holds for its clients: bodies as they come in, answers until they are taken; and its limit.
//!
//! A newcomer would count bodies only. But 200 KB of lines that make no sense are answered with 16 MB, one reason for each,
//! and a client that never reads makes us hold them: so what was a body's is counted on until its answer has gone.
//!
//! Whatever changed nothing is refused when it would go beyond the limit. What was applied has to be answered: it may go
//! beyond, and whoever comes next is refused.

use std::cell::Cell;
use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use crate::problem::{Kind, Problem};

/// In bytes.
const HELD_BYTES_MAX: usize = 256 << 20;
/// Answers up to this size are never refused: a connection costs as much anyway.
const SMALL_BYTES_MAX: usize = 32 * 1024;
/// hyper is given an answer in such pieces. It keeps, for as long as a connection lasts, a buffer as large as the largest
/// piece that it was ever given.
const PIECE_BYTES_MAX: usize = 16 * 1024;

/// The sum for one worker.
#[derive(Clone, Default)]
pub(crate) struct Held(Rc<Cell<usize>>);

/// What one request has of it, until dropped.
pub(crate) struct Counted {
    all: Held,
    mine: usize,
}

impl Held {
    pub(crate) fn nothing(&self) -> Counted {
        Counted { all: self.clone(), mine: 0 }
    }
}

impl Counted {
    pub(crate) fn bytes(&self) -> usize {
        self.mine
    }

    /// So many more, if there is room.
    pub(crate) fn add(&mut self, bytes: usize) -> Result<(), Problem> {
        if self.all.0.get() + bytes > HELD_BYTES_MAX {
            let detail = "this gateway holds too many large bodies and answers already";
            return Err(Problem::new(Kind::Overloaded, detail));
        }
        self.set(self.mine + bytes);
        Ok(())
    }

    /// So many from now on, which are there: they can't be refused.
    pub(crate) fn set(&mut self, bytes: usize) {
        self.all.0.set(self.all.0.get() - self.mine + bytes);
        self.mine = bytes;
    }

    /// An answer that can still be refused, in the place of what it answers.
    pub(crate) fn answer(&mut self, bytes: usize) -> Result<(), Problem> {
        self.set(0);
        if bytes > SMALL_BYTES_MAX {
            return self.add(bytes);
        }
        self.set(bytes);
        Ok(())
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
    counted: Option<Counted>,
}

impl Answer {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { left: bytes.into(), counted: None }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.left.len()
    }

    /// It is what is counted here.
    pub(crate) fn count(&mut self, counted: Counted) {
        self.counted = Some(counted);
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.left.len().min(PIECE_BYTES_MAX);
        if piece == 0 {
            return Poll::Ready(None);
        }
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
        let held = Held::default();
        let mut counted = held.nothing();
        assert!(counted.answer(whole.len()).is_ok());
        let mut answer = Answer::new(whole.clone());
        answer.count(counted);
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
            assert_eq!(held.0.get(), whole.len());
        }
        assert_eq!(taken, whole);
        assert!(matches!(Pin::new(&mut answer).poll_frame(&mut cx), Poll::Ready(None)));
        drop(answer);
        assert_eq!(held.0.get(), 0);
    }

    #[test]
    fn beyond_the_limit_only_what_is_small_or_was_applied_is_taken() {
        let held = Held::default();
        let (mut first, mut second) = (held.nothing(), held.nothing());
        assert!(first.add(HELD_BYTES_MAX - 10).is_ok());
        assert!(second.add(10).is_ok());
        assert_eq!(second.add(1).map_err(|problem| problem.kind), Err(Kind::Overloaded));
        // Its own body makes room for its answer.
        assert!(second.answer(SMALL_BYTES_MAX + 1).is_err());
        assert_eq!(second.bytes(), 0);
        assert!(second.answer(SMALL_BYTES_MAX).is_ok());
        second.set(1 << 20);
        assert!(first.add(1).is_err());
        drop(second);
        assert!(first.add(10).is_ok());
        assert_eq!(first.bytes(), HELD_BYTES_MAX);
    }
}
