//! `dkc status --watch`: shows the status and its changes every second.
//!
//! On a terminal the tables are redrawn, with the latest changes below. Otherwise each change is a
//! line of its own, so that the output is a log of the cluster. With `--json` each line is the
//! whole page with the changes.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::Duration;

use client::Gateways;
use serde_json::{Value, json};
use telemetry::wall_clock_ms;
use tokio::time::MissedTickBehavior;

use super::changes::changes_between;
use super::page::ClusterInfo;
use super::{StatusAnswer, ask, table};
use crate::clock;
use crate::exit::CommandExit;
use crate::output;

/// The interval of refreshes.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The number of changes that are shown below the tables.
const RECENT: usize = 12;

/// Runs until stdout is closed or the user interrupts it.
pub(super) async fn run(
    mut gateways: Gateways,
    all: bool,
    json: bool,
) -> anyhow::Result<CommandExit> {
    let redraws = !json && std::io::stdout().is_terminal();
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tracker = ChangeTracker::default();
    let mut recent = VecDeque::new();
    loop {
        ticks.tick().await;
        let answer = ask(&mut gateways).await;
        let cluster = answer.as_ref().map(|answer| &answer.cluster).map_err(String::as_str);
        let changes = tracker.update(cluster);
        let at = clock::time_of_day(wall_clock_ms());
        let lines: Vec<_> = changes.iter().map(|what| format!("{at} {what}")).collect();
        let text = if json {
            if changes.is_empty() { None } else { Some(document(&answer, &changes)?.to_string()) }
        } else if redraws {
            recent.extend(lines);
            while recent.len() > RECENT {
                recent.pop_front();
            }
            let recent = recent.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
            let page = match &answer {
                Ok(answer) => table::text(&answer.cluster, all),
                Err(why) => format!("{why}\n"),
            };
            // Cursor to the top left, then clear the screen.
            Some(format!("\x1b[H\x1b[2J{at} UTC  {page}\n{recent}"))
        } else {
            Some(lines.join("\n")).filter(|lines| !lines.is_empty())
        };
        if let Some(text) = text
            && !output::still_read(&text)?
        {
            return Ok(CommandExit::Done);
        }
    }
}

/// The last state that was shown, from which changes are computed.
#[derive(Default)]
struct ChangeTracker {
    cluster: Option<ClusterInfo>,
    /// The reason why no gateway answered the last time, if none did.
    unreachable: Option<String>,
}

impl ChangeTracker {
    /// Returns the changes since the last state.
    fn update(&mut self, answer: Result<&ClusterInfo, &str>) -> Vec<String> {
        let now = match answer {
            Ok(now) => now,
            Err(why) => {
                let change = self.unreachable.is_none().then(|| why.to_owned());
                self.unreachable = Some(why.to_owned());
                return change.into_iter().collect();
            }
        };
        let mut changes = match &self.cluster {
            None => vec![now.headline()],
            Some(before) => changes_between(before, now),
        };
        if self.unreachable.take().is_some() && self.cluster.is_some() {
            changes.insert(0, "a gateway answers again".to_owned());
        }
        self.cluster = Some(now.clone());
        changes
    }
}

fn document(
    answer: &Result<StatusAnswer, String>,
    changes: &[String],
) -> serde_json::Result<Value> {
    let mut document = match answer {
        Ok(answer) => answer.document()?,
        Err(why) => json!({ "detail": why }),
    };
    document["time_ms"] = json!(wall_clock_ms());
    document["changes"] = json!(changes);
    Ok(document)
}

#[cfg(test)]
mod tests {
    use super::super::page::tests::cluster;
    use super::*;

    #[test]
    fn an_outage_is_reported_once_and_so_is_its_end() {
        let mut tracker = ChangeTracker::default();
        let (cluster, nothing) = (cluster(), Vec::<String>::new());
        assert_eq!(tracker.update(Err("no gateway answers")), ["no gateway answers"]);
        assert_eq!(tracker.update(Err("no gateway answers at all")), nothing);
        assert_eq!(
            tracker.update(Ok(&cluster)),
            ["cluster dkc: 1 of 2 nodes up, 1 of 2 shards open"]
        );
        assert_eq!(tracker.update(Ok(&cluster)), nothing);
        assert_eq!(tracker.update(Err("gone")), ["gone"]);
        assert_eq!(tracker.update(Ok(&cluster)), ["a gateway answers again"]);
    }
}
