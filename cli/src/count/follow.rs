//! Reads a log file while it is being written, as `tail -F` does: its content, and then the lines
//! that are appended.
//!
//! - **Rotated by rename** (logrotate): the name refers to a new file. Writers use the old file
//!   until they reopen the log, so the old file is read until nothing was appended for [`LATE`].
//! - **Truncated** (`copytruncate`): the file is shorter than the position read so far, so it is
//!   read from its beginning.
//! - **Missing** or not readable: opening is tried again.
//!
//! The reader returns whole lines only, so lines of two files cannot mix, and an incomplete line
//! waits for its rest. If the rest cannot come any more, because the file was truncated or rotated,
//! the incomplete line is not counted, and a message on stderr reports it.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, Read, Seek};
use std::mem;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use memchr::memrchr;

use super::content::{InputOptions, followed, unsupported};
use super::keys::LINE_BYTES_MAX;
use crate::output::note;

/// A read without new data returns to its caller this often.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// A rotated file is closed when nothing was appended for this long.
const LATE: Duration = Duration::from_secs(5);
/// The size of one read.
const READ_BYTES: usize = 256 << 10;
/// The bytes kept of an incomplete line: enough to detect that it is too long.
const HALF_BYTES_MAX: usize = LINE_BYTES_MAX + 2;

/// The reader of a followed file. It has no end, and returns [`io::ErrorKind::TimedOut`] when no
/// data arrived within the poll interval.
pub(super) struct Follow {
    path: PathBuf,
    options: InputOptions,
    /// The file that the name refers to.
    current: Option<Tail>,
    /// The files that the name referred to before.
    rotated: Vec<Tail>,
    /// The last message about a missing file.
    missing: String,
    /// True if the kind of the content was checked.
    is_known: bool,
    late: Duration,
    /// Whole lines that were read; those before `used` were consumed.
    lines: Vec<u8>,
    used: usize,
}

impl Follow {
    /// Follows the file with this name, which need not exist yet.
    pub(super) fn new(path: &Path, options: InputOptions) -> Self {
        Self {
            path: path.to_owned(),
            options,
            current: None,
            rotated: Vec::new(),
            missing: String::new(),
            is_known: false,
            late: LATE,
            lines: Vec::new(),
            used: 0,
        }
    }

    /// Reads new data, from rotated files first.
    fn refill(&mut self) -> io::Result<()> {
        self.lines.clear();
        self.used = 0;
        loop {
            let mut any = self.read_rotated()?;
            if self.lines.is_empty() {
                any |= self.read_current()?;
            }
            // After a part of a long line the loop reads on without waiting.
            if !self.lines.is_empty() || !(any || self.has_changed()?) {
                return Ok(());
            }
        }
    }

    /// Reads the rotated files; returns whether there was new data.
    fn read_rotated(&mut self) -> io::Result<bool> {
        let mut any = false;
        for tail in &mut self.rotated {
            any |= tail.read(&mut self.lines)?;
        }
        let is_over = |tail: &mut Tail| tail.last_read_at.elapsed() >= self.late;
        for mut old in self.rotated.extract_if(.., is_over) {
            old.drop_half(&self.path, "rotated");
        }
        Ok(any)
    }

    fn read_current(&mut self) -> io::Result<bool> {
        if self.current.is_none() {
            self.open()?;
        }
        let Some(tail) = &mut self.current else { return Ok(false) };
        let any = tail.read(&mut self.lines)?;
        if !self.is_known && !self.lines.is_empty() {
            self.is_known = true;
            self.lines = followed(mem::take(&mut self.lines), self.options)?;
        }
        Ok(any)
    }

