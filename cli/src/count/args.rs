//! What `dkc count` is asked for, checked.

use std::path::PathBuf;
use std::time::Duration;

use super::content::Taking;
use super::csv::Csv;
use super::journal;
use super::keys::{Column, Keys, Part, Pattern};
use crate::client::{self, ServerArgs};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Namespace of the counters
    #[arg(value_name = "NS", value_parser = client::namespace)]
    pub(super) namespace: String,
    /// Input, one key a line; `-` is standard input. What is compressed (gzip, zstd, bzip2, xz) is decompressed
    #[arg(default_value = "-")]
    pub(super) file: PathBuf,
    /// The key is this field of a line, from 1, or with --csv its name; a line without it is skipped [default: the key is
    /// the whole line]
    #[arg(long, value_name = "N|NAME", value_parser = column)]
    field: Option<Column>,
    /// What stands between two fields, one byte (`\\t` is a TAB) [default: any white space; with --csv a comma]
    #[arg(long, value_name = "C", requires = "field", value_parser = delimiter)]
    delimiter: Option<u8>,
    /// Lines are CSV records: a field in double quotes may hold delimiters, line ends and (doubled) quotes
    #[arg(long, requires = "field")]
    csv: bool,
    /// The key is what this regular expression's group named `key`, or else its first group, finds in a line; a line that
    /// does not match is skipped. It matches bytes
    #[arg(long, value_name = "REGEX", conflicts_with_all = ["field", "delimiter", "csv"])]
    regex: Option<String>,
    /// Do not count the first line
    #[arg(long)]
    skip_header: bool,
    /// Take compressed input as it is
    #[arg(long)]
    no_decompress: bool,
    /// Count lines of input that is no text, too
    #[arg(long)]
    binary: bool,
    /// Go on with what is appended to the file, as `tail -F` does, over rotation and truncation, until Ctrl-C or SIGTERM
    #[arg(long, conflicts_with_all = ["resume_id", "skip_header"])]
    pub(super) follow: bool,
    /// How long a line that comes by a pipe may wait for others before it is sent, such as 250ms or 2s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub(super) flush_interval: Duration,
    /// Lines in one request
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(super) batch: u32,
    /// Requests in flight
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) in_flight: u32,
    /// Seconds after which a request that is refused or not answered again and again ends the count
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(super) give_up: u64,
    /// A name of your own for this count: after an interruption of any kind, the same command with the same input goes on
    /// where it was, and counts nothing twice. Half a line at the input's end is left for the next run
    #[arg(long, value_name = "ID", value_parser = journal::id)]
    pub(super) resume_id: Option<String>,
    /// Where is noted how far the count with --resume-id has come [default: $XDG_STATE_HOME/dkc, or ~/.local/state/dkc]
    #[arg(long, env = "DKC_RESUME_DIR", value_name = "DIR")]
    pub(super) resume_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(super) server: ServerArgs,
}

impl Args {
    pub(super) fn taking(&self) -> Taking {
        Taking { decompress: !self.no_decompress, binary: self.binary }
    }

    /// What of a line is its key. The reason why not is for the user.
    pub(super) fn keys(&self) -> Result<Keys, String> {
        let part = match (&self.regex, self.field.clone()) {
            (Some(pattern), _) => Part::Found(Pattern::new(pattern)?),
            (None, None) => Part::Whole,
            (None, Some(column)) if self.csv => Part::Column(self.csv()?, column),
            (None, Some(Column::Number(number))) => {
                Part::Field { number, delimiter: self.delimiter }
            }
            (None, Some(Column::Name(name))) => {
                return Err(format!(
                    "--field {name}: fields have names with --csv only; a number is expected"
                ));
            }
        };
        if self.follow && matches!(part, Part::Column(_, Column::Name(_))) {
            return Err("--follow wants the field's number: which line of a log that is rotated is a header is not known"
                .to_owned());
        }
        Ok(Keys::new(part, self.skip_header))
    }

    fn csv(&self) -> Result<Csv, String> {
        match self.delimiter.unwrap_or(b',') {
            b'"' | b'\n' | b'\r' => Err("--delimiter can't be a quote or a line end".to_owned()),
            delimiter => Ok(Csv { delimiter }),
        }
    }

    /// Refuses options that the kind of input rules out.
    pub(super) fn check_input(&self) -> Result<(), String> {
        if self.follow && self.file.as_os_str() == "-" {
            return Err("--follow wants a file: a pipe is read to its end in any case".to_owned());
        }
        Ok(())
    }
}

/// A number is one; anything else is a name.
fn column(text: &str) -> Result<Column, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("fields are numbered from 1".to_owned()),
        Ok(number) => Ok(Column::Number(number)),
        Err(_) if text.is_empty() => Err("a number or a name is expected".to_owned()),
        Err(_) => Ok(Column::Name(text.to_owned())),
    }
}

/// One byte, or how a TAB is written.
fn delimiter(text: &str) -> Result<u8, String> {
    match text.as_bytes() {
        b"\\t" => Ok(b'\t'),
        [byte] => Ok(*byte),
        _ => Err("one byte is expected, or \\t".to_owned()),
    }
}

/// `1s`, `250ms`; a number alone is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let (digits, unit_ms) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1),
        (None, Some(digits)) => (digits, 1_000),
        (None, None) => (text, 1_000),
    };
    match digits.parse::<u64>() {
        Ok(count) if (1..=3_600_000).contains(&count.saturating_mul(unit_ms)) => {
            Ok(Duration::from_millis(count * unit_ms))
        }
        _ => Err("1ms to 3600s is expected, such as 250ms or 2s".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let ms = |text| duration(text).map(|duration| duration.as_millis());
        assert_eq!([ms("250ms"), ms("2s"), ms("3")], [Ok(250), Ok(2_000), Ok(3_000)]);
        for wrong in ["", "s", "0", "0ms", "1.5s", "1m", "3601s", "99999999999999999999s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn columns() {
        assert!(matches!(column("7"), Ok(Column::Number(7))));
        assert!(matches!(column("status"), Ok(Column::Name(_))));
        assert!(matches!(column("-1"), Ok(Column::Name(_))));
        assert!(column("0").is_err());
        assert!(column("").is_err());
    }
}
