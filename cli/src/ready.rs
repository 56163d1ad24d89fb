//! `dkc ready`: whether a process is ready, for health checks where there is no curl.

use std::time::Duration;

use bench::http::{Connection, Request, Url};

use crate::exit::Exit;
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the process serves /readyz: its --metrics, or a gateway's --http
    #[arg(value_name = "HOST:PORT", value_parser = url)]
    at: Url,
    /// Seconds to wait for an answer
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    within: u32,
}

/// As people write it, with or without `http://`.
fn url(text: &str) -> Result<Url, String> {
    Url::parse(&format!("http://{}", text.strip_prefix("http://").unwrap_or(text)))
}

pub(crate) async fn run(args: Args) -> anyhow::Result<Exit> {
    let within = Duration::from_secs(args.within.into());
    let request = Request::get(&args.at, "/readyz", within);
    match Connection::new(args.at.clone()).call(&request, within).await {
        Ok(answer) => {
            output::result(String::from_utf8_lossy(&answer.body).trim_end())?;
            Ok(if answer.status == 200 { Exit::Done } else { Exit::Failed })
        }
        Err(error) => {
            output::note(&format!("error: {}/readyz: {error}", args.at));
            Ok(Exit::Failed)
        }
    }
}
