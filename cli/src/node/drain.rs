//! `dkc node drain NODE`: moves all shards off a node, so that it can be shut down; `dkc node
//! undrain NODE` cancels that.
//!
//! The command writes a drain intent to etcd and waits until the node is empty: the leading
//! coordinator moves the node's primaries and then its copies, each only once its replacement is in
//! sync. The intent stays in etcd when this command ends, until it is cancelled or the node is
//! removed. Progress is counted from the map of shards, by which the coordinator plans, too.

use std::time::{Duration, Instant};

use anyhow::bail;
use engine::coordinator::planner::{DrainObstacle, drain_obstacle};
use engine::ids::StoreId;
use engine::records::StoreRecord;
use engine::shard_record::ShardRecord;
use metastore::{CasOutcome, DrainIntent, Metastore, Revisioned};
use process::ClusterOptions;
use serde::Serialize;

use super::{NodeRecords, StoreHoldings, holdings, replicas};
use crate::etcd::connect;
use crate::exit::{CommandExit, UnknownOutcome};
use crate::output::{self, note};

/// The pause between two reads of the shards' records.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Options of `dkc node drain`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the node, or uuid of its store
    node: String,
    /// Drain although too few nodes are left, so that copies without a place move once a node
    /// joins, or too few zones, so that two copies of a shard share one; and wait on when the moves
    /// have stalled
    #[arg(long)]
    wait: bool,
    /// Return at once instead of when the node is empty
    #[arg(long)]
    detach: bool,
    /// Seconds without progress after which the command reports that the moves have stalled, and
    /// ends with 3
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    stalled_after: u64,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// Options of `dkc node undrain`.
#[derive(Debug, clap::Args)]
pub(super) struct UndrainArgs {
    /// Name of the node, or uuid of its store
    node: String,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The result of the commands.
#[derive(Debug, Serialize)]
struct DrainReport {
    node: String,
    uuid: String,
    draining: bool,
    /// The number of shards that the node leads.
    leads: usize,
    /// The number of copies that the node holds.
    copies: usize,
    /// Nothing has moved for `--stalled-after`.
    stalled: bool,
}

/// Starts a drain, and prints the state of the node.
pub(super) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let records = NodeRecords::read(&metastore).await?;
    let store = records.named(&args.node)?;
    let node = DrainTarget::new(metastore, store);
    if !args.wait
        && let Some(why) = node.obstacle(&records).await?
    {
        note!("error: {}: {why}. Nothing was changed: --wait drains it all the same", node.name);
        return Ok(CommandExit::Failed);
    }
    node.drain().await?;
    let stalled = match args.detach {
        true => false,
        false => node.until_empty(Duration::from_secs(args.stalled_after), args.wait).await?,
    };
    let StoreHoldings { leads, copies, .. } = node.holds().await?;
    let uuid = node.store.to_string();
    let report = DrainReport { node: node.name, uuid, draining: true, leads, copies, stalled };
    output::report(args.json, &report, DrainReport::sentence)?;
    Ok(if stalled { CommandExit::Unknown } else { CommandExit::Done })
}

/// The time without progress after which [`empty`] gives up.
const STALLED_AFTER: Duration = Duration::from_secs(60);

/// Drains a node, and waits until it is empty. Otherwise the result is the exit code and the
/// reason, for people; the drain goes on if it had begun.
pub(crate) async fn empty(
    metastore: Metastore,
    records: &NodeRecords,
    store: &Revisioned<StoreRecord>,
) -> anyhow::Result<Result<(), (CommandExit, String)>> {
    let node = DrainTarget::new(metastore, store);
    if let Some(why) = node.obstacle(records).await? {
        return Ok(Err((CommandExit::Failed, format!("{why}. Nothing was changed"))));
    }
    node.drain().await?;
    if node.until_empty(STALLED_AFTER, false).await? {
        let why =
            "the drain has stalled and goes on when it can; `dkc plan` shows what it waits for";
        return Ok(Err((CommandExit::Unknown, why.to_owned())));
    }
    Ok(Ok(()))
}

/// Cancels a drain, and prints the state of the node.
pub(super) async fn undo(args: UndrainArgs) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let records = NodeRecords::read(&metastore).await?;
    let store = records.named(&args.node)?;
    let node = DrainTarget::new(metastore, store);
    node.undo().await?;
    let StoreHoldings { leads, copies, .. } = records.holds(node.store);
    let uuid = node.store.to_string();
    let (name, stalled) = (node.name, false);
    let report = DrainReport { node: name, uuid, draining: false, leads, copies, stalled };
    output::report(args.json, &report, DrainReport::sentence)?;
    Ok(CommandExit::Done)
}

impl DrainReport {
    fn sentence(&self) -> String {
        let Self { node, leads, copies, .. } = self;
        let rest = format!("it leads {leads} shards and holds {copies} copies");
        match (self.draining, copies) {
            (false, _) => format!("{node} is no longer draining: it may hold shards again"),
            (true, 0) => format!("{node} is empty: it can be shut down"),
            (true, _) if self.stalled => format!(
                "{node}: the drain has stalled and goes on when it can: {rest}; `dkc plan` shows \
                 what it waits for"
            ),
            (true, _) => format!("{node} is draining: {rest}"),
        }
    }
}

