//! F, the yardstick of a disk: writers that append and fdatasync at once, each in a folder of its
//! own, as the storage nodes of one machine do.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::histogram::Histogram;

/// The work of the writers.
#[derive(Clone, Copy, Debug)]
pub struct FsyncPlan {
    /// The number of writers.
    pub writers: usize,
    /// The bytes of each append.
    pub bytes: usize,
    /// The time of the measurement.
    pub measured: Duration,
}

/// Runs the writers in folders below `folder`, and returns the latencies of all of them.
pub fn measure(plan: FsyncPlan, folder: &Path) -> io::Result<Histogram> {
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..plan.writers)
            .map(|number| {
                let folder = folder.join(format!("writer-{number}"));
                scope.spawn(move || append(plan, &folder))
            })
            .collect();
        let mut all = Histogram::default();
        for writer in writers {
            let one = writer.join().map_err(|_| io::Error::other("a writer panicked"))?;
            all.merge(&one?);
        }
        Ok(all)
    })
}

fn append(plan: FsyncPlan, folder: &Path) -> io::Result<Histogram> {
    std::fs::create_dir_all(folder)?;
    let mut file = File::options().create(true).append(true).open(folder.join("log"))?;
    let record = vec![b'x'; plan.bytes];
    let mut latencies = Histogram::default();
    let end = Instant::now() + plan.measured;
    loop {
        let began = Instant::now();
        if began >= end {
            return Ok(latencies);
        }
        file.write_all(&record)?;
        file.sync_data()?;
        latencies.record(began.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_writer_has_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let plan = FsyncPlan { writers: 2, bytes: 10, measured: Duration::from_millis(30) };
        let latencies = measure(plan, folder.path()).unwrap();
        let bytes = |number| {
            let path = folder.path().join(format!("writer-{number}/log"));
            std::fs::metadata(path).unwrap().len()
        };
        assert!(bytes(0) > 0 && bytes(1) > 0);
        assert_eq!(bytes(0) + bytes(1), 10 * latencies.count());
    }
}
