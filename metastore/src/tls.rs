//! Whether who listens somewhere speaks TLS: to a client that does not, such an etcd is one that breaks connections.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const WITHIN: Duration = Duration::from_secs(1);

/// Types of TLS records: an alert, a message of the handshake.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

/// Says hello as TLS does. Whoever speaks it answers with a hello or an alert, whatever it thinks of what is offered.
pub(crate) async fn is_spoken(endpoint: &str) -> bool {
    let address = endpoint.trim_start_matches("http://");
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&hello()).await?;
        let mut record = [0; 3];
        stream.read_exact(&mut record).await?;
        std::io::Result::Ok(record)
    };
    match timeout(WITHIN, asked).await {
        // The major version is 3 in all of them.
        Ok(Ok([kind, 3, _])) => matches!(kind, ALERT | HANDSHAKE),
        _ => false,
    }
}

/// A ClientHello of TLS 1.2, with two suites and without extensions.
fn hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]); // what should be random, and is used for nothing
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

    /// Takes one connection, reads what comes and answers so.
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
        assert_eq!(is_spoken(&format!("http://{address}")).await, want, "{answer:?}");
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
    async fn where_nobody_listens_nothing_is_spoken() {
        assert!(!is_spoken("127.0.0.1:1").await);
    }
}
