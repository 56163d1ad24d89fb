//! A snapshot of etcd, as a file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use crate::{Error, Metastore};

/// The longest pause between two parts of a snapshot.
const PART_WITHIN: Duration = Duration::from_secs(30);
/// etcd appends the SHA-256 of the database.
const SUM_BYTES: u64 = 32;
/// The database is written in pages; no file system has smaller ones.
const PAGE_BYTES: u64 = 512;
/// The number at the start of the first page of the database, in the byte order of this machine.
const MAGIC: [u8; 4] = 0xED0C_DAED_u32.to_le_bytes();
const MAGIC_AT: usize = 16;

/// The reason why there is no new snapshot. The old file, if there is one, is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// etcd sent none.
    #[error(transparent)]
    Etcd(#[from] Error),
    /// The bytes that etcd sent are no whole snapshot.
    #[error("etcd sent no whole snapshot: {0}")]
    Incomplete(&'static str),
    /// The file could not be written.
    #[error("{}: {why}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        why: io::Error,
    },
}

impl Metastore {
    /// Writes a snapshot of all of etcd to `path`, in place of an older one once it is whole and
    /// fsynced. Returns its size in bytes.
    pub async fn save_snapshot(&self, path: &Path) -> Result<u64, SnapshotError> {
        let part = path.with_added_extension("part");
        let saved = self.receive_snapshot(&part).await;
        let saved = saved.and_then(|bytes| put_in_place(&part, path).map(|()| bytes));
        if saved.is_err() {
            // A part that is left is overwritten by the next attempt.
            let _left = fs::remove_file(&part);
        }
        saved
    }

    async fn receive_snapshot(&self, part: &Path) -> Result<u64, SnapshotError> {
        let failed = |why| SnapshotError::File { path: part.to_owned(), why };
        let mut maintenance = self.client().maintenance_client();
        let mut stream = self.call("snapshot", maintenance.snapshot()).await?;
        let mut file = File::create(part).map_err(failed)?;
        let (mut bytes, mut head, mut left) = (0_u64, Vec::new(), u64::MAX);
        loop {
            let next = timeout(PART_WITHIN, stream.message()).await;
            let next = next.map_err(|_| SnapshotError::Incomplete("it stopped sending"))?;
            let next = next.map_err(|error| Error::from_client("snapshot", error))?;
            let Some(next) = next else { break };
            file.write_all(next.blob()).map_err(failed)?;
            head.extend(next.blob().iter().take(64_usize.saturating_sub(head.len())));
            bytes += next.blob().len() as u64;
            left = next.remaining_bytes();
        }
        check(bytes, &head, left)?;
        file.sync_all().map_err(failed)?;
        Ok(bytes)
    }
}

/// Checks that a snapshot is whole: the sum at its end is left to `etcdutl snapshot status`.
fn check(bytes: u64, head: &[u8], left: u64) -> Result<(), SnapshotError> {
    let why = if left != 0 {
        "its end is missing"
    } else if bytes % PAGE_BYTES != SUM_BYTES {
        "its size is not that of a database and its sum"
    } else if head.get(MAGIC_AT..MAGIC_AT + MAGIC.len()) != Some(&MAGIC) {
        "it is no database"
    } else {
        return Ok(());
    };
    Err(SnapshotError::Incomplete(why))
}

fn put_in_place(part: &Path, path: &Path) -> Result<(), SnapshotError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let renamed = fs::rename(part, path).and_then(|()| File::open(folder)?.sync_all());
    renamed.map_err(|why| SnapshotError::File { path: path.to_owned(), why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_database_is_taken() {
        let head = [&[0; MAGIC_AT][..], &MAGIC, &[7; 8]].concat();
        let text = |checked: Result<(), SnapshotError>| checked.map_err(|why| why.to_string());
        assert_eq!(text(check(8_192 + 32, &head, 0)), Ok(()));
        for (bytes, head, left) in [
            (8_192 + 32, &head[..], 1),
            (8_192, &head, 0),
            (8_192 + 32, &head[1..], 0),
            (32, &[], 0),
        ] {
            assert!(check(bytes, head, left).is_err(), "{bytes} bytes, {left} left");
        }
    }
}
