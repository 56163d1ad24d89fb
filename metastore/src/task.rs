//! The task that feeds a receiver: it is aborted with the receiver, and its panic is passed on.

use std::panic::resume_unwind;

use tokio::task::JoinHandle;

/// A spawned task, which is aborted when this is dropped.
#[derive(Debug)]
pub(crate) struct Task(Option<JoinHandle<()>>);

impl Task {
    pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Some(tokio::spawn(task)))
    }

    /// Waits until the task has ended. If it panicked, the caller panics, too: a receiver that
    /// silently gets no more events would be worse.
    pub(crate) async fn end(&mut self) {
        let Some(task) = &mut self.0 else { return };
        let ended = task.await;
        self.0 = None;
        match ended {
            Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
            _ => {}
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn end_can_be_called_again_and_passes_a_panic_on() {
        let mut ends = Task::spawn(async {});
        ends.end().await;
        ends.end().await;
        let failed = tokio::spawn(async {
            Task::spawn(async { panic!("a bug of this test") }).end().await;
        });
        assert!(failed.await.is_err_and(|error| error.is_panic()));
    }
}
