//! HTTP over plain sockets, including requests that `curl` would not send.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

pub(crate) struct Client {
    stream: TcpStream,
    input: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The last part of a problem's type.
    pub(crate) fn kind(&self) -> String {
        let json = self.json();
        json["type"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()
    }

    pub(crate) fn outcome(&self) -> String {
        self.json()["outcome"].as_str().unwrap().to_owned()
    }
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, input: Vec::new() }
    }

    /// A client with a small receive buffer in the kernel.
    pub(crate) async fn narrow(address: SocketAddr) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let stream = socket.connect(address).await.unwrap().into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        Self { stream, input: Vec::new() }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Returns false if the connection is broken.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Closes the sending side; answers still arrive.
    pub(crate) fn end_sending(&self) {
        self.stream.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// Sends a request with these header lines and a body of known length.
    pub(crate) fn request(&mut self, line: &str, headers: &[&str], body: &[u8]) {
        let mut text = format!("{line} HTTP/1.1\r\nHost: x\r\n");
        for header in headers {
            text.push_str(header);
            text.push_str("\r\n");
        }
        if !body.is_empty() {
            text.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        text.push_str("\r\n");
        self.send(&[text.as_bytes(), body].concat());
    }

    #[track_caller]
    pub(crate) fn call(&mut self, line: &str, headers: &[&str], body: &[u8]) -> Answer {
        self.request(line, headers, body);
        self.answer(line.starts_with("HEAD "))
    }

    #[track_caller]
    pub(crate) fn get(&mut self, path: &str) -> Answer {
        self.call(&format!("GET {path}"), &[], b"")
    }

    #[track_caller]
    pub(crate) fn post(&mut self, path: &str, body: &str) -> Answer {
        self.call(&format!("POST {path}"), &[], body.as_bytes())
    }

    /// Receives the next answer.
    #[track_caller]
    pub(crate) fn answer(&mut self, bodiless: bool) -> Answer {
        let end = loop {
            if let Some(end) = self.input.windows(4).position(|four| four == b"\r\n\r\n") {
                break end;
            }
            assert!(self.read() > 0, "the connection ended before an answer: {:?}", self.input);
        };
        let head = String::from_utf8(self.input.drain(..end + 4).collect()).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: BTreeMap<_, _> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        if status == 100 {
            return Answer { status, headers, body: String::new() };
        }
        let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
        let length = if bodiless { 0 } else { length };
        while self.input.len() < length {
            assert!(self.read() > 0, "the connection ended within an answer");
        }
        let body = String::from_utf8(self.input.drain(..length).collect()).unwrap();
        Answer { status, headers, body }
    }

    /// Reads a few bytes and drops them.
    pub(crate) fn take_some(&mut self) {
        let _closed = self.stream.read(&mut [0; 200]);
    }

    /// Returns whether the server has closed the connection without further data.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.read() == 0 && self.input.is_empty()
    }

    fn read(&mut self) -> usize {
        let mut bytes = [0; 64 << 10];
        match self.stream.read(&mut bytes) {
            Ok(count) => {
                self.input.extend_from_slice(&bytes[..count]);
                count
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("{error}"),
        }
    }
}
