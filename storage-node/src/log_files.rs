//! The log's segment files: preallocated, written, rewritten after a crash, deleted.
//!
//! This file knows no format: bytes come from and go to `engine::store::log`. It guarantees the log
//! *when something is on the disk*:
//!
//! - A file with a segment's name exists at its full size, with zeros written and the header in it,
//!   all of it fsynced, before the first group goes in. So a group's fdatasync never has to write
//!   metadata, and a segment without a good header is damage, never a crash.
//! - A name is only given once the bytes under it are durable: every file is made under a name that
//!   ends in `.new` and renamed; then the folder is fsynced. Files that end in `.new` at a start
//!   were never used and are removed.
//!
//! Zeros are written, not allocated by `fallocate`: an extent that is merely reserved is converted
//! at its first write, and that is a metadata write again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use bytes::Bytes;
use engine::store::log::writer::Output;

use crate::error::{DiskError, context};
use crate::folders::{self, make_durably};
use crate::kill;
use crate::shortage_retry::ShortageRetry;
use crate::workers::{JoinedThread, spawn};

static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// The folder of the log.
#[derive(Clone)]
pub struct LogFolder {
    path: PathBuf,
    /// `None` while the store is being opened: the caller retries the opening as a whole.
    retry: Option<ShortageRetry>,
}

impl LogFolder {
    /// Opens the folder, creating it if it does not exist, and removes unused files.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let folder = Self { path: path.to_owned(), retry: None };
        make_durably(path)?;
        for name in folder.names()? {
            if name.ends_with(".new") {
                let unused = path.join(name);
                fs::remove_file(&unused).map_err(|why| context("remove", &unused, why))?;
            }
        }
        folder.sync()?;
        Ok(folder)
    }

    /// Retries operations that fail for want of resources from now on.
    pub(crate) fn with_retry(self, retry: ShortageRetry) -> Self {
        Self { retry: Some(retry), ..self }
    }

    fn retried<T>(
        &self,
        job: &'static str,
        mut attempt: impl FnMut() -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        match &self.retry {
            Some(retry) => retry.run(job, attempt),
            None => attempt(),
        }
    }

    /// Returns the path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the numbers of the segments, oldest first.
    pub fn segments(&self) -> Result<Vec<u64>, DiskError> {
        let mut segments = Vec::new();
        for name in self.names()? {
            let number = name.strip_suffix(".log").and_then(|number| number.parse().ok());
            segments.push(number.ok_or_else(|| {
                DiskError::Foreign(self.path.join(&name), "not a segment of the log")
            })?);
        }
        segments.sort_unstable();
        Ok(segments)
    }

    /// Returns all bytes of a segment.
    pub fn read(&self, segment: u64) -> Result<Bytes, DiskError> {
        let path = self.segment_path(segment);
        fs::read(&path).map(Bytes::from).map_err(|why| context("read", &path, why))
    }

    /// Drops a segment's cached pages, so that the next read comes from the disk.
    pub fn forget_cached(&self, segment: u64) -> Result<(), DiskError> {
        let path = self.segment_path(segment);
        match File::open(&path) {
            Ok(file) => {
                // The advice is only a hint, so its failure does not matter.
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                Ok(())
            }
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(why) => Err(context("open", &path, why)),
        }
    }

    /// Returns some bytes of a segment, fewer at its end; `None` if the segment was deleted
    /// meanwhile.
    pub fn read_at(
        &self,
        segment: u64,
        offset: usize,
        len: usize,
    ) -> Result<Option<Vec<u8>>, DiskError> {
        let path = self.segment_path(segment);
        let open = || match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(why) => Err(context("open", &path, why)),
        };
        let Some(file) = self.retried("read of the log", open)? else { return Ok(None) };
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            match file.read_at(&mut bytes[filled..], (offset + filled) as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(again) if again.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Err(context("read", &path, why)),
            }
        }
        bytes.truncate(filled);
        Ok(Some(bytes))
    }

    /// Replaces a segment's bytes, durably, in one step.
    pub fn rewrite(&self, segment: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let new = self.path.join(format!("rewrite-{segment}.new"));
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|why| context("rewrite", &new, why))?;
        self.rename(&new, segment)
    }

    /// Deletes a segment, durably.
    pub fn delete(&self, segment: u64) -> Result<(), DiskError> {
        let path = self.segment_path(segment);
        fs::remove_file(&path).map_err(|why| context("delete", &path, why))?;
        self.sync()
    }

    /// Makes a file of zeros, fsynced, under a name that is not a segment's.
    fn make_spare(&self, name: u64, size: usize) -> Result<PathBuf, DiskError> {
        let path = self.path.join(format!("spare-{name}.new"));
        let make = || -> io::Result<()> {
            let mut file = File::create(&path)?;
            let mut left = size;
            while left > 0 {
                let piece = left.min(ZEROS.len());
                kill::point_after("spare.half-made", || {
                    let _ = file.write_all(&ZEROS[..piece / 2]);
                });
                file.write_all(&ZEROS[..piece])?;
                left -= piece;
            }
            file.sync_all()
        };
        self.retried("making the next log segment", || {
            make().map_err(|why| context("preallocate", &path, why))
        })?;
        kill::point("spare.made");
        Ok(path)
    }

    /// Writes a segment's header into a spare file and renames it to the segment.
    fn put_to_use(&self, spare: &Path, segment: u64, header: &[u8]) -> Result<File, DiskError> {
        let write = || -> io::Result<File> {
            let file = OpenOptions::new().write(true).open(spare)?;
            file.write_all_at(header, 0)?;
            file.sync_all()?;
            Ok(file)
        };
        kill::point("roll.begun");
        let file = self.retried("beginning a log segment", || {
            write().map_err(|why| context("begin", spare, why))
        })?;
        kill::point("roll.header");
        self.rename(spare, segment)?;
        kill::point("roll.renamed");
        Ok(file)
    }

    fn rename(&self, from: &Path, segment: u64) -> Result<(), DiskError> {
        let to = self.segment_path(segment);
        self.retried("naming a log segment", || {
            fs::rename(from, &to).map_err(|why| context("rename to", &to, why))
        })?;
        self.sync()
    }

    fn segment_path(&self, segment: u64) -> PathBuf {
        self.path.join(format!("{segment:020}.log"))
    }

    fn names(&self) -> Result<Vec<String>, DiskError> {
        let read = || -> io::Result<Vec<String>> {
            fs::read_dir(&self.path)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect()
        };
        read().map_err(|why| context("list", &self.path, why))
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.retried("fsync of the log's folder", || folders::sync(&self.path))
    }
}

