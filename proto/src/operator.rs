//! Conversion of a forecast, and of events, into the messages for operators.

use engine::coordinator::MovesStatus;
use engine::coordinator::events::{ClusterEvent, EventReason};
use engine::coordinator::planner::{DrainObstacle, MoveReason, PlanForecast, PlannedMove};
use engine::ids::StoreId;

use crate::wire;

impl wire::PlanQuery {
    /// The request for a plan, from a process of `cluster`; `drain`: as if this store were drained.
    pub fn new(cluster: u128, drain: Option<StoreId>) -> Self {
        let drain = drain.map(wire::StoreId::from);
        Self { open: Some(wire::Open::new(cluster, 0)), drain }
    }
}

impl wire::PlanReply {
    /// The reply: a forecast, the progress so far, and why the store of the query can't be drained.
    pub fn new(
        forecast: &PlanForecast,
        moves: &MovesStatus,
        obstacle: Option<DrainObstacle>,
    ) -> Self {
        Self {
            moves: forecast.moves.iter().map(|it| line(it, moves.copy_ms)).collect(),
            truncated: forecast.truncated,
            wanted: moves.wanted as u64,
            stalled: moves.stalled,
            still_ms: moves.still_ms,
            copy_ms: moves.copy_ms,
            paused: false,
            guard: false,
            obstacle: obstacle.map(|obstacle| obstacle.to_string()),
        }
    }
}

fn line(one: &PlannedMove, copy_ms: Option<u64>) -> wire::PlannedMove {
    wire::PlannedMove {
        shard: one.shard.0.into(),
        kind: one.kind.word().to_owned(),
        from: one.from.map(wire::StoreId::from),
        to: one.to.map(wire::StoreId::from),
        state: one.state.word().to_owned(),
        reason: one.reason.map(MoveReason::word).map(str::to_owned),
        round: u32::try_from(one.round).unwrap_or(u32::MAX),
        age_ms: one.age_ms,
        eta_ms: one.eta_ms(copy_ms),
    }
}

impl wire::EventsQuery {
    /// The request for events, from a process of `cluster`; `seen`: the instance of an earlier
    /// reply, and the number of its last event.
    pub fn new(cluster: u128, seen: Option<(u64, u64)>) -> Self {
        let (instance, after) = seen.unwrap_or_default();
        Self { open: Some(wire::Open::new(cluster, 0)), instance, after }
    }
}

impl From<&ClusterEvent> for wire::ClusterEvent {
    fn from(event: &ClusterEvent) -> Self {
        let what = &event.what;
        Self {
            number: event.number,
            at_ms: event.at.0,
            revision: event.revision,
            kind: what.kind.word().to_owned(),
            shard: what.shard.map(|shard| shard.0.into()),
            node: what.node.map(wire::StoreId::from),
            other: what.other.map(wire::StoreId::from),
            reason: what.reason.map(EventReason::word).map(str::to_owned),
            epoch: what.epoch.map(|epoch| epoch.0),
            count: what.count,
            by: what.by.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use engine::coordinator::planner::{MoveKind, MoveState};
    use engine::ids::ShardId;

    use super::*;

    #[test]
    fn a_running_move_has_its_age_and_its_eta() {
        let one = PlannedMove {
            shard: ShardId(7),
            kind: MoveKind::Copy,
            from: None,
            to: Some(StoreId(4)),
            state: MoveState::Running,
            reason: None,
            round: 0,
            age_ms: Some(300),
        };
        let moves = MovesStatus { wanted: 1, copy_ms: Some(1_000), ..Default::default() };
        let forecast = PlanForecast { moves: vec![one], truncated: false };
        let reply = wire::PlanReply::new(&forecast, &moves, None);
        let [line] = &reply.moves[..] else { panic!("{reply:?}") };
        assert_eq!((line.age_ms, line.eta_ms), (Some(300), Some(700)));
        assert_eq!((line.kind.as_str(), line.state.as_str()), ("copy", "running"));
        assert_eq!((line.from, line.reason.as_deref()), (None, None));
    }
}
