//! Disk faults: full disks, changed bytes, slow and failing syncs.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Environment, Fault};
use crate::chaos::fleet::Role;

/// The exit code of a process after a disk error.
const DISK_ERROR: i32 = 5;
/// The exit code of a node that refuses its folder, since it may not be that of its last start.
const REFUSED: i32 = 4;

/// A file beside the data takes all free space of the disk of one node, or nearly all of it.
///
/// The node refuses ("no space", not applied), or ends with a disk error if the disk fills up
/// between two of its checks. It must not lose or change anything.
#[derive(Default)]
pub struct FilledDisk {
    ballast: Option<PathBuf>,
}

impl Fault for FilledDisk {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let victim = env.any(&[Role::Node]);
        let left = env.rng.pick(&[0, 1 << 20, 8 << 20]).unwrap_or(0);
        env.fleet.allow_exit_codes(&victim, &[DISK_ERROR]);
        // The file is not in the data folder, which belongs to the node.
        let path = env.fleet.folder().join(&victim).join("ballast");
        self.ballast = Some(path.clone());
        let filled = fill(&path, left).map_err(|error| format!("{path:?}: {error}"))?;
        Ok(format!("{victim}: {} MiB more, {} MiB left", filled >> 20, left >> 20))
    }

    fn heal(&mut self, _env: &mut Environment) {
        if let Some(ballast) = &self.ballast {
            let _was_never_made = std::fs::remove_file(ballast);
        }
    }
}

/// Writes until only `left` bytes are free. Returns the number of bytes written.
fn fill(path: &Path, left: u64) -> std::io::Result<u64> {
    let mut file = File::create(path)?;
    let block = vec![0; 64 << 10];
    let mut filled = 0;
    loop {
        let disk = rustix::fs::statvfs(path)?;
        if disk.f_bavail * disk.f_frsize <= left.max(block.len() as u64) {
            break;
        }
        match file.write(&block) {
            Ok(count) => filled += count as u64,
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
            Err(error) => return Err(error),
        }
    }
    if left == 0 {
        // The last bytes: the loop ends with the error that none are left.
        while let Ok(count @ 1..) = file.write(&block[..512]) {
            filled += count as u64;
        }
    }
    Ok(filled)
}

/// Empty files beside the data take every inode of the disk of one node, which still has free
/// bytes.
///
/// The node waits and refuses. It does not report damage, and continues by itself afterwards.
#[derive(Default)]
pub struct NoInodes {
    ballast: Option<PathBuf>,
}

impl Fault for NoInodes {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        let victim = env.any(&[Role::Node]);
        let folder = env.fleet.folder().join(&victim).join("inodes");
        self.ballast = Some(folder.clone());
        std::fs::create_dir_all(&folder).map_err(|error| format!("{folder:?}: {error}"))?;
        let mut names = (0..).map(|number| folder.join(number.to_string()));
        let refused = names.find_map(|path| File::create(path).err());
        match refused {
            Some(error) if error.kind() == std::io::ErrorKind::StorageFull => Ok(victim),
            error => Err(format!("{victim}: the inodes are not exhausted: {error:?}")),
        }
    }

    fn heal(&mut self, _env: &mut Environment) {
        if let Some(folder) = &self.ballast {
            let _was_never_made = std::fs::remove_dir_all(folder);
        }
    }
}

/// One bit of a file of a node that is down is flipped.
pub struct BitFlip {
    /// The files to choose from, by beginning and end of the name.
    files: (&'static str, &'static str),
    /// The exit codes with which the node may end.
    codes: &'static [i32],
    victim: String,
}

impl BitFlip {
    /// Damages a segment of the log. The damaged group may be the one with the nonce of the last
    /// start: without it the folder looks like one that was rolled back, and is refused.
    pub fn log() -> Self {
        Self::new(("", ".log"), &[DISK_ERROR, REFUSED])
    }

    pub fn table() -> Self {
        Self::new(("", ".sst"), &[DISK_ERROR])
    }

    pub fn manifest() -> Self {
        Self::new(("MANIFEST", ""), &[DISK_ERROR])
    }

