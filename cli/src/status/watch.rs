//! `dkc status --watch`: a look every second.
//!
//! On a terminal the tables are drawn again, with the latest changes below. Elsewhere each change is a line of its own, so
//! that what is written down reads as a story. With `--json` a line is the whole page, with what has changed.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::time::MissedTickBehavior;

use super::changes::changes;
use super::page::Cluster;
use super::{Told, ask, table};
use crate::client::Gateways;
use crate::exit::Exit;
use crate::output;

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Changes that are kept in sight.
const RECENT: usize = 12;

/// Until nobody reads it any more, or the user has seen enough.
pub(super) async fn run(mut gateways: Gateways, all: bool, json: bool) -> anyhow::Result<Exit> {
    let redraws = !json && std::io::stdout().is_terminal();
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut story = Story::default();
    let mut recent = VecDeque::new();
    loop {
        ticks.tick().await;
        let told = ask(&mut gateways).await;
        let said = story.goes_on(told.as_ref().map(|told| &told.cluster).map_err(String::as_str));
        let at = clock(SystemTime::now());
        let lines: Vec<_> = said.iter().map(|what| format!("{at} {what}")).collect();
        let text = if json {
            if said.is_empty() { None } else { Some(document(&told, &said)?.to_string()) }
        } else if redraws {
            recent.extend(lines);
            while recent.len() > RECENT {
                recent.pop_front();
            }
            let recent = recent.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
            let page = match &told {
                Ok(told) => table::text(&told.cluster, all),
                Err(why) => format!("{why}\n"),
            };
            // To the top left, and what was there goes.
            Some(format!("\x1b[H\x1b[2J{at} UTC  {page}\n{recent}"))
        } else {
            Some(lines.join("\n")).filter(|lines| !lines.is_empty())
        };
        if let Some(text) = text
            && !output::still_read(&text)?
        {
            return Ok(Exit::Done);
        }
    }
}

/// What has been told so far.
#[derive(Default)]
struct Story {
    cluster: Option<Cluster>,
    /// Why no gateway answered, the last time.
    silent: Option<String>,
}

impl Story {
    /// What is new.
    fn goes_on(&mut self, told: Result<&Cluster, &str>) -> Vec<String> {
        let now = match told {
            Ok(now) => now,
            Err(why) => {
                let news = self.silent.is_none().then(|| why.to_owned());
                self.silent = Some(why.to_owned());
                return news.into_iter().collect();
            }
        };
        let mut said = match &self.cluster {
            None => vec![now.headline()],
            Some(before) => changes(before, now),
        };
        if self.silent.take().is_some() && self.cluster.is_some() {
            said.insert(0, "a gateway answers again".to_owned());
        }
        self.cluster = Some(now.clone());
        said
    }
}

fn document(told: &Result<Told, String>, said: &[String]) -> serde_json::Result<Value> {
    let mut document = match told {
        Ok(told) => told.document()?,
        Err(why) => json!({ "detail": why }),
    };
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    document["time_ms"] = json!(since.as_millis() as u64);
    document["changes"] = json!(said);
    Ok(document)
}

/// `12:03:04`, UTC.
fn clock(now: SystemTime) -> String {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::super::page::tests::cluster;
    use super::*;

    #[test]
    fn silence_is_told_once_and_so_is_its_end() {
        let mut story = Story::default();
        let (cluster, nothing) = (cluster(), Vec::<String>::new());
        assert_eq!(story.goes_on(Err("no gateway answers")), ["no gateway answers"]);
        assert_eq!(story.goes_on(Err("no gateway answers at all")), nothing);
        assert_eq!(
            story.goes_on(Ok(&cluster)),
            ["cluster dkc: 1 of 2 nodes up, 1 of 2 shards open"]
        );
        assert_eq!(story.goes_on(Ok(&cluster)), nothing);
        assert_eq!(story.goes_on(Err("gone")), ["gone"]);
        assert_eq!(story.goes_on(Ok(&cluster)), ["a gateway answers again"]);
    }

    #[test]
    fn the_clock_is_of_the_day() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000 * 86_400 + 43_384);
        assert_eq!(clock(at), "12:03:04");
    }
}
