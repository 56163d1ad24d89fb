//! The ways to shards: the shard map, and the connections to the nodes that it names.

use crate::batcher::router::Router;
use crate::batcher::shard_map::ShardMap;
use crate::ids::{Conn, Epoch, ShardId, StoreBoot};
use crate::shard_record::ShardRecord;

/// The known shards, and the connections to nodes. See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Routes {
    pub map: ShardMap,
    pub router: Router,
}

impl Routes {
    /// The connection to the shard's primary, and the epoch in which it leads.
    pub(super) fn to_primary(&self, shard: ShardId) -> Option<(Conn, Epoch)> {
        let record = self.map.get(shard)?;
        Some((self.router.to(record.primary)?, record.epoch))
    }

    /// Primaries in the map without a connection to that very process.
    pub(super) fn unconnected(&self) -> Vec<StoreBoot> {
        let mut primaries = self.map.primaries();
        primaries.retain(|&primary| self.router.to(primary).is_none());
        primaries
    }

    /// Takes a connection. Returns the shards that the process leads.
    pub(super) fn connected(&mut self, conn: Conn, node: StoreBoot) -> Vec<ShardId> {
        self.router.connected(conn, node);
        let led = self.map.iter().filter(|record| record.primary == node);
        led.map(ShardRecord::shard).collect()
    }
}
