//! Open files run out: a process can open, accept and dial hardly anything more.

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use super::{Fault, Field};
use crate::chaos::fleet::Role;

/// The exit code of a node that has failed, for a passing reason too.
const FAILED: i32 = 1;

/// The limit of a running process drops to what it has open, or a little above.
///
/// It waits or refuses, takes nothing for damage, and goes on when it may open files again; or, once RocksDB has failed to
/// open a table for a change of its own and so refuses every later one, it ends with 1 after a minute and starts again.
#[derive(Default)]
pub struct Few {
    /// With the limit that it had.
    victim: Option<(String, Pid, Rlimit)>,
}

impl Fault for Few {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let victim = field.any(&[Role::Node, Role::Node, Role::Gateway]);
        let pid = field.fleet.process(&victim).ok_or_else(|| format!("{victim} does not run"))?;
        let open = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero()));
        let open = open.map_err(|error| format!("{victim}: {error}"))?.count() as u64;
        let more = field.rng.below(6);
        let had = limit(pid, open + more).map_err(|error| format!("{victim}: {error}"))?;
        self.victim = Some((victim.clone(), pid, had));
        if field.fleet.member(&victim).role == Role::Node {
            field.fleet.explain(&victim, &[FAILED]);
        }
        Ok(format!("{victim}: {open} open, {more} more may be"))
    }

    fn heal(&mut self, field: &mut Field) {
        let Some((victim, pid, had)) = self.victim.take() else { return };
        // One that was started again meanwhile has a limit of its own.
        if field.fleet.process(&victim) == Some(pid)
            && let Err(why) = prlimit(Some(pid), Resource::Nofile, had)
        {
            field.broken.push(format!("{victim} can't be given open files again: {why}"));
        }
    }
}

/// Sets the soft limit only, so that it can be put back: the hard one is this program's own. Returns what it was.
fn limit(pid: Pid, files: u64) -> rustix::io::Result<Rlimit> {
    let lower = Rlimit { current: Some(files), ..getrlimit(Resource::Nofile) };
    prlimit(Some(pid), Resource::Nofile, lower)
}
