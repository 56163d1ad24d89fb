//! Tasks that a process can't do without: one that ends or panics ends the process.
//!
//! A task that panics ends alone, and nothing notices: the process would go on, for example without
//! following etcd, and look healthy. So the code that spawns such a task wraps it here, and the
//! code that runs the process waits for [`TaskFailures::next`].

use std::future::Future;

use tokio::sync::mpsc;

/// Wraps critical tasks. Clones are cheap and report to the same [`TaskFailures`].
#[derive(Clone, Debug)]
pub struct CriticalTasks(mpsc::UnboundedSender<&'static str>);

/// The failures of the tasks that [`CriticalTasks`] has wrapped.
#[derive(Debug)]
pub struct TaskFailures(mpsc::UnboundedReceiver<&'static str>);

/// Creates both ends, for one process.
pub fn critical_tasks() -> (CriticalTasks, TaskFailures) {
    let (ended, failures) = mpsc::unbounded_channel();
    (CriticalTasks(ended), TaskFailures(failures))
}

impl CriticalTasks {
    /// Wraps a task that must never end. A task that has nothing left to do waits for ever.
    pub fn forever<F: Future>(
        &self,
        name: &'static str,
        task: F,
    ) -> impl Future<Output = F::Output> + use<F> {
        let alarm = Alarm { ended: self.0.clone(), name };
        async move {
            let output = alarm.watch(task).await;
            alarm.ring();
            output
        }
    }

    /// Wraps a task that may end but must not panic, since others wait for its result.
    pub fn job<F: Future>(
        &self,
        name: &'static str,
        task: F,
    ) -> impl Future<Output = F::Output> + use<F> {
        let alarm = Alarm { ended: self.0.clone(), name };
        async move { alarm.watch(task).await }
    }
}

impl TaskFailures {
    /// Waits until a task has failed and returns a sentence that names it. Cancel-safe.
    pub async fn next(&mut self) -> String {
        match self.0.recv().await {
            Some(name) => format!("{name} has failed"),
            // All wrappers are gone, so nothing can fail any more.
            None => std::future::pending().await,
        }
    }
}

struct Alarm {
    ended: mpsc::UnboundedSender<&'static str>,
    name: &'static str,
}

impl Alarm {
    async fn watch<F: Future>(&self, task: F) -> F::Output {
        let _on_panic = OnPanic(self);
        task.await
    }

    fn ring(&self) {
        // A process that does not receive any more is already ending.
        let _ending = self.ended.send(self.name);
    }
}

struct OnPanic<'a>(&'a Alarm);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_must_live_is_missed_however_it_ends() {
        let (tasks, mut failures) = critical_tasks();
        tokio::spawn(tasks.forever("the first", async {}));
        assert_eq!(failures.next().await, "the first has failed");
        tokio::spawn(tasks.forever("the second", async { panic!("a bug of this test") }));
        assert_eq!(failures.next().await, "the second has failed");
    }

    #[tokio::test]
    async fn a_job_may_end_or_be_given_up_but_not_panic() {
        let (tasks, mut failures) = critical_tasks();
        tokio::spawn(tasks.job("ends", async {})).await.expect("it ends");
        let given_up = tokio::spawn(tasks.job("given up", std::future::pending::<()>()));
        given_up.abort();
        assert!(given_up.await.is_err_and(|error| error.is_cancelled()));
        tokio::spawn(tasks.job("fails", async { panic!("a bug of this test") }));
        assert_eq!(failures.next().await, "fails has failed");
    }
}
