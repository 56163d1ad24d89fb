//! The options of `dkc count`, and their checks.

use std::path::PathBuf;
use std::time::Duration;

use super::content::InputOptions;
use super::csv::Csv;
use super::journal;
use super::keys::{Column, KeyExtractor, KeySource, Pattern};
use crate::args::{self, ServerArgs};

/// Options of `dkc count`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Namespace of the counters
    #[arg(value_name = "NS", value_parser = args::namespace)]
    pub(super) namespace: String,
    /// Input with one key per line; `-` is stdin. Compressed input (gzip, zstd, bzip2, xz) is
    /// decompressed
    #[arg(default_value = "-")]
    pub(super) file: PathBuf,
    /// Use this field of each line as the key: a number from 1, or with --csv a column name. Lines
    /// without the field are skipped [default: the whole line]
    #[arg(long, value_name = "N|NAME", value_parser = column)]
    field: Option<Column>,
    /// Delimiter of fields, one byte (`\\t` is a TAB) [default: any white space; with --csv a
    /// comma]
    #[arg(long, value_name = "C", requires = "field", value_parser = delimiter)]
    delimiter: Option<u8>,
    /// Parse lines as CSV records: a field in double quotes may contain delimiters, line ends and
    /// (doubled) quotes
    #[arg(long, requires = "field")]
    csv: bool,
    /// Use as the key what the group `key`, or else the first group, of this regular expression
    /// matches in each line. The expression matches bytes; lines without a match are skipped
    #[arg(long, value_name = "REGEX", conflicts_with_all = ["field", "delimiter", "csv"])]
    regex: Option<String>,
    /// Do not count the first line
    #[arg(long)]
    skip_header: bool,
    /// Do not decompress compressed input
    #[arg(long)]
    no_decompress: bool,
    /// Count lines of binary input, too
    #[arg(long)]
    binary: bool,
    /// Follow the file as `tail -F` does, across rotation and truncation, until Ctrl-C or SIGTERM
    #[arg(long, conflicts_with_all = ["resume_id", "skip_header"])]
    pub(super) follow: bool,
    /// Maximum delay before a line from a pipe is sent, for example 250ms or 2s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub(super) flush_interval: Duration,
    /// Maximum number of lines per request
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(super) batch: u32,
    /// Maximum number of requests in flight
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) in_flight: u32,
    /// Stop the count when a request was rejected or not answered for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(super) give_up: u64,
    /// A name for this count, to resume it: after an interruption the same command with the same
    /// input continues and counts nothing twice. An incomplete last line is left for the next run
    #[arg(long, value_name = "ID", value_parser = journal::id)]
    pub(super) resume_id: Option<String>,
    /// Directory of the journal for --resume-id [default: $XDG_STATE_HOME/dkc, or
    /// ~/.local/state/dkc]
    #[arg(long, env = "DKC_RESUME_DIR", value_name = "DIR")]
    pub(super) resume_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(super) server: ServerArgs,
}

impl Args {
    /// The options that concern the reading of the input.
    pub(super) fn input_options(&self) -> InputOptions {
        InputOptions { decompress: !self.no_decompress, binary: self.binary }
    }

    /// Builds the extractor of keys. The error is a usage error for the user.
    pub(super) fn keys(&self) -> Result<KeyExtractor, String> {
        let part = match (&self.regex, self.field.clone()) {
            (Some(pattern), _) => KeySource::Match(Pattern::new(pattern)?),
            (None, None) => KeySource::Whole,
            (None, Some(column)) if self.csv => KeySource::Column(self.csv()?, column),
            (None, Some(Column::Number(number))) => {
                KeySource::Field { number, delimiter: self.delimiter }
            }
            (None, Some(Column::Name(name))) => {
                return Err(format!(
                    "--field {name}: columns have names with --csv only; expected a number"
                ));
            }
        };
        if self.follow && matches!(part, KeySource::Column(_, Column::Name(_))) {
            let why = "--follow needs a column number: in a rotated log it is unknown which line \
                       is the header";
            return Err(why.to_owned());
        }
        Ok(KeyExtractor::new(part, self.skip_header))
    }

    fn csv(&self) -> Result<Csv, String> {
        match self.delimiter.unwrap_or(b',') {
            b'"' | b'\n' | b'\r' => Err("--delimiter cannot be a quote or a line end".to_owned()),
            delimiter => Ok(Csv { delimiter }),
        }
    }

    /// Rejects options that do not apply to the kind of input.
    pub(super) fn check_input(&self) -> Result<(), String> {
        if self.follow && self.file.as_os_str() == "-" {
            return Err("--follow needs a file: a pipe is always read to its end".to_owned());
        }
        Ok(())
    }
}

/// Parses a column: a number, or otherwise a name.
fn column(text: &str) -> Result<Column, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("fields are numbered from 1".to_owned()),
        Ok(number) => Ok(Column::Number(number)),
        Err(_) if text.is_empty() => Err("expected a number or a name".to_owned()),
        Err(_) => Ok(Column::Name(text.to_owned())),
    }
}

/// Parses a delimiter: one byte, or `\t` for a TAB.
fn delimiter(text: &str) -> Result<u8, String> {
    match text.as_bytes() {
        b"\\t" => Ok(b'\t'),
        [byte] => Ok(*byte),
        _ => Err("expected one byte or \\t".to_owned()),
    }
}

/// Parses a duration such as `1s` or `250ms`; a number alone is in seconds.
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
        _ => Err("expected 1ms to 3600s, for example 250ms or 2s".to_owned()),
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
