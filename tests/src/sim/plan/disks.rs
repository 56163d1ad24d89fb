//! The faults of disks that a seed suffers.

use super::super::rng::Rng;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum DiskFault {
    /// An fsync fails: the process ends, and any part of what it was writing may be there.
    FsyncFails,
    /// The log is too long or the disk too full for a while.
    Full,
    /// The disk is full but for its reserve, and stays so until the operator makes room: see
    /// `disk_faults::RoomWatch`.
    StaysFull,
    /// A durable bit is changed, and a later group proves that it was durable.
    Rot,
    /// As `Rot`, and every other node is away when this one comes back: its copies are the only
    /// ones in reach.
    LeftAlone,
    /// A counter's row can't be read.
    RowLost,
    /// The folder is as it was before some earlier start.
    RolledBack,
    /// Everything is gone: a new disk.
    Emptied,
    /// The disk is missing at the next start, and an empty folder is in its place; later the disk
    /// is mounted again. This happens to one node, or to all at once; the operator may take the
    /// disk for lost and replace its store.
    Unmounted,
    /// A copy of the folder as it was before some earlier start is started on another machine,
    /// perhaps as this node dies.
    Cloned,
}

impl DiskFault {
    pub const ALL: [Self; 10] = [
        Self::FsyncFails,
        Self::Full,
        Self::StaysFull,
        Self::Rot,
        Self::LeftAlone,
        Self::RowLost,
        Self::RolledBack,
        Self::Emptied,
        Self::Unmounted,
        Self::Cloned,
    ];

    /// Something that was durable may be gone, or it is impossible to know that it is not.
    pub fn harms(self) -> bool {
        !matches!(self, Self::Full | Self::StaysFull | Self::Cloned)
    }

    /// Returns whether every disk stays in its place with all that was durable.
    pub(super) fn leaves_disks_alone(self) -> bool {
        matches!(self, Self::Full | Self::StaysFull)
    }

    /// Returns whether all that was durable is there afterwards, be it on a disk that is mounted
    /// later.
    pub(super) fn keeps_all(self) -> bool {
        matches!(self, Self::FsyncFails | Self::Full | Self::Cloned | Self::Unmounted)
    }
}

/// The faults of disks that a seed suffers, and how often.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    pub faults: Vec<DiskFault>,
    pub every: u64,
    /// At most one disk stays full, the one of a node that leads: the others have room, and could
    /// lead as well.
    pub one_leader_full: bool,
    pub rng: Rng,
}

impl DiskPlan {
    /// With `min_in_sync` of one a disk may be the only one that counts at any moment: none is
    /// harmed then, since nothing is promised for a shard that has lost its last in-sync copy.
    pub fn from_seed(seed: u64, min_in_sync: usize) -> Self {
        let mut rng = Rng::new(seed.rotate_left(45) ^ 0x0D15_CFA1_75ED);
        let mut faults = Vec::new();
        if rng.percent(30) {
            faults = DiskFault::ALL.to_vec();
            rng.shuffle(&mut faults);
            faults.truncate(rng.between(1, 3) as usize);
            faults.retain(|fault| min_in_sync > 1 || !fault.harms());
        }
        if min_in_sync > 1 && rng.percent(5) && !faults.contains(&DiskFault::LeftAlone) {
            faults.push(DiskFault::LeftAlone);
        }
        let every = rng.between(200_000, 900_000);
        let one_leader_full = rng.percent(50);
        Self { faults, every, one_leader_full, rng }
    }
}
