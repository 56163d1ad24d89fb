//! A log that is being written, by its name, as `tail -F` reads it: what it holds, and then what is appended.
//!
//! - **Rotated by rename** (logrotate): the name is another file's now. Writers go on with the old one until they are
//!   told to open the new one, so the old one is read on until nothing has come for [`LATE`].
//! - **Truncated** (`copytruncate`): it is shorter than what was read of it, so it is read from its begin.
//! - **Not there**, or not readable: it is looked for again.
//!
//! Only whole lines are handed on, so lines of two files can't mix, and the half of a line waits for its rest. When that
//! can't come any more, since the file was truncated or is rotated away, the half is not counted, and stderr says so.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, Read, Seek};
use std::mem;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use memchr::memrchr;

use super::content::{Taking, followed, refused};
use super::input::WAIT;
use super::keys::LINE_BYTES_MAX;
use crate::output;

/// How long nothing may come from a file that was rotated away before it is left.
const LATE: Duration = Duration::from_secs(5);
/// What is read of a file at a time.
const READ_BYTES: usize = 256 << 10;
/// What is kept of a line that has no end yet: enough to see that it is too long.
const HALF_BYTES_MAX: usize = LINE_BYTES_MAX + 2;

/// Gives [`io::ErrorKind::TimedOut`] when nothing has come for a moment; it never ends.
pub(super) struct Follow {
    path: PathBuf,
    taking: Taking,
    /// The file of that name.
    current: Option<Tail>,
    /// Those that had it before.
    rotated: Vec<Tail>,
    /// What was last said about a file that is not there.
    lack: String,
    /// Whether the first bytes were looked at.
    is_known: bool,
    late: Duration,
    /// Whole lines.
    lines: Vec<u8>,
    used: usize,
}

impl Follow {
    pub(super) fn new(path: &Path, taking: Taking) -> Self {
        Self {
            path: path.to_owned(),
            taking,
            current: None,
            rotated: Vec::new(),
            lack: String::new(),
            is_known: false,
            late: LATE,
            lines: Vec::new(),
            used: 0,
        }
    }

    /// Reads what has come, of files that were rotated away first.
    fn refill(&mut self) -> io::Result<()> {
        self.lines.clear();
        self.used = 0;
        loop {
            let mut come = self.read_rotated()?;
            if self.lines.is_empty() {
                come |= self.read_current()?;
            }
            // A part of a long line is no reason to wait.
            if !self.lines.is_empty() || !(come || self.has_changed()?) {
                return Ok(());
            }
        }
    }

    /// Whether anything came.
    fn read_rotated(&mut self) -> io::Result<bool> {
        let mut come = false;
        for tail in &mut self.rotated {
            come |= tail.read(&mut self.lines)?;
        }
        let is_over = |tail: &mut Tail| tail.last_came.elapsed() >= self.late;
        for mut old in self.rotated.extract_if(.., is_over) {
            old.drop_half(&self.path, "rotated away");
        }
        Ok(come)
    }

    fn read_current(&mut self) -> io::Result<bool> {
        if self.current.is_none() {
            self.look()?;
        }
        let Some(tail) = &mut self.current else { return Ok(false) };
        let come = tail.read(&mut self.lines)?;
        if !self.is_known && !self.lines.is_empty() {
            self.is_known = true;
            self.lines = followed(mem::take(&mut self.lines), self.taking)?;
        }
        Ok(come)
    }

    /// Opens the file of the name, if there is one.
    fn look(&mut self) -> io::Result<()> {
        // Nothing else is opened: that may wait for a writer.
        if self.path.metadata().is_ok_and(|data| !data.is_file()) {
            return Err(refused("is no file, so it can't be followed".to_owned()));
        }
        match File::open(&self.path).and_then(|file| Ok((file.metadata()?, file))) {
            Ok((data, file)) => {
                if !mem::take(&mut self.lack).is_empty() {
                    output::note(&format!("{} is there", self.path.display()));
                }
                self.current = Some(Tail::new(file, &data));
                Ok(())
            }
            Err(error) => {
                let lack = format!("waiting for {}: {error}", self.path.display());
                if self.lack != lack {
                    output::note(&lack);
                    self.lack = lack;
                }
                Ok(())
            }
        }
    }

