//! A client of Redis: pipelines of `INCR`, with or without `WAIT`.

use std::io::{self, Write};
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::keys::{KeyChooser, KeySpace};
use crate::load::{LoadClient, LoadOutcome};

const READ_BYTES: usize = 16 << 10;

/// The commands that clients send to Redis.
#[derive(Clone, Debug)]
pub struct PipelinePlan {
    /// The primary.
    pub address: SocketAddr,
    /// The number of `INCR` that are sent at once.
    pub depth: usize,
    /// The number of replicas that must have acknowledged them; `None` sends no `WAIT`.
    pub wait_for: Option<u64>,
    /// The counters.
    pub keys: KeySpace,
}

impl PipelinePlan {
    /// Returns the client of this number.
    pub fn client(&self, number: usize) -> PipelineClient {
        PipelineClient {
            chooser: self.keys.chooser(number as u64),
            plan: self.clone(),
            stream: None,
            keys: Vec::new(),
            bytes: Vec::new(),
        }
    }
}

/// A client with one connection.
#[derive(Debug)]
pub struct PipelineClient {
    plan: PipelinePlan,
    chooser: KeyChooser,
    stream: Option<TcpStream>,
    keys: Vec<u64>,
    /// The commands, then the replies. The buffer is reused.
    bytes: Vec<u8>,
}

impl LoadClient for PipelineClient {
    async fn call(&mut self) -> Option<LoadOutcome> {
        self.chooser.choose(self.plan.depth, &mut self.keys);
        if self.keys.is_empty() {
            return None;
        }
        Some(self.exchange().await.unwrap_or_else(|error| {
            self.stream = None;
            LoadOutcome::Failed(error.to_string())
        }))
    }
}

impl PipelineClient {
    async fn exchange(&mut self) -> io::Result<LoadOutcome> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.plan.address).await?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        write_commands(&self.keys, self.plan.wait_for, &mut self.bytes)?;
        stream.write_all(&self.bytes).await?;
        let wanted = self.keys.len() + usize::from(self.plan.wait_for.is_some());
        self.bytes.clear();
        let mut scanned = 0;
        let mut lines = 0;
        while lines < wanted {
            self.bytes.reserve(READ_BYTES);
            if stream.read_buf(&mut self.bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            lines += self.bytes[scanned..].iter().filter(|&&byte| byte == b'\n').count();
            scanned = self.bytes.len();
        }
        self.stream = Some(stream);
        Ok(replies(&self.bytes, self.keys.len() as u64, self.plan.wait_for))
    }
}

fn write_commands(keys: &[u64], wait_for: Option<u64>, into: &mut Vec<u8>) -> io::Result<()> {
    into.clear();
    for key in keys {
        let length = 1 + key.checked_ilog10().unwrap_or(0) + 1;
        write!(into, "*2\r\n$4\r\nINCR\r\n${length}\r\nk{key}\r\n")?;
    }
    if let Some(replicas) = wait_for {
        let digits = replicas.checked_ilog10().unwrap_or(0) + 1;
        // A time-out of 0 waits for as long as it takes.
        write!(into, "*3\r\n$4\r\nWAIT\r\n${digits}\r\n{replicas}\r\n$1\r\n0\r\n")?;
    }
    Ok(())
}

/// Returns the outcome of a pipeline, all of whose replies must be integers.
fn replies(bytes: &[u8], increments: u64, wait_for: Option<u64>) -> LoadOutcome {
    let lines = || bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    if let Some(line) = lines().find(|line| line[0] != b':') {
        return LoadOutcome::Failed(String::from_utf8_lossy(line).trim().to_owned());
    }
    let integer = |line: &[u8]| std::str::from_utf8(&line[1..]).ok()?.trim().parse::<u64>().ok();
    match (wait_for, lines().next_back().and_then(integer)) {
        (Some(wanted), Some(got)) if got < wanted => {
            LoadOutcome::Failed(format!("{got} of {wanted} replicas have it"))
        }
        _ => LoadOutcome::Applied(increments),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_resp() {
        let mut bytes = Vec::new();
        write_commands(&[0, 10], None, &mut bytes).unwrap();
        assert_eq!(bytes, b"*2\r\n$4\r\nINCR\r\n$2\r\nk0\r\n*2\r\n$4\r\nINCR\r\n$3\r\nk10\r\n");
        write_commands(&[7], Some(2), &mut bytes).unwrap();
        let want = b"*2\r\n$4\r\nINCR\r\n$2\r\nk7\r\n*3\r\n$4\r\nWAIT\r\n$1\r\n2\r\n$1\r\n0\r\n";
        assert_eq!(bytes, want);
    }

    #[test]
    fn replies_have_outcomes() {
        #[track_caller]
        fn check(bytes: &str, wait_for: Option<u64>, want: Result<u64, &str>) {
            let got = match replies(bytes.as_bytes(), 2, wait_for) {
                LoadOutcome::Applied(increments) => Ok(increments),
                LoadOutcome::Failed(why) => Err(why),
                other => panic!("{other:?}"),
            };
            assert_eq!(got, want.map_err(str::to_owned));
        }
        check(":1\r\n:5\r\n", None, Ok(2));
        check(":1\r\n:5\r\n:2\r\n", Some(2), Ok(2));
        check(":1\r\n:5\r\n:1\r\n", Some(2), Err("1 of 2 replicas have it"));
        check(":1\r\n-OOM no memory\r\n", None, Err("-OOM no memory"));
    }
}
