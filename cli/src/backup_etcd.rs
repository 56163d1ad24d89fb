//! `dkc backup-etcd FILE`: writes a snapshot of etcd to a file, and prints the age of the last one.
//!
//! A snapshot must not be restored under a cluster: `dkc recover-etcd` rebuilds a lost etcd from
//! the stores. A snapshot holds what stores do not know: which losses were accepted and which nodes
//! an operator drains, as they were then.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use process::ClusterOptions;
use serde::Serialize;

use crate::etcd::connect;
use crate::exit::CommandExit;
use crate::output::{self, note};

/// Options of `dkc backup-etcd`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// File to write; it is replaced once the new snapshot is complete
    file: PathBuf,
    /// Write nothing: exit with 1 if the last snapshot in FILE is older than this
    #[arg(long, value_name = "HOURS")]
    check: Option<u64>,
    #[command(flatten)]
    etcd: ClusterOptions<true>,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// The last snapshot.
#[derive(Debug, Serialize)]
struct BackupReport {
    file: String,
    bytes: u64,
    /// The age in seconds.
    age_s: u64,
}

impl BackupReport {
    fn read(file: &Path) -> Option<Self> {
        let found = fs::metadata(file).ok()?;
        // A clock that was set back makes a file of the future: it is new.
        let age = found.modified().ok()?;
        let age = SystemTime::now().duration_since(age).unwrap_or(Duration::ZERO);
        Some(Self { file: file.display().to_string(), bytes: found.len(), age_s: age.as_secs() })
    }

    fn sentence(&self) -> String {
        let Self { file, bytes, age_s } = self;
        let (hours, minutes) = (age_s / 3_600, age_s / 60 % 60);
        format!("{file}: the last snapshot is {hours} h {minutes} min old, {bytes} bytes")
    }

    fn is_within(&self, hours: u64) -> bool {
        self.age_s <= hours.saturating_mul(3_600)
    }
}

/// Writes a snapshot, or checks the age of the last one.
pub(crate) async fn run(args: Args) -> anyhow::Result<CommandExit> {
    if args.check.is_none() {
        let metastore = connect(&args.etcd).await?;
        if let Err(error) = metastore.save_snapshot(&args.file).await {
            let last = BackupReport::read(&args.file);
            let last = last.map_or("there is none yet".to_owned(), |last| last.sentence());
            note!("error: no new snapshot: {error}. {last}");
            return Ok(CommandExit::Failed);
        }
    }
    let Some(last) = BackupReport::read(&args.file) else {
        note!("error: {}: there is no snapshot", args.file.display());
        return Ok(CommandExit::Failed);
    };
    output::report(args.json, &last, BackupReport::sentence)?;
    let fresh = args.check.is_none_or(|hours| last.is_within(hours));
    Ok(if fresh { CommandExit::Done } else { CommandExit::Failed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_judged_in_whole_hours() {
        let at = |age_s| BackupReport { file: "etcd.snapshot".into(), bytes: 20_512, age_s };
        assert!(at(7_200).is_within(2));
        assert!(!at(7_201).is_within(2));
        let text = "etcd.snapshot: the last snapshot is 2 h 0 min old, 20512 bytes";
        assert_eq!(at(7_201).sentence(), text);
    }
}
