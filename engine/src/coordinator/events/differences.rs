//! The events that a difference of two states of one record shows.

use crate::coordinator::events::{EventFacts, EventKind, EventReason};
use crate::ids::{Boot, StoreBoot, StoreId};
use crate::records::{StoreRecord, StoreStatus};
use crate::shard_record::ShardRecord;

/// The knowledge of stores that a shard's record lacks.
pub(super) trait StoreFacts {
    /// The status of a store; `None` if its record is not known.
    fn status(&self, store: StoreId) -> Option<StoreStatus>;
    /// The boot of the process that is registered.
    fn registered(&self, store: StoreId) -> Option<Boot>;
    /// The finding of the leader's probes, if this process leads and the store counts as dead.
    fn death(&self, store: StoreId) -> Option<EventReason>;
}

/// The events of a change of a shard's record. A first record gives none: the caller counts those.
pub(super) fn shard_events(
    before: &ShardRecord,
    after: &ShardRecord,
    stores: &impl StoreFacts,
) -> Vec<EventFacts> {
    let mut events = Vec::new();
    if after.slots.hi < before.slots.hi {
        events.push(split(after));
    }
    if after.epoch > before.epoch {
        if is_loss(before, after) {
            events.push(loss(after));
        }
        events.push(EventFacts {
            node: Some(after.primary.store),
            other: Some(before.primary.store),
            epoch: Some(after.epoch),
            reason: Some(why_promoted(before, after, stores)),
            shard: Some(after.shard()),
            ..EventFacts::new(EventKind::PrimaryChanged)
        });
    }
    let shard = after.shard();
    let mut copy =
        |kind, store, reason| events.push(EventFacts::of_copy(kind, shard, store, reason));
    for store in added(&before.tainted, &after.tainted) {
        copy(EventKind::Tainted, store, None);
    }
    for store in added(&before.learners, &after.learners) {
        let returns = before.target.contains(&store).then_some(EventReason::Returned);
        copy(EventKind::LearnerAdded, store, returns);
    }
    for store in added(&before.isr, &after.isr) {
        copy(EventKind::InSync, store, None);
    }
    for store in added(&after.tainted, &before.tainted) {
        if after.isr.contains(&store) {
            copy(EventKind::InSync, store, Some(EventReason::Refilled));
        }
    }
    for store in added(&after.isr, &before.isr) {
        if after.mentions(store) {
            let reason = why_away(store, stores).unwrap_or(EventReason::NotAcknowledging);
            copy(EventKind::OutOfSync, store, Some(reason));
        }
    }
    for store in before.mentioned().into_iter().filter(|&store| !after.mentions(store)) {
        copy(EventKind::CopyRemoved, store, Some(why_removed(before, store, stores)));
    }
    let planned = planned_copies(before, after, stores);
    // A copy is planned, then added, then in sync.
    planned.into_iter().chain(events).collect()
}

/// The events of a change of a store's record.
pub(super) fn store_events(
    store: StoreId,
    before: &StoreRecord,
    after: &StoreRecord,
) -> Option<EventFacts> {
    use StoreStatus::{Active, Draining, Lost, LostSuspect, Retired, Suspect};
    let (kind, reason) = match (before.status, after.status) {
        (before, after) if before == after => return None,
        (_, Retired) => (EventKind::NodeRemoved, Some(EventReason::Operator)),
        (_, Lost | LostSuspect) => (EventKind::NodeLost, Some(EventReason::NameTaken)),
        (_, Draining) => (EventKind::NodeDraining, Some(EventReason::Operator)),
        (_, Suspect) => (EventKind::NodeSuspect, None),
        (Draining, Active) => (EventKind::NodeUndrained, Some(EventReason::Operator)),
        (Suspect, Active) => (EventKind::NodeTrusted, None),
        // A start takes a store back that was given up: its registration is the event.
        (Active | Lost | LostSuspect | Retired, Active) => return None,
    };
    Some(EventFacts::of_node(kind, store, reason))
}

