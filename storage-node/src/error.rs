//! The errors of a disk, and their classification ([`FaultClass`]), which is made only here.
//!
//! Three things look alike to a caller, an `Err`, and are not:
//!
//! - **The disk can't be trusted**: a checksum is wrong, a file is gone, the device fails. After
//!   that the content of the disk is unknown, and going on could acknowledge writes that are lost.
//!   The process ends with code 5 and the store is suspect: its copies are made again from others.
//! - **Something has run out** ([`Shortage`]): bytes, file names (inodes), a quota, open files. All
//!   that was durable is still there. Jobs that need it wait ([`crate::shortage_retry`]), or the
//!   process ends with code 1 and recovers from its log.
//! - **The folder can't be used as it is**: permissions, a read-only mount, a file in place of a
//!   folder. A person has to change something: code 2.
//!
//! RocksDB returns its errors as text, so text is classified too: its own words for a status, and
//! the C library's words for an errno that it quotes.

use std::io;
use std::path::{Path, PathBuf};

use engine::store::log::catch_up::Gone;
use process::ProcessExit;
use rustix::io::Errno;

/// An error of a store's disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A call on a file or folder failed.
    #[error("{action} {path}: {why}")]
    Io {
        /// The call that failed, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the call.
        why: io::Error,
    },
    /// RocksDB reports an error.
    #[error("state: {0}")]
    State(#[from] rocksdb::Error),
    /// RocksDB's `CURRENT`, with this content, does not name a MANIFEST.
    #[error("state: CURRENT names {0:?}, which does not exist")]
    Current(String),
    /// A row of the state can't be decoded.
    #[error("state: row {key}: {why}")]
    Row {
        /// The row's key, escaped.
        key: String,
        /// The part that can't be decoded.
        why: engine::codec::Malformed,
    },
    /// Durable bytes of the log are missing or changed.
    #[error("log segment {segment} at byte {offset}: durable data is missing or changed")]
    Damage {
        /// The number of the segment.
        segment: u64,
        /// The offset of the damage in the segment, in bytes.
        offset: usize,
    },
    #[error(
        "{0}: damaged so badly that its store is unknown; once the shards have other \
         copies, delete the store's folder and start with --replace to be a new store"
    )]
    /// The log is damaged so badly that its owner is unknown.
    Nameless(PathBuf),
    /// A thread of this name panicked.
    #[error("the {0} thread ended")]
    Thread(&'static str),
    /// Another process has locked the folder.
    #[error("{0} is in use by another process")]
    Locked(PathBuf),
    /// The folder contains a file that is not a store's.
    #[error("{0}: {1}")]
    Foreign(PathBuf, &'static str),
    /// The folder has vanished or was replaced; the text is the error that showed it.
    #[error("{0} is no longer the folder that was opened ({1})")]
    Away(PathBuf, String),
}

impl From<Gone> for DiskError {
    fn from(Gone { segment, offset }: Gone) -> Self {
        Self::Damage { segment, offset }
    }
}

/// The prefix of errors of the state.
pub(crate) const STATE: &str = "state: ";

/// The meaning of an error for the disk, which decides what is to be done about it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FaultClass {
    /// Durable data is gone or changed: the disk answers, but wrongly. It will give the same answer
    /// at the next start, so the store keeps a note of it.
    Damaged,
    /// The device fails, or its content makes no sense: the latest writes are in doubt.
    Failing,
    /// A resource of the machine has run out. Nothing durable is in doubt.
    Shortage(Shortage),
    /// Permissions or settings do not let this process use the folder.
    Denied,
    /// The folder has vanished: its volume was unmounted, or it was moved.
    Away,
    /// The folder is in use, or does not contain a store.
    NotOurs,
    /// A bug, or an error that no rule here classifies. The disk is not at fault.
    Other,
}

/// A resource that has run out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shortage {
    /// Bytes, inodes, or the quota of either.
    Space,
    /// Open files, of the process or of the machine.
    OpenFiles,
    /// The memory of the machine.
    Memory,
}

