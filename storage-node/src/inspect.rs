//! The owner of a data folder, read without touching it: for `--check-config`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;
use engine::store::log::group::{Owner, SEGMENT_HEADER_BYTES, SegmentHeader};

use crate::error::{DiskError, context};

/// Returns the cluster and store named in a data folder's log. `None` if there is no log yet, so
/// that a start would make a new store, or if no segment has a readable header, which a start looks
/// into.
pub fn owner(data: &Path) -> Result<Option<Owner>, DiskError> {
    let log = data.join("log");
    let names = match fs::read_dir(&log) {
        Ok(names) => names,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(why) => return Err(context("list", &log, why)),
    };
    for name in names {
        let path = name.map_err(|why| context("list", &log, why))?.path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let mut head = Vec::new();
        let read = File::open(&path)
            .and_then(|file| file.take(SEGMENT_HEADER_BYTES as u64).read_to_end(&mut head));
        read.map_err(|why| context("read", &path, why))?;
        if let Ok(header) = SegmentHeader::decode(&Bytes::from(head)) {
            return Ok(Some(header.owner));
        }
    }
    Ok(None)
}