/// The node to drain.
struct DrainTarget {
    metastore: Metastore,
    store: StoreId,
    name: String,
}

impl DrainTarget {
    fn new(metastore: Metastore, store: &Revisioned<StoreRecord>) -> Self {
        Self { metastore, store: store.id, name: store.record.name.clone() }
    }

    /// Writes the intent. An intent that exists already stays as it is.
    async fn drain(&self) -> anyhow::Result<()> {
        match self.metastore.create(&self.store, &DrainIntent).await? {
            CasOutcome::Done { .. } | CasOutcome::Failed => Ok(()),
            CasOutcome::Unknown => Err(UnknownOutcome.into()),
        }
    }

    async fn undo(&self) -> anyhow::Result<()> {
        let Some(intent) = self.metastore.get::<DrainIntent>(&self.store).await? else {
            return Ok(());
        };
        let gone = self.metastore.delete::<DrainIntent>(&self.store, intent.modified).await?;
        match gone {
            CasOutcome::Done { .. } => Ok(()),
            CasOutcome::Failed => {
                bail!("the intent was changed concurrently: run the command again")
            }
            CasOutcome::Unknown => Err(UnknownOutcome.into()),
        }
    }

    /// Waits until the node is empty. Returns true if nothing has moved for `stalled_after`, unless
    /// `wait` asks to wait on.
    async fn until_empty(&self, stalled_after: Duration, wait: bool) -> anyhow::Result<bool> {
        let mut progress: Option<DrainProgress> = None;
        loop {
            let held = self.holds().await?;
            if held.copies == 0 {
                return Ok(false);
            }
            let now = Instant::now();
            let known = progress.get_or_insert_with(|| DrainProgress::new(held, now));
            if known.take(held, now) {
                note!("{}: {}", self.name, known.line(now));
            }
            if known.has_stalled(now, stalled_after) {
                if !wait {
                    return Ok(true);
                }
                note!("{}: nothing has moved for {} s", self.name, stalled_after.as_secs());
                known.moved_at = now;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn holds(&self) -> anyhow::Result<StoreHoldings> {
        let shards = self.metastore.list::<ShardRecord>().await?.all;
        let shards: Vec<ShardRecord> = shards.into_iter().map(|kept| kept.record).collect();
        Ok(holdings(&shards, self.store))
    }

    /// Returns why the node can't be emptied with the nodes that there are now, or only at the cost
    /// of a zone.
    async fn obstacle(&self, records: &NodeRecords) -> anyhow::Result<Option<DrainObstacle>> {
        let Some(replicas) = replicas(&self.metastore).await? else { return Ok(None) };
        let (stores, shards) = (records.planner_stores(), records.shards.iter());
        Ok(drain_obstacle(&stores, shards, self.store, replicas))
    }
}

/// The progress since the command began, counted from the map.
#[derive(Debug)]
struct DrainProgress {
    began: Instant,
    /// The copies at the beginning.
    first: usize,
    held: StoreHoldings,
    /// The time of the last change.
    moved_at: Instant,
    reported: bool,
}

impl DrainProgress {
    fn new(held: StoreHoldings, now: Instant) -> Self {
        Self { began: now, first: held.copies, held, moved_at: now, reported: false }
    }

    /// Takes what the node holds now. Returns whether that is to be reported.
    fn take(&mut self, held: StoreHoldings, now: Instant) -> bool {
        let news = held != self.held || !self.reported;
        if held != self.held {
            self.moved_at = now;
        }
        (self.held, self.reported) = (held, true);
        self.first = self.first.max(held.copies);
        news
    }

    fn has_stalled(&self, now: Instant, after: Duration) -> bool {
        now.duration_since(self.moved_at) >= after
    }

    fn line(&self, now: Instant) -> String {
        let StoreHoldings { leads, copies, .. } = self.held;
        let (moved, seconds) = (self.first - copies, now.duration_since(self.began).as_secs());
        let rest = format!("leads {leads}, holds {copies}");
        // The average of all moves so far, which take turns in the limits on moves.
        match (seconds * copies as u64).checked_div(moved as u64) {
            None => rest,
            Some(left) => {
                format!("{rest}; moved {moved} of {} in {seconds} s, {left} s left", self.first)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_counted_from_the_map() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let held = |leads, copies| StoreHoldings { leads, copies, in_sync: copies };
        let mut progress = DrainProgress::new(held(2, 8), began);
        assert!(progress.take(held(2, 8), began), "the first state is reported");
        assert_eq!(progress.line(began), "leads 2, holds 8");
        assert!(!progress.take(held(2, 8), at(5)));
        assert!(progress.take(held(0, 8), at(10)), "a primary that moves is progress, too");
        assert!(progress.take(held(0, 6), at(20)));
        assert_eq!(progress.line(at(20)), "leads 0, holds 6; moved 2 of 8 in 20 s, 60 s left");
        let minute = Duration::from_secs(60);
        assert!(!progress.has_stalled(at(79), minute));
        assert!(progress.has_stalled(at(80), minute));
        progress.take(held(0, 5), at(81));
        assert!(!progress.has_stalled(at(100), minute));
    }
}