impl FaultClass {
    /// Returns the exit code of the process.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Damaged | Self::Failing => 5,
            Self::NotOurs => 4,
            Self::Denied => 2,
            Self::Shortage(_) | Self::Away | Self::Other => 1,
        }
    }

    /// Returns what an operator should do; empty where the error itself states it.
    fn advice(self) -> &'static str {
        match self {
            Self::Damaged | Self::Failing | Self::NotOurs | Self::Other => "",
            Self::Shortage(shortage) => shortage.advice(),
            Self::Denied => {
                "check --data, the owner and the rights of everything in it, and that its file \
                 system is mounted for writing (if the kernel has made it read-only, dmesg says \
                 why)"
            }
            Self::Away => {
                "mount the volume again and start the node again: what is on it is as it was"
            }
        }
    }

    /// Classifies the errno of a call on a file or folder.
    pub fn of_errno(errno: i32) -> Self {
        match Errno::from_raw_os_error(errno) {
            Errno::NOSPC | Errno::DQUOT => Self::Shortage(Shortage::Space),
            Errno::MFILE | Errno::NFILE => Self::Shortage(Shortage::OpenFiles),
            Errno::NOMEM | Errno::AGAIN | Errno::NOLCK => Self::Shortage(Shortage::Memory),
            // The file existed before: a missing folder is detected by the holder of its lock.
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
            // These do not come from the kernel: a file ends too early, or has unexpected content.
            None => match why.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => Self::Damaged,
                _ => Self::Other,
            },
        }
    }

    /// Classifies an error text of RocksDB.
    pub fn of_state(text: &str) -> Self {
        let quoted = quoted_errno(text).map(Self::of_errno);
        // A shortage while RocksDB checks files can look like a wrong file.
        if let Some(Self::Shortage(shortage)) = quoted {
            return Self::Shortage(shortage);
        }
        let begins = |words: &str| text.starts_with(words);
        match quoted {
            _ if text.contains("No space left on device")
                || text.contains("Space limit reached") =>
            {
                Self::Shortage(Shortage::Space)
            }
            _ if text.contains("Memory limit reached") => Self::Shortage(Shortage::Memory),
            _ if begins("Corruption") || begins("NotFound") => Self::Damaged,
            Some(fault) => fault,
            None if text.contains("No such file") => Self::Damaged,
            // An error of a file without an errno: the file ended too early, or could not be read.
            None if begins("IO error") => Self::Failing,
            None => Self::Other,
        }
    }
}

/// Returns the errno that a text quotes: at its end, or else between two of its parts.
fn quoted_errno(text: &str) -> Option<i32> {
    // Linux has 133 errnos.
    let find = |quotes: &dyn Fn(&str) -> bool| (1..=133).find(|&errno| quotes(&description(errno)));
    find(&|words| text.ends_with(&format!(": {words}")))
        .or_else(|| find(&|words| text.contains(&format!(": {words}: "))))
}

/// Returns the C library's text for an errno, which RocksDB quotes too.
fn description(errno: i32) -> String {
    let mut text = io::Error::from_raw_os_error(errno).to_string();
    if let Some(at) = text.rfind(" (os error") {
        text.truncate(at);
    }
    text
}

impl Shortage {
    /// Returns the reason that `/readyz` shows.
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
                "there are no free bytes or no free inodes (df, df -i), or a quota is used up: \
                 make room. Nothing is damaged: the node goes on by itself once there is some"
            }
            Self::OpenFiles => {
                "too many files are open, in this process or on the machine: raise the hard limit \
                 (ulimit -Hn, LimitNOFILE=) or fs.file-max. Nothing is damaged"
            }
            Self::Memory => "the machine has no memory left for it. Nothing is damaged",
        }
    }
}

impl DiskError {
    /// Classifies the error.
    pub fn fault(&self) -> FaultClass {
        match self {
            Self::Io { why, .. } => FaultClass::of_io(why),
            Self::State(error) => FaultClass::of_state(error.as_ref()),
            Self::Current(_) | Self::Damage { .. } => FaultClass::Damaged,
            // An intact row that can't be decoded was written so: by a newer build, or by a bug.
            Self::Row { .. } | Self::Nameless(_) => FaultClass::Failing,
            Self::Thread(_) => FaultClass::Other,
            Self::Locked(_) | Self::Foreign(..) => FaultClass::NotOurs,
            Self::Away(..) => FaultClass::Away,
        }
    }

    /// Returns whether durable data is gone or changed.
    pub fn is_damage(&self) -> bool {
        self.fault() == FaultClass::Damaged
    }

    /// Returns what has run out, if that is the only fault.
    pub fn shortage(&self) -> Option<Shortage> {
        match self.fault() {
            FaultClass::Shortage(shortage) => Some(shortage),
            _ => None,
        }
    }

    /// Returns the exit code of the process.
    pub fn exit_code(&self) -> u8 {
        self.fault().exit_code()
    }

