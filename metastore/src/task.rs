//! A task behind a receiver: aborted with it, and its panic is the receiver's.

use std::panic::resume_unwind;

use tokio::task::JoinHandle;

/// Spawned by whoever holds this.
#[derive(Debug)]
pub(crate) struct Task(Option<JoinHandle<()>>);

impl Task {
    pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Some(tokio::spawn(task)))
    }

    /// Waits until it has ended. If it panicked so does the caller: to be deaf and not know it would be worse.
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
    async fn an_end_is_waited_for_more_than_once_and_a_panic_goes_on() {
        let mut ends = Task::spawn(async {});
        ends.end().await;
        ends.end().await;
        let failed = tokio::spawn(async {
            Task::spawn(async { panic!("a bug of this test") }).end().await;
        });
        assert!(failed.await.is_err_and(|error| error.is_panic()));
    }
}
