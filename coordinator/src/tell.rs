//! The machine's story as log lines: who, which shards, why, how long.
//!
//! A failover is one sentence per node and successor, not one per shard: a person reads this at night.

use std::time::Duration;

use engine::coordinator::Story;
use engine::coordinator::story::{Cause, Need};
use engine::ids::{Seq, ShardId, StoreBoot, StoreId};
use engine::records::LossRecord;
use tracing::{debug, error, info, warn};

use crate::book::Book;
use crate::metrics::Gauges;

/// Promotions that are told together.
struct Failover {
    from: StoreBoot,
    to: StoreBoot,
    why: Need,
    shards: Vec<ShardId>,
    took_ms: u64,
}

/// Logs and counts what happened in one turn.
pub(crate) fn tell(stories: Vec<Story>, book: &Book, gauges: &Gauges) {
    let mut failovers: Vec<Failover> = Vec::new();
    for story in stories {
        match story {
            Story::Promoted { shard, epoch, from, to, why, last, took_ms } => {
                gauges.promotions.inc();
                gauges.promotion_seconds.observe(Duration::from_millis(took_ms).as_secs_f64());
                debug!(%shard, epoch = epoch.0, last_epoch = last.0.0, last_seq = last.1.0, took_ms, "promoted");
                let alike = |one: &&mut Failover| (one.from, one.to, one.why) == (from, to, why);
                match failovers.iter_mut().find(alike) {
                    Some(failover) => {
                        failover.shards.push(shard);
                        failover.took_ms = failover.took_ms.max(took_ms);
                    }
                    None => {
                        failovers.push(Failover { from, to, why, shards: vec![shard], took_ms })
                    }
                }
            }
            other => tell_one(&other, book, gauges),
        }
    }
    for failover in failovers {
        let Failover { from, to, why, shards, took_ms } = failover;
        let (from, to) = (process(book, from), process(book, to));
        let why = need(why);
        info!(from, to, why, shards = listed(&shards), count = shards.len(), took_ms, "promoted");
    }
}

fn tell_one(story: &Story, book: &Book, gauges: &Gauges) {
    let name = |store: &StoreId| book.name(*store);
    match story {
        Story::TookOffice { term, stores, shards } => {
            info!(term, stores, shards, "took office, and knows what etcd holds");
        }
        Story::Waits(waits) => info!("placing waits: {waits}"),
        Story::Placed { shards } => info!(shards, "placed"),
        Story::Died { process: who, why } if *why == Cause::Leaving => {
            gauges.died(*why);
            info!(node = process(book, *who), "node is about to end: it is done without");
        }
        Story::Died { process: who, why } => {
            gauges.died(*why);
            warn!(node = process(book, *who), why = found(*why), "node is dead");
        }
        Story::Returned { process: who } => info!(node = process(book, *who), "node is back"),
        Story::Leaderless { shard, why } => warn!(%shard, why, "nobody can be promoted for now"),
        Story::LossAccepted(loss) => {
            gauges.promotions.inc();
            gauges.losses.inc();
            tell_loss(loss, book);
        }
        Story::Removed { store, shards } => {
            info!(node = name(store), shards, "left the in-sync sets");
        }
        Story::Recruited { shard, store, instead: None } => {
            info!(%shard, node = name(store), "recruited a learner");
        }
        Story::Recruited { shard, store, instead: Some(instead) } => {
            info!(%shard, node = name(store), instead = name(instead), "recruited a learner");
        }
        Story::Released { shard, store } => info!(%shard, node = name(store), "released"),
        Story::Lost { store, to } => {
            let node = name(store);
            warn!(node, %store, %to, "a store is given up: another one has its name and gets its places");
        }
        Story::Draining { store } => {
            info!(node = name(store), "drains: its shards are led elsewhere, its copies move");
        }
        Story::Undrained { store } => info!(node = name(store), "drains no more"),
        Story::Cleared { store } => {
            info!(node = name(store), "no longer suspect: its copies are new")
        }
        Story::Guarded { away, of } => {
            warn!(away, of, "many nodes vanished at once: no new copies are made for now");
        }
        Story::Unguarded => info!("new copies are made again"),
        // Told together, by the caller.
        Story::Promoted { .. } => {}
    }
}

fn process(book: &Book, process: StoreBoot) -> String {
    format!("{} (boot {})", book.name(process.store), process.boot.0)
}

fn need(need: Need) -> &'static str {
    match need {
        Need::Dead(why) => found(why),
        Need::Restarted => "its process was started again",
        Need::Gone => "its store was given up",
        Need::Resigned => "it asked to be replaced: it hears neither peers nor etcd",
        Need::CutOff => "it is frozen, and another member hears more of the cluster",
        Need::HandedOver => "it has handed over",
    }
}

/// A loss is logged with all that its record in etcd says: an operator looks for these copies.
fn tell_loss(loss: &LossRecord, book: &Book) {
    let given_up = |(store, last): &(StoreId, Option<Seq>)| {
        let known = match last {
            Some(seq) => format!("known to hold all up to {}", seq.0),
            None => "nothing is known of it".to_owned(),
        };
        format!("{} (store {store}, {known})", book.name(*store))
    };
    let given_up: Vec<String> = loss.given_up.iter().map(given_up).collect();
    let by = loss.accepted_by.as_ref().map(|operator| operator.name.as_str());
    error!(
        shard = %loss.shard,
        epoch = loss.epoch.0,
        primary = process(book, loss.primary),
        log_ends_at = loss.last.1.0,
        given_up = given_up.join(", "),
        accepted_by = by.unwrap_or("none: every trusted member has answered, all their copies are damaged"),
        "a shard is led with a loss: what this copy lacks is given up"
    );
}

/// What a probe found, in words; metrics have it in one.
fn found(cause: Cause) -> &'static str {
    match cause {
        Cause::Refused => "its address refuses connections",
        Cause::Replaced => "another process answers at its address",
        Cause::Silent => "it does not answer",
        Cause::DiskStalled => "its disk has stalled",
        Cause::Leaving => "it is stopping",
    }
}

/// The first few, and how many more.
fn listed(shards: &[ShardId]) -> String {
    const MOST: usize = 12;
    let named: Vec<String> = shards.iter().take(MOST).map(ShardId::to_string).collect();
    match shards.len().saturating_sub(MOST) {
        0 => named.join(","),
        more => format!("{} and {more} more", named.join(",")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        let shards: Vec<ShardId> = (0..14).map(ShardId).collect();
        assert_eq!(listed(&shards[..2]), "0,1");
        assert_eq!(listed(&shards), "0,1,2,3,4,5,6,7,8,9,10,11 and 2 more");
    }
}
