//! What can go wrong with a disk, and the one place that says what it means ([`Fault`]).
//!
//! Three things look alike to a caller, an `Err`, and are not:
//!
//! - **The disk can't be trusted**: a checksum is wrong, a file is gone, the device fails. After that it is not known
//!   what is on the disk, and going on would acknowledge what may not be there. The process ends with code 5 and the
//!   store is suspect: its copies are made again from others.
//! - **Something has run out** ([`Lack`]): bytes, file names (inodes), a quota, open files. All that was durable is still
//!   there. What needs it waits ([`crate::patience`]), or the process ends with code 1 and comes back by its log.
//! - **The folder can't be used as it is**: rights, a mount that is read-only, a file in place of a folder. A person has
//!   to change something: code 2.
//!
//! RocksDB hands its errors out as text, so text is classified too: its own words for a status, and the C library's words
//! for an errno that it quotes.

use std::io;
use std::path::{Path, PathBuf};

use engine::store::log::catch_up::Gone;
use rustix::io::Errno;

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{action} {path}: {why}")]
    Io { action: &'static str, path: PathBuf, why: io::Error },
    #[error("state: {0}")]
    State(#[from] rocksdb::Error),
    #[error("state: CURRENT says {0:?}, which is no MANIFEST that is there")]
    Current(String),
    #[error("state: row {key}: {why}")]
    Row { key: String, why: engine::codec::Malformed },
    #[error("log segment {segment} at byte {offset}: what was written there is not there any more")]
    Damage { segment: u64, offset: usize },
    #[error(
        "{0}: damaged so far that it no longer says whose store this is; once the shards have other \
         copies, delete the store's folder and start with --replace to be a new store"
    )]
    Nameless(PathBuf),
    #[error("the {0} thread ended")]
    Thread(&'static str),
    #[error("{0} is in use by another process")]
    Locked(PathBuf),
    #[error("{0}: {1}")]
    Foreign(PathBuf, &'static str),
    #[error("{0} is no longer the folder that was opened ({1})")]
    Away(PathBuf, String),
}

impl From<Gone> for DiskError {
    fn from(Gone { segment, offset }: Gone) -> Self {
        Self::Damage { segment, offset }
    }
}

/// How messages about the state begin.
pub(crate) const STATE: &str = "state: ";

/// What an error says about the disk, and so what is to be done about it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// What was durable is gone or is something else: a disk that answers, and lies. It will give the same answer at the
    /// next start, so the store keeps a note of it.
    Damaged,
    /// The device fails, or what is on it makes no sense: what was written last is in doubt.
    Failing,
    /// Something that the machine gives out has run out. Nothing durable is in doubt.
    Lacks(Lack),
    /// Rights or settings do not let this process use the folder.
    Denied,
    /// The folder is not there any more: its volume was unmounted, or it was moved.
    Away,
    /// The folder is in use, or is no store's.
    NotOurs,
    /// A bug, or something that no rule here knows. The disk is not to blame.
    Other,
}

/// What has run out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lack {
    /// Bytes, inodes, or the quota of either.
    Space,
    /// Open files, of the process or of the machine.
    OpenFiles,
    Memory,
}

