//! `dkc ready`: checks whether a process is ready, for health checks in images without curl.

use std::time::Duration;

use client::{HttpConnection, HttpRequest, Url};

use crate::exit::CommandExit;
use crate::output::{self, note};

/// Options of `dkc ready`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address that serves /readyz: --metrics of a process, or --http of a gateway
    #[arg(value_name = "HOST:PORT", value_parser = url)]
    at: Url,
    /// Time-out in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    within: u32,
}

/// Parses an address with or without `http://`.
fn url(text: &str) -> Result<Url, String> {
    Url::parse(&format!("http://{}", text.strip_prefix("http://").unwrap_or(text)))
}

/// Prints the answer of `/readyz`; succeeds if its status is 200.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let within = Duration::from_secs(args.within.into());
    let request = HttpRequest::get(&args.at, "/readyz", within);
    match HttpConnection::new(args.at.clone()).call(&request, within).await {
        Ok(answer) => {
            output::result(String::from_utf8_lossy(&answer.body).trim_end())?;
            Ok(if answer.status == 200 { CommandExit::Done } else { CommandExit::Failed })
        }
        Err(error) => {
            note!("error: {}/readyz: {error}", args.at);
            Ok(CommandExit::Failed)
        }
    }
}
