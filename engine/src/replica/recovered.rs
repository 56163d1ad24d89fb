//! The replicas of a store as recovery found them on its disk.

use crate::entry::{Entry, Position};
use crate::ids::{CopyNo, Epoch, ShardId, Slots};
use crate::message::{CopyEnd, ShardKnowledge};
use crate::shard::state::ShardState;
use crate::shard_record::ShardRecord;

/// The state of one shard, as recovery found it.
#[derive(Clone, Debug)]
pub struct RecoveredReplica {
    /// The shard.
    pub shard: ShardId,
    /// The slots of the shard.
    pub slots: Slots,
    /// The highest epoch that was promised.
    pub promised: Epoch,
    /// The number of the present copy, or of the last one if the shard has no copy here.
    pub copy: CopyNo,
    /// The newest record of the shard that the store has acted on.
    pub acted_on: Option<Box<ShardRecord>>,
    /// The content of the copy. `None`: there is no copy, only a promise.
    pub content: Option<RecoveredContent>,
}

/// The content of a copy, as recovery found it.
#[derive(Clone, Debug)]
pub struct RecoveredContent {
    /// The shard record as of the last flush.
    pub state: ShardState,
    /// Entries above `state.applied`, contiguous.
    pub entries: Vec<Entry>,
    /// The copy may be wrong: it is not promotable and is to be replaced by a snapshot.
    pub suspect: bool,
}

impl RecoveredReplica {
    /// Returns what the log and the state know about the shard, for a recovery of etcd.
    pub fn knowledge(&self) -> ShardKnowledge {
        ShardKnowledge {
            shard: self.shard,
            promised: self.promised,
            record: self.acted_on.as_deref().cloned(),
            copy: self.content.as_ref().map(RecoveredContent::end),
        }
    }
}

impl RecoveredContent {
    /// A copy that was being filled is not known as such here: it has no barrier of the epoch that
    /// it follows, so its end is below that of a complete one.
    fn end(&self) -> CopyEnd {
        let last = self.entries.last().map_or(self.state.applied, Entry::position);
        let Position { epoch, seq, .. } = last;
        CopyEnd { last: (epoch, seq), unfit: self.suspect, damaged: self.suspect }
    }
}
