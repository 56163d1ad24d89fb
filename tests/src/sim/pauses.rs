//! Paused processes, as after SIGSTOP: messages that they have sent are on their way, messages for
//! them wait, and so do their timers. They may stop between any two outputs.
//!
//! No other process is notified: connections stay open, new ones are not answered. A process that
//! continues receives everything that has arrived meanwhile, at once, and its clock has jumped
//! ahead.

use std::collections::BTreeMap;

use super::core::{Core, ProcessId, ProcessInput, SimEvent};

#[derive(Default)]
pub struct Pauses {
    /// The inputs that wait for paused processes.
    inboxes: BTreeMap<ProcessId, Vec<ProcessInput>>,
    /// This process pauses after so many more outputs, for so long.
    armed: Option<(ProcessId, u64, u64)>,
}

impl Core {
    pub fn is_paused(&self, process: ProcessId) -> bool {
        self.pauses.inboxes.contains_key(&process)
    }

    /// Pauses a process now, or before a coming output.
    pub fn pause(&mut self, process: ProcessId, outputs: u64, lasts: u64) {
        if outputs == 0 {
            self.stop(process, lasts);
        } else {
            self.pauses.armed = Some((process, outputs, lasts));
        }
    }

    fn stop(&mut self, process: ProcessId, lasts: u64) {
        self.trace.note(self.now, || format!("{process:?} pauses"));
        self.pauses.inboxes.entry(process).or_default();
        self.after(lasts, SimEvent::Resume { process });
    }

    /// A process is about to do something that others can see: returns whether it must wait.
    pub fn holds_back(&mut self, process: ProcessId) -> bool {
        if let Some((armed, outputs, lasts)) = &mut self.pauses.armed
            && *armed == process
        {
            *outputs -= 1;
            if *outputs == 0 {
                let lasts = *lasts;
                self.pauses.armed = None;
                self.stop(process, lasts);
            }
        }
        self.is_paused(process)
    }

    /// Returns `None` if the input waits for a paused process. A timer need not wait: the process
    /// checks its timers when it continues.
    pub fn waits_for(&mut self, process: ProcessId, input: ProcessInput) -> Option<ProcessInput> {
        let Some(inbox) = self.pauses.inboxes.get_mut(&process) else { return Some(input) };
        if !matches!(input, ProcessInput::Wake) {
            inbox.push(input);
        }
        None
    }

    /// The process continues: with the effects that it was about to perform, then with the inputs
    /// that have arrived.
    pub fn resume(&mut self, process: ProcessId) -> Vec<ProcessInput> {
        let Some(mut inbox) = self.pauses.inboxes.remove(&process) else { return Vec::new() };
        self.trace.note(self.now, || format!("{process:?} resumes"));
        inbox.insert(0, ProcessInput::Resumed);
        inbox
    }

    /// All paused processes continue now.
    pub fn resume_all(&mut self) {
        self.pauses.armed = None;
        for process in self.pauses.inboxes.keys().copied().collect::<Vec<_>>() {
            self.after(0, SimEvent::Resume { process });
        }
    }
}