impl Fault {
    /// The code the process ends with.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Damaged | Self::Failing => 5,
            Self::NotOurs => 4,
            Self::Denied => 2,
            Self::Lacks(_) | Self::Away | Self::Other => 1,
        }
    }

    /// What a person is to do about it; empty where the error itself says so.
    fn advice(self) -> &'static str {
        match self {
            Self::Damaged | Self::Failing | Self::NotOurs | Self::Other => "",
            Self::Lacks(lack) => lack.advice(),
            Self::Denied => {
                "check --data, the owner and the rights of everything in it, and that its file system is mounted for \
                 writing (if the kernel has made it read-only, dmesg says why)"
            }
            Self::Away => {
                "mount the volume again and start the node again: what is on it is as it was"
            }
        }
    }

    /// By the errno of a call on a file or folder.
    pub fn of_errno(errno: i32) -> Self {
        match Errno::from_raw_os_error(errno) {
            Errno::NOSPC | Errno::DQUOT => Self::Lacks(Lack::Space),
            Errno::MFILE | Errno::NFILE => Self::Lacks(Lack::OpenFiles),
            Errno::NOMEM | Errno::AGAIN | Errno::NOLCK => Self::Lacks(Lack::Memory),
            // A file that was there: a missing folder is told apart by whoever holds its lock.
            Errno::NOENT => Self::Damaged,
            Errno::ACCESS
            | Errno::PERM
            | Errno::ROFS
            | Errno::NOTDIR
            | Errno::ISDIR
            | Errno::EXIST
            | Errno::LOOP
            | Errno::NAMETOOLONG
            | Errno::FBIG
            | Errno::BUSY
            | Errno::TXTBSY
            | Errno::MLINK
            | Errno::XDEV
            | Errno::NOTSUP
            | Errno::NOSYS
            | Errno::INVAL => Self::Denied,
            Errno::IO
            | Errno::NXIO
            | Errno::NODEV
            | Errno::UCLEAN
            | Errno::BADMSG
            | Errno::ILSEQ
            | Errno::NODATA
            | Errno::REMOTEIO
            | Errno::TIMEDOUT
            | Errno::STALE
            | Errno::OVERFLOW => Self::Failing,
            _ => Self::Other,
        }
    }

    fn of_io(why: &io::Error) -> Self {
        match why.raw_os_error() {
            Some(errno) => Self::of_errno(errno),
            // Not from the kernel: a file that ends too early, or says something else than it should.
            None => match why.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => Self::Damaged,
                _ => Self::Other,
            },
        }
    }

    /// By what RocksDB says.
    pub fn of_state(text: &str) -> Self {
        let quoted = quoted_errno(text).map(Self::of_errno);
        // What has run out while files were looked at can look like files that are not right.
        if let Some(Self::Lacks(lack)) = quoted {
            return Self::Lacks(lack);
        }
        let says = |words: &str| text.starts_with(words);
        match quoted {
            _ if text.contains("No space left on device")
                || text.contains("Space limit reached") =>
            {
                Self::Lacks(Lack::Space)
            }
            _ if text.contains("Memory limit reached") => Self::Lacks(Lack::Memory),
            _ if says("Corruption") || says("NotFound") => Self::Damaged,
            Some(fault) => fault,
            None if text.contains("No such file") => Self::Damaged,
            // Of a file and without an errno: it ended too early, or could not be read.
            None if says("IO error") => Self::Failing,
            None => Self::Other,
        }
    }
}

/// The errno that a text quotes: at its end, or else between two of its parts.
fn quoted_errno(text: &str) -> Option<i32> {
    // Linux has 133 of them.
    let find = |quotes: &dyn Fn(&str) -> bool| (1..=133).find(|&errno| quotes(&description(errno)));
    find(&|words| text.ends_with(&format!(": {words}")))
        .or_else(|| find(&|words| text.contains(&format!(": {words}: "))))
}

/// What the C library says of an errno: RocksDB asks it too.
fn description(errno: i32) -> String {
    let mut text = io::Error::from_raw_os_error(errno).to_string();
    if let Some(at) = text.rfind(" (os error") {
        text.truncate(at);
    }
    text
}

impl Lack {
    /// What `/readyz` says.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Space => "no space on the disk",
            Self::OpenFiles => "too many open files",
            Self::Memory => "no memory",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Space => {
                "there are no free bytes or no free inodes (df, df -i), or a quota is used up: make room. Nothing is \
                 damaged: the node goes on by itself once there is some"
            }
            Self::OpenFiles => {
                "too many files are open, in this process or on the machine: raise the hard limit (ulimit -Hn, \
                 LimitNOFILE=) or fs.file-max. Nothing is damaged"
            }
            Self::Memory => "the machine has no memory left for it. Nothing is damaged",
        }
    }
}

impl DiskError {
    pub fn fault(&self) -> Fault {
        match self {
            Self::Io { why, .. } => Fault::of_io(why),
            Self::State(error) => Fault::of_state(error.as_ref()),
            Self::Current(_) | Self::Damage { .. } => Fault::Damaged,
            // A row that is whole and makes no sense was written so: by a newer build, or by a bug.
            Self::Row { .. } | Self::Nameless(_) => Fault::Failing,
            Self::Thread(_) => Fault::Other,
            Self::Locked(_) | Self::Foreign(..) => Fault::NotOurs,
            Self::Away(..) => Fault::Away,
        }
    }

    pub fn is_damage(&self) -> bool {
        self.fault() == Fault::Damaged
    }

    /// What has run out, if that is all.
    pub fn lack(&self) -> Option<Lack> {
        match self.fault() {
            Fault::Lacks(lack) => Some(lack),
            _ => None,
        }
    }

    /// The code the process exits with.
    pub fn exit_code(&self) -> u8 {
        self.fault().exit_code()
    }

    /// What happened, and what to do about it.
    pub fn with_advice(&self) -> String {
        match self.fault().advice() {
            "" => self.to_string(),
            advice => format!("{self}. To do: {advice}"),
        }
    }
}

