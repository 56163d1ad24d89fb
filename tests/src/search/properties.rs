//! What must hold in every state of the replication world.

use super::replication::{Replication, State, name};
use super::store::index_of;

/// An epoch begins once, at one process.
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

/// The first promise that is broken. Takes note of what is newly committed.
pub(super) fn broken(world: &Replication, state: &mut State) -> Option<String> {
    one_committed_log(world, state)
        .or_else(|| members_hold_it(world, state))
        .or_else(|| logs_match(world, state))
        .or_else(|| nobody_stops(world, state))
        .or_else(|| the_floor(world, state))
}

/// Whatever anybody knows committed is one log.
fn one_committed_log(world: &Replication, state: &mut State) -> Option<String> {
    for at in world.stores() {
        let face = world.face(state, at);
        let Some(own) = face.log.get(..face.commit) else {
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

/// Every member of the in-sync set can be named primary: so what is committed lies on its disk.
fn members_hold_it(world: &Replication, state: &State) -> Option<String> {
    let members = world.config(state).isr.iter().map(|&store| usize::from(index_of(store)));
    for at in members {
        if !world.face(state, at).durable.starts_with(&state.committed) {
            return Some(format!("{} is in sync and lacks what is committed", name(at)));
        }
    }
    None
}

/// Logs that agree on an epoch at a seq agree on the entry.
fn logs_match(world: &Replication, state: &State) -> Option<String> {
    for one in world.stores() {
        for other in one + 1..world.stores().end {
            let pairs = world.face(state, one).log.iter().zip(&world.face(state, other).log);
            let mut differing = pairs.filter(|(a, b)| a.0 == b.0 && a.1 != b.1);
            if let Some(((epoch, chain), _)) = differing.next() {
                let (one, other) = (name(one), name(other));
                return Some(format!("{one} and {other} differ in epoch {epoch} at {chain:x}"));
            }
        }
    }
    None
}

/// No disk here loses what it has fsynced: so no copy is ever found wanting.
fn nobody_stops(world: &Replication, state: &State) -> Option<String> {
    for at in world.stores() {
        let face = world.face(state, at);
        if let Some(why) = face.stopped {
            return Some(format!("{} stops: {why}", name(at)));
        }
        if face.short {
            return Some(format!("{} finds that a member has lost something", name(at)));
        }
    }
    None
}

fn the_floor(world: &Replication, state: &State) -> Option<String> {
    let config = world.config(state);
    if config.isr.len() < world.min_in_sync() {
        return Some("the in-sync set is below the floor".into());
    }
    (!config.isr.contains(&config.primary.store)).then(|| "the primary is not in sync".into())
}
