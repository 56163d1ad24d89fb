//! A power cut: undoes all writes of a process that no sync covered, both of bytes and of names,
//! from the records of `disk_shim.c`.
//!
//! ```text
//!   process ── LD_PRELOAD disk_shim.so ──▶ shadow: the synced state    (killed)    cut ──▶ folder
//! ```
//!
//! This is harsher than most disks: everything that need not have survived is gone. Partial writes,
//! as a disk leaves them that loses power during a write, are tested by
//! `storage-node/tests/disk/torn.rs`. The module uses std only, since tests of other crates include
//! it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The places where the synced state of a process's files is recorded.
#[derive(Clone, Debug)]
pub struct ShadowedDisk {
    /// The common prefix of all recorded paths, such as `/tmp/x/store-`.
    pub root: String,
    /// The folder with the synced state, created by the process.
    pub shadow: PathBuf,
    /// The folder for files that lost a name, on the same file system as the root; also created by
    /// the process.
    pub kept: PathBuf,
}

/// The counts of what a power cut undid.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct LostWrites {
    /// The number of files whose length or content changed.
    pub files: usize,
    /// The number of names that had been created, changed or removed.
    pub names: usize,
}

/// Compiles the preload library into this folder.
pub fn build_shim(folder: &Path) -> Result<PathBuf, String> {
    let (source, shim) = (folder.join("disk_shim.c"), folder.join("disk_shim.so"));
    fs::write(&source, include_str!("disk_shim.c")).map_err(|error| error.to_string())?;
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&shim).arg(&source).stdin(Stdio::null());
    match compiler.output() {
        Ok(output) if output.status.success() => Ok(shim),
        Ok(output) => Err(format!("cc: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("cc: {error}")),
    }
}

impl ShadowedDisk {
    /// Returns the environment variables that the process needs, besides `LD_PRELOAD`.
    pub fn environment(&self) -> [(&'static str, PathBuf); 3] {
        [
            ("DKC_DISK_ROOT", PathBuf::from(&self.root)),
            ("DKC_DISK_SHADOW", self.shadow.clone()),
            ("DKC_DISK_KEPT", self.kept.clone()),
        ]
    }

    /// Cuts the power. No process may have a file below the root open.
    pub fn cut(&self) -> io::Result<LostWrites> {
        if !self.shadow.exists() {
            return Ok(LostWrites::default());
        }
        let lost = LostWrites { files: self.undo_bytes()?, names: self.undo_names()? };
        self.settle()?;
        Ok(lost)
    }

    /// Declares all writes synced, as they would be after some time without a power cut.
    pub fn settle(&self) -> io::Result<()> {
        for folder in [&self.shadow, &self.kept] {
            match fs::remove_dir_all(folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Restores the bytes in place, so that all names of a file see them.
    fn undo_bytes(&self) -> io::Result<usize> {
        let mut paths = BTreeMap::new();
        let (folder, first) = self.root.rsplit_once('/').unwrap_or(("/", &self.root));
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(first) {
                walk(&entry.path(), &mut paths)?;
            }
        }
        walk(&self.kept, &mut paths)?;
        let mut undone = 0;
        for entry in fs::read_dir(self.shadow.join("data"))? {
            let entry = entry?;
            let inode = entry.file_name().to_string_lossy().parse::<u64>();
            let Some(path) = inode.ok().and_then(|inode| paths.get(&inode)) else { continue };
            let synced = fs::read(entry.path())?;
            if fs::read(path)? != synced {
                fs::write(path, synced)?;
                undone += 1;
            }
        }
        Ok(undone)
    }

    fn undo_names(&self) -> io::Result<usize> {
        let text = fs::read_to_string(self.shadow.join("names"))?;
        let mut operations: Vec<NameOperation<'_>> = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split('\t').collect();
            // A process that was killed while it wrote the last line has not done that operation.
            let [what, number, has_kept, folder, path, other] = words[..] else { continue };
            let kept = (has_kept == "1").then(|| self.kept.join(number));
            match what {
                "s" => operations.retain(|one| one.folder != folder),
                "x" => operations.retain(|one| one.number != number),
                _ => operations.push(NameOperation { what, number, folder, path, other, kept }),
            }
        }
        for operation in operations.iter().rev() {
            match operation.undo() {
                // The folder of the name is gone too, or the operation had not begun.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(operations.len())
    }
}

/// An operation on a name that can be undone.
struct NameOperation<'a> {
    what: &'a str,
    number: &'a str,
    folder: &'a str,
    path: &'a str,
    /// The name before a renaming.
    other: &'a str,
    /// The file that lost its name.
    kept: Option<PathBuf>,
}

impl NameOperation<'_> {
    fn undo(&self) -> io::Result<()> {
        let back = |kept: &PathBuf| match fs::hard_link(kept, self.path) {
            // The operation had not begun.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done,
        };
        match self.what {
            "c" | "l" => fs::remove_file(self.path),
            "m" => fs::remove_dir_all(self.path),
            // The file that would be replaced still has its name: the operation had not begun.
            "r" if self.kept.as_ref().is_some_and(|kept| is_same(kept, self.path)) => Ok(()),
            "r" => {
                fs::rename(self.path, self.other)?;
                self.kept.as_ref().map_or(Ok(()), back)
            }
            "u" => self.kept.as_ref().map_or(Ok(()), back),
            "d" => fs::create_dir(self.path),
            what => Err(io::Error::other(format!("unknown operation {what:?}"))),
        }
    }
}

fn is_same(one: &Path, other: &str) -> bool {
    let inode = |path: &Path| fs::symlink_metadata(path).ok().map(|metadata| metadata.ino());
    inode(one) == inode(Path::new(other))
}

/// Collects all files below `path` by inode.
fn walk(path: &Path, paths: &mut BTreeMap<u64, PathBuf>) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            walk(&entry?.path(), paths)?;
        }
    } else if metadata.is_file() {
        paths.insert(metadata.ino(), path.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The folder of the test, and the preload library.
    struct Bench {
        folder: PathBuf,
        shim: PathBuf,
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            let _is_temporary = fs::remove_dir_all(&self.folder);
        }
    }

    /// Runs these commands on a disk with a file `old`, cuts the power, and returns the files that
    /// are left, with name and content.
    fn left(Bench { folder, shim }: &Bench, commands: &str) -> (Vec<(String, String)>, LostWrites) {
        let data = folder.join("store-1");
        let _of_the_one_before = fs::remove_dir_all(&data);
        fs::create_dir_all(&data).expect("a folder");
        fs::write(data.join("old"), "old").expect("a file");
        let root = folder.join("store-").display().to_string();
        let disk = ShadowedDisk { root, shadow: folder.join("shadow"), kept: folder.join("kept") };
        // Each command is a process of its own, like one that is killed and started again.
        for command in commands.split(';') {
            let script = command.trim().replace('@', &format!("{}/", data.display()));
            let mut shell = Command::new("sh");
            shell.args(["-c", &script]).env("LD_PRELOAD", shim).envs(disk.environment());
            assert!(shell.status().expect("a shell").success(), "{script}");
        }
        let lost = disk.cut().expect("its own folder");
        let mut found = Vec::new();
        for entry in fs::read_dir(&data).expect("a folder") {
            let entry = entry.expect("an entry");
            let content = fs::read_to_string(entry.path()).expect("text");
            found.push((entry.file_name().to_string_lossy().into_owned(), content));
        }
        found.sort();
        (found, lost)
    }

    #[test]
    fn what_no_sync_covered_is_gone() {
        let folder = std::env::temp_dir().join(format!("dkc-power-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let shim = build_shim(&folder).expect("a C compiler");
        let bench = Bench { folder, shim };
        let check = |commands: &str, want: &[(&str, &str)]| {
            let (found, lost) = left(&bench, commands);
            let found: Vec<_> = found.iter().map(|(name, text)| (&name[..], &text[..])).collect();
            assert_eq!(found, want, "{commands}");
            lost
        };
        let old = ("old", "old");
        assert_eq!(check("true", &[old]), LostWrites::default());
        // Bytes.
        check("printf new > @old", &[old]);
        check("printf new > @old; sync @old; printf more >> @old", &[("old", "new")]);
        // Through a second descriptor, as `File::try_clone` makes one.
        let script = "from os import *\nfile = open('@old', O_WRONLY | O_APPEND)\n\
                      copy = dup(file)\nwrite(file, b'+1')\nwrite(copy, b'+2')\n\
                      fsync(file)\nwrite(copy, b'+3')";
        check(&format!("python3 -c \"{script}\""), &[("old", "old+1+2")]);
        // Names: a synced file has no durable name before its folder is synced.
        check("printf new > @a; sync @a", &[old]);
        check("printf new > @a; sync @", &[("a", ""), old]);
        check("printf new > @a; sync @a; sync @", &[("a", "new"), old]);
        check("rm @old", &[old]);
        check("rm @old; sync @", &[]);
        // Renaming over an existing file.
        check("printf new > @a; sync @a; sync @; mv @a @old", &[("a", "new"), old]);
        check("printf new > @a; sync @a; mv @a @old; sync @", &[("old", "new")]);
        check("printf new > @a; mv @a @old; sync @", &[("old", "")]);
        check("ln @old @two; sync @; rm @old", &[old, ("two", "old")]);
        let lost = check("printf new > @a; printf new > @old; mkdir @b; printf x > @b/c", &[old]);
        assert_eq!(lost, LostWrites { files: 3, names: 3 });
    }
}