    /// Opens the file that the name refers to, if there is one.
    fn open(&mut self) -> io::Result<()> {
        // A file that is not regular is not opened: opening a pipe may block until there is a
        // writer.
        if self.path.metadata().is_ok_and(|data| !data.is_file()) {
            return Err(unsupported("is not a regular file and cannot be followed".to_owned()));
        }
        match File::open(&self.path).and_then(|file| Ok((file.metadata()?, file))) {
            Ok((data, file)) => {
                if !mem::take(&mut self.missing).is_empty() {
                    note!("{} exists now", self.path.display());
                }
                self.current = Some(Tail::new(file, &data));
                Ok(())
            }
            Err(error) => {
                let missing = format!("waiting for {}: {error}", self.path.display());
                if self.missing != missing {
                    note!("{missing}");
                    self.missing = missing;
                }
                Ok(())
            }
        }
    }

    /// Without new data, checks whether the file was truncated or the name refers to another file.
    fn has_changed(&mut self) -> io::Result<bool> {
        let Some(tail) = &mut self.current else { return Ok(false) };
        if tail.file.metadata()?.len() < tail.position {
            note!("{} was truncated: reading it from its beginning", self.path.display());
            tail.drop_half(&self.path, "truncated");
            tail.rewind()?;
            return Ok(true);
        }
        // The name does not exist: it may be created again, and the old file may still be written.
        let Ok(data) = self.path.metadata() else { return Ok(false) };
        if id(&data) == tail.id {
            return Ok(false);
        }
        note!("{} was rotated: following the new file", self.path.display());
        tail.last_read_at = Instant::now();
        self.rotated.extend(self.current.take());
        Ok(true)
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        for tail in self.rotated.iter_mut().chain(&mut self.current) {
            tail.drop_half(&self.path, "closed");
        }
    }
}

impl Read for Follow {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(bytes)?;
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Follow {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.lines.len() {
            self.refill()?;
            if self.lines.is_empty() {
                std::thread::sleep(POLL_INTERVAL);
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(&self.lines[self.used..])
    }

    fn consume(&mut self, length: usize) {
        self.used += length;
    }
}

/// A file that is read as it grows.
struct Tail {
    file: File,
    id: (u64, u64),
    position: u64,
    /// The beginning of an incomplete line, at most [`HALF_BYTES_MAX`].
    half: Vec<u8>,
    /// The length of the incomplete line.
    half_bytes: u64,
    last_read_at: Instant,
}

/// The identity of a file, which survives renaming and is unique while the file is open.
fn id(data: &Metadata) -> (u64, u64) {
    (data.dev(), data.ino())
}

impl Tail {
    fn new(file: File, data: &Metadata) -> Self {
        let last_read_at = Instant::now();
        Self { file, id: id(data), position: 0, half: Vec::new(), half_bytes: 0, last_read_at }
    }

    /// Appends new whole lines to `lines`; returns whether there was new data.
    fn read(&mut self, lines: &mut Vec<u8>) -> io::Result<bool> {
        let mut bytes = vec![0; READ_BYTES];
        let length = match self.file.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            read => read?,
        };
        if length == 0 {
            return Ok(false);
        }
        self.last_read_at = Instant::now();
        self.position += length as u64;
        let whole = memrchr(b'\n', &bytes[..length]).map_or(0, |end| end + 1);
        if whole > 0 {
            lines.append(&mut self.half);
            lines.extend_from_slice(&bytes[..whole]);
            self.half_bytes = 0;
        }
        let half = &bytes[whole..length];
        let room = HALF_BYTES_MAX.saturating_sub(self.half.len());
        self.half.extend_from_slice(&half[..half.len().min(room)]);
        self.half_bytes += half.len() as u64;
        Ok(true)
    }

    fn rewind(&mut self) -> io::Result<()> {
        self.position = 0;
        self.file.rewind()
    }

    fn drop_half(&mut self, path: &Path, what: &str) {
        if self.half_bytes > 0 {
            note!(
                "{} was {what} with an incomplete last line: its {} bytes are not counted",
                path.display(),
                self.half_bytes
            );
        }
        self.half.clear();
        self.half_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    const USUAL: InputOptions = InputOptions { decompress: true, binary: false };

    struct Fixture {
        folder: tempfile::TempDir,
        follow: Follow,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let follow = Follow::new(&folder.path().join("log"), USUAL);
            Self { folder, follow }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn append(&self, name: &str, text: &str) {
            let mut file = File::options().create(true).append(true).open(self.path(name)).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }

        /// Returns all new lines.
        fn read_all(&mut self) -> String {
            let mut text = Vec::new();
            loop {
                match self.follow.fill_buf() {
                    Ok(bytes) => {
                        text.extend_from_slice(bytes);
                        let length = bytes.len();
                        self.follow.consume(length);
                    }
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => break,
                    Err(error) => panic!("{error}"),
                }
            }
            String::from_utf8(text).unwrap()
        }
    }

    #[test]
    fn appended_text_is_returned_line_by_line() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.read_all(), "");
        fixture.append("log", "a\nb\nfo");
        assert_eq!(fixture.read_all(), "a\nb\n");
        fixture.append("log", "o");
        assert_eq!(fixture.read_all(), "");
        fixture.append("log", "\nz\n");
        assert_eq!(fixture.read_all(), "foo\nz\n");
    }

