//! Opens the input: a complete file, or a pipe or file that is still being written.
//!
//! A reader of a pipe must not block for ever: the lines that arrived so far are to be counted
//! after a while. A read from a pipe has no time-out, so a thread reads, and [`PipeReader`] waits
//! for that thread with a time-out. Decompression runs in such a thread, too, in parallel to the
//! counting.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};

use super::content::{self, InputOptions, OpenedInput};
use super::follow::{Follow, POLL_INTERVAL};

/// The buffer size for files.
const READ_BYTES: usize = 1 << 20;
/// The size of one read, which is the capacity of a pipe.
const CHUNK_BYTES: usize = 64 << 10;
/// The number of chunks that are read ahead.
const CHUNKS_MAX: usize = 16;

/// An opened input.
pub(super) struct Input {
    /// The decompressed text.
    pub(super) lines: Box<dyn BufRead + Send>,
    /// The size in bytes, if known beforehand.
    pub(super) size: Option<u64>,
    /// True if the input may still be written.
    pub(super) is_live: bool,
}

/// Opens a file, or stdin (`-`).
pub(super) fn open(path: &Path, options: InputOptions) -> io::Result<Input> {
    if path.as_os_str() == "-" {
        return Ok(live(io::stdin(), options));
    }
    let file = File::open(path)?;
    let data = file.metadata()?;
    if data.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !data.is_file() {
        return Ok(live(file, options));
    }
    let file = BufReader::with_capacity(READ_BYTES, file);
    Ok(match content::open(file, options)? {
        OpenedInput::Plain(lines) => Input { lines, size: Some(data.len()), is_live: false },
        OpenedInput::Decompressed(text) => {
            let lines = Box::new(PipeReader::new(|| Ok(text)));
            Input { lines, size: None, is_live: false }
        }
    })
}

/// Opens a file for its content and for everything that is appended to it.
pub(super) fn follow(path: &Path, options: InputOptions) -> Input {
    Input { lines: Box::new(Follow::new(path, options)), size: None, is_live: true }
}

/// Opens a pipe, whose first bytes may arrive late.
fn live(input: impl Read + Send + 'static, options: InputOptions) -> Input {
    let text = move || match content::open(BufReader::with_capacity(CHUNK_BYTES, input), options)? {
        OpenedInput::Plain(text) | OpenedInput::Decompressed(text) => Ok(text),
    };
    Input { lines: Box::new(PipeReader::new(text)), size: None, is_live: true }
}

/// A reader with a time-out: it returns [`io::ErrorKind::TimedOut`] when no data arrived within the
/// poll interval, and may then be read again.
struct PipeReader {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    used: usize,
}

impl PipeReader {
    /// Starts the reading thread, which also calls `open`, since that may block, too.
    fn new<R: Read>(open: impl FnOnce() -> io::Result<R> + Send + 'static) -> Self {
        let (sender, chunks) = sync_channel(CHUNKS_MAX);
        // The thread is never joined: it may block in a read from a terminal for ever.
        std::thread::spawn(move || {
            let mut input = match open() {
                Ok(input) => input,
                Err(error) => return drop(sender.send(Err(error))),
            };
            loop {
                let mut chunk = vec![0; CHUNK_BYTES];
                let read = match input.read(&mut chunk) {
                    Ok(0) => return,
                    Ok(length) => {
                        chunk.truncate(length);
                        Ok(chunk)
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let failed = read.is_err();
                if sender.send(read).is_err() || failed {
                    return;
                }
            }
        });
        Self { chunks, chunk: Vec::new(), used: 0 }
    }
}

impl Read for PipeReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(bytes)?;
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for PipeReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.chunk.len() {
            match self.chunks.recv_timeout(POLL_INTERVAL) {
                Ok(chunk) => (self.chunk, self.used) = (chunk?, 0),
                Err(RecvTimeoutError::Timeout) => return Err(io::ErrorKind::TimedOut.into()),
                Err(RecvTimeoutError::Disconnected) => return Ok(&[]),
            }
        }
        Ok(&self.chunk[self.used..])
    }

    fn consume(&mut self, length: usize) {
        self.used += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_without_data_times_out() {
        let (theirs, mut ours) = std::os::unix::net::UnixStream::pair().expect("two sockets");
        let mut input = PipeReader::new(|| Ok(theirs));
        assert_eq!(input.fill_buf().unwrap_err().kind(), io::ErrorKind::TimedOut);
        io::Write::write_all(&mut ours, b"a\nb").expect("it is read");
        let mut received = Vec::new();
        while received.len() < 3 {
            if let Ok(bytes) = input.fill_buf() {
                received.extend_from_slice(bytes);
                let length = bytes.len();
                input.consume(length);
            }
        }
        assert_eq!(received, b"a\nb");
        drop(ours);
        let end = loop {
            match input.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                other => break other.map(<[u8]>::len),
            }
        };
        assert_eq!(end.expect("the end"), 0);
    }
}