/// The event of a registration. `last` is the boot that was registered last.
pub(super) fn registration(store: StoreId, last: Option<Boot>, boot: Boot) -> EventFacts {
    let reason = match last {
        Some(last) if last == boot => EventReason::LeaseLost,
        None if boot == Boot(1) => EventReason::New,
        _ => EventReason::Restarted,
    };
    EventFacts::of_node(EventKind::NodeCame, store, Some(reason))
}

/// The event of a split, for one of the halves.
pub(super) fn split(record: &ShardRecord) -> EventFacts {
    EventFacts::of_copy(EventKind::ShardSplit, record.shard(), record.primary.store, None)
}

/// The event of an accepted loss.
pub(super) fn loss(record: &ShardRecord) -> EventFacts {
    let (shard, node) = (record.shard(), record.primary.store);
    EventFacts {
        epoch: Some(record.epoch),
        ..EventFacts::of_copy(EventKind::LossAccepted, shard, node, None)
    }
}

/// Returns whether this epoch began with an accepted loss: its transaction taints every other
/// member. (A set of one member shows it by the operator's intent alone.)
fn is_loss(before: &ShardRecord, after: &ShardRecord) -> bool {
    let others = || after.isr.iter().filter(|&&store| store != after.primary.store);
    others().count() > 0
        && others().all(|store| after.tainted.contains(store))
        && others().any(|store| !before.tainted.contains(store))
}

fn why_promoted(
    before: &ShardRecord,
    after: &ShardRecord,
    stores: &impl StoreFacts,
) -> EventReason {
    let StoreBoot { store: former, boot } = before.primary;
    let is_registered = stores.registered(former) == Some(boot);
    if is_loss(before, after) {
        return EventReason::Loss;
    }
    if former == after.primary.store {
        return EventReason::Restarted;
    }
    match by_status(former, stores).or(stores.death(former)) {
        Some(reason) => reason,
        None if !is_registered || !after.isr.contains(&former) => EventReason::Dead,
        None => EventReason::HandOver,
    }
}

/// The copies that a change of the target plans, each with the node whose place it takes.
fn planned_copies(
    before: &ShardRecord,
    after: &ShardRecord,
    stores: &impl StoreFacts,
) -> Vec<EventFacts> {
    let mut instead = added(&after.target, &before.target);
    let planned = |store| {
        let other = instead.next();
        let reason = match other {
            None => EventReason::Missing,
            Some(other) => match why_away(other, stores) {
                Some(reason) => reason,
                None if before.isr.contains(&other) => EventReason::Balance,
                None => EventReason::NotAcknowledging,
            },
        };
        let facts = EventFacts::of_copy(EventKind::CopyPlanned, after.shard(), store, Some(reason));
        EventFacts { other, ..facts }
    };
    // A member that is taken into the target has its copy already.
    let is_new = |store: &StoreId| !before.isr.contains(store);
    added(&before.target, &after.target).filter(is_new).map(planned).collect()
}

fn why_removed(before: &ShardRecord, store: StoreId, stores: &impl StoreFacts) -> EventReason {
    let was_in_sync = before.isr.contains(&store);
    why_away(store, stores).unwrap_or(match was_in_sync {
        true => EventReason::Moved,
        false => EventReason::NotNeeded,
    })
}

/// The reason for which a store should hold no copies, or can't be reached.
fn why_away(store: StoreId, stores: &impl StoreFacts) -> Option<EventReason> {
    let absent = stores.registered(store).is_none().then_some(EventReason::Dead);
    by_status(store, stores).or(stores.death(store)).or(absent)
}

fn by_status(store: StoreId, stores: &impl StoreFacts) -> Option<EventReason> {
    match stores.status(store)? {
        StoreStatus::Active => None,
        StoreStatus::Draining => Some(EventReason::Draining),
        StoreStatus::Suspect => Some(EventReason::Suspect),
        StoreStatus::Lost | StoreStatus::LostSuspect | StoreStatus::Retired => {
            Some(EventReason::Gone)
        }
    }
}

/// The members of `after` that are not in `before`.
fn added(before: &[StoreId], after: &[StoreId]) -> impl Iterator<Item = StoreId> {
    after.iter().copied().filter(|store| !before.contains(store))
}
