//! The queue in front of the batcher: requests that are received, and wait until there is room.
//!
//! Parsing a request costs more than receiving it. A worker that parsed all that its clients send,
//! only to refuse it, would have no time left for the answers of nodes, and under overload nearly
//! nothing would be applied. So a large request waits, unparsed, until the batcher has room: its
//! worker parses what it can apply. One that has waited for too long is refused as a whole.

use std::cell::Cell;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// The room in the batcher, and the requests that wait for it in the order of their arrival.
#[derive(Default)]
pub(crate) struct Admission {
    /// The bytes that may be admitted before the next turn ends.
    room: Cell<usize>,
    /// The number of requests that wait.
    waiting: Cell<usize>,
    /// The first request that waits was woken, and has not run yet.
    woken: Cell<bool>,
    /// Wakes them one by one.
    first: Notify,
}

/// Counts a request as waiting, until dropped.
struct Waiting<'a>(&'a Cell<usize>);

impl<'a> Waiting<'a> {
    fn begin(waiting: &'a Cell<usize>) -> Self {
        waiting.set(waiting.get() + 1);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Admission {
    /// Sets the room, at the end of a turn.
    pub(crate) fn set_room(&self, bytes: usize) {
        self.room.set(bytes);
        self.wake_first();
    }

    /// Waits until a request that will take about `bytes` is admitted. Returns `false` if it is not
    /// before `until`. The last one admitted may take more than there is room.
    pub(crate) async fn admit(&self, bytes: usize, until: Instant) -> bool {
        if self.room.get() == 0 || self.waiting.get() > 0 {
            let waiting = Waiting::begin(&self.waiting);
            let has_room = async {
                // A wake-up may come when the room is taken again.
                while {
                    self.first.notified().await;
                    self.woken.set(false);
                    self.room.get() == 0
                } {}
            };
            if timeout_at(until, has_room).await.is_err() {
                return false;
            }
            drop(waiting);
        }
        self.room.set(self.room.get().saturating_sub(bytes));
        self.wake_first();
        true
    }

    fn wake_first(&self) {
        if self.room.get() > 0 && self.waiting.get() > 0 && !self.woken.replace(true) {
            self.first.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::rc::Rc;
    use std::task::Poll;
    use std::time::Duration;

    use tokio::task::{LocalSet, spawn_local};
    use tokio::time::sleep;

    use super::*;

    const FOREVER: Duration = Duration::from_secs(3600);
    const TURN: Duration = Duration::from_millis(10);

    /// Runs requests of 10 bytes each, each of which waits for so long, while turns set the room.
    /// Returns the requests in the order in which they were admitted.
    async fn admitted(patience: &[Duration], turns: &[usize]) -> Vec<usize> {
        let admission = Rc::new(Admission::default());
        let order = Rc::new(RefCell::new(Vec::new()));
        let run = async {
            for (number, &patience) in patience.iter().enumerate() {
                let (admission, order) = (admission.clone(), order.clone());
                spawn_local(async move {
                    if admission.admit(10, Instant::now() + patience).await {
                        order.borrow_mut().push(number);
                    }
                });
            }
            for &room in turns {
                sleep(TURN).await;
                admission.set_room(room);
            }
            sleep(TURN).await;
        };
        LocalSet::new().run_until(run).await;
        order.take()
    }

    async fn is_pending(future: impl Future<Output = bool>) -> bool {
        let mut future = pin!(future);
        poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
    }

    #[tokio::test(start_paused = true)]
    async fn requests_are_admitted_in_order_as_far_as_there_is_room() {
        assert_eq!(admitted(&[FOREVER; 5], &[0]).await, []);
        assert_eq!(admitted(&[FOREVER; 5], &[1]).await, [0]);
        assert_eq!(admitted(&[FOREVER; 5], &[25, 0, 20]).await, [0, 1, 2, 3, 4]);
        assert_eq!(admitted(&[FOREVER; 5], &[20, 5, 0]).await, [0, 1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_gives_up_holds_up_no_other() {
        let patience = [TURN + TURN / 2, FOREVER, TURN + TURN / 2, FOREVER];
        assert_eq!(admitted(&patience, &[0, 11]).await, [1, 3]);
        // Two give up in the moment in which there is room.
        let order = admitted(&[TURN, TURN, FOREVER], &[1, 1, 1, 1]).await;
        assert_eq!(order.last(), Some(&2), "{order:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_request_overtakes_those_that_wait() {
        let admission = Admission::default();
        let until = Instant::now() + FOREVER;
        let mut first = pin!(admission.admit(10, until));
        let mut second = pin!(admission.admit(10, until));
        assert!(is_pending(first.as_mut()).await);
        admission.set_room(10);
        assert!(is_pending(second.as_mut()).await, "the first one was woken, and has not run");
        assert!(first.await);
        assert!(is_pending(second.as_mut()).await, "the room is taken");
        admission.set_room(1);
        assert!(second.await);
        // Nothing waits and there is room, so nothing is waited for.
        admission.set_room(11);
        assert!(admission.admit(10, Instant::now()).await);
        assert!(admission.admit(10, Instant::now()).await);
        assert!(!admission.admit(10, Instant::now()).await);
    }
}
