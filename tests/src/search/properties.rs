//! The properties that must hold in every state of the replication world.

use super::replication::{Replication, ReplicationState, name};
use super::store::index_of;

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

/// Returns the first broken promise. Records newly committed entries in the state.
pub(super) fn broken(world: &Replication, state: &mut ReplicationState) -> Option<String> {
    one_committed_log(world, state)
        .or_else(|| members_hold_it(world, state))
        .or_else(|| logs_match(world, state))
        .or_else(|| no_replica_stops(world, state))
        .or_else(|| min_in_sync_holds(world, state))
}

/// Checks that all entries known to be committed form one log.
fn one_committed_log(world: &Replication, state: &mut ReplicationState) -> Option<String> {
    for at in world.stores() {
        let summary = world.summary(state, at);
        let Some(own) = summary.log.get(..summary.commit) else {
            return Some(format!("{} commits more than it holds", name(at)));
        };
        let both = own.len().min(state.committed.len());
        if own[..both] != state.committed[..both] {
            return Some(format!("{} commits another entry than was committed", name(at)));
        }
        if own.len() > both {
            state.committed = own.to_vec();
        }
    }
    None
}

/// Checks that committed entries are on the disk of every member of the in-sync set, since each of
/// them can become primary.
fn members_hold_it(world: &Replication, state: &ReplicationState) -> Option<String> {
    let members = world.record(state).isr.iter().map(|&store| usize::from(index_of(store)));
    for at in members {
        if !world.summary(state, at).durable.starts_with(&state.committed) {
            return Some(format!("{} is in sync and lacks what is committed", name(at)));
        }
    }
    None
}

/// Checks that logs with the same epoch at a position have the same entry there.
fn logs_match(world: &Replication, state: &ReplicationState) -> Option<String> {
    for one in world.stores() {
        for other in one + 1..world.stores().end {
            let pairs = world.summary(state, one).log.iter().zip(&world.summary(state, other).log);
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
fn no_replica_stops(world: &Replication, state: &ReplicationState) -> Option<String> {
    for at in world.stores() {
        let summary = world.summary(state, at);
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
fn min_in_sync_holds(world: &Replication, state: &ReplicationState) -> Option<String> {
    let record = world.record(state);
    if record.isr.len() < world.min_in_sync() {
        return Some("the in-sync set is smaller than min_in_sync".into());
    }
    (!record.isr.contains(&record.primary.store)).then(|| "the primary is not in sync".into())
}
