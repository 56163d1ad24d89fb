//! The kinds of faults.

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum FaultKind {
    /// A node's process is killed; what it wrote survives.
    NodeKill,
    /// A node's machine loses power; what it had not fsynced is torn.
    NodePower,
    /// A node is away for longer than a log is kept, or than others wait for it.
    NodeAway,
    /// Every node loses power at once.
    AllPower,
    GatewayKill,
    CoordinatorKill,
    /// A node is asked to stop, hands its shards over, and is started again.
    NodeLeave,
    /// A process is paused, perhaps in the middle of a turn, perhaps until all others have given it
    /// up.
    NodePause,
    GatewayPause,
    CoordinatorPause,
    /// A node's wall clock is set.
    ClockJump,
    /// Connections die.
    Cut,
    /// All connections of one process die, each with one of its next messages.
    Snap,
    /// Connections die at one end, and messages sent on them arrive later than those on the next
    /// connections; queries and reports arrive a second time, late.
    Straggle,
    /// Some processes can't reach each other.
    Partition,
    /// One direction between two processes is blocked.
    OneWay,
    /// Many pairs are separated one after the other, and connected again in another order.
    Swizzle,
    /// One process, or a pair, loses the others and finds them again, several times.
    Flap,
    /// A node that leads, a follower of it and a gateway are separated from all others for long.
    Island,
    /// A node, and perhaps a gateway beside it, are behind a congested link: their incoming
    /// messages, or outgoing ones, or both, are late, though none is lost. The cluster has moved on
    /// before they know.
    SlowLine,
    /// A gateway loses its key, and its connections with the pending answers on them; it reaches
    /// the nodes again once its session may have been collected.
    Orphan,
    /// A node can reach nothing but perhaps one gateway; then others die, and it comes back to
    /// those that restart, while etcd is still out of its reach: a deposed primary that does not
    /// know it.
    Exile,
    SlowDisk,
    StalledDisk,
    /// Etcd stops, and continues.
    EtcdStop,
    /// Etcd is unreachable for a while.
    EtcdDead,
    /// Calls and answers take about as long as clients wait.
    EtcdSlow,
    /// Etcd is restored from a snapshot, and put right some time later. No process starts
    /// meanwhile.
    EtcdRestored,
    /// All leases vanish though every process is well.
    LeaseWipe,
    /// One lease vanishes though its process is well.
    LeaseRevoke,
    /// All leases live longer than they should.
    LeaseProlong,
    /// A keep-alive succeeds though the lease is gone.
    LyingKeepAlive,
    /// Watches end, and are made again later: the changes in between are not delivered.
    WatchBreak,
    /// Watches miss events now and then, and deliver the resulting state later.
    WatchMiss,
}

impl FaultKind {
    pub const ALL: [Self; 34] = [
        Self::NodeKill,
        Self::NodePower,
        Self::NodeAway,
        Self::AllPower,
        Self::GatewayKill,
        Self::CoordinatorKill,
        Self::NodeLeave,
        Self::NodePause,
        Self::GatewayPause,
        Self::CoordinatorPause,
        Self::ClockJump,
        Self::Cut,
        Self::Snap,
        Self::Straggle,
        Self::Partition,
        Self::OneWay,
        Self::Swizzle,
        Self::Flap,
        Self::Island,
        Self::SlowLine,
        Self::Orphan,
        Self::Exile,
        Self::SlowDisk,
        Self::StalledDisk,
        Self::EtcdStop,
        Self::EtcdDead,
        Self::EtcdSlow,
        Self::EtcdRestored,
        Self::LeaseWipe,
        Self::LeaseRevoke,
        Self::LeaseProlong,
        Self::LyingKeepAlive,
        Self::WatchBreak,
        Self::WatchMiss,
    ];

    /// The faults that make deposed primaries that do not know it: few other faults reach the rules
    /// that keep such primaries from harm.
    pub const DEPOSE: [Self; 4] = [Self::Exile, Self::Island, Self::SlowLine, Self::EtcdSlow];
}
