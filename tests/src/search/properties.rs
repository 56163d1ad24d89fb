//! The properties that must hold in every state of the replication world.

use engine::shard_record::ShardRecord;

use super::store::{StoreSummary, index_of, name};

/// The part of a state that the properties are about.
pub(super) struct ObservedState<'a> {
    /// The stores, in order.
    pub(super) stores: Vec<&'a StoreSummary>,
    /// The current record of the shard.
    pub(super) record: &'a ShardRecord,
    pub(super) min_in_sync: usize,
}

/// Entries known to be committed, by epoch and chain.
type CommittedLog = Vec<(u64, u64)>;

/// Checks that an epoch begins once, at one process.
pub(super) fn begins(begun: &mut Vec<(u64, u8, u8)>, leads: (u64, u8, u8)) -> Result<(), String> {
    if begun.contains(&leads) {
        return Ok(());
    }
    if let Some((epoch, store, boot)) = begun.iter().find(|known| known.0 == leads.0) {
        return Err(format!(
            "epoch {epoch} is led by two: {}#{boot} before",
            name((*store).into())
        ));
    }
    begun.push(leads);
    begun.sort();
    Ok(())
}

/// Returns the first broken promise. Adds newly committed entries to the log of those that are
/// known to be committed.
pub(super) fn broken(state: &ObservedState<'_>, committed: &mut CommittedLog) -> Option<String> {
    one_committed_log(state, committed)
        .or_else(|| members_hold_it(state, committed))
        .or_else(|| logs_match(state))
        .or_else(|| no_replica_stops(state))
        .or_else(|| min_in_sync_holds(state))
}

/// Checks that all entries known to be committed form one log.
fn one_committed_log(state: &ObservedState<'_>, committed: &mut CommittedLog) -> Option<String> {
    for (at, summary) in state.stores.iter().enumerate() {
        let Some(own) = summary.log.get(..summary.commit) else {
            return Some(format!("{} commits more than it holds", name(at)));
        };
        let both = own.len().min(committed.len());
        if own[..both] != committed[..both] {
            return Some(format!("{} commits another entry than was committed", name(at)));
        }
        if own.len() > both {
            *committed = own.to_vec();
        }
    }
    None
}

/// Checks that committed entries are on the disk of every member of the in-sync set, since each of
/// them can become primary.
fn members_hold_it(state: &ObservedState<'_>, committed: &CommittedLog) -> Option<String> {
    let members = state.record.isr.iter().map(|&store| usize::from(index_of(store)));
    for at in members {
        if !state.stores[at].durable.starts_with(committed) {
            return Some(format!("{} is in sync and lacks what is committed", name(at)));
        }
    }
    None
}

/// Checks that logs with the same epoch at a position have the same entry there.
fn logs_match(state: &ObservedState<'_>) -> Option<String> {
    let stores = &state.stores;
    for one in 0..stores.len() {
        for other in one + 1..stores.len() {
            let pairs = stores[one].log.iter().zip(&stores[other].log);
            let mut differing = pairs.filter(|(a, b)| a.0 == b.0 && a.1 != b.1);
            if let Some(((epoch, chain), _)) = differing.next() {
                let (one, other) = (name(one), name(other));
                return Some(format!("{one} and {other} differ in epoch {epoch} at {chain:x}"));
            }
        }
    }
    None
}

/// Checks that no replica stops or lacks acknowledged data, since no disk here loses fsynced data.
fn no_replica_stops(state: &ObservedState<'_>) -> Option<String> {
    for (at, summary) in state.stores.iter().enumerate() {
        if let Some(why) = summary.stopped {
            return Some(format!("{} stops: {why}", name(at)));
        }
        if summary.short {
            return Some(format!("{} reports that a member lost acknowledged data", name(at)));
        }
    }
    None
}

/// Checks that the in-sync set has `min_in_sync` members and contains the primary.
fn min_in_sync_holds(state: &ObservedState<'_>) -> Option<String> {
    let record = state.record;
    if record.isr.len() < state.min_in_sync {
        return Some("the in-sync set is smaller than min_in_sync".into());
    }
    (!record.isr.contains(&record.primary.store)).then(|| "the primary is not in sync".into())
}
