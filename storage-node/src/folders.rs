//! Folders whose names are durable.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::error::{DiskError, context};

/// Creates a folder and every missing level above it, each one's name durable in the level above
/// it.
///
/// Without this, the data folder may be missing after a power cut although its content had been
/// fsynced.
pub fn make_durably(folder: &Path) -> Result<(), DiskError> {
    // The level above a relative path with one part is the working folder.
    let above = match folder.parent() {
        Some(above) if above.as_os_str().is_empty() => Path::new("."),
        Some(above) => above,
        None => return Ok(()),
    };
    match make(folder) {
        Ok(()) => sync(above),
        // The name may exist since an earlier start that died before it was durable. A parent that
        // this user may not read is not this process's responsibility: nothing was created in it
        // here.
        Err(there) if there.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {
            match sync(above) {
                Err(DiskError::Io { why, .. }) if why.kind() == io::ErrorKind::PermissionDenied => {
                    Ok(())
                }
                synced => synced,
            }
        }
        Err(missing) if missing.kind() == io::ErrorKind::NotFound && above != folder => {
            make_durably(above)?;
            make(folder).map_err(|why| context("make", folder, why))?;
            sync(above)
        }
        Err(why) => Err(context("make", folder, why)),
    }
}

/// The folder is readable by this user alone: it holds the keys of counters.
fn make(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(folder)
}

pub(crate) fn sync(folder: &Path) -> Result<(), DiskError> {
    let sync = || File::open(folder)?.sync_all();
    sync().map_err(|why| context("fsync", folder, why))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn every_level_is_made_and_what_is_there_stays() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        for _ in 0..2 {
            make_durably(&deep).unwrap();
            let mode = deep.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "nobody else reads what is counted");
        }
    }

    #[test]
    fn a_file_in_the_way_is_a_matter_of_settings() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below")] {
            assert_eq!(make_durably(&path).unwrap_err().exit_code(), 2, "{path:?}");
        }
    }
}
