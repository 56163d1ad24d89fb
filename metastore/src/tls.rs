//! Detects a server that requires TLS: a client without TLS only sees that its connections break.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const WITHIN: Duration = Duration::from_secs(1);

/// The type of a TLS record with an alert.
const ALERT: u8 = 21;
/// The type of a TLS record with a message of the handshake.
const HANDSHAKE: u8 = 22;

/// Sends a TLS ClientHello. A server with TLS replies with a hello or an alert, even if it supports
/// none of the offered suites.
pub(crate) async fn is_required(endpoint: &str) -> bool {
    let address = endpoint.trim_start_matches("http://");
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&hello()).await?;
        let mut record = [0; 3];
        stream.read_exact(&mut record).await?;
        std::io::Result::Ok(record)
    };
    match timeout(WITHIN, asked).await {
        // The major version is 3 in all versions of TLS.
        Ok(Ok([kind, 3, _])) => matches!(kind, ALERT | HANDSHAKE),
        _ => false,
    }
}

/// Returns a ClientHello of TLS 1.2, with two suites and without extensions.
fn hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]); // the random number, which is not used
    body.push(0); // no session
    body.extend([0, 4, 0xc0, 0x2f, 0x00, 0x2f]); // suites
    body.extend([1, 0]); // no compression
    let length = |bytes: usize| u8::try_from(bytes).expect("it is short");
    let mut record = vec![HANDSHAKE, 3, 1, 0, length(body.len() + 4), 1, 0, 0, length(body.len())];
    record.append(&mut body);
    record
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Checks the result for a server that reads one ClientHello and replies with these bytes.
    async fn check(answer: &'static [u8], want: bool) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut header = [0; 5];
            stream.read_exact(&mut header).await.expect("a record");
            let mut body = vec![0; usize::from(header[4])];
            stream.read_exact(&mut body).await.expect("as long as it says");
            assert_eq!((header[0], usize::from(body[3])), (HANDSHAKE, body.len() - 4));
            stream.write_all(answer).await.expect("it listens");
        });
        assert_eq!(is_required(&format!("http://{address}")).await, want, "{answer:?}");
        server.await.expect("a hello");
    }

    #[tokio::test]
    async fn a_hello_or_an_alert_is_tls_and_nothing_else() {
        check(&[22, 3, 3, 0, 1], true).await;
        check(&[21, 3, 1, 0, 2, 2, 40], true).await;
        check(b"HTTP/1.1 400 Bad Request", false).await;
        // An HTTP/2 SETTINGS frame, as etcd without TLS begins.
        check(&[0, 0, 6, 4, 0], false).await;
        check(b"", false).await;
    }

    #[tokio::test]
    async fn a_port_without_a_listener_requires_no_tls() {
        assert!(!is_required("127.0.0.1:1").await);
    }
}