/// Writes groups, one after the other, each durable before `write` returns.
pub struct LogWriter {
    folder: LogFolder,
    spares: Spares,
    open: Option<(u64, File)>,
}

impl LogWriter {
    /// Creates a writer; the first group begins a segment.
    pub fn new(folder: LogFolder, segment_bytes: usize) -> Self {
        Self { spares: Spares::new(folder.clone(), segment_bytes), folder, open: None }
    }

    /// Appends a group with one write and one fdatasync.
    pub fn write(&mut self, output: &Output) -> Result<(), DiskError> {
        if let Some(header) = &output.new_segment {
            let spare = self.spares.take(&self.folder, output.segment_bytes)?;
            let file = self.folder.put_to_use(&spare, output.segment, header)?;
            self.open = Some((output.segment, file));
        }
        let (segment, file) = self.open.as_ref().expect("the first group makes a segment");
        assert_eq!(*segment, output.segment, "a group goes into the segment that was made last");
        kill::point("group.begun");
        let write = || -> io::Result<()> {
            kill::point_after("group.half-written", || {
                let half = &output.bytes[..output.bytes.len() / 2];
                let _ = file.write_all_at(half, output.offset as u64);
            });
            file.write_all_at(&output.bytes, output.offset as u64)?;
            kill::point("group.written");
            file.sync_data()
        };
        write().map_err(|why| context("append to", &self.folder.segment_path(*segment), why))
    }
}

/// Makes the next segment's file while the present one fills.
#[derive(Debug)]
struct Spares {
    size: usize,
    wanted: mpsc::Sender<()>,
    made: mpsc::Receiver<Result<PathBuf, DiskError>>,
    next_odd: u64,
    /// The spare being made is awaited, so that the next process to open the folder has it alone.
    _thread: JoinedThread,
}

impl Spares {
    fn new(folder: LogFolder, size: usize) -> Self {
        let (wanted, wants) = mpsc::channel();
        let (make, made) = mpsc::channel();
        let _thread = spawn("dkc-spares", move || {
            for (name, ()) in (0..).map(|n| n * 2).zip(wants) {
                if make.send(folder.make_spare(name, size)).is_err() {
                    return;
                }
            }
        });
        // `take` notices a thread that has ended.
        let _ = wanted.send(());
        Self { size, wanted, made, next_odd: 1, _thread }
    }

    /// Returns the file that was made ahead, if its size is right, or one made now.
    fn take(&mut self, folder: &LogFolder, size: usize) -> Result<PathBuf, DiskError> {
        if size != self.size {
            self.next_odd += 2;
            return folder.make_spare(self.next_odd, size);
        }
        let gone = || DiskError::Thread("dkc-spares");
        let spare = self.made.recv().map_err(|_| gone())??;
        self.wanted.send(()).map_err(|_| gone())?;
        Ok(spare)
    }
}