    #[test]
    fn a_rotated_file_is_read_to_its_end() {
        let mut fixture = Fixture::new();
        fixture.append("log", "a\nha");
        assert_eq!(fixture.read_all(), "a\n");
        fs::rename(fixture.path("log"), fixture.path("log.1")).unwrap();
        // The name does not exist yet, and the old file is still written.
        fixture.append("log.1", "lf\nb\n");
        assert_eq!(fixture.read_all(), "half\nb\n");
        fixture.append("log", "c\n");
        fixture.append("log.1", "d\nla");
        assert_eq!(fixture.read_all(), "d\nc\n");
        fixture.append("log.1", "te\n");
        fixture.append("log", "e\n");
        assert_eq!(fixture.read_all(), "late\ne\n");
        // A second rotation before the first old file is closed.
        fs::rename(fixture.path("log"), fixture.path("log.2")).unwrap();
        fixture.append("log", "f\n");
        assert_eq!(fixture.read_all(), "f\n");
        assert_eq!(fixture.follow.rotated.len(), 2);
        // An old file is closed when nothing was appended for long.
        fixture.follow.late = Duration::ZERO;
        assert_eq!(fixture.read_all(), "");
        assert!(fixture.follow.rotated.is_empty());
    }

    #[test]
    fn a_truncated_file_is_read_from_its_beginning() {
        let mut fixture = Fixture::new();
        fixture.append("log", "a\nb\nfo");
        assert_eq!(fixture.read_all(), "a\nb\n");
        fs::write(fixture.path("log"), "c\n").unwrap();
        assert_eq!(fixture.read_all(), "c\n");
        fixture.append("log", "d\n");
        assert_eq!(fixture.read_all(), "d\n");
    }

    #[test]
    fn unsupported_content_is_rejected() {
        for (text, why) in
            [("a\0b\n", "binary"), ("PK\x03\x04\n", "zip"), ("BZh91AY&SY\n", "bzip2")]
        {
            let mut fixture = Fixture::new();
            fixture.append("log", text);
            let error = fixture.follow.fill_buf().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
        let mut fixture = Fixture::new();
        fs::create_dir(fixture.path("log")).unwrap();
        assert!(fixture.follow.fill_buf().unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn an_incomplete_line_takes_limited_memory() {
        let mut fixture = Fixture::new();
        for _ in 0..5 {
            fixture.append("log", &"x".repeat(LINE_BYTES_MAX));
            assert_eq!(fixture.read_all(), "");
        }
        let tail = fixture.follow.current.as_ref().unwrap();
        assert_eq!(tail.half.len(), HALF_BYTES_MAX);
        assert_eq!(tail.half_bytes, 5 << 20);
        fixture.append("log", "\na\n");
        let lines = fixture.read_all();
        assert_eq!((lines.len(), lines.ends_with("\na\n")), (HALF_BYTES_MAX + 3, true));
    }
}
