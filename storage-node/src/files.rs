//! The allocation of a storage node's open files.

use telemetry::files::{self, TooFewFiles};

/// The files kept for everything else: segments and sorted files being written, RocksDB's own (two
/// databases), sockets of the runtime, etcd, metrics.
const KEPT: u64 = 96;
/// The fewest sorted files that RocksDB can work with.
const SORTED_FILES_MIN: u64 = 20;

/// The allocation of open files.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct FilePlan {
    /// Sorted files of the state: they are closed and reopened as needed.
    pub(crate) sorted_files: i32,
    /// Connections that others have made to this node.
    pub(crate) connections: usize,
}

impl FilePlan {
    /// Divides the files that the whole process is `allowed`. `sorted_files` is the number that the
    /// memory suffices for.
    pub(crate) fn of(allowed: u64, sorted_files: i32) -> Result<Self, TooFewFiles> {
        let left = files::connections(allowed, KEPT).unwrap_or(0) as u64;
        let sorted = u64::try_from(sorted_files).unwrap_or(0).min(left / 2);
        if sorted < SORTED_FILES_MIN {
            return Err(TooFewFiles { allowed, least: Self::LEAST });
        }
        let sorted_files = i32::try_from(sorted).unwrap_or(i32::MAX);
        Ok(Self { sorted_files, connections: (left - sorted) as usize })
    }

    /// The fewest allowed files: fewer leave too little for the state.
    const LEAST: u64 = 155;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_part() {
        let plan = |allowed| FilePlan::of(allowed, 4_000).ok();
        let want = |sorted_files, connections| Some(FilePlan { sorted_files, connections });
        assert_eq!(plan(256), want(64, 64));
        assert_eq!(plan(1_024), want(400, 400));
        assert_eq!(plan(65_536), want(4_000, 53_248));
        assert_eq!(plan(u64::MAX).map(|plan| plan.sorted_files), Some(4_000));
        assert!(plan(FilePlan::LEAST).is_some());
        assert!(plan(FilePlan::LEAST - 1).is_none());
    }
}
