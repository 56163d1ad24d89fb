//! How the memory that a gateway may take is divided (docs/operations.md, "Size").
//!
//! A fixed part is the process's own. Connections have theirs, since each may have sent half a head or take nothing of what
//! is written to it. The rest is the workers', and of each worker's part a quarter is what it agrees to hold of bodies and
//! answers, one is what that takes while it is moved or read, one is operations that wait or are under way, and one is
//! left for reads, the links to nodes and the allocator. What is full makes its clients wait or refuses them.

use engine::batcher::Settings;

use crate::request::BODY_BYTES_MAX;

/// The process itself, pages, etcd's records.
const OWN_BYTES: u64 = 64 << 20;
/// What a connection takes at most.
const CONNECTION_BYTES: u64 = 64 << 10;
/// Connections have a quarter of all, unless `--connections` says how many there may be.
const CONNECTIONS_SHARE: u64 = 4;
/// A key of a read that waits, with its value.
const READ_KEY_BYTES: usize = 512;

/// Who may have how much.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Shares {
    /// Clients that may be connected.
    pub(crate) connections: usize,
    /// Bytes of bodies and answers that a worker agrees to hold.
    pub(crate) held: usize,
    /// Bytes of operations that a worker agrees to hold.
    pub(crate) operations: usize,
}

/// Divides `memory` bytes. `files`: as many connections as open files leave room for. An error says what is wrong with
/// which setting.
pub(crate) fn divide(
    memory: u64,
    wanted: Option<u32>,
    files: usize,
    workers: usize,
) -> Result<Shares, String> {
    if let Some(wanted) = wanted
        && wanted as usize > files
    {
        return Err(format!(
            "--connections {wanted}: open files leave room for {files}: raise the hard limit (ulimit -Hn, LimitNOFILE=)"
        ));
    }
    let by_memory = memory / CONNECTIONS_SHARE / CONNECTION_BYTES;
    let connections = wanted.map_or(by_memory.min(files as u64), u64::from);
    let taken = OWN_BYTES + connections * CONNECTION_BYTES;
    let quarter = memory.saturating_sub(taken) / workers as u64 / 4;
    let least = BODY_BYTES_MAX as u64;
    if quarter < least {
        let needed = taken + 4 * least * workers as u64;
        return Err(format!(
            "--memory-bytes {memory} is too little for {workers} workers and {connections} connections, which need {needed}: \
             give more, or lower --workers or --connections"
        ));
    }
    let quarter = usize::try_from(quarter).unwrap_or(usize::MAX);
    Ok(Shares { connections: connections as usize, held: quarter, operations: quarter })
}

impl Shares {
    /// What the machine of a worker may hold. From half of it on, shards that have more waiting than their share give way
    /// to the others; at all of it nothing more is read from clients.
    pub(crate) fn settings(&self, linger_us: u64) -> Settings {
        let usual = Settings::default();
        let half = self.operations / 2;
        Settings {
            linger_us,
            worker_bytes_max: half,
            queue_bytes_max: usual.queue_bytes_max.min(half),
            lane_bytes_max: usual.lane_bytes_max.min(half),
            read_keys_max: usual.read_keys_max.min(self.operations / READ_KEY_BYTES),
            ..usual
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn all_parts_together_are_what_it_may_take() {
        for (memory, workers) in [(1024, 4), (1024, 2), (512, 4), (256, 2), (4096, 16)] {
            let shares = divide(memory * MIB, None, 1 << 20, workers).unwrap();
            let connections = shares.connections as u64 * CONNECTION_BYTES;
            assert_eq!(connections, memory * MIB / 4);
            let of_workers = (2 * shares.held + 2 * shares.operations) as u64 * workers as u64;
            let all = OWN_BYTES + connections + of_workers;
            assert!((memory * MIB - 4 * workers as u64..=memory * MIB).contains(&all), "{memory}");
        }
        let shares = divide(1024 * MIB, None, 1 << 20, 4).unwrap();
        let want = Shares { connections: 4096, held: 44 << 20, operations: 44 << 20 };
        assert_eq!(shares, want);
        assert_eq!(divide(1024 * MIB, None, 1000, 4).unwrap().connections, 1000);
        let settings = shares.settings(7);
        assert_eq!((settings.linger_us, settings.worker_bytes_max), (7, 22 << 20));
        assert_eq!((settings.queue_bytes_max, settings.read_keys_max), (16 << 20, 90_112));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        #[track_caller]
        fn check(memory: u64, wanted: Option<u32>, workers: usize, says: &str) {
            let error = divide(memory * MIB, wanted, 1000, workers).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        check(1024, Some(1001), 1, "--connections 1001: open files leave room for 1000");
        check(
            64,
            None,
            1,
            "--memory-bytes 67108864 is too little for 1 workers and 256 connections, which need 117440512",
        );
        check(128, Some(1000), 4, "lower --workers");
        let fits = divide(117_440_512, Some(256), 1000, 1).unwrap();
        assert_eq!(fits.held as u64, 8 * MIB);
    }
}
