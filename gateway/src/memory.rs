//! The division of a gateway's memory (docs/operations.md, "Memory of a gateway").
//!
//! A fixed part belongs to the process itself. Connections have a part, since each may have sent
//! half a head, or may not read what is written to it. The rest is divided among the workers. A
//! quarter of a worker's part is for bodies and answers, a quarter for copies of them while they
//! are moved or parsed, a quarter for operations that are queued or in flight, and a quarter for
//! reads, node connections and the allocator. A worker with a full part lets its clients wait, or
//! refuses them.

use engine::batcher::Settings;

use crate::request::BODY_BYTES_MAX;

/// The part of the process itself: pages and the records from etcd.
const OWN_BYTES: u64 = 64 << 20;
/// The most that a connection takes.
const CONNECTION_BYTES: u64 = 64 << 10;
/// Connections get a quarter of the memory, unless `--connections` sets their number.
const CONNECTIONS_SHARE: u64 = 4;
/// The memory of one key of a waiting read, with its value.
const READ_KEY_BYTES: usize = 512;

/// The limits that follow from the memory of a gateway.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Shares {
    /// The number of clients that may be connected.
    pub(crate) connections: usize,
    /// Bytes of bodies and answers that a worker may hold.
    pub(crate) body_bytes_max: usize,
    /// Bytes of operations that a worker may hold.
    pub(crate) operation_bytes_max: usize,
}

/// Divides `memory` bytes. `files` is the number of connections that the limit of open files
/// allows. An error names the setting that is wrong, and the reason.
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
            "--connections {wanted}: open files leave room for {files}: raise the hard limit \
             (ulimit -Hn, LimitNOFILE=)"
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
            "--memory-bytes {memory} is too little for {workers} workers and {connections} \
             connections, which need {needed}: give more, or lower --workers or --connections"
        ));
    }
    let quarter = usize::try_from(quarter).unwrap_or(usize::MAX);
    Ok(Shares {
        connections: connections as usize,
        body_bytes_max: quarter,
        operation_bytes_max: quarter,
    })
}

impl Shares {
    /// The settings of a worker's batcher. From an eighth of its limit on, 32 MiB at most, large
    /// requests wait until there is room; from half of it on, shards with more than their share of
    /// the queue are refused in favour of the others; at the limit, no more requests are read from
    /// clients.
    pub(crate) fn settings(&self, linger_us: u64) -> Settings {
        let usual = Settings::default();
        let half = self.operation_bytes_max / 2;
        Settings {
            linger_us,
            total_bytes_max: half,
            queue_bytes_max: usual.queue_bytes_max.min(half),
            room_bytes: usual.room_bytes.min(half / 4),
            connection_bytes_max: usual.connection_bytes_max.min(half),
            read_keys_max: usual.read_keys_max.min(self.operation_bytes_max / READ_KEY_BYTES),
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
            let of_workers = (2 * shares.body_bytes_max + 2 * shares.operation_bytes_max) as u64
                * workers as u64;
            let all = OWN_BYTES + connections + of_workers;
            assert!((memory * MIB - 4 * workers as u64..=memory * MIB).contains(&all), "{memory}");
        }
        let shares = divide(1024 * MIB, None, 1 << 20, 4).unwrap();
        let want =
            Shares { connections: 4096, body_bytes_max: 44 << 20, operation_bytes_max: 44 << 20 };
        assert_eq!(shares, want);
        assert_eq!(divide(1024 * MIB, None, 1000, 4).unwrap().connections, 1000);
        let settings = shares.settings(7);
        assert_eq!((settings.linger_us, settings.total_bytes_max), (7, 22 << 20));
        assert_eq!((settings.queue_bytes_max, settings.read_keys_max), (16 << 20, 90_112));
    }

    #[test]
    fn settings_that_do_not_fit_are_refused() {
        #[track_caller]
        fn check(memory: u64, wanted: Option<u32>, workers: usize, want: &str) {
            let error = divide(memory * MIB, wanted, 1000, workers).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
        check(1024, Some(1001), 1, "--connections 1001: open files leave room for 1000");
        check(
            64,
            None,
            1,
            "--memory-bytes 67108864 is too little for 1 workers and 256 connections, which need \
             117440512",
        );
        check(128, Some(1000), 4, "lower --workers");
        let fits = divide(117_440_512, Some(256), 1000, 1).unwrap();
        assert_eq!(fits.body_bytes_max as u64, 8 * MIB);
    }
}
