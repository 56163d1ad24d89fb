//! The report of a count, as text, as JSON and as exit code.

use anyhow::Context;
use serde::Serialize;

use super::lines::LineRange;
use super::reasons::Reasons;
use crate::exit::CommandExit;
use crate::output::{self, grouped, note};

/// The result of a count, which is also the JSON that `--json` prints.
#[derive(Debug, Default, Serialize)]
pub(super) struct CountReport {
    pub(super) namespace: String,
    /// The number of lines read. `lines` = `applied` + lines unknown, not applied and failed +
    /// `skipped`.
    pub(super) lines: u64,
    /// The number of these lines whose outcome is that of an earlier run with the same
    /// `--resume-id`.
    pub(super) resumed: u64,
    /// The number of lines that the service had counted before this count sent them for the first
    /// time.
    pub(super) replayed: u64,
    /// The id of the count, if it can be resumed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) resume_id: Option<String>,
    /// The number of lines without a key, including the header.
    pub(super) skipped: u64,
    /// The number of bytes of an incomplete last line, which is not counted.
    pub(super) bytes_left: u64,
    /// The number of counted lines.
    pub(super) applied: u64,
    /// Lines that may have been counted.
    pub(super) unknown: Vec<LineRange>,
    /// Lines that were not counted, and could be.
    pub(super) not_applied: Vec<LineRange>,
    /// Lines that cannot be counted.
    pub(super) failed: Vec<LineRange>,
    /// True if the whole input was read.
    pub(super) complete: bool,
    /// True if the input is followed, so that it has no end.
    #[serde(skip)]
    pub(super) follows: bool,
    /// True if each line that was read is in one of the categories above.
    #[serde(skip)]
    pub(super) settled: bool,
    pub(super) reasons: Reasons,
    /// The number of requests that were sent again.
    pub(super) retries: u64,
    pub(super) seconds: f64,
    pub(super) per_second: f64,
}

/// Prints the report and returns the exit code.
pub(super) fn print_report(report: &CountReport, as_json: bool) -> anyhow::Result<CommandExit> {
    if as_json {
        output::json(report)?;
        return Ok(exit_of(report));
    }
    let CountReport { applied, lines, seconds, per_second, .. } = report;
    let (applied, lines_read) = (grouped(*applied), grouped(*lines));
    let rate = grouped(*per_second as u64);
    output::result(&format!(
        "counted {applied} of {lines_read} lines in {seconds:.1} s, {rate} lines/s"
    ))
    .context("writing the result")?;
    if report.resumed > 0 {
        note!("{} of the lines were counted by an earlier run", grouped(report.resumed));
    }
    if report.skipped > 0 {
        note!("skipped {} lines without a key", grouped(report.skipped));
    }
    if report.bytes_left > 0 {
        note!(
            "left {} bytes of an incomplete last line, which is counted when it is complete",
            grouped(report.bytes_left)
        );
    }
    if report.replayed > 0 {
        note!(
            "{} of the lines had already been counted with this journal's tokens: was the journal \
             copied or restored? If those were lines of another machine, the lines of this input \
             are not counted; count them with another --resume-id",
            grouped(report.replayed)
        );
    }
    let categories = [
        ("unknown, may have been counted:", &report.unknown),
        ("not counted:", &report.not_applied),
        ("cannot be counted:", &report.failed),
    ];
    for (title, ranges) in categories.into_iter().filter(|(_, ranges)| !ranges.is_empty()) {
        let lines: u64 = ranges.iter().map(LineRange::count).sum();
        let shown: Vec<_> = ranges.iter().take(10).map(range_text).collect();
        let more = if ranges.len() > 10 { ", … (--json lists all)" } else { "" };
        note!("{title} {} lines: {}{more}", grouped(lines), shown.join(", "));
    }
    if !report.complete && !report.follows {
        note!("stopped before the end of the input: this run counted nothing after line {lines}");
    }
    for reason in report.reasons.texts() {
        note!("reason: {reason}");
    }
    match &report.resume_id {
        _ if (report.complete && exit_of(report) == CommandExit::Done) || report.follows => {}
        Some(id) => note!(
            "to resume: run the same command with the same input and --resume-id {id}, within the \
             service's idempotency window (1 h by default) for an exact count"
        ),
        None => note!("use --resume-id ID to make a count resumable"),
    }
    Ok(exit_of(report))
}

fn exit_of(report: &CountReport) -> CommandExit {
    if !report.unknown.is_empty() {
        CommandExit::Unknown
    } else if !(report.settled && report.not_applied.is_empty() && report.failed.is_empty()) {
        CommandExit::Failed
    } else {
        CommandExit::Done
    }
}

fn range_text(range: &LineRange) -> String {
    if range.first_line == range.last_line {
        range.first_line.to_string()
    } else {
        format!("{}-{}", range.first_line, range.last_line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the exit code for categories with lines, and for `settled`.
    #[track_caller]
    fn check(unknown: bool, not_applied: bool, failed: bool, settled: bool, want: CommandExit) {
        let lines = |full: bool| match full {
            true => vec![LineRange { first_line: 2, last_line: 3 }],
            false => Vec::new(),
        };
        let (unknown, not_applied, failed) = (lines(unknown), lines(not_applied), lines(failed));
        let report =
            CountReport { unknown, not_applied, failed, settled, ..CountReport::default() };
        assert_eq!(exit_of(&report), want, "{report:?}");
    }

    /// A script may count again after "not counted"; with one unknown line it must not.
    #[test]
    fn unknown_outweighs_all_else() {
        check(false, false, false, true, CommandExit::Done);
        check(false, false, false, false, CommandExit::Failed);
        for (not_applied, failed) in [(true, false), (false, true), (true, true)] {
            check(false, not_applied, failed, true, CommandExit::Failed);
            check(true, not_applied, failed, true, CommandExit::Unknown);
            check(true, not_applied, failed, false, CommandExit::Unknown);
        }
        check(true, false, false, true, CommandExit::Unknown);
    }
}
