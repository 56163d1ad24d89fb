//! `dkc events`: the latest events of the cluster, as coordinators have seen them.
//!
//! Every coordinator derives events from the records that it follows, and keeps the last ones in
//! its memory: nothing of this is in etcd. The leading one is asked, and others that the command
//! line names; an event that several have seen is printed once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use engine::ids::StoreId;
use engine::records::StoreRecord;
use metastore::{CoordinatorRecord, Metastore};
use process::ClusterOptions;
use proto::wire;
use serde::Serialize;
use telemetry::wall_clock_ms;

use crate::etcd::{cluster, connect};
use crate::exit::CommandExit;
use crate::output::{self, note};
use crate::{clock, coordinators};

/// The time-out of one query.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The pause between two queries of `--follow`.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// A query lasts less than a connection that has gone silent.
const PINGS: process::Pings =
    process::Pings { every: Duration::from_secs(2), timeout: Duration::from_secs(2) };

/// Options of `dkc events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show only events of the last 30s, 10m, 2h or 1d
    #[arg(long, value_name = "TIME", value_parser = duration)]
    since: Option<Duration>,
    /// Go on, and print each event as it happens
    #[arg(long)]
    follow: bool,
    /// Show only events of this shard
    #[arg(long, value_name = "N")]
    shard: Option<u32>,
    /// Show only events of this node: its name, or the uuid of its store
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Ask these coordinators, too: a standby may know older events than the leader
    #[arg(long, value_name = "HOST:PORT[,…]", value_delimiter = ',')]
    coordinators: Vec<String>,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON; with --follow, each event as one line
    #[arg(long)]
    json: bool,
}

/// All events, as in the JSON output.
#[derive(Debug, Default, Serialize)]
struct EventTable {
    coordinators: Vec<Witness>,
    /// The coordinators that did not answer, with the reasons: only they may know some events.
    unanswered: Vec<Unanswered>,
    events: Vec<EventRow>,
}

/// A coordinator that answered.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
struct Witness {
    coordinator: String,
    /// The time since which it knows all events.
    since_ms: u64,
    /// Older events were dropped for lack of room.
    cut: bool,
}

/// A coordinator that did not answer.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
struct Unanswered {
    coordinator: String,
    error: String,
}

/// One event.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
struct EventRow {
    time_ms: u64,
    event: String,
    shard: Option<u32>,
    node: Option<String>,
    uuid: Option<String>,
    /// The former primary, or the node whose place a planned copy takes.
    other: Option<String>,
    other_uuid: Option<String>,
    reason: Option<String>,
    epoch: Option<u64>,
    count: Option<u64>,
    by: Option<String>,
    /// The revision in etcd; 0 if the event comes from no record.
    revision: u64,
}

/// Prints the events.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    let metastore = connect(&args.etcd).await?;
    let meta = cluster(&metastore, &args.etcd).await?;
    let mut query = EventQuery::new(metastore, meta.cluster, &args);
    let table = match query.ask().await {
        Ok(table) => table,
        Err(why) => {
            note!("error: {why:#}");
            return Ok(CommandExit::Failed);
        }
    };
    for Unanswered { error, .. } in &table.unanswered {
        note!("warning: {error}: what only this coordinator has seen is missing");
    }
    if let Some(node) = &args.node
        && table.events.is_empty()
        && !query.is_known(node).await?
    {
        note!("warning: no node has the name or uuid {node:?}: `dkc node list` shows all");
    }
    if !args.follow {
        output::report(args.json, &table, |table| table.text(wall_clock_ms()))?;
        return Ok(CommandExit::Done);
    }
    if !args.json && !output::still_read(&table.headline(wall_clock_ms()))? {
        return Ok(CommandExit::Done);
    }
    let mut known = table.coordinators;
    let mut events = table.events;
    loop {
        for event in &events {
            let line =
                if args.json { serde_json::to_string(event)? } else { event.line(wall_clock_ms()) };
            if !output::still_read(&line)? {
                return Ok(CommandExit::Done);
            }
        }
        tokio::time::sleep(POLL_INTERVAL).await;
        match query.ask().await {
            Ok(table) => {
                for new in table.coordinators.iter().filter(|it| !known.contains(it)) {
                    note!("{}", new.sentence(wall_clock_ms()));
                }
                (known, events) = (table.coordinators, table.events);
            }
            // A new leader is elected within seconds, and has followed the records meanwhile.
            Err(_) => events = Vec::new(),
        }
    }
}

