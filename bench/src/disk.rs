//! The disk space of a folder.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The unit of `st_blocks`, whatever the block size of the file system is.
const BLOCK_BYTES: u64 = 512;

/// Returns the bytes that all files under `folder` occupy. Files that are deleted meanwhile are
/// left out.
pub fn occupied(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)?.flatten() {
        match entry.metadata() {
            Ok(found) if found.is_dir() => bytes += occupied(&entry.path()).unwrap_or(0),
            Ok(found) => bytes += found.blocks() * BLOCK_BYTES,
            Err(_) => {}
        }
    }
    Ok(bytes)
}

/// Returns the bytes that the folders of this name occupy, one level below `folder`.
pub fn occupied_by(name: &str, folder: &Path) -> io::Result<u64> {
    let folders = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path().join(name));
    folders.filter(|folder| folder.is_dir()).map(|folder| occupied(&folder)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_all_levels_are_added_up() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("a/b")).unwrap();
        let bytes = vec![1; 100_000];
        for name in ["one", "a/b/two"] {
            let file = std::fs::File::create(folder.path().join(name)).unwrap();
            io::Write::write_all(&mut &file, &bytes).unwrap();
            // Some file systems allocate blocks only when they write them.
            file.sync_all().unwrap();
        }
        assert_eq!(occupied_by("c", folder.path()).unwrap(), 0);
        let below = occupied_by("b", folder.path()).unwrap();
        assert!((100_000..150_000).contains(&below), "{below}");
        let occupied = occupied(folder.path()).unwrap();
        assert!((200_000..300_000).contains(&occupied), "{occupied}");
    }
}
