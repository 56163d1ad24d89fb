//! Where lines come from: a file, which is there, or somebody who still writes.
//!
//! Whoever reads a pipe must not wait for it for ever: the lines that came so far are to be counted after a while. A read
//! from a pipe can't be given a time, so a thread does the reading, and [`Patient`] asks that thread.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

const READ_BYTES: usize = 1 << 20;
/// What a pipe holds.
const CHUNK_BYTES: usize = 64 << 10;
/// Chunks that are read ahead.
const CHUNKS_MAX: usize = 16;
/// How often whoever waits may look at something else.
const WAIT: Duration = Duration::from_millis(50);

/// Lines, and their bytes if that is known before: of a file.
pub(super) fn open(path: &Path) -> io::Result<(Box<dyn BufRead + Send>, Option<u64>)> {
    if path.as_os_str() == "-" {
        return Ok((Box::new(Patient::new(io::stdin())), None));
    }
    let file = File::open(path)?;
    let data = file.metadata()?;
    if data.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if data.is_file() {
        return Ok((Box::new(BufReader::with_capacity(READ_BYTES, file)), Some(data.len())));
    }
    Ok((Box::new(Patient::new(file)), None))
}

/// Gives [`io::ErrorKind::TimedOut`] when nothing has come for a moment; then it may be asked again.
struct Patient {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    used: usize,
}

impl Patient {
    fn new(mut input: impl Read + Send + 'static) -> Self {
        let (sender, chunks) = sync_channel(CHUNKS_MAX);
        // Never joined: it may sit in a read from a terminal for ever.
        std::thread::spawn(move || {
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

/// `1s`, `250ms`; a number alone is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let (digits, unit_ms) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1),
        (None, Some(digits)) => (digits, 1_000),
        (None, None) => (text, 1_000),
    };
    match digits.parse::<u64>() {
        Ok(count) if (1..=3_600_000).contains(&count.saturating_mul(unit_ms)) => {
            Ok(Duration::from_millis(count * unit_ms))
        }
        _ => Err("1ms to 3600s is expected, such as 250ms or 2s".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let ms = |text| duration(text).map(|duration| duration.as_millis());
        assert_eq!([ms("250ms"), ms("2s"), ms("3")], [Ok(250), Ok(2_000), Ok(3_000)]);
        for wrong in ["", "s", "0", "0ms", "1.5s", "1m", "3601s", "99999999999999999999s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn who_waits_is_not_held_up() {
        let (theirs, mut ours) = std::os::unix::net::UnixStream::pair().expect("two sockets");
        let mut input = Patient::new(theirs);
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
