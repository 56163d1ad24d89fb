//! A view of a replica for readers outside the engine's state machine.

use crate::entry::Position;
use crate::ids::{CopyNo, Epoch, Seq, ShardId};
use crate::replica::log::ReplicaLog;
use crate::replica::primary::Primary;
use crate::shard::state::ShardState;

/// A view of a replica, for status and for the checkers of the simulator.
#[derive(Clone, Debug)]
pub struct ReplicaView<'a> {
    /// The shard.
    pub shard: ShardId,
    /// The number of the copy.
    pub copy: CopyNo,
    /// True if there is a copy.
    pub exists: bool,
    /// The highest epoch that was promised.
    pub promised: Epoch,
    /// The end of the log.
    pub last: Position,
    /// The last seq that is fsynced here.
    pub durable: Seq,
    /// The last seq that is known to be committed.
    pub commit: Seq,
    /// The log in memory.
    pub log: &'a ReplicaLog,
    /// The applied state.
    pub state: &'a ShardState,
    /// True if the copy ranks last for promotion: it is wrong, or being filled.
    pub unfit: bool,
    /// The reason why the copy takes no more entries, if it takes none.
    pub stopped: Option<&'static str>,
    /// The state of the primary, if this node leads the shard.
    pub primary: Option<&'a Primary>,
}
