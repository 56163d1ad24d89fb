//! Threads that run jobs, and the alarm that the first failure of any of them rings.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use crate::error::DiskError;

/// Tells of the first failure, and of no other: the process ends because of it.
#[derive(Clone)]
pub(crate) struct Alarm {
    failed: Arc<dyn Fn(DiskError) + Send + Sync>,
    rung: Arc<AtomicBool>,
}

impl Alarm {
    pub(crate) fn new(failed: impl Fn(DiskError) + Send + Sync + 'static) -> Self {
        Self { failed: Arc::new(failed), rung: Arc::default() }
    }

    pub(crate) fn ring(&self, error: DiskError) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            (self.failed)(error);
        }
    }

    /// Runs what a thread does; an error or a panic in it rings.
    pub(crate) fn guard(&self, name: &'static str, body: impl FnOnce() -> Result<(), DiskError>) {
        struct OnPanic<'a>(&'a Alarm, &'static str);
        impl Drop for OnPanic<'_> {
            fn drop(&mut self) {
                if thread::panicking() {
                    self.0.ring(DiskError::Thread(self.1));
                }
            }
        }
        let _on_panic = OnPanic(self, name);
        if let Err(error) = body() {
            self.ring(error);
        }
    }
}

impl std::fmt::Debug for Alarm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Alarm({})", self.rung.load(Ordering::Acquire))
    }
}

type Job = Box<dyn FnOnce() -> Result<(), DiskError> + Send>;

/// One thread or several that take jobs from one queue, in order. With one thread each job ends
/// before the next begins, and after one that failed there is none.
#[derive(Debug)]
pub(crate) struct Workers {
    jobs: Option<mpsc::Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    stopping: Arc<AtomicBool>,
}

impl Workers {
    pub(crate) fn start(name: &'static str, count: usize, alarm: &Alarm) -> Self {
        Self::start_after(name, count, alarm, || {})
    }

    /// Threads that get the processor only when others leave it. RocksDB's own are set so in its
    /// options.
    pub(crate) fn start_low(name: &'static str, count: usize, alarm: &Alarm) -> Self {
        // A quarter of the weight of a normal thread: behind the loop, yet never starved, since the
        // tables fill while a flush waits.
        const NICE: i32 = 6;
        Self::start_after(name, count, alarm, || {
            if let Err(why) = rustix::process::setpriority_process(None, NICE) {
                tracing::debug!(%why, "a thread keeps its priority");
            }
        })
    }

    fn start_after(
        name: &'static str,
        count: usize,
        alarm: &Alarm,
        prepare: impl Fn() + Copy + Send + 'static,
    ) -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let stopping = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|_| {
            let (queue, stopping, alarm) = (queue.clone(), stopping.clone(), alarm.clone());
            spawn(name, move || {
                prepare();
                alarm.guard(name, || run_jobs(&queue, &stopping));
            })
        });
        Self { threads: threads.collect(), jobs: Some(jobs), stopping }
    }

    /// Queues a job. Once a thread has failed, or all are to stop, jobs are dropped unrun: the
    /// process is about to end.
    pub(crate) fn run(&self, job: impl FnOnce() -> Result<(), DiskError> + Send + 'static) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(Box::new(job));
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.jobs = None;
        join(self.threads.drain(..));
    }
}

fn run_jobs(queue: &Mutex<mpsc::Receiver<Job>>, stopping: &AtomicBool) -> Result<(), DiskError> {
    loop {
        // Held while waiting, too: the others wait for the lock instead. No job runs under it.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return Ok(()) };
        if stopping.load(Ordering::Acquire) {
            return Ok(());
        }
        job()?;
    }
}

pub(crate) fn spawn(name: &'static str, body: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    thread::Builder::new().name(name.into()).spawn(body).expect("a thread at start-up")
}

/// Waits for threads to end. What one of them panicked with has been reported by the alarm.
pub(crate) fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    for thread in threads {
        let _ = thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alarm() -> (Alarm, mpsc::Receiver<String>) {
        let (send, failures) = mpsc::channel();
        (Alarm::new(move |error| send.send(error.to_string()).expect("the test listens")), failures)
    }

    #[test]
    fn one_thread_keeps_the_order_and_stops_at_a_failure() {
        let (alarm, failures) = alarm();
        let workers = Workers::start("test", 1, &alarm);
        let (ran, order) = mpsc::channel();
        for number in 0..4 {
            let ran = ran.clone();
            workers.run(move || {
                ran.send(number).expect("the test listens");
                if number == 2 { Err(DiskError::Thread("told")) } else { Ok(()) }
            });
        }
        assert_eq!(failures.recv().unwrap(), "the told thread ended");
        drop((workers, ran));
        assert_eq!(order.iter().collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn a_panic_is_a_failure_and_only_the_first_is_told() {
        let (alarm, failures) = alarm();
        let workers = Workers::start("test", 2, &alarm);
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
        drop((workers, alarm));
        assert_eq!(failures.iter().collect::<Vec<_>>(), ["the test thread ended"]);
    }
}
