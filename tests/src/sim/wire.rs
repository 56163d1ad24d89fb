//! The messages on a connection.

use engine::ids::ShardId;
use engine::message::{FromFollower, GatewayMessage, NodeReply, ToFollower};
use engine::shard::state::ShardState;

use super::rows::Rows;

/// A message on a link.
#[derive(Debug)]
pub enum WireMessage {
    ToFollower(ToFollower),
    FromFollower(FromFollower),
    ToNode(GatewayMessage),
    ToGateway(NodeReply),
    /// The rows of a copy, in a stream of their own beside the link.
    Rows {
        transfer: u64,
        shard: ShardId,
        rows: Rows,
        state: Box<ShardState>,
    },
    /// The stream of a copy's rows was refused for want of room.
    RowsRefused {
        transfer: u64,
    },
}