/// The query, and what its replies have shown so far.
struct EventQuery<'a> {
    metastore: Metastore,
    cluster: u128,
    args: &'a Args,
    names: BTreeMap<StoreId, String>,
    /// The last reply of each address.
    seen: BTreeMap<String, SeenReply>,
    /// The identities of the events that were returned.
    returned: BTreeSet<EventIdentity>,
}

/// The parts of a reply that matter for the next one.
#[derive(Clone, Debug)]
struct SeenReply {
    instance: u64,
    /// The number of the last event.
    last: u64,
    witness: Witness,
}

/// The revision, kind, shard and node of an event; or, if it comes from no record, the instance
/// and the number instead of the revision.
type EventIdentity = (u64, u64, String, Option<u32>, Option<StoreId>);

impl<'a> EventQuery<'a> {
    fn new(metastore: Metastore, cluster: u128, args: &'a Args) -> Self {
        let (names, seen, returned) = Default::default();
        Self { metastore, cluster, args, names, seen, returned }
    }

    /// Asks the coordinators for the events that were not returned yet. The leader comes first: it
    /// knows more reasons.
    async fn ask(&mut self) -> anyhow::Result<EventTable> {
        let leader = self.metastore.get::<CoordinatorRecord>(&()).await?;
        let mut addresses: Vec<String> =
            leader.into_iter().map(|leader| leader.record.address).collect();
        for other in &self.args.coordinators {
            if !addresses.contains(other) {
                addresses.push(other.clone());
            }
        }
        anyhow::ensure!(
            !addresses.is_empty(),
            "no coordinator is leader: start one, or name a standby with --coordinators"
        );
        let mut replies = Vec::new();
        let mut unanswered = Vec::new();
        for coordinator in addresses {
            match self.reply_of(&coordinator).await {
                Ok(reply) => replies.push((coordinator, reply)),
                Err(why) => unanswered.push(Unanswered { coordinator, error: format!("{why:#}") }),
            }
        }
        if let ([], [.., last]) = (&replies[..], &unanswered[..]) {
            anyhow::bail!("{}", last.error);
        }
        self.learn_names(&replies).await?;
        Ok(EventTable { unanswered, ..self.merge(replies) })
    }

    /// Returns whether a store has this name or uuid.
    async fn is_known(&self, node: &str) -> Result<bool, metastore::Error> {
        let stores = self.metastore.list::<StoreRecord>().await?.all;
        Ok(stores.iter().any(|kept| kept.record.name == node || kept.id.to_string() == node))
    }

    async fn reply_of(&self, address: &str) -> anyhow::Result<wire::EventsReply> {
        let seen = self.seen.get(address).map(|seen| (seen.instance, seen.last));
        let query = wire::EventsQuery::new(self.cluster, seen);
        coordinators::ask(address, ANSWER_WITHIN, PINGS, async |client| client.events(query).await)
            .await
    }

    /// Reads the names of stores if a reply contains an unknown one.
    async fn learn_names(
        &mut self,
        replies: &[(String, wire::EventsReply)],
    ) -> Result<(), metastore::Error> {
        let events = replies.iter().flat_map(|(_, reply)| &reply.events);
        let mut stores = events.flat_map(|event| [event.node, event.other]).flatten();
        if stores.any(|store| !self.names.contains_key(&StoreId::from(store))) {
            let stores = self.metastore.list::<StoreRecord>().await?.all;
            self.names = stores.into_iter().map(|kept| (kept.id, kept.record.name)).collect();
        }
        Ok(())
    }

