//! Paused processes, as after SIGSTOP: messages that they have sent are on their way, messages for
//! them wait, and so do their timers. They may stop between any two outputs.
//!
//! No other process is notified: connections stay open, new ones are not answered. A process that
//! continues receives everything that has arrived meanwhile, at once, and its clock has jumped
//! ahead.

use std::collections::BTreeMap;

use super::event::ProcessInput;
use super::place::ProcessId;

#[derive(Default)]
pub struct Pauses {
    /// The inputs that wait for paused processes.
    pub(super) inboxes: BTreeMap<ProcessId, Vec<ProcessInput>>,
    /// This process pauses after so many more outputs, for so long.
    pub(super) armed: Option<(ProcessId, u64, u64)>,
}
