//! The memory that one worker holds for its clients, and its limit: request bodies while they are
//! received, and answers until they are sent.
//!
//! Bodies alone are not enough. 200 KB of malformed lines are answered with 16 MB, one reason per
//! line, and a client that never reads makes the gateway hold them. Therefore a reservation begins
//! with the body and lasts until the answer is sent.
//!
//! A request without effect is refused if it would exceed the limit. An applied write must be
//! answered: it may exceed the limit, and later requests are refused. A small body or answer is
//! always admitted: otherwise one client that reads slowly, and holds all the memory, would lock
//! out all others. Such a client is also cut off after a time that grows with the size of the
//! answer.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use crate::problem::{Kind, Problem};

/// Bodies and answers up to this size are never refused: a connection takes as much anyway.
const SMALL_BYTES_MAX: usize = 32 * 1024;
/// The size of the pieces in which hyper gets an answer. For as long as a connection lasts, hyper
/// keeps a buffer as large as the largest piece that it ever got.
const PIECE_BYTES_MAX: usize = 16 * 1024;
/// A client that reads an answer more slowly than this is cut off.
const BYTES_PER_SECOND_MIN: usize = 64 * 1024;

/// The bytes that one worker holds, and the limit.
#[derive(Clone)]
pub(crate) struct MemoryBudget {
    bytes: Rc<Cell<usize>>,
    max: usize,
}

/// The part of a [`MemoryBudget`] that one request holds, until dropped.
pub(crate) struct Reservation {
    budget: MemoryBudget,
    bytes: usize,
}

impl MemoryBudget {
    pub(crate) fn new(max: usize) -> Self {
        Self { bytes: Rc::default(), max }
    }

    /// A reservation of no bytes yet.
    pub(crate) fn reserve(&self) -> Reservation {
        Reservation { budget: self.clone(), bytes: 0 }
    }
}

impl Reservation {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reserves `bytes` more. Fails if the budget is exhausted and the reservation would not be
    /// small.
    pub(crate) fn add(&mut self, bytes: usize) -> Result<(), Problem> {
        let is_small = self.bytes + bytes <= SMALL_BYTES_MAX;
        if !is_small && self.budget.bytes.get() + bytes > self.budget.max {
            let detail = "this gateway holds too many large bodies and answers already";
            return Err(Problem::new(Kind::Overloaded, detail));
        }
        self.set(self.bytes + bytes);
        Ok(())
    }

    /// Sets the reservation to `bytes` that exist already, and so can't be refused.
    pub(crate) fn set(&mut self, bytes: usize) {
        self.budget.bytes.set(self.budget.bytes.get() - self.bytes + bytes);
        self.bytes = bytes;
    }

    /// Replaces the reservation of a body by one for its answer, which can still be refused.
    pub(crate) fn replace(&mut self, bytes: usize) -> Result<(), Problem> {
        self.set(0);
        self.add(bytes)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The body of an answer. It is complete before its first byte is sent, and its memory is reserved
/// until its last byte is sent.
pub struct AnswerBody {
    left: Bytes,
    sent: usize,
    limit: Option<SendLimit>,
}

/// The reservation of an answer, and the rate at which its client must read it.
struct SendLimit {
    _reservation: Reservation,
    /// `None` if the answer is one piece, which hyper gets at once.
    since: Option<Instant>,
    /// The time for which the client may pause.
    pause_max: Duration,
}

impl SendLimit {
    /// Returns whether the client has read less than it must have by now.
    fn is_exceeded(&self, sent: usize) -> bool {
        let allowed = Duration::from_secs_f64(sent as f64 / BYTES_PER_SECOND_MIN as f64);
        self.since.is_some_and(|since| since.elapsed() > self.pause_max + allowed)
    }
}

impl AnswerBody {
    pub(crate) fn new(bytes: impl Into<Bytes>) -> Self {
        Self { left: bytes.into(), sent: 0, limit: None }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.left.len()
    }

    /// Keeps `reservation` until the answer is sent. The client may pause for `pause_max`.
    pub(crate) fn limit(&mut self, reservation: Reservation, pause_max: Duration) {
        let since = (self.left.len() > PIECE_BYTES_MAX).then(Instant::now);
        self.limit = Some(SendLimit { _reservation: reservation, since, pause_max });
    }
}

impl Body for AnswerBody {
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
        let limit = self.limit.as_ref();
        if self.sent > 0 && limit.is_some_and(|limit| limit.is_exceeded(self.sent)) {
            return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
        }
        self.sent += piece;
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
        let budget = MemoryBudget::new(MAX);
        let mut reservation = budget.reserve();
        assert!(reservation.replace(whole.len()).is_ok());
        let mut answer = AnswerBody::new(whole.clone());
        answer.limit(reservation, Duration::from_secs(75));
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
            assert_eq!(budget.bytes.get(), whole.len());
        }
        assert_eq!(taken, whole);
        assert!(matches!(Pin::new(&mut answer).poll_frame(&mut cx), Poll::Ready(None)));
        drop(answer);
        assert_eq!(budget.bytes.get(), 0);
    }

    /// The client may pause once, and must read 64 KiB a second.
    #[test]
    fn the_time_that_a_client_has_grows_with_the_size_of_the_answer() {
        let long_ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        let over = |seconds, sent| {
            let since = Some(long_ago(seconds));
            let pause_max = Duration::from_secs(10);
            let _reservation = MemoryBudget::new(MAX).reserve();
            SendLimit { _reservation, since, pause_max }.is_exceeded(sent)
        };
        assert!(!over(9, 1) && over(11, 1));
        assert!(!over(19, 10 * BYTES_PER_SECOND_MIN) && over(21, 10 * BYTES_PER_SECOND_MIN));
        let mut answer = AnswerBody::new(vec![0; 3 * PIECE_BYTES_MAX]);
        answer.limit(MemoryBudget::new(MAX).reserve(), Duration::ZERO);
        answer.limit.as_mut().unwrap().since = Some(long_ago(1));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut poll = || Pin::new(&mut answer).poll_frame(&mut cx);
        assert!(matches!(poll(), Poll::Ready(Some(Ok(_)))), "it takes the first piece");
        assert!(
            matches!(poll(), Poll::Ready(Some(Err(_)))),
            "the first piece allows 250 ms, and 1 s has passed"
        );
    }

    const MAX: usize = 64 << 20;

    #[test]
    fn beyond_the_limit_only_what_is_small_or_was_applied_is_admitted() {
        let budget = MemoryBudget::new(MAX);
        let (mut first, mut second) = (budget.reserve(), budget.reserve());
        assert!(first.add(MAX - 10).is_ok());
        assert!(second.add(10).is_ok());
        // A small body is admitted, a large one is not.
        assert!(second.add(SMALL_BYTES_MAX - 10).is_ok());
        assert_eq!(second.add(1).map_err(|problem| problem.kind), Err(Kind::Overloaded));
        // The answer takes the place of its own body.
        assert!(second.replace(SMALL_BYTES_MAX + 1).is_err());
        assert_eq!(second.bytes(), 0);
        assert!(second.replace(SMALL_BYTES_MAX).is_ok());
        second.set(1 << 20);
        assert!(first.add(1).is_err());
        drop(second);
        assert!(first.add(10).is_ok());
        assert_eq!(first.bytes(), MAX);
    }
}
