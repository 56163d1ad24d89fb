//! Finds the etcd to run: `$ETCD`, or the one that `./run` chose or unpacked, or the one in `PATH`,
//! if it is new enough.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns the first etcd that exists and is at least 3.5. The error lists the candidates.
pub(crate) fn find() -> Result<String, String> {
    let candidates = match set("ETCD") {
        Some(named) => vec![PathBuf::from(named)],
        None => {
            // `scripts/setup` writes this file.
            let chosen = cache_folder()
                .and_then(|cache| std::fs::read_to_string(cache.join("etcd-path")).ok());
            let chosen = chosen.map(|path| PathBuf::from(path.trim()));
            chosen.into_iter().chain([PathBuf::from("etcd")]).collect()
        }
    };
    let mut tried = Vec::new();
    for path in candidates {
        match check(&path) {
            Ok(()) => return Ok(path.display().to_string()),
            Err(why) => tried.push(format!("{}: {why}", path.display())),
        }
    }
    let tried = tried.join("; ");
    Err(format!(
        "no etcd 3.5 or newer found ({tried}). ./run installs one; set $ETCD to use another one"
    ))
}

/// Returns the folder into which `scripts/setup` unpacks programs: `$DKC_CACHE`, or the default.
pub(crate) fn cache_folder() -> Option<PathBuf> {
    let home = set("HOME").map(|home| PathBuf::from(home).join(".cache/dkc"));
    set("DKC_CACHE").map(PathBuf::from).or(home)
}

fn set(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn check(path: &Path) -> Result<(), String> {
    let output = Command::new(path).arg("--version").output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    match version(&text) {
        Some(version) if version >= (3, 5) => Ok(()),
        Some((major, minor)) => Err(format!("version {major}.{minor} is too old")),
        None => Err("it does not print its version".to_owned()),
    }
}

/// Parses `etcd Version: 3.5.16`.
fn version(text: &str) -> Option<(u32, u32)> {
    let number = text.lines().find_map(|line| line.strip_prefix("etcd Version:"))?;
    let mut parts = number.trim().split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version("etcd Version: 3.5.16\nGit SHA: x\n"), Some((3, 5)));
        assert_eq!(version("etcd Version: 3.4.23\n"), Some((3, 4)));
        assert_eq!(version("something else"), None);
        assert!((3, 10) > (3, 5));
    }
}
