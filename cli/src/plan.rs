//! `dkc plan`: what the leading coordinator moves and will move until the map is level, what can't
//! be moved, and why.
//!
//! The coordinator answers, since only it knows which nodes reply to its probes and what their
//! primaries report.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use engine::ids::StoreId;
use engine::records::StoreRecord;
use metastore::{CoordinatorRecord, Metastore};
use process::ClusterOptions;
use proto::wire;
use serde::Serialize;

use crate::coordinators;
use crate::etcd::{cluster, connect, store_named};
use crate::exit::CommandExit;
use crate::output::{self, note};

/// The time-out of the query: the forecast of a large cluster takes seconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// The number of moves that are shown without `--all`.
const MOVES_SHOWN: usize = 30;

/// Options of `dkc plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show what a drain of this node would move; nothing is changed
    #[arg(long, value_name = "NODE")]
    drain: Option<String>,
    /// List all moves
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The plan, as in the JSON output.
#[derive(Debug, Serialize)]
struct PlanTable {
    moves: Vec<MoveRow>,
    /// More moves follow, which were not computed.
    truncated: bool,
    /// The number of shards that want a move.
    wanted: u64,
    stalled: bool,
    /// The time without a change of the map while moves are wanted.
    still_ms: u64,
    /// The average duration of the last copies.
    copy_ms: Option<u64>,
    /// An operator has paused the moves for balance.
    paused: bool,
    /// No new copies are made for now, since many nodes vanished at once.
    guard: bool,
    /// The reason why the node of `--drain` can't be emptied, or only at the cost of a zone.
    obstacle: Option<String>,
}

/// One move.
#[derive(Debug, Serialize)]
struct MoveRow {
    shard: u32,
    kind: String,
    from: Option<String>,
    to: Option<String>,
    state: String,
    reason: Option<String>,
    round: u32,
    age_ms: Option<u64>,
    eta_ms: Option<u64>,
}

/// Prints the plan.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let meta = cluster(&metastore, &args.etcd).await?;
    let stores = metastore.list::<StoreRecord>().await?.all;
    let drain = match &args.drain {
        None => None,
        Some(node) => Some(store_named(&stores, node)?.id),
    };
    let reply = match ask(&metastore, wire::PlanQuery::new(meta.cluster, drain)).await {
        Ok(reply) => reply,
        Err(why) => {
            note!("error: {why:#}");
            return Ok(CommandExit::Failed);
        }
    };
    let names = stores.into_iter().map(|kept| (kept.id, kept.record.name)).collect();
    let plan = PlanTable::new(reply, &names);
    output::report(args.json, &plan, |plan| plan.text(args.all))?;
    Ok(match (&plan.obstacle, plan.stalled) {
        (Some(_), _) => CommandExit::Failed,
        (None, true) if drain.is_none() => CommandExit::Unknown,
        _ => CommandExit::Done,
    })
}

/// Asks the leading coordinator.
async fn ask(metastore: &Metastore, query: wire::PlanQuery) -> anyhow::Result<wire::PlanReply> {
    let leader = metastore.get::<CoordinatorRecord>(&()).await?;
    let leader = leader.context("no coordinator is leader, and the leader plans: start one")?;
    let address = leader.record.address;
    coordinators::ask(&address, ANSWER_WITHIN, PINGS, async |client| client.plan(query).await).await
}

/// A query lasts less than a connection that has gone silent.
const PINGS: process::Pings =
    process::Pings { every: Duration::from_secs(5), timeout: Duration::from_secs(5) };

impl PlanTable {
    fn new(reply: wire::PlanReply, names: &BTreeMap<StoreId, String>) -> Self {
        let name = |store: Option<wire::StoreId>| {
            let store = StoreId::from(store?);
            Some(names.get(&store).cloned().unwrap_or_else(|| store.to_string()))
        };
        let row = |it: wire::PlannedMove| MoveRow {
            shard: it.shard,
            kind: it.kind,
            from: name(it.from),
            to: name(it.to),
            state: it.state,
            reason: it.reason,
            round: it.round,
            age_ms: it.age_ms,
            eta_ms: it.eta_ms,
        };
        Self {
            moves: reply.moves.into_iter().map(row).collect(),
            truncated: reply.truncated,
            wanted: reply.wanted,
            stalled: reply.stalled,
            still_ms: reply.still_ms,
            copy_ms: reply.copy_ms,
            paused: reply.paused,
            guard: reply.guard,
            obstacle: reply.obstacle,
        }
    }

