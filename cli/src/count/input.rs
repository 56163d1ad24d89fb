//! Where lines come from: a file, which is there, or somebody who still writes.
//!
//! Whoever reads a pipe must not wait for it for ever: the lines that came so far are to be counted after a while. A read
//! from a pipe can't be given a time, so a thread does the reading, and [`Patient`] asks that thread. Decompression runs
//! in such a thread, too: beside the counting.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::content::{self, Opened, Taking};
use super::follow::Follow;

const READ_BYTES: usize = 1 << 20;
/// What a pipe holds.
const CHUNK_BYTES: usize = 64 << 10;
/// Chunks that are read ahead.
const CHUNKS_MAX: usize = 16;
/// How often whoever waits may look at something else.
pub(super) const WAIT: Duration = Duration::from_millis(50);

/// Lines to count.
pub(super) struct Input {
    pub(super) lines: Box<dyn BufRead + Send>,
    /// Its bytes, if that is known before.
    pub(super) size: Option<u64>,
    /// Somebody may still write it.
    pub(super) is_live: bool,
}

/// A file, or standard input (`-`).
pub(super) fn open(path: &Path, taking: Taking) -> io::Result<Input> {
    if path.as_os_str() == "-" {
        return Ok(live(io::stdin(), taking));
    }
    let file = File::open(path)?;
    let data = file.metadata()?;
    if data.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !data.is_file() {
        return Ok(live(file, taking));
    }
    let file = BufReader::with_capacity(READ_BYTES, file);
    Ok(match content::open(file, taking)? {
        Opened::Plain(lines) => Input { lines, size: Some(data.len()), is_live: false },
        Opened::Decompressed(text) => {
            let lines = Box::new(Patient::new(|| Ok(text)));
            Input { lines, size: None, is_live: false }
        }
    })
}

/// What is appended to a file from now on, and what it holds already.
pub(super) fn follow(path: &Path, taking: Taking) -> Input {
    Input { lines: Box::new(Follow::new(path, taking)), size: None, is_live: true }
}

/// A pipe. Its first bytes may take their time.
fn live(input: impl Read + Send + 'static, taking: Taking) -> Input {
    let text = move || match content::open(BufReader::with_capacity(CHUNK_BYTES, input), taking)? {
        Opened::Plain(text) | Opened::Decompressed(text) => Ok(text),
    };
    Input { lines: Box::new(Patient::new(text)), size: None, is_live: true }
}

/// Gives [`io::ErrorKind::TimedOut`] when nothing has come for a moment; then it may be asked again.
struct Patient {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    used: usize,
}

impl Patient {
    /// `open` is called where the reading is done: it may wait, too.
    fn new<R: Read>(open: impl FnOnce() -> io::Result<R> + Send + 'static) -> Self {
        let (sender, chunks) = sync_channel(CHUNKS_MAX);
        // Never joined: it may sit in a read from a terminal for ever.
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

impl Read for Patient {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(bytes)?;
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Patient {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.chunk.len() {
            match self.chunks.recv_timeout(WAIT) {
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
    fn who_waits_is_not_held_up() {
        let (theirs, mut ours) = std::os::unix::net::UnixStream::pair().expect("two sockets");
        let mut input = Patient::new(|| Ok(theirs));
        assert_eq!(input.fill_buf().unwrap_err().kind(), io::ErrorKind::TimedOut);
        io::Write::write_all(&mut ours, b"a\nb").expect("it is read");
        let mut come = Vec::new();
        while come.len() < 3 {
            if let Ok(bytes) = input.fill_buf() {
                come.extend_from_slice(bytes);
                let length = bytes.len();
                input.consume(length);
            }
        }
        assert_eq!(come, b"a\nb");
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