    /// Returns the error with what an operator should do about it.
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

impl From<DiskError> for ProcessExit {
    fn from(error: DiskError) -> Self {
        let text = error.with_advice();
        match error.exit_code() {
            1 => Self::Failed(format!("disk: {text}")),
            2 => Self::Usage(format!("disk: {text}")),
            4 => Self::Refused(text),
            _ => Self::Disk(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: FaultClass = FaultClass::Shortage(Shortage::Space);
    const FILES: FaultClass = FaultClass::Shortage(Shortage::OpenFiles);
    const MEMORY: FaultClass = FaultClass::Shortage(Shortage::Memory);

    /// Every errno is checked as a call's own error and in RocksDB's two ways of quoting it.
    #[test]
    fn every_errno_has_one_meaning() {
        let want = |errno: i32| match errno {
            28 | 122 => SPACE,
            23 | 24 => FILES,
            11 | 12 | 37 => MEMORY,
            2 => FaultClass::Damaged,
            1 | 13 | 16..=18 | 20..=22 | 26 | 27 | 30 | 31 | 36 | 38 | 40 | 95 => {
                FaultClass::Denied
            }
            5 | 6 | 19 | 61 | 74 | 75 | 84 | 110 | 116 | 117 | 121 => FaultClass::Failing,
            _ => FaultClass::Other,
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
            // Linux has two names for some errnos, such as EAGAIN and EWOULDBLOCK.
            assert_eq!(FaultClass::of_state(&last), want(errno), "{last}");
        }
    }

    #[test]
    fn rocksdb_errors_are_classified_by_their_text() {
        #[track_caller]
        fn check(text: &str, want: FaultClass) {
            assert_eq!(FaultClass::of_state(text), want, "{text}");
        }
        check(
            "IO error: No space left on device: While open a file for appending: ino/d/1.sst: No \
             space left on device",
            SPACE,
        );
        check("IO error: No space left on device: While appending to file: d/1.sst", SPACE);
        check("IO error: Space limit reached: Max allowed space was reached", SPACE);
        check("IO error: While fdatasync: d/MANIFEST-000004: Disk quota exceeded", SPACE);
        check(
            "Corruption: Can't access /000005.sst: IO error: While open a file: d/5: Too many open \
             files",
            FILES,
        );
        check("IO error: Memory limit reached: x", MEMORY);
        check(
            "Corruption: block checksum mismatch: stored = 1, computed = 2 in d/9.sst offset 0 \
             size 7",
            FaultClass::Damaged,
        );
        check("Corruption: Error: Could not perform merge.", FaultClass::Damaged);
        check("NotFound: ", FaultClass::Damaged);
        check(
            "IO error: No such file or directory: While open a file for random read: d/9.sst: No \
             such file or directory",
            FaultClass::Damaged,
        );
        check(
            "Corruption: Can't access /000005.sst: IO error: x: d/5.sst: Permission denied",
            FaultClass::Damaged,
        );
        check("IO error: While lock file: d/state/LOCK: Permission denied", FaultClass::Denied);
        check(
            "IO error: While mkdir if missing: d/state: Read-only file system",
            FaultClass::Denied,
        );
        check(
            "IO error: While pread offset 0 len 7: d/9.sst: Input/output error",
            FaultClass::Failing,
        );
        check("IO error: Stale file handle: While fsync: d/9.sst", FaultClass::Failing);
        check(
            "IO error: file is too short (3 bytes) to be an sstable: d/9.sst",
            FaultClass::Failing,
        );
        check(
            "Invalid argument: d/state: does not exist (create_if_missing is false)",
            FaultClass::Other,
        );
        check("Aborted: ", FaultClass::Other);
        // A folder of that name proves nothing.
        check("Corruption: bad block in /No space/9.sst", FaultClass::Damaged);
    }

    #[test]
    fn only_a_disk_that_can_not_be_trusted_ends_with_5() {
        let faults = [
            (FaultClass::Damaged, 5),
            (FaultClass::Failing, 5),
            (SPACE, 1),
            (FILES, 1),
            (MEMORY, 1),
            (FaultClass::Denied, 2),
            (FaultClass::Away, 1),
            (FaultClass::NotOurs, 4),
            (FaultClass::Other, 1),
        ];
        for (fault, code) in faults {
            assert_eq!(fault.exit_code(), code, "{fault:?}");
        }
    }

    #[test]
    fn the_advice_is_part_of_the_text() {
        let full = context("preallocate", Path::new("d"), io::Error::from_raw_os_error(28));
        let said = full.with_advice();
        assert!(said.starts_with("preallocate d: No space left on device"), "{said}");
        assert!(said.contains("df -i"), "{said}");
    }
}