    fn merge(&mut self, replies: Vec<(String, wire::EventsReply)>) -> EventTable {
        let mut table = EventTable::default();
        let earliest = self.args.since.map_or(0, |since| wall_clock_ms().saturating_sub(ms(since)));
        for (address, reply) in replies {
            let seen = self.seen.remove(&address).filter(|seen| seen.instance == reply.instance);
            let seen = SeenReply::new(seen, &reply);
            table.coordinators.push(seen.witness.clone());
            self.seen.insert(address, seen);
            for event in reply.events {
                if self.returned.insert(identity(&event, reply.instance)) {
                    table.events.push(self.row(event));
                }
            }
        }
        table.events.retain(|event| event.time_ms >= earliest && self.is_wanted(event));
        // Each reply is in order, and so are events of one moment.
        table.events.sort_by_key(|event| event.time_ms);
        table
    }

    fn row(&self, event: wire::ClusterEvent) -> EventRow {
        let uuid =
            |store: Option<wire::StoreId>| store.map(|store| StoreId::from(store).to_string());
        let name = |store: Option<wire::StoreId>| {
            let store = StoreId::from(store?);
            Some(self.names.get(&store).cloned().unwrap_or_else(|| store.to_string()))
        };
        EventRow {
            time_ms: event.at_ms,
            event: event.kind,
            shard: event.shard,
            node: name(event.node),
            uuid: uuid(event.node),
            other: name(event.other),
            other_uuid: uuid(event.other),
            reason: event.reason,
            epoch: event.epoch,
            count: event.count,
            by: event.by,
            revision: event.revision,
        }
    }

    fn is_wanted(&self, event: &EventRow) -> bool {
        let names = [&event.node, &event.uuid, &event.other, &event.other_uuid];
        let of_node = |node: &String| names.contains(&&Some(node.clone()));
        self.args.node.as_ref().is_none_or(of_node)
            && self.args.shard.is_none_or(|shard| event.shard == Some(shard))
    }
}

impl SeenReply {
    /// The facts of a reply that follows `before`, if the process is the same.
    fn new(before: Option<Self>, reply: &wire::EventsReply) -> Self {
        let last = reply.events.last().map(|event| event.number);
        let last = last.or(before.as_ref().map(|before| before.last)).unwrap_or(0);
        let witness = before.map(|before| before.witness).unwrap_or_else(|| {
            // Events that were dropped are older than the oldest one.
            let oldest = reply.events.first().filter(|_| reply.cut).map(|event| event.at_ms);
            Witness {
                coordinator: reply.coordinator.clone(),
                since_ms: oldest.unwrap_or(reply.since_ms),
                cut: reply.cut,
            }
        });
        Self { instance: reply.instance, last, witness }
    }
}

fn identity(event: &wire::ClusterEvent, instance: u64) -> EventIdentity {
    let (origin, number) = match event.revision {
        0 => (instance, event.number),
        revision => (0, revision),
    };
    (origin, number, event.kind.clone(), event.shard, event.node.map(StoreId::from))
}

impl EventTable {
    fn text(&self, now_ms: u64) -> String {
        let lines = self.events.iter().map(|event| event.line(now_ms));
        std::iter::once(self.headline(now_ms)).chain(lines).collect::<Vec<_>>().join("\n")
    }

    fn headline(&self, now_ms: u64) -> String {
        let each = self.coordinators.iter().map(|it| it.sentence(now_ms));
        each.collect::<Vec<_>>().join("\n")
    }
}

impl Witness {
    fn sentence(&self, now_ms: u64) -> String {
        let Self { coordinator, since_ms, cut } = self;
        let since = clock::moment(*since_ms, now_ms);
        match cut {
            false => format!("since {since}, when {coordinator} started"),
            true => format!("since {since}: {coordinator} has dropped older events"),
        }
    }
}

