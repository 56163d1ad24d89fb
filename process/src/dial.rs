//! Connections to other processes of the cluster.

use std::error::Error;
use std::io;
use std::iter::successors;
use std::time::Duration;

use tonic::transport::Endpoint;

/// The time limit of a connection: on a local network it takes a millisecond.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The HTTP/2 pings on a connection, which detect a machine that vanished silently. (They detect a
/// paused process too, which is harmless.)
#[derive(Clone, Copy, Debug)]
pub struct Pings {
    /// The interval of the pings.
    pub every: Duration,
    /// The connection is closed if a ping is not answered within this time.
    pub timeout: Duration,
}

/// Returns the endpoint of another process, `host:port`, with the settings that all connections
/// have. An error means that the address is invalid.
pub fn endpoint(address: &str, pings: Pings) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(pings.every)
        .keep_alive_timeout(pings.timeout)
        .keep_alive_while_idle(true))
}

/// Returns an error and its causes, the outermost first. (The text of tonic's own error is only
/// "transport error".)
pub fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    successors(Some(error), |&error| error.source())
}

/// Returns whether the cause of an error is that the kernel of the other side refused the
/// connection: no process listens there.
pub fn is_refused(error: &(dyn Error + 'static)) -> bool {
    causes(error)
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