pub(crate) fn context(action: &'static str, path: &Path, why: io::Error) -> DiskError {
    DiskError::Io { action, path: path.to_owned(), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: Fault = Fault::Lacks(Lack::Space);
    const FILES: Fault = Fault::Lacks(Lack::OpenFiles);
    const MEMORY: Fault = Fault::Lacks(Lack::Memory);

    /// Every errno there is: as a call's own, and quoted by RocksDB in its two ways.
    #[test]
    fn every_errno_has_one_meaning_whoever_says_it() {
        let want = |errno: i32| match errno {
            28 | 122 => SPACE,
            23 | 24 => FILES,
            11 | 12 | 37 => MEMORY,
            2 => Fault::Damaged,
            1 | 13 | 16..=18 | 20..=22 | 26 | 27 | 30 | 31 | 36 | 38 | 40 | 95 => Fault::Denied,
            5 | 6 | 19 | 61 | 74 | 75 | 84 | 110 | 116 | 117 | 121 => Fault::Failing,
            _ => Fault::Other,
        };
        for errno in 1..=133 {
            let name = description(errno);
            let io = context("write", Path::new("a/b"), io::Error::from_raw_os_error(errno));
            assert_eq!(io.fault(), want(errno), "{errno} {name}");
            if name.starts_with("Unknown error") {
                continue;
            }
            let last =
                format!("IO error: While open a file for random read: /d/state/7.sst: {name}");
            // Linux has two names for some: EAGAIN and EWOULDBLOCK are one, EDEADLK and EDEADLOCK too.
            assert_eq!(Fault::of_state(&last), want(errno), "{last}");
        }
    }

    #[test]
    fn rocksdb_says_the_same_in_other_words() {
        #[track_caller]
        fn check(text: &str, want: Fault) {
            assert_eq!(Fault::of_state(text), want, "{text}");
        }
        check(
            "IO error: No space left on device: While open a file for appending: ino/d/1.sst: No space left on device",
            SPACE,
        );
        check("IO error: No space left on device: While appending to file: d/1.sst", SPACE);
        check("IO error: Space limit reached: Max allowed space was reached", SPACE);
        check("IO error: While fdatasync: d/MANIFEST-000004: Disk quota exceeded", SPACE);
        check(
            "Corruption: Can't access /000005.sst: IO error: While open a file: d/5: Too many open files",
            FILES,
        );
        check("IO error: Memory limit reached: x", MEMORY);
        check(
            "Corruption: block checksum mismatch: stored = 1, computed = 2 in d/9.sst offset 0 size 7",
            Fault::Damaged,
        );
        check("Corruption: Error: Could not perform merge.", Fault::Damaged);
        check("NotFound: ", Fault::Damaged);
        check(
            "IO error: No such file or directory: While open a file for random read: d/9.sst: No such file or directory",
            Fault::Damaged,
        );
        check(
            "Corruption: Can't access /000005.sst: IO error: x: d/5.sst: Permission denied",
            Fault::Damaged,
        );
        check("IO error: While lock file: d/state/LOCK: Permission denied", Fault::Denied);
        check("IO error: While mkdir if missing: d/state: Read-only file system", Fault::Denied);
        check("IO error: While pread offset 0 len 7: d/9.sst: Input/output error", Fault::Failing);
        check("IO error: Stale file handle: While fsync: d/9.sst", Fault::Failing);
        check("IO error: file is too short (3 bytes) to be an sstable: d/9.sst", Fault::Failing);
        check(
            "Invalid argument: d/state: does not exist (create_if_missing is false)",
            Fault::Other,
        );
        check("Aborted: ", Fault::Other);
        // A folder of that name proves nothing.
        check("Corruption: bad block in /No space/9.sst", Fault::Damaged);
    }

    #[test]
    fn only_a_disk_that_can_not_be_trusted_ends_with_5() {
        let faults = [
            (Fault::Damaged, 5),
            (Fault::Failing, 5),
            (SPACE, 1),
            (FILES, 1),
            (MEMORY, 1),
            (Fault::Denied, 2),
            (Fault::Away, 1),
            (Fault::NotOurs, 4),
            (Fault::Other, 1),
        ];
        for (fault, code) in faults {
            assert_eq!(fault.exit_code(), code, "{fault:?}");
        }
    }

    #[test]
    fn what_to_do_is_said() {
        let full = context("preallocate", Path::new("d"), io::Error::from_raw_os_error(28));
        let said = full.with_advice();
        assert!(said.starts_with("preallocate d: No space left on device"), "{said}");
        assert!(said.contains("df -i"), "{said}");
    }
}