impl EventRow {
    /// The event as one line: time, event, shard, node, reason, and what else is known.
    fn line(&self, now_ms: u64) -> String {
        let shard = self.shard.map_or_else(|| "-".to_owned(), |shard| shard.to_string());
        let node = self.node.as_deref().unwrap_or("-");
        let reason = self.reason.as_deref().unwrap_or("-");
        let mut more = Vec::new();
        if let Some(other) = &self.other {
            let word = if self.event == "primary" { "after" } else { "instead of" };
            more.push(format!("{word} {other}"));
        }
        more.extend(self.epoch.map(|epoch| format!("epoch {epoch}")));
        more.extend(self.count.map(|count| format!("count {count}")));
        more.extend(self.by.as_ref().map(|by| format!("by {by}")));
        let line = format!(
            "{}  {:<17}  {shard:>5}  {node:<12}  {reason:<16}  {}",
            clock::moment(self.time_ms, now_ms),
            self.event,
            more.join(", ")
        );
        line.trim_end().to_owned()
    }
}

/// Parses `30s`, `10m`, `2h` or `1d`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?}: expected a number and a unit, such as 30s, 10m, 2h or 1d");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let number: u32 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        let seconds = |text| duration(text).map(|it| it.as_secs()).ok();
        assert_eq!(["30s", "10m", "2h", "1d"].map(seconds), [30, 600, 7_200, 86_400].map(Some));
        assert_eq!(["", "10", "m", "-1m", "1.5h", "10min", "5µ"].map(seconds), [None; 7]);
    }

    fn row(event: &str) -> EventRow {
        EventRow {
            time_ms: 43_384_000,
            event: event.into(),
            shard: None,
            node: None,
            uuid: None,
            other: None,
            other_uuid: None,
            reason: None,
            epoch: None,
            count: None,
            by: None,
            revision: 1,
        }
    }

    #[test]
    fn each_event_is_one_line() {
        let primary = EventRow {
            shard: Some(2730),
            node: Some("node-2".into()),
            other: Some("node-1".into()),
            reason: Some("refused".into()),
            epoch: Some(5),
            ..row("primary")
        };
        let planned = EventRow { reason: Some("balance".into()), ..primary.clone() };
        let planned = EventRow { event: "copy-planned".into(), epoch: None, ..planned };
        let elected = EventRow { by: Some("coordinator-1".into()), ..row("leader-elected") };
        let held = EventRow { count: Some(2), ..row("guard-held") };
        let witness = |cut| Witness { coordinator: "coordinator-1".into(), since_ms: 0, cut };
        let events = vec![elected, held, primary, planned];
        let table =
            EventTable { coordinators: vec![witness(false)], events, ..EventTable::default() };
        let want = "\
since 00:00:00, when coordinator-1 started
12:03:04  leader-elected         -  -             -                 by coordinator-1
12:03:04  guard-held             -  -             -                 count 2
12:03:04  primary             2730  node-2        refused           after node-1, epoch 5
12:03:04  copy-planned        2730  node-2        balance           instead of node-1";
        assert_eq!(table.text(43_384_000), want);
        assert!(witness(true).sentence(0).ends_with("coordinator-1 has dropped older events"));
    }

    #[test]
    fn an_event_of_two_coordinators_is_one() {
        let event = wire::ClusterEvent {
            number: 3,
            revision: 50,
            kind: "in-sync".into(),
            shard: Some(7),
            node: Some(StoreId(1).into()),
            ..wire::ClusterEvent::default()
        };
        let seen_later = wire::ClusterEvent { number: 9, at_ms: 5, ..event.clone() };
        assert_eq!(identity(&event, 1), identity(&seen_later, 2));
        let other = wire::ClusterEvent { shard: Some(8), ..event.clone() };
        assert_ne!(identity(&event, 1), identity(&other, 1));
        let unrecorded = wire::ClusterEvent { revision: 0, ..event };
        assert_ne!(identity(&unrecorded, 1), identity(&unrecorded, 2));
    }
}
