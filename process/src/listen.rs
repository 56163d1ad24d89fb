//! The ports of a process.

use std::net::SocketAddr;
use std::sync::Arc;

use telemetry::{Health, Metrics};
use tokio::net::TcpListener;

use crate::{ListenOptions, ProcessExit};

/// Listens on an address, which `flag` has set. The kernel queues as many connections as it may
/// (`net.core.somaxconn`) until they are accepted.
pub async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, ProcessExit> {
    TcpListener::bind(address).await.map_err(|error| {
        ProcessExit::Usage(format!("{flag} {address}: can't listen there: {error}"))
    })
}

/// Listens on the address of `--metrics`, and returns the task that serves `/livez`, `/readyz` and
/// `/metrics` there. Without an address, the task serves nothing. It never ends by itself.
pub async fn monitoring(
    address: Option<SocketAddr>,
    health: Health,
    metrics: Arc<Metrics>,
) -> Result<impl Future<Output = ()> + Send + 'static, ProcessExit> {
    let listener = match address {
        Some(address) => Some(bind("--metrics", address).await?),
        None => None,
    };
    Ok(async move {
        match listener {
            Some(listener) => telemetry::serve(listener, health, metrics).await,
            None => std::future::pending().await,
        }
    })
}

impl ListenOptions {
    /// Listens on `--listen`. Returns the listener and the address that others dial: that of
    /// `--advertise`, or else the bound one.
    pub async fn bind(&self) -> Result<(TcpListener, String), ProcessExit> {
        let listener = bind("--listen", self.listen).await?;
        let bound = listener.local_addr()?;
        let address = self.advertise.clone().unwrap_or_else(|| bound.to_string());
        Ok((listener, address))
    }
}