    fn new(files: (&'static str, &'static str), codes: &'static [i32]) -> Self {
        Self { files, codes, victim: String::new() }
    }
}

impl Fault for BitFlip {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        self.victim = env.fleet.victim(&mut env.rng);
        let (start, end) = self.files;
        env.fleet.hold(&self.victim);
        env.fleet.wait_until_dead(&self.victim);
        let data = env.fleet.data(&self.victim);
        let mut files = Vec::new();
        find(&data, &|name| name.starts_with(start) && name.ends_with(end), &mut files);
        // Files of zeros only are left out: the unused log of RocksDB, and the next segment.
        files.retain(|path| {
            std::fs::read(path).is_ok_and(|bytes| bytes.iter().any(|&byte| byte != 0))
        });
        files.sort();
        let flipped = match env.rng.index(files.len().max(1)) {
            _ if files.is_empty() => Err("no such file".to_owned()),
            at => flip(&files[at], env).map_err(|error| error.to_string()),
        };
        match flipped {
            Ok(offset) => {
                // The damage is found at the start or when the bytes are read. The next start then
                // finds a suspect store, or one that cannot be used: see `Fleet::watch`.
                env.fleet.allow_exit_codes(&self.victim, self.codes);
                Ok(format!("{}: {offset}", self.victim))
            }
            Err(why) => {
                env.fleet.release(&self.victim);
                Err(format!("{}: {why}", self.victim))
            }
        }
    }

    fn heal(&mut self, env: &mut Environment) {
        env.fleet.release(&self.victim);
    }
}

/// Changes one of the bytes that were written; a segment of the log ends in zeros.
fn flip(path: &Path, env: &mut Environment) -> std::io::Result<String> {
    let bytes = std::fs::read(path)?;
    let written = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    if written == 0 {
        return Err(std::io::Error::other(format!("{path:?} is empty")));
    }
    let at = env.rng.index(written);
    let changed = bytes[at] ^ (1 << env.rng.below(8));
    File::options().write(true).open(path)?.write_all_at(&[changed], at as u64)?;
    let name = path.file_name().unwrap_or_default().display();
    Ok(format!("byte {at} of {written} of {name}"))
}

fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            find(&path, wanted, found);
        } else if wanted(&entry.file_name().to_string_lossy()) {
            found.push(path);
        }
    }
}

/// Each sync of some nodes takes up to five seconds: the nodes respond, but cannot acknowledge.
#[derive(Default)]
pub struct SlowSyncs {
    victims: Vec<String>,
}

const SLOW_MS: (u32, u32) = (200, 5_000);

impl Fault for SlowSyncs {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        if !env.fleet.can_control_disks() {
            return Err("syncs cannot be delayed here".to_owned());
        }
        let count = env.rng.between(1, 2) as usize;
        self.victims = env.some(Role::Node, count);
        for victim in &self.victims {
            env.fleet.set_disk(victim, SLOW_MS, 0)?;
        }
        Ok(self.victims.join(", "))
    }

    fn heal(&mut self, env: &mut Environment) {
        for victim in &self.victims {
            if let Err(why) = env.fleet.set_disk(victim, (0, 0), 0) {
                env.broken.push(why);
            }
        }
    }
}

/// One sync of one node fails. Its data may be on the disk or not, so the process must end.
#[derive(Default)]
pub struct FailedSync {
    victim: String,
}

impl Fault for FailedSync {
    fn begin(&mut self, env: &mut Environment) -> Result<String, String> {
        if !env.fleet.can_control_disks() {
            return Err("syncs cannot fail here".to_owned());
        }
        self.victim = env.fleet.victim(&mut env.rng);
        env.fleet.allow_exit_codes(&self.victim, &[DISK_ERROR]);
        env.fleet.set_disk(&self.victim, (0, 0), 1)?;
        Ok(self.victim.clone())
    }

    fn heal(&mut self, env: &mut Environment) {
        if let Err(why) = env.fleet.set_disk(&self.victim, (0, 0), 0) {
            env.broken.push(why);
        }
    }
}