    /// Nothing has come: was the file truncated, or is the name another file's?
    fn has_changed(&mut self) -> io::Result<bool> {
        let Some(tail) = &mut self.current else { return Ok(false) };
        if tail.file.metadata()?.len() < tail.position {
            output::note(&format!(
                "{} was truncated: reading it from its begin",
                self.path.display()
            ));
            tail.drop_half(&self.path, "truncated");
            tail.rewind()?;
            return Ok(true);
        }
        // No file of that name: it may come back, and the old one may still be written.
        let Ok(data) = self.path.metadata() else { return Ok(false) };
        if id(&data) == tail.id {
            return Ok(false);
        }
        output::note(&format!("{} was rotated: following the new file", self.path.display()));
        tail.last_came = Instant::now();
        self.rotated.extend(self.current.take());
        Ok(true)
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        for tail in self.rotated.iter_mut().chain(&mut self.current) {
            tail.drop_half(&self.path, "left");
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
                std::thread::sleep(WAIT);
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(&self.lines[self.used..])
    }

    fn consume(&mut self, length: usize) {
        self.used += length;
    }
}

/// A file that is read to its end again and again.
struct Tail {
    file: File,
    id: (u64, u64),
    position: u64,
    /// The begin of a line whose end has not come …
    half: Vec<u8>,
    /// … and how long it is, kept or not.
    half_bytes: u64,
    last_came: Instant,
}

/// What stays with a file when it is renamed, and is no other's while it is open.
fn id(data: &Metadata) -> (u64, u64) {
    (data.dev(), data.ino())
}

impl Tail {
    fn new(file: File, data: &Metadata) -> Self {
        let last_came = Instant::now();
        Self { file, id: id(data), position: 0, half: Vec::new(), half_bytes: 0, last_came }
    }

    /// Appends whole lines that have come to `lines`, and tells whether anything has.
    fn read(&mut self, lines: &mut Vec<u8>) -> io::Result<bool> {
        let mut bytes = vec![0; READ_BYTES];
        let length = match self.file.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            read => read?,
        };
        if length == 0 {
            return Ok(false);
        }
        self.last_came = Instant::now();
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
            output::note(&format!(
                "{} was {what} with half a line at its end: its {} bytes are not counted",
                path.display(),
                self.half_bytes
            ));
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

    const USUAL: Taking = Taking { decompress: true, binary: false };

    struct Story {
        folder: tempfile::TempDir,
        follow: Follow,
    }

    impl Story {
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

        /// All that has come.
        fn come(&mut self) -> String {
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
    fn what_is_appended_comes_line_by_line() {
        let mut story = Story::new();
        assert_eq!(story.come(), "");
        story.append("log", "a\nb\nfo");
        assert_eq!(story.come(), "a\nb\n");
        story.append("log", "o");
        assert_eq!(story.come(), "");
        story.append("log", "\nz\n");
        assert_eq!(story.come(), "foo\nz\n");
    }

    #[test]
    fn a_rotated_file_is_read_to_its_end() {
        let mut story = Story::new();
        story.append("log", "a\nha");
        assert_eq!(story.come(), "a\n");
        fs::rename(story.path("log"), story.path("log.1")).unwrap();
        // No file of that name yet, and the old one is still written.
        story.append("log.1", "lf\nb\n");
        assert_eq!(story.come(), "half\nb\n");
        story.append("log", "c\n");
        story.append("log.1", "d\nla");
        assert_eq!(story.come(), "d\nc\n");
        story.append("log.1", "te\n");
        story.append("log", "e\n");
        assert_eq!(story.come(), "late\ne\n");
        // Twice, before the first is left.
        fs::rename(story.path("log"), story.path("log.2")).unwrap();
        story.append("log", "f\n");
        assert_eq!(story.come(), "f\n");
        assert_eq!(story.follow.rotated.len(), 2);
        // Left once nothing has come for long.
        story.follow.late = Duration::ZERO;
        assert_eq!(story.come(), "");
        assert!(story.follow.rotated.is_empty());
    }

    #[test]
    fn a_truncated_file_is_read_from_its_begin() {
        let mut story = Story::new();
        story.append("log", "a\nb\nfo");
        assert_eq!(story.come(), "a\nb\n");
        fs::write(story.path("log"), "c\n").unwrap();
        assert_eq!(story.come(), "c\n");
        story.append("log", "d\n");
        assert_eq!(story.come(), "d\n");
    }

    #[test]
    fn what_can_not_be_followed_is_refused() {
        for (text, why) in
            [("a\0b\n", "binary"), ("PK\x03\x04\n", "zip"), ("BZh91AY&SY\n", "bzip2")]
        {
            let mut story = Story::new();
            story.append("log", text);
            let error = story.follow.fill_buf().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
        let mut story = Story::new();
        fs::create_dir(story.path("log")).unwrap();
        assert!(story.follow.fill_buf().unwrap_err().to_string().contains("no file"));
    }

    #[test]
    fn half_a_line_takes_no_more_memory_than_it_may() {
        let mut story = Story::new();
        for _ in 0..5 {
            story.append("log", &"x".repeat(LINE_BYTES_MAX));
            assert_eq!(story.come(), "");
        }
        let tail = story.follow.current.as_ref().unwrap();
        assert_eq!(tail.half.len(), HALF_BYTES_MAX);
        assert_eq!(tail.half_bytes, 5 << 20);
        story.append("log", "\na\n");
        let come = story.come();
        assert_eq!((come.len(), come.ends_with("\na\n")), (HALF_BYTES_MAX + 3, true));
    }
}
