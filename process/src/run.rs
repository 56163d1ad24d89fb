//! The process of a role, from its runtime to its exit code.

use std::time::Duration;

use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::error;

use crate::ProcessExit;

/// The time that tasks have to end once the role has ended.
const TASKS_END_WITHIN: Duration = Duration::from_secs(2);

/// Runs a role within a runtime until it ends. Returns the exit code of the process.
pub fn run(runtime: &mut Builder, role: impl Future<Output = Result<(), ProcessExit>>) -> u8 {
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(%error, "could not start the runtime");
            return 1;
        }
    };
    let code = match runtime.block_on(role) {
        Ok(()) => 0,
        Err(exit) => {
            error!(code = exit.code(), "{exit}");
            exit.code()
        }
    };
    // The runtime is awaited: tasks may hold RocksDB, which aborts a process that closes it while
    // `exit` runs. Tasks that hang are left behind after a while.
    runtime.shutdown_timeout(TASKS_END_WITHIN);
    code
}

/// The signals that stop a process, from the moment when this is created.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Begins to receive SIGTERM and SIGINT, which no longer end the process by themselves. Must be
    /// called within a runtime.
    pub fn new() -> Result<Self, ProcessExit> {
        let failed = |error| ProcessExit::Failed(format!("can't handle signals: {error}"));
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
        })
    }

    /// Waits for the next signal, and returns its name.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Waits until a stop is to be cut short: at SIGINT, or at a second SIGTERM.
    pub async fn hurry(mut self) {
        if self.next().await == "SIGTERM" {
            self.next().await;
        }
    }
}
