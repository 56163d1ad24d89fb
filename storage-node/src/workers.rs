//! Threads that run jobs, and the report of their first failure.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use crate::error::DiskError;

/// Reports the first failure and no other: the process ends because of it.
#[derive(Clone)]
pub(crate) struct FailureReporter {
    failed: Arc<dyn Fn(DiskError) + Send + Sync>,
    reported: Arc<AtomicBool>,
}

impl FailureReporter {
    pub(crate) fn new(failed: impl Fn(DiskError) + Send + Sync + 'static) -> Self {
        Self { failed: Arc::new(failed), reported: Arc::default() }
    }

    pub(crate) fn report(&self, error: DiskError) {
        if !self.reported.swap(true, Ordering::AcqRel) {
            (self.failed)(error);
        }
    }

    /// Runs the body of a thread and reports an error or a panic in it.
    pub(crate) fn guard(&self, name: &'static str, body: impl FnOnce() -> Result<(), DiskError>) {
        struct ReportOnPanic<'a>(&'a FailureReporter, &'static str);
        impl Drop for ReportOnPanic<'_> {
            fn drop(&mut self) {
                if thread::panicking() {
                    self.0.report(DiskError::Thread(self.1));
                }
            }
        }
        let _on_panic = ReportOnPanic(self, name);
        if let Err(error) = body() {
            self.report(error);
        }
    }
}

type DiskJob = Box<dyn FnOnce() -> Result<(), DiskError> + Send>;

/// One or more threads that take jobs from one queue, in order. With one thread each job ends
/// before the next begins, and no job runs after a failed one.
#[derive(Debug)]
pub(crate) struct DiskWorkers {
    jobs: mpsc::Sender<DiskJob>,
    _threads: Vec<JoinedThread>,
    stopping: Arc<AtomicBool>,
}

impl DiskWorkers {
    pub(crate) fn start(name: &'static str, count: usize, reporter: &FailureReporter) -> Self {
        Self::start_after(name, count, reporter, || {})
    }

    /// Starts threads of low CPU priority. RocksDB's own threads get theirs by its options.
    pub(crate) fn start_low_priority(
        name: &'static str,
        count: usize,
        reporter: &FailureReporter,
    ) -> Self {
        // A quarter of the weight of a normal thread: behind the loop, yet never starved, since the
        // tables fill while a flush waits.
        const NICE: i32 = 6;
        Self::start_after(name, count, reporter, || {
            if let Err(why) = rustix::process::setpriority_process(None, NICE) {
                tracing::debug!(%why, "could not lower thread priority");
            }
        })
    }

    fn start_after(
        name: &'static str,
        count: usize,
        reporter: &FailureReporter,
        prepare: impl Fn() + Copy + Send + 'static,
    ) -> Self {
        let (jobs, queue) = mpsc::channel::<DiskJob>();
        let queue = Arc::new(Mutex::new(queue));
        let stopping = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|_| {
            let (queue, stopping, reporter) = (queue.clone(), stopping.clone(), reporter.clone());
            spawn(name, move || {
                prepare();
                reporter.guard(name, || run_jobs(&queue, &stopping));
            })
        });
        Self { jobs, _threads: threads.collect(), stopping }
    }

    /// Queues a job. Once a thread has failed, or all are to stop, jobs are dropped unrun: the
    /// process is about to end.
    pub(crate) fn run(&self, job: impl FnOnce() -> Result<(), DiskError> + Send + 'static) {
        let _ = self.jobs.send(Box::new(job));
    }
}

impl Drop for DiskWorkers {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
    }
}

fn run_jobs(
    queue: &Mutex<mpsc::Receiver<DiskJob>>,
    stopping: &AtomicBool,
) -> Result<(), DiskError> {
    loop {
        // The lock is held while waiting, too: the other threads wait for the lock instead. No job
        // runs under it.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return Ok(()) };
        if stopping.load(Ordering::Acquire) {
            return Ok(());
        }
        job()?;
    }
}

/// A thread whose end is awaited when this is dropped: in a struct it comes after the channel whose
/// end makes the thread end, since fields are dropped in order.
#[derive(Debug)]
pub(crate) struct JoinedThread(Option<JoinHandle<()>>);

pub(crate) fn spawn(name: &'static str, body: impl FnOnce() + Send + 'static) -> JoinedThread {
    let thread = thread::Builder::new().name(name.into()).spawn(body);
    JoinedThread(Some(thread.expect("a thread at start-up")))
}

impl Drop for JoinedThread {
    fn drop(&mut self) {
        // A panic has been reported already.
        let _panicked = self.0.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reporter() -> (FailureReporter, mpsc::Receiver<String>) {
        let (send, failures) = mpsc::channel();
        (
            FailureReporter::new(move |error| {
                send.send(error.to_string()).expect("the test listens")
            }),
            failures,
        )
    }

    #[test]
    fn one_thread_keeps_the_order_and_stops_at_a_failure() {
        let (reporter, failures) = reporter();
        let workers = DiskWorkers::start("test", 1, &reporter);
        let (ran, order) = mpsc::channel();
        for number in 0..4 {
            let ran = ran.clone();
            workers.run(move || {
                ran.send(number).expect("the test listens");
                if number == 2 { Err(DiskError::Thread("second")) } else { Ok(()) }
            });
        }
        assert_eq!(failures.recv().unwrap(), "the second thread ended");
        drop((workers, ran));
        assert_eq!(order.iter().collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn a_panic_is_a_failure_and_only_the_first_is_reported() {
        let (reporter, failures) = reporter();
        let workers = DiskWorkers::start("test", 2, &reporter);
        // Jobs that have not begun are dropped with the workers.
        let (begun, began) = mpsc::channel();
        for _ in 0..2 {
            let begun = begun.clone();
            workers.run(move || {
                begun.send(()).expect("the test listens");
                panic!("a bug");
            });
        }
        assert_eq!(began.iter().take(2).count(), 2);
        drop((workers, reporter));
        assert_eq!(failures.iter().collect::<Vec<_>>(), ["the test thread ended"]);
    }
}
