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
struct WaitingCount<'a>(&'a Cell<usize>);

impl<'a> WaitingCount<'a> {
    fn begin(waiting: &'a Cell<usize>) -> Self {
        waiting.set(waiting.get() + 1);
        Self(waiting)
    }
}

impl Drop for WaitingCount<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// A request that was admitted. Dropped, it gives its room back.
pub(crate) struct AdmittedRequest<'a> {
    admission: &'a Admission,
    taken: usize,
}

impl AdmittedRequest<'_> {
    /// Notes that the batcher gets the request: the next turn counts what it takes.
    pub(crate) fn submitted(mut self) {
        self.taken = 0;
    }
}

impl Drop for AdmittedRequest<'_> {
    fn drop(&mut self) {
        self.admission.set_room(self.admission.room.get() + self.taken);
    }
}

impl Admission {
    /// Sets the room, as it is at the end of a turn.
    pub(crate) fn set_room(&self, bytes: usize) {
        self.room.set(bytes);
        self.wake_first();
    }

    /// Waits until a request that will take about `bytes` is admitted. Returns `None` if it is not
    /// before `until`. The last one admitted may take more than there is room.
    pub(crate) async fn admit(&self, bytes: usize, until: Instant) -> Option<AdmittedRequest<'_>> {
        if self.room.get() == 0 || self.waiting.get() > 0 {
            let _waiting = WaitingCount::begin(&self.waiting);
            timeout_at(until, self.first.notified()).await.ok()?;
            // A request that was woken is admitted even if the room has been taken since: it must
            // not wait behind those that came later.
            self.woken.set(false);
        }
        let taken = bytes.min(self.room.get());
        self.room.set(self.room.get() - taken);
        self.wake_first();
        Some(AdmittedRequest { admission: self, taken })
    }

    fn wake_first(&self) {
        if self.room.get() > 0 && self.waiting.get() > 0 && !self.woken.replace(true) {
            self.first.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Waker};
    use std::time::Duration;

    use super::*;

    /// Requests of 10 bytes each, in the order of their arrival. `None`: admitted, or given up.
    #[derive(Default)]
    struct Requests<'a>(Vec<Option<Pin<Box<dyn Future<Output = bool> + 'a>>>>);

    impl<'a> Requests<'a> {
        /// Returns whether the request is admitted at once.
        fn arrive(&mut self, admission: &'a Admission) -> bool {
            let until = Instant::now() + Duration::from_secs(3600);
            let admitted = async move {
                let admitted = admission.admit(10, until).await;
                admitted.map(AdmittedRequest::submitted).is_some()
            };
            self.0.push(Some(Box::pin(admitted)));
            self.runs(self.0.len() - 1)
        }

        fn give_up(&mut self, number: usize) {
            self.0[number] = None;
        }

        /// Runs one request. Returns whether it is admitted.
        fn runs(&mut self, number: usize) -> bool {
            let Some(request) = &mut self.0[number] else { return false };
            let is_admitted =
                request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
            if is_admitted {
                self.0[number] = None;
            }
            is_admitted
        }

        /// Runs each until none can go on. Returns those that were admitted, in this order.
        fn run(&mut self) -> Vec<usize> {
            let mut admitted = Vec::new();
            while let Some(number) = (0..self.0.len()).find(|&number| self.runs(number)) {
                admitted.push(number);
            }
            admitted
        }

        /// Ends a turn that leaves so much room.
        #[track_caller]
        fn turn(&mut self, admission: &Admission, room: usize, want: &[usize]) {
            admission.set_room(room);
            assert_eq!(self.run(), want);
        }
    }

    #[tokio::test]
    async fn requests_are_admitted_in_order_as_far_as_there_is_room() {
        let admission = Admission::default();
        let mut requests = Requests::default();
        for _ in 0..6 {
            assert!(!requests.arrive(&admission), "there is no room yet");
        }
        requests.turn(&admission, 0, &[]);
        requests.turn(&admission, 1, &[0]);
        requests.turn(&admission, 25, &[1, 2, 3]);
        requests.turn(&admission, 0, &[]);
        requests.turn(&admission, 10, &[4]);
        requests.turn(&admission, 15, &[5]);
        assert!(requests.arrive(&admission), "nothing waits, and 5 bytes are left");
        assert!(!requests.arrive(&admission));
    }

    #[tokio::test]
    async fn one_that_gives_up_holds_up_no_other() {
        let admission = Admission::default();
        let mut requests = Requests::default();
        (0..5).for_each(|_| assert!(!requests.arrive(&admission)));
        requests.give_up(0);
        requests.turn(&admission, 10, &[1]);
        // It was woken, and gives up before it runs.
        admission.set_room(10);
        requests.give_up(2);
        assert_eq!(requests.run(), [3]);
        // So does the last one: the next one that waits is woken in its place.
        admission.set_room(10);
        requests.give_up(4);
        admission.set_room(0);
        assert!(requests.arrive(&admission));
        assert!(!requests.arrive(&admission));
        requests.turn(&admission, 0, &[]);
        requests.turn(&admission, 10, &[6]);
    }

    /// The turn that follows the first one finds that there is no room for another.
    #[tokio::test]
    async fn one_that_was_woken_does_not_go_to_the_end() {
        let admission = Admission::default();
        let mut requests = Requests::default();
        (0..4).for_each(|_| assert!(!requests.arrive(&admission)));
        admission.set_room(15);
        assert!(requests.runs(0));
        admission.set_room(0);
        assert_eq!(requests.run(), [1]);
        requests.turn(&admission, 20, &[2, 3]);
    }

    /// It is malformed, say: no turn will count it.
    #[tokio::test]
    async fn one_that_does_not_reach_the_batcher_gives_its_room_back() {
        let admission = Admission::default();
        admission.set_room(15);
        let mut requests = Requests::default();
        let long = admission.admit(100, Instant::now()).await;
        assert!(long.is_some());
        assert!(!requests.arrive(&admission), "the first one has all the room");
        drop(long);
        assert_eq!(requests.run(), [0]);
        assert!(requests.arrive(&admission), "5 of the 15 bytes are left");
        assert!(!requests.arrive(&admission));
    }

    #[tokio::test]
    async fn no_request_overtakes_those_that_wait() {
        let admission = Admission::default();
        let mut requests = Requests::default();
        (0..2).for_each(|_| assert!(!requests.arrive(&admission)));
        admission.set_room(10);
        assert!(!requests.arrive(&admission), "the first one was woken, and has not run yet");
        assert_eq!(requests.run(), [0]);
        requests.turn(&admission, 10, &[1]);
        requests.turn(&admission, 10, &[2]);
    }

    #[tokio::test]
    async fn a_request_waits_no_longer_than_it_may() {
        let admission = Admission::default();
        assert!(admission.admit(10, Instant::now()).await.is_none());
        admission.set_room(1);
        let admitted = admission.admit(10, Instant::now()).await;
        assert!(admitted.is_some(), "what need not wait is not late");
    }
}
