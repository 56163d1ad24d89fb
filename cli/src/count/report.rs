//! How a count ended, for people, for programs and as an exit code.

use anyhow::Context;
use serde::Serialize;

use super::lines::LineRange;
use super::reasons::Reasons;
use crate::exit::Exit;
use crate::output::{self, grouped};

/// How it ended. The JSON that `--json` prints.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    pub(super) namespace: String,
    /// Lines read. `lines` = `applied` + lines unknown, not applied and failed + `skipped`.
    pub(super) lines: u64,
    /// Of these, lines that an earlier run with the same `--resume-id` had seen to.
    pub(super) resumed: u64,
    /// Lines that the service had counted before this count sent them first.
    pub(super) replayed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) resume_id: Option<String>,
    /// Lines without a key, and the header.
    pub(super) skipped: u64,
    /// Bytes of a last line without an end, which is not counted.
    pub(super) bytes_left: u64,
    pub(super) applied: u64,
    pub(super) unknown: Vec<LineRange>,
    pub(super) not_applied: Vec<LineRange>,
    pub(super) failed: Vec<LineRange>,
    /// Whether the whole input was read.
    pub(super) complete: bool,
    /// Whether the input has no end.
    #[serde(skip)]
    pub(super) follows: bool,
    /// Whether each line that was read is in one of the heaps above.
    #[serde(skip)]
    pub(super) settled: bool,
    pub(super) reasons: Reasons,
    pub(super) retries: u64,
    pub(super) seconds: f64,
    pub(super) per_second: f64,
}

/// Says it, and how the command ends.
pub(super) fn say(report: &Report, as_json: bool) -> anyhow::Result<Exit> {
    if as_json {
        output::json(report)?;
        return Ok(exit_of(report));
    }
    let Report { applied, lines, seconds, per_second, .. } = report;
    let (applied, lines_read) = (grouped(*applied), grouped(*lines));
    let rate = grouped(*per_second as u64);
    output::result(&format!(
        "counted {applied} of {lines_read} lines in {seconds:.1} s, {rate} lines/s"
    ))
    .context("writing the result")?;
    if report.resumed > 0 {
        output::note(&format!("{} of the lines by an earlier run", grouped(report.resumed)));
    }
    if report.skipped > 0 {
        output::note(&format!("skipped {} lines without a key", grouped(report.skipped)));
    }
    if report.bytes_left > 0 {
        output::note(&format!(
            "left {} bytes after the last line end: half a line counts once it is whole",
            grouped(report.bytes_left)
        ));
    }
    if report.replayed > 0 {
        output::note(&format!(
            "{} of the lines had been counted before under this journal's number: was it copied, or put back? If they are \
             another machine's, they are missing; count them under an id of their own",
            grouped(report.replayed)
        ));
    }
    let heaps = [
        ("unknown, may have been counted:", &report.unknown),
        ("not counted:", &report.not_applied),
        ("can't be counted:", &report.failed),
    ];
    for (title, ranges) in heaps.into_iter().filter(|(_, ranges)| !ranges.is_empty()) {
        let lines: u64 = ranges.iter().map(LineRange::count).sum();
        let shown: Vec<_> = ranges.iter().take(10).map(range_text).collect();
        let more = if ranges.len() > 10 { ", … (--json lists all)" } else { "" };
        output::note(&format!("{title} {} lines: {}{more}", grouped(lines), shown.join(", ")));
    }
    if !report.complete && !report.follows {
        output::note(&format!(
            "stopped before the end: this run counted nothing after line {lines}"
        ));
    }
    for reason in report.reasons.texts() {
        output::note(&format!("reason: {reason}"));
    }
    match &report.resume_id {
        _ if (report.complete && exit_of(report) == Exit::Done) || report.follows => {}
        Some(id) => output::note(&format!(
            "to go on: the same command with the same input and --resume-id {id}, within the service's idempotency window \
             (1 h) for all to be exact"
        )),
        None => output::note("with --resume-id ID it could have been gone on with"),
    }
    Ok(exit_of(report))
}

fn exit_of(report: &Report) -> Exit {
    if !report.unknown.is_empty() {
        Exit::Unknown
    } else if !(report.settled && report.not_applied.is_empty() && report.failed.is_empty()) {
        Exit::Failed
    } else {
        Exit::Done
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

    /// Which heaps have lines, and whether every line that was read is in one.
    #[track_caller]
    fn check(unknown: bool, not_applied: bool, failed: bool, settled: bool, want: Exit) {
        let heap = |full: bool| match full {
            true => vec![LineRange { first_line: 2, last_line: 3 }],
            false => Vec::new(),
        };
        let (unknown, not_applied, failed) = (heap(unknown), heap(not_applied), heap(failed));
        let report = Report { unknown, not_applied, failed, settled, ..Report::default() };
        assert_eq!(exit_of(&report), want, "{report:?}");
    }

    /// A script that is told "not counted" counts again: with one line unknown it must not.
    #[test]
    fn unknown_outweighs_all_else() {
        check(false, false, false, true, Exit::Done);
        check(false, false, false, false, Exit::Failed);
        for (not_applied, failed) in [(true, false), (false, true), (true, true)] {
            check(false, not_applied, failed, true, Exit::Failed);
            check(true, not_applied, failed, true, Exit::Unknown);
            check(true, not_applied, failed, false, Exit::Unknown);
        }
        check(true, false, false, true, Exit::Unknown);
    }
}
