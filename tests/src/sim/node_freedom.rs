//! The freedom that docs/design.md#order-of-effects leaves to the driver of a node.

use engine::node::{Effect, Event};
use engine::planted::Planted;

use super::coverage::Path;
use super::late::Stream;

/// After these events loads see one more change of the state.
pub fn changes_the_view(event: &Event) -> bool {
    matches!(
        event,
        Event::Ingested { .. } | Event::RowsDropped { .. } | Event::SnapshotInstalled { .. }
    )
}

/// The stream of an effect, if it has to keep an order.
pub fn stream_of(planted: Option<Planted>, effect: &Effect) -> Option<Stream> {
    match effect {
        Effect::Write(_) if Planted::WriteAfterSync.is_in(planted) => None,
        Effect::Write(_) | Effect::Sync { .. } | Effect::Trim { .. } => Some(Stream::Log),
        Effect::Flush { .. }
        | Effect::InstallSnapshot { .. }
        | Effect::DropRows { .. }
        | Effect::SendSnapshot { .. } => Some(Stream::State),
        Effect::ToFollower { .. } | Effect::ToPrimary { .. }
            if Planted::MessagesInAnyOrder.is_in(planted) =>
        {
            None
        }
        Effect::ToFollower { conn, .. }
        | Effect::ToPrimary { conn, .. }
        | Effect::Gateway { conn, .. }
        | Effect::Close { conn } => Some(Stream::Conn(*conn)),
        _ => None,
    }
}

/// The path that is taken if this effect is late.
pub fn late_effect(effect: &Effect) -> Path {
    match effect {
        Effect::Write(_) | Effect::Sync { .. } => Path::WriteLate,
        Effect::Flush { .. }
        | Effect::InstallSnapshot { .. }
        | Effect::DropRows { .. }
        | Effect::SendSnapshot { .. } => Path::ChangeLate,
        Effect::ToFollower { .. }
        | Effect::ToPrimary { .. }
        | Effect::Gateway { .. }
        | Effect::Close { .. } => Path::MessageLate,
        Effect::ReadLog { .. } => Path::LogReadLate,
        Effect::Trim { .. } => Path::TrimLate,
        Effect::ReadRecord { .. }
        | Effect::Propose { .. }
        | Effect::ProposeSplit { .. }
        | Effect::CheckEtcd { .. }
        | Effect::ListSessions => Path::CallLate,
        _ => Path::RestLate,
    }
}

/// The path that is taken if this answer is late.
pub fn late_answer(event: &Event) -> Path {
    match event {
        Event::Durable { .. } => Path::DurableLate,
        Event::Loaded { .. } => Path::LoadedLate,
        Event::LogRead { .. } => Path::LogAnswerLate,
        Event::ShardRecord { read: None, .. } | Event::PeersRegistered(_) => Path::RecordLate,
        event if changes_the_view(event) => Path::ChangedLate,
        _ => Path::CallAnswerLate,
    }
}
