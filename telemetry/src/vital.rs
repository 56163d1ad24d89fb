//! Tasks that a process can't do without: one that ends, or panics, ends the process.
//!
//! A task that panics dies alone, and nobody hears of it: the process would go on without following etcd, say, and look
//! well. So whoever spawns such a task wraps it here, and whoever runs the process waits for [`Failures::next`].

use std::future::Future;

use tokio::sync::mpsc;

/// Wraps tasks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Vital(mpsc::UnboundedSender<&'static str>);

/// What has ended of what [`Vital`] has wrapped.
#[derive(Debug)]
pub struct Failures(mpsc::UnboundedReceiver<&'static str>);

/// For one process.
pub fn vital() -> (Vital, Failures) {
    let (ended, failures) = mpsc::unbounded_channel();
    (Vital(ended), Failures(failures))
}

impl Vital {
    /// A task that never ends by itself. One that has nothing left to do waits for ever.
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

    /// A task that may end, but not with a panic: somebody waits for what it does.
    pub fn job<F: Future>(
        &self,
        name: &'static str,
        task: F,
    ) -> impl Future<Output = F::Output> + use<F> {
        let alarm = Alarm { ended: self.0.clone(), name };
        async move { alarm.watch(task).await }
    }
}

impl Failures {
    /// Waits until a task has ended that must not; says what it was. Safe to drop and call again.
    pub async fn next(&mut self) -> String {
        match self.0.recv().await {
            Some(name) => format!("{name} has failed"),
            // Nothing is watched any more.
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
        // A process that does not listen any more is ending.
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
        let (vital, mut failures) = vital();
        tokio::spawn(vital.forever("the first", async {}));
        assert_eq!(failures.next().await, "the first has failed");
        tokio::spawn(vital.forever("the second", async { panic!("a bug of this test") }));
        assert_eq!(failures.next().await, "the second has failed");
    }

    #[tokio::test]
    async fn a_job_may_end_or_be_given_up_but_not_panic() {
        let (vital, mut failures) = vital();
        tokio::spawn(vital.job("ends", async {})).await.expect("it ends");
        let given_up = tokio::spawn(vital.job("given up", std::future::pending::<()>()));
        given_up.abort();
        assert!(given_up.await.is_err_and(|error| error.is_cancelled()));
        tokio::spawn(vital.job("fails", async { panic!("a bug of this test") }));
        assert_eq!(failures.next().await, "fails has failed");
    }
}
