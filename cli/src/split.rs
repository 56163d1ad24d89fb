//! `dkc shards split SHARD`: splits a shard into two or more, while it serves.
//!
//! The command asks the shard's primary, which orders the split, and waits until etcd has the
//! records of both halves. Asking again is harmless, so an answer that is lost is no more than a
//! wait. A run that ends early prints the commands that go on: without --at the same command would
//! split what is split already. See docs/design.md#splitting-a-shard.

use std::time::Duration;

use anyhow::{Context, bail};
use engine::ids::{ShardId, Slots};
use engine::message::{NodeQuery, NodeQueryReply};
use engine::records::NodeRecord;
use engine::shard_record::ShardRecord;
use metastore::Metastore;
use process::ClusterOptions;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use crate::etcd::{cluster, connect};
use crate::exit::CommandExit;
use crate::output::{self, note};

/// The pause between two questions.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// The time-out of a query to a node.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Options of `dkc shards split`.
#[derive(Debug, clap::Args)]
pub(crate) struct Split {
    /// Id of the shard, as in `dkc status --all`
    shard: u16,
    /// First slot of the second half [default: the middle]
    #[arg(long, value_name = "SLOT", conflicts_with = "into")]
    at: Option<u16>,
    /// Number of equal parts
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        value_parser = clap::value_parser!(u16).range(2..=64)
    )]
    into: u16,
    /// Seconds to wait for each part
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    wait: u64,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The shards that a shard has become.
#[derive(Debug, Serialize)]
struct SplitReport {
    shards: Vec<ShardPart>,
}

#[derive(Debug, Serialize)]
struct ShardPart {
    shard: u16,
    first_slot: u16,
    last_slot: u16,
}

/// Splits the shard.
pub(crate) async fn run(args: Split) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let meta = cluster(&metastore, &args.etcd).await?;
    let shard = ShardId(args.shard);
    let Some(record) = metastore.get::<ShardRecord>(&shard).await? else {
        let why = format!("no shard {shard}: `dkc status --all` lists the shards");
        return CommandExit::usage(why);
    };
    let mut slots = record.record.slots;
    if let Some(at) = args.at
        && let Some(child) = metastore.get::<ShardRecord>(&ShardId(at)).await?
        && at > slots.lo
    {
        slots.hi = child.record.slots.hi;
        report_parts(&metastore, slots, args.json).await?;
        return Ok(CommandExit::Done);
    }
    let places = match args.at {
        Some(at) => vec![at],
        None => places(slots, args.into),
    };
    let count = usize::from(slots.hi - slots.lo) + 1;
    let inside = |&at: &u16| slots.lo < at && at <= slots.hi;
    if places.is_empty() || !places.iter().all(inside) {
        let why = format!(
            "shard {shard} has the {count} slots {} to {}: a part begins at a later one of these",
            slots.lo, slots.hi
        );
        return CommandExit::usage(why);
    }
    // From the right: the part that is left of a place keeps the name of the shard.
    let mut left: Vec<u16> = places;
    while let Some(&at) = left.last() {
        let until = Instant::now() + Duration::from_secs(args.wait);
        let (ordered, why) = match split_at(&metastore, meta.cluster, shard, at, until).await? {
            SplitOutcome::Done => {
                left.pop();
                continue;
            }
            SplitOutcome::Ordered => (true, "etcd does not have it yet, and it will come".into()),
            SplitOutcome::Refused(why) => (false, why),
        };
        note!("error: shard {shard} is not split at {at} yet: {why}. To go on, run");
        for at in left.iter().rev() {
            note!("  dkc shards split {shard} --at {at}");
        }
        report_parts(&metastore, slots, args.json).await?;
        return Ok(if ordered { CommandExit::Unknown } else { CommandExit::Failed });
    }
    report_parts(&metastore, slots, args.json).await?;
    Ok(CommandExit::Done)
}

/// Prints the shards that have these slots now.
async fn report_parts(metastore: &Metastore, slots: Slots, json: bool) -> anyhow::Result<()> {
    let parts = metastore.list::<ShardRecord>().await?.all;
    let within = parts.iter().map(|kept| kept.record.slots);
    let within = within.filter(|part| slots.lo <= part.lo && part.hi <= slots.hi);
    let part = |slots: Slots| ShardPart {
        shard: slots.shard().0,
        first_slot: slots.lo,
        last_slot: slots.hi,
    };
    let report = SplitReport { shards: within.map(part).collect() };
    output::report(json, &report, SplitReport::sentence)?;
    Ok(())
}

/// The first slots of all parts but the first.
fn places(slots: Slots, parts: u16) -> Vec<u16> {
    let count = u32::from(slots.hi - slots.lo) + 1;
    let place = |part: u32| u32::from(slots.lo) + part * count / u32::from(parts);
    let mut places: Vec<u16> = (1..u32::from(parts)).map(|part| place(part) as u16).collect();
    places.dedup();
    places.retain(|&at| at > slots.lo);
    places
}

/// The outcome of a split at one slot, once the time is over.
enum SplitOutcome {
    /// Etcd has both halves.
    Done,
    /// The primary has ordered it.
    Ordered,
    /// The primary has refused it, for this reason, or did not answer.
    Refused(String),
}

/// Asks until etcd has the shard that begins at this slot.
async fn split_at(
    metastore: &Metastore,
    cluster: u128,
    shard: ShardId,
    at: u16,
    until: Instant,
) -> anyhow::Result<SplitOutcome> {
    loop {
        let left = metastore.get::<ShardRecord>(&shard).await?.context("its record is gone")?;
        if metastore.get::<ShardRecord>(&ShardId(at)).await?.is_some() {
            return Ok(SplitOutcome::Done);
        }
        let asked = ask(metastore, cluster, &left.record, at).await;
        if Instant::now() >= until {
            return Ok(match asked {
                Ok(()) => SplitOutcome::Ordered,
                Err(why) => SplitOutcome::Refused(format!("{why:#}")),
            });
        }
        sleep(ASK_EVERY).await;
    }
}

/// Asks the primary of the record to split its shard.
async fn ask(
    metastore: &Metastore,
    cluster: u128,
    record: &ShardRecord,
    at: u16,
) -> anyhow::Result<()> {
    let primary = record.primary.store;
    let node = metastore.get::<NodeRecord>(&primary).await?.context("its primary does not run")?;
    let query = NodeQuery::Split { shard: record.shard(), epoch: record.epoch, at };
    let asked = storage_node::ask(cluster, &node.record.address, query);
    let reply = timeout(ANSWER_WITHIN, asked).await.context("its primary does not answer")?;
    match reply.map_err(anyhow::Error::msg)? {
        NodeQueryReply::Split { outcome, .. } => outcome.map_err(anyhow::Error::msg),
        other => bail!("an answer to another question: {other:?}"),
    }
}

impl SplitReport {
    fn sentence(&self) -> String {
        let part = |part: &ShardPart| {
            format!("shard {}: slots {} to {}", part.shard, part.first_slot, part.last_slot)
        };
        self.shards.iter().map(part).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_parts() {
        let check = |lo, hi, parts, want: &[u16]| {
            assert_eq!(places(Slots { lo, hi }, parts), want);
        };
        check(0, u16::MAX, 2, &[0x8000]);
        check(0, 99, 4, &[25, 50, 75]);
        check(10, 11, 2, &[11]);
        check(10, 10, 2, &[]);
        check(10, 12, 9, &[11, 12]);
    }
}
