//! File descriptors run out: a process can hardly open, accept or dial any more.

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use super::{Environment, Fault};
use crate::chaos::fleet::Role;

/// The exit code of a node that has failed, for a passing reason too.
const FAILED: i32 = 1;

/// The limit of a running process drops to what it has open, or a little above.
///
/// The process waits or refuses, does not report damage, and continues when it may open files
/// again. If RocksDB has failed to open a table for a background change, it refuses every later
/// write; the process then ends with exit code 1 after a minute and is restarted.
#[derive(Default)]
pub struct FewFileDescriptors {
    /// The victim, its process id, and its former limit.
    victim: Option<(String, Pid, Rlimit)>,
}

impl Fault for FewFileDescriptors {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let victim = env.any(&[Role::Node, Role::Node, Role::Gateway]);
        let pid = env.fleet.process(&victim).ok_or_else(|| format!("{victim} does not run"))?;
        let open = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero()));
        let open = open.map_err(|error| format!("{victim}: {error}"))?.count() as u64;
        let more = env.rng.below(6);
        let had = limit(pid, open + more).map_err(|error| format!("{victim}: {error}"))?;
        self.victim = Some((victim.clone(), pid, had));
        if env.fleet.member(&victim).role == Role::Node {
            env.fleet.allow_exit_codes(&victim, &[FAILED]);
        }
        Ok(format!("{victim}: {open} open, {more} more permitted"))
    }

    fn heal(&mut self, env: &mut Environment) {
        let Some((victim, pid, had)) = self.victim.take() else { return };
        // A process that was restarted meanwhile has a limit of its own.
        if env.fleet.process(&victim) == Some(pid)
            && let Err(why) = prlimit(Some(pid), Resource::Nofile, had)
        {
            env.broken
                .push(format!("the limit of open files of {victim} can't be raised again: {why}"));
        }
    }
}

/// Sets the soft limit only, so that it can be raised again; the hard limit is that of this
/// program. Returns the former limit.
fn limit(pid: Pid, files: u64) -> rustix::io::Result<Rlimit> {
    let lower = Rlimit { current: Some(files), ..getrlimit(Resource::Nofile) };
    prlimit(Some(pid), Resource::Nofile, lower)
}