    fn text(&self, all: bool) -> String {
        let mut text = self.headline();
        let most = if all { self.moves.len() } else { self.moves.len().min(MOVES_SHOWN) };
        if most > 0 {
            let columns =
                ["<MOVE", ">SHARD", "<FROM", "<TO", "<STATE", "<REASON", ">SINCE", ">LEFT"];
            let rows = self.moves[..most].iter().map(MoveRow::cells).collect();
            text += "\n\n";
            text += output::table(&columns, rows).trim_end();
        }
        if self.moves.len() > most {
            text += &format!("\n… and {} more (--all)", self.moves.len() - most);
        }
        if self.truncated {
            text += "\n… and others after these, which were not computed";
        }
        if let Some(obstacle) = &self.obstacle {
            text += &format!("\n\nA drain would be refused: {obstacle}");
        }
        text
    }

    fn headline(&self) -> String {
        let count = |state: &str| self.moves.iter().filter(|it| it.state == state).count();
        let mut text = match self.moves.len() {
            0 => "level: nothing is to be moved".to_owned(),
            _ => format!(
                "{} running, {} waiting, {} impossible",
                count("running"),
                count("waiting"),
                count("impossible")
            ),
        };
        if let Some(copy_ms) = self.copy_ms {
            text += &format!("; a copy takes {}", seconds(copy_ms));
        }
        if self.paused {
            text += "; moves for balance are paused";
        }
        if self.guard {
            text += "; new copies are held back, since many nodes vanished at once";
        }
        if self.stalled {
            text += &format!("; STALLED: nothing has moved for {}", seconds(self.still_ms));
        }
        text
    }
}

impl MoveRow {
    fn cells(&self) -> Vec<String> {
        let shown = |word: &Option<String>| word.clone().unwrap_or_else(|| "-".to_owned());
        let time = |ms: Option<u64>| ms.map_or_else(|| "-".to_owned(), seconds);
        vec![
            self.kind.clone(),
            self.shard.to_string(),
            shown(&self.from),
            shown(&self.to),
            self.state.clone(),
            shown(&self.reason),
            time(self.age_ms),
            time(self.eta_ms),
        ]
    }
}

/// Formats a duration: tenths below ten seconds, whole seconds above.
fn seconds(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{}.{} s", ms / 1_000, ms / 100 % 10),
        _ => format!("{} s", ms / 1_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(from: Option<u128>, to: Option<u128>, state: &str) -> wire::PlannedMove {
        let store = |id: Option<u128>| id.map(|id| wire::StoreId::from(StoreId(id)));
        wire::PlannedMove {
            shard: 2730,
            kind: "copy".into(),
            from: store(from),
            to: store(to),
            state: state.into(),
            ..wire::PlannedMove::default()
        }
    }

    #[test]
    fn each_move_has_a_line() {
        let names = [(StoreId(1), "node-1".to_owned()), (StoreId(4), "node-4".to_owned())].into();
        let running = wire::PlannedMove {
            age_ms: Some(1_250),
            eta_ms: Some(12_000),
            ..line(Some(1), Some(4), "running")
        };
        let waits = Some("no-target".to_owned());
        let stuck = wire::PlannedMove { reason: waits, ..line(None, None, "impossible") };
        let reply = wire::PlanReply {
            moves: vec![running, stuck],
            stalled: true,
            still_ms: 61_000,
            copy_ms: Some(3_000),
            ..wire::PlanReply::default()
        };
        let want = "\
1 running, 0 waiting, 1 impossible; a copy takes 3.0 s; STALLED: nothing has moved for 61 s

MOVE  SHARD  FROM    TO      STATE       REASON     SINCE  LEFT
copy   2730  node-1  node-4  running     -          1.2 s  12 s
copy   2730  -       -       impossible  no-target      -     -";
        assert_eq!(PlanTable::new(reply, &names).text(false), want);
        let level = PlanTable::new(wire::PlanReply::default(), &names);
        assert_eq!(level.text(false), "level: nothing is to be moved");
    }

    #[test]
    fn a_long_plan_is_cut() {
        let moves = vec![line(Some(1), Some(4), "waiting"); MOVES_SHOWN + 2];
        let reply = wire::PlanReply { moves, truncated: true, ..wire::PlanReply::default() };
        let plan = PlanTable::new(reply, &BTreeMap::new());
        assert!(plan.text(false).contains("\n… and 2 more (--all)\n… and others after these"));
        assert!(!plan.text(true).contains("more (--all)"));
    }
}
