//! Processes that stand still, as after SIGSTOP: what they have sent is on its way, what comes for them waits, and so do
//! their timers. They may stop between any two outputs.
//!
//! Nobody is told: connections stay open, new ones are not answered. A process that goes on does so with everything
//! that has come meanwhile, at once, and with its clock jumped ahead.

use std::collections::BTreeMap;

use super::core::{Core, Happening, Process, Told};

#[derive(Default)]
pub struct Pauses {
    /// What waits for those that stand still.
    inboxes: BTreeMap<Process, Vec<Told>>,
    /// This one stops before so many more outputs, and goes on after so long.
    armed: Option<(Process, u64, u64)>,
}

impl Core {
    pub fn is_paused(&self, process: Process) -> bool {
        self.pauses.inboxes.contains_key(&process)
    }

    /// Stops a process now, or before a coming output.
    pub fn pause(&mut self, process: Process, outputs: u64, lasts: u64) {
        if outputs == 0 {
            self.stop(process, lasts);
        } else {
            self.pauses.armed = Some((process, outputs, lasts));
        }
    }

    fn stop(&mut self, process: Process, lasts: u64) {
        self.journal.note(self.now, || format!("{process:?} stands still"));
        self.pauses.inboxes.entry(process).or_default();
        self.after(lasts, Happening::Resume { process });
    }

    /// A process is about to do something that others can see: must it wait?
    pub fn holds_back(&mut self, process: Process) -> bool {
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

    /// None: it will be told when it goes on. Its timers it looks at anew then.
    pub fn waits_for(&mut self, process: Process, told: Told) -> Option<Told> {
        let Some(inbox) = self.pauses.inboxes.get_mut(&process) else { return Some(told) };
        if !matches!(told, Told::Wake) {
            inbox.push(told);
        }
        None
    }

    /// It goes on: with what it was about to do, then with what has come.
    pub fn resume(&mut self, process: Process) -> Vec<Told> {
        let Some(mut inbox) = self.pauses.inboxes.remove(&process) else { return Vec::new() };
        self.journal.note(self.now, || format!("{process:?} goes on"));
        inbox.insert(0, Told::Resumed);
        inbox
    }

    /// All that stand still go on now.
    pub fn resume_all(&mut self) {
        self.pauses.armed = None;
        for process in self.pauses.inboxes.keys().copied().collect::<Vec<_>>() {
            self.after(0, Happening::Resume { process });
        }
    }
}
