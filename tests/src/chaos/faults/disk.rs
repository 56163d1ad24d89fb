//! Disks: full ones, and ones that give back other bytes than they were given.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Fault, Field};
use crate::chaos::fleet::Role;

/// A disk error: the process ends, as it must.
const DISK_ERROR: i32 = 5;
/// Not the folder of the last start, as far as it can tell.
const REFUSED: i32 = 4;

/// A file beside the data takes what is free of one node's disk, or nearly all of it.
///
/// The node refuses ("no space", not applied), or ends with a disk error if it came between two of
/// its looks; it must not lose or change anything.
#[derive(Default)]
pub struct Full {
    ballast: Option<PathBuf>,
}

impl Fault for Full {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let victim = field.any(&[Role::Node]);
        let left = field.rng.pick(&[0, 1 << 20, 8 << 20]).unwrap_or(0);
        field.fleet.explain(&victim, &[DISK_ERROR]);
        // Not in the data folder: what lies there is the node's own.
        let path = field.fleet.folder().join(&victim).join("ballast");
        self.ballast = Some(path.clone());
        let filled = fill(&path, left).map_err(|error| format!("{path:?}: {error}"))?;
        Ok(format!("{victim}: {} MiB more, {} MiB left", filled >> 20, left >> 20))
    }

    fn heal(&mut self, _field: &mut Field) {
        if let Some(ballast) = &self.ballast {
            let _was_never_made = std::fs::remove_file(ballast);
        }
    }
}

/// Writes until only `left` bytes are free; returns how many it wrote.
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
        // The last odd bytes; it ends with the error that says that there are no more.
        while let Ok(count @ 1..) = file.write(&block[..512]) {
            filled += count as u64;
        }
    }
    Ok(filled)
}

/// Empty files beside the data take every inode of one node's disk: there is room, and no name for it.
///
/// The node waits and refuses; it takes nothing for damage, and goes on by itself.
#[derive(Default)]
pub struct NoInodes {
    ballast: Option<PathBuf>,
}

impl Fault for NoInodes {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        let victim = field.any(&[Role::Node]);
        let folder = field.fleet.folder().join(&victim).join("inodes");
        self.ballast = Some(folder.clone());
        std::fs::create_dir_all(&folder).map_err(|error| format!("{folder:?}: {error}"))?;
        let mut names = (0..).map(|number| folder.join(number.to_string()));
        let refused = names.find_map(|path| File::create(path).err());
        match refused {
            Some(error) if error.kind() == std::io::ErrorKind::StorageFull => Ok(victim),
            error => Err(format!("{victim}: its inodes don't run out: {error:?}")),
        }
    }

    fn heal(&mut self, _field: &mut Field) {
        if let Some(folder) = &self.ballast {
            let _was_never_made = std::fs::remove_dir_all(folder);
        }
    }
}

/// A byte of a file of a node that is down is no longer what was written.
pub struct Flip {
    /// By the beginning and the end of the name.
    files: (&'static str, &'static str),
    /// What its node may end with.
    codes: &'static [i32],
    victim: String,
}

impl Flip {
    /// The group that is harmed may be the one that says which start this is. Without it the folder
    /// can't be told from one that was rolled back, and is refused.
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

impl Fault for Flip {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        self.victim = field.fleet.victim(&mut field.rng);
        let (start, end) = self.files;
        field.fleet.hold(&self.victim);
        field.fleet.wait_until_dead(&self.victim);
        let data = field.fleet.data(&self.victim);
        let mut files = Vec::new();
        find(&data, &|name| name.starts_with(start) && name.ends_with(end), &mut files);
        // RocksDB's own log is never written, and the next segment not yet.
        files.retain(|path| {
            std::fs::read(path).is_ok_and(|bytes| bytes.iter().any(|&byte| byte != 0))
        });
        files.sort();
        let flipped = match field.rng.index(files.len().max(1)) {
            _ if files.is_empty() => Err("no such file".to_owned()),
            at => flip(&files[at], field).map_err(|error| error.to_string()),
        };
        match flipped {
            Ok(offset) => {
                // Found at the start, at once or when the bytes are wanted; then a fresh start
                // finds a suspect store, or one that is beyond use: see Fleet::watch.
                field.fleet.explain(&self.victim, self.codes);
                Ok(format!("{}: {offset}", self.victim))
            }
            Err(why) => {
                field.fleet.release(&self.victim);
                Err(format!("{}: {why}", self.victim))
            }
        }
    }

    fn heal(&mut self, field: &mut Field) {
        field.fleet.release(&self.victim);
    }
}

/// Changes one byte among those that were written: a log's segment ends in zeros.
fn flip(path: &Path, field: &mut Field) -> std::io::Result<String> {
    let bytes = std::fs::read(path)?;
    let written = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    if written == 0 {
        return Err(std::io::Error::other(format!("{path:?} is empty")));
    }
    let at = field.rng.index(written);
    let changed = bytes[at] ^ (1 << field.rng.below(8));
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

/// Each sync of some nodes takes up to five seconds: they answer, and can't acknowledge anything.
#[derive(Default)]
pub struct Slow {
    victims: Vec<String>,
}

const SLOW_MS: (u32, u32) = (200, 5_000);

impl Fault for Slow {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        if !field.fleet.has_disks() {
            return Err("no way to delay a sync".to_owned());
        }
        let count = field.rng.between(1, 2) as usize;
        self.victims = field.some(Role::Node, count);
        for victim in &self.victims {
            field.fleet.set_disk(victim, SLOW_MS, 0)?;
        }
        Ok(self.victims.join(", "))
    }

    fn heal(&mut self, field: &mut Field) {
        for victim in &self.victims {
            if let Err(why) = field.fleet.set_disk(victim, (0, 0), 0) {
                field.broken.push(why);
            }
        }
    }
}

/// One sync of one node fails. What it was to cover may be on the disk or not: the process ends, as it must.
#[derive(Default)]
pub struct Failing {
    victim: String,
}

impl Fault for Failing {
    fn begin(&mut self, field: &mut Field) -> Result<String, String> {
        if !field.fleet.has_disks() {
            return Err("no way to fail a sync".to_owned());
        }
        self.victim = field.fleet.victim(&mut field.rng);
        field.fleet.explain(&self.victim, &[DISK_ERROR]);
        field.fleet.set_disk(&self.victim, (0, 0), 1)?;
        Ok(self.victim.clone())
    }

    fn heal(&mut self, field: &mut Field) {
        if let Err(why) = field.fleet.set_disk(&self.victim, (0, 0), 0) {
            field.broken.push(why);
        }
    }
}
