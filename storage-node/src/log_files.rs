//! The log's segment files: made ahead of need, written, rewritten after a crash, deleted.
//!
//! No format is known here: bytes come from and go to `engine::store::log`. What this file owes the
//! log is *when something is on the disk*:
//!
//! - A file with a segment's name exists at its full size, zeros written and header in it, all of it
//!   fsynced, before the first group goes in. So a group's fdatasync never has to write metadata,
//!   and a segment without a good header is damage, never a crash.
//! - A name is only given once the bytes under it are durable: everything is made under a name that
//!   ends in `.new` and renamed; then the folder is fsynced. Whatever ends in `.new` at a start was
//!   never used and goes.
//!
//! Zeros are written, not allocated by `fallocate`: an extent that is merely reserved is converted
//! at its first write, and that is metadata again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use bytes::Bytes;
use engine::store::log::writer::Output;

use crate::error::{DiskError, context};
use crate::folders::{self, make_durably};
use crate::kill;
use crate::patience::Patience;
use crate::workers::{join, spawn};

static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// The folder of the log.
#[derive(Clone, Debug)]
pub struct LogFolder {
    path: PathBuf,
    /// None while the store is being opened: whoever opens it tries again as a whole.
    patience: Option<Patience>,
}

impl LogFolder {
    /// Opens the folder, making it if it is not there, and removes what was never used.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let folder = Self { path: path.to_owned(), patience: None };
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

    /// From now on what has run out is waited for.
    pub(crate) fn patient(self, patience: Patience) -> Self {
        Self { patience: Some(patience), ..self }
    }

    fn patiently<T>(
        &self,
        job: &'static str,
        mut attempt: impl FnMut() -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        match &self.patience {
            Some(patience) => patience.run(job, attempt),
            None => attempt(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The segments there are, oldest first.
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

    /// All bytes of a segment.
    pub fn read(&self, segment: u64) -> Result<Bytes, DiskError> {
        let path = self.segment_path(segment);
        fs::read(&path).map(Bytes::from).map_err(|why| context("read", &path, why))
    }

    /// What is read of this segment next comes from the disk, not from memory.
    pub fn forget_cached(&self, segment: u64) -> Result<(), DiskError> {
        let path = self.segment_path(segment);
        match File::open(&path) {
            Ok(file) => {
                // Only a hint anyway.
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                Ok(())
            }
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(why) => Err(context("open", &path, why)),
        }
    }

    /// Some bytes of a segment; none if the segment was deleted meanwhile, fewer at its end.
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
        let Some(file) = self.patiently("read of the log", open)? else { return Ok(None) };
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

    /// A file of zeros, fsynced, under a name that is not a segment's.
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
        self.patiently("making the next log segment", || {
            make().map_err(|why| context("preallocate", &path, why))
        })?;
        kill::point("spare.made");
        Ok(path)
    }

    /// Gives a spare its header and its name.
    fn put_to_use(&self, spare: &Path, segment: u64, header: &[u8]) -> Result<File, DiskError> {
        let write = || -> io::Result<File> {
            let file = OpenOptions::new().write(true).open(spare)?;
            file.write_all_at(header, 0)?;
            file.sync_all()?;
            Ok(file)
        };
        kill::point("roll.begun");
        let file = self.patiently("beginning a log segment", || {
            write().map_err(|why| context("begin", spare, why))
        })?;
        kill::point("roll.header");
        self.rename(spare, segment)?;
        kill::point("roll.renamed");
        Ok(file)
    }

    fn rename(&self, from: &Path, segment: u64) -> Result<(), DiskError> {
        let to = self.segment_path(segment);
        self.patiently("naming a log segment", || {
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
        self.patiently("fsync of the log's folder", || folders::sync(&self.path))
    }
}

/// Writes groups, one after the other, each durable before `write` returns.
#[derive(Debug)]
pub struct LogWriter {
    folder: LogFolder,
    spares: Spares,
    open: Option<(u64, File)>,
}

impl LogWriter {
    pub fn new(folder: LogFolder, segment_bytes: usize) -> Self {
        Self { spares: Spares::new(folder.clone(), segment_bytes), folder, open: None }
    }

    /// One write, one fdatasync.
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
    wanted: Option<mpsc::Sender<()>>,
    made: mpsc::Receiver<Result<PathBuf, DiskError>>,
    next_odd: u64,
    thread: Option<JoinHandle<()>>,
}

impl Spares {
    fn new(folder: LogFolder, size: usize) -> Self {
        let (wanted, wants) = mpsc::channel();
        let (make, made) = mpsc::channel();
        let thread = spawn("dkc-spares", move || {
            for (name, ()) in (0..).map(|n| n * 2).zip(wants) {
                if make.send(folder.make_spare(name, size)).is_err() {
                    return;
                }
            }
        });
        // A thread that is gone is noticed by `take`.
        let _ = wanted.send(());
        Self { size, wanted: Some(wanted), made, next_odd: 1, thread: Some(thread) }
    }

    /// The file that was made ahead, if its size is right; else one made now.
    fn take(&mut self, folder: &LogFolder, size: usize) -> Result<PathBuf, DiskError> {
        if size != self.size {
            self.next_odd += 2;
            return folder.make_spare(self.next_odd, size);
        }
        let gone = || DiskError::Thread("dkc-spares");
        let spare = self.made.recv().map_err(|_| gone())??;
        self.wanted.as_ref().and_then(|wanted| wanted.send(()).ok()).ok_or_else(gone)?;
        Ok(spare)
    }
}

impl Drop for Spares {
    /// Waits for the spare being made, so that whoever opens the folder next has it alone.
    fn drop(&mut self) {
        self.wanted = None;
        join(self.thread.take());
    }
}
