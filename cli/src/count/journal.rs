//! The journal of a count with `--resume-id`, which makes the next run send the same requests.
//!
//! A token makes a repeated request count once, but only if it *is* the same request: the same
//! lines under the same token, with the issue time of the first send. Lines of a pipe are cut into
//! batches by time, `--batch` may change, and with a new issue time the service would apply a batch
//! again after it has dropped the batch's record. So the cut, the checksum and the issue time of a
//! batch are on disk **before it is sent**, and its outcome is appended afterwards. The next run
//! cuts the input as recorded, compares checksums, takes over known outcomes, and sends the
//! remaining batches again unchanged. Batches that are sent again after the service's idempotency
//! window are rejected as too old, and reported as unknown; they are never counted twice.
//!
//! A proxy may reject a request as too large. Then nothing of it was applied, and its lines become
//! two requests; the split is on disk, too, before the first of them is sent.
//!
//! ```text
//!   {"begun":{"namespace":"words","series":"6f1c…"}}
//!   {"cut":{"first_line":1,"lines":5000,"sum":1234,"issued_at_ms":1700000000000}}
//!   {"decided":{"first_line":1,"lines":5000,"applied":5000,"skipped":0,"unknown":[],"failed":[]}}
//! ```
//!
//! The tokens begin with a random number, the *series*, which only the journal contains: two
//! machines or two inputs with the same id never share tokens. So without the journal's file, an id
//! starts a new count.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use client::{IdempotencyHeaders, fresh_id};
use serde::{Deserialize, Serialize};
use storage_node::folders::make_durably;
use telemetry::wall_clock_ms;

use super::batch::LineBatch;
use super::lines::{LineRange, LineSet};
use super::pending::BatchOutcome;
use super::reasons::Reasons;
use crate::exit::UsageError;

/// One line of the file.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum JournalRecord {
    /// The first record: the namespace, and the series of the tokens.
    Begun { namespace: String, series: String },
    /// A batch that is about to be sent.
    Cut(Cut),
    /// The two batches that replace one.
    Split { first_line: u64, into: [Cut; 2] },
    /// The outcome of a batch.
    Decided(Decided),
}

/// The lines of one request, with their checksum and the issue time of its token.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Cut {
    first_line: u64,
    lines: u64,
    sum: u64,
    issued_at_ms: u64,
}

/// The final outcome of a batch.
#[derive(Debug, Deserialize, Serialize)]
struct Decided {
    first_line: u64,
    lines: u64,
    applied: u64,
    skipped: u64,
    unknown: Vec<LineRange>,
    failed: Vec<LineRange>,
}

/// A batch with the token that it is sent under.
pub(super) struct SendJob {
    pub(super) batch: LineBatch,
    pub(super) token: IdempotencyHeaders,
    /// True if an earlier run may have sent it.
    pub(super) in_doubt: bool,
}

impl SendJob {
    /// A batch that was never sent before, with a token of this series.
    pub(super) fn new(series: &str, batch: LineBatch) -> Self {
        // With a clock before 1970 the service rejects the token as too old.
        let token = token(series, &batch, wall_clock_ms());
        Self { batch, token, in_doubt: false }
    }

    fn cut(&self) -> Cut {
        Cut {
            first_line: self.batch.first_line(),
            lines: self.batch.line_count(),
            sum: self.batch.sum(),
            issued_at_ms: self.token.issued_at_ms.expect("every job has one"),
        }
    }
}

/// Returns a batch's token. It contains the number of lines, because the first half of a split
/// batch begins at the same line as the whole.
fn token(series: &str, batch: &LineBatch, issued_at_ms: u64) -> IdempotencyHeaders {
    let key = format!("{series}-{}-{}", batch.first_line(), batch.line_count());
    IdempotencyHeaders { key, issued_at_ms: Some(issued_at_ms) }
}

/// The next step for a batch that was read.
pub(super) enum Admitted {
    /// The batch is to be sent.
    Send(SendJob),
    /// The outcome of the batch is known from an earlier run.
    Known(BatchOutcome),
}

/// The journal of a count, which is locked while it is open.
pub(super) struct Journal {
    id: String,
    series: String,
    file: File,
    /// The batches of earlier runs that this run has not read yet.
    earlier: VecDeque<Cut>,
    decided: BTreeMap<u64, Decided>,
}

/// Appends outcomes and splits to a journal.
pub(super) struct JournalWriter(File);

impl Journal {
    /// Opens the journal of `id`, or creates it.
    pub(super) fn open(folder: &Path, id: &str, namespace: &str) -> anyhow::Result<Self> {
        let path = path(folder, id);
        let shown = || path.display().to_string();
        // The home directory may be read-only or owned by another user, as in a container.
        let not_writable = |error: String| {
            UsageError(format!("{error}: set --resume-dir to a writable directory"))
        };
        make_durably(folder).map_err(|error| not_writable(error.to_string()))?;
        let open = File::options().create(true).read(true).append(true).open(&path);
        let mut file = open.map_err(|error| not_writable(format!("{}: {error}", shown())))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let why = format!("another dkc count with --resume-id {id} is running");
                return Err(UsageError(why).into());
            }
            Err(fs::TryLockError::Error(error)) => return Err(error).with_context(shown),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(shown)?;
        // A last line without a line end was being written when the machine stopped: its batch was
        // not sent.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64)
            .and_then(|()| file.seek(io::SeekFrom::End(0)))
            .with_context(shown)?;
        let mut journal = Self {
            id: id.to_owned(),
            series: String::new(),
            file,
            earlier: VecDeque::new(),
            decided: BTreeMap::new(),
        };
        match journal.load(&text[..whole]).with_context(shown)? {
            Some(other) if other == namespace => {}
            Some(other) => {
                let why = format!(
                    "--resume-id {id} belongs to a count of namespace {other:?} ({})",
                    shown()
                );
                return Err(UsageError(why).into());
            }
            None => {
                journal.series = fresh_id().context("/dev/urandom")?;
                let series = journal.series.clone();
                journal
                    .write(&[JournalRecord::Begun { namespace: namespace.to_owned(), series }])?;
            }
        }
        // The directory entry is made durable, too: an earlier run may not have synced it.
        File::open(folder).and_then(|folder| folder.sync_all()).with_context(shown)?;
        Ok(journal)
    }

    /// Reads the records; returns the namespace, or `None` for a new journal.
    fn load(&mut self, text: &str) -> anyhow::Result<Option<String>> {
        let mut begun = None;
        let mut next_line = 1;
        for (number, line) in (1..).zip(text.lines()) {
            let record = serde_json::from_str(line).with_context(|| format!("line {number}"))?;
            match record {
                JournalRecord::Begun { namespace, series } => {
                    begun = Some(namespace);
                    self.series = series;
                }
                JournalRecord::Cut(cut) => {
                    anyhow::ensure!(
                        cut.first_line == next_line,
                        "line {number} does not continue the previous cut"
                    );
                    next_line += cut.lines;
                    self.earlier.push_back(cut);
                }
                JournalRecord::Split { first_line, into } => {
                    let find = self.earlier.binary_search_by_key(&first_line, |cut| cut.first_line);
                    let at = find
                        .ok()
                        .with_context(|| format!("line {number} splits an unknown batch"))?;
                    let lines = into.iter().map(|cut| cut.lines).sum::<u64>();
                    anyhow::ensure!(
                        lines == self.earlier[at].lines,
                        "line {number} splits into another number of lines"
                    );
                    self.earlier[at] = into[1];
                    self.earlier.insert(at, into[0]);
                }
                JournalRecord::Decided(decided) => {
                    self.decided.insert(decided.first_line, decided);
                }
            }
        }
        Ok(begun)
    }

    /// The prefix of all tokens of this count.
    pub(super) fn series(&self) -> &str {
        &self.series
    }

    /// The numbers of lines of the batches of earlier runs.
    pub(super) fn cuts(&self) -> VecDeque<u64> {
        self.earlier.iter().map(|cut| cut.lines).collect()
    }

    /// Returns a writer to the same file.
    pub(super) fn writer(&self) -> io::Result<JournalWriter> {
        Ok(JournalWriter(self.file.try_clone()?))
    }

    /// Records batches, which are given in the order of the input and each once. When this returns,
    /// they may be sent.
    pub(super) fn admit(&mut self, batches: Vec<LineBatch>) -> anyhow::Result<Vec<Admitted>> {
        let mut cuts = Vec::new();
        let mut next = Vec::with_capacity(batches.len());
        for batch in batches {
            let first_line = batch.first_line();
            let Some(cut) = self.earlier.pop_front() else {
                let job = SendJob::new(&self.series, batch);
                cuts.push(JournalRecord::Cut(job.cut()));
                next.push(Admitted::Send(job));
                continue;
            };
            if (cut.first_line, cut.lines, cut.sum) != (first_line, batch.line_count(), batch.sum())
            {
                let last = cut.first_line + cut.lines - 1;
                anyhow::bail!(
                    "lines {first_line} to {last} differ from those of the first run with \
                     --resume-id {}: this run counted nothing from there on. Use the same input \
                     and the same key options to continue, or another --resume-id for another \
                     input",
                    self.id
                );
            }
            next.push(match self.decided.remove(&first_line) {
                Some(decided) => Admitted::Known(decided.outcome()),
                None => {
                    let token = token(&self.series, &batch, cut.issued_at_ms);
                    Admitted::Send(SendJob { batch, token, in_doubt: true })
                }
            });
        }
        self.write(&cuts)?;
        Ok(next)
    }

    /// Checks at the end of the input that it has all lines that an earlier run has read.
    pub(super) fn input_ended(&self) -> anyhow::Result<()> {
        match self.earlier.front() {
            None => Ok(()),
            Some(cut) => anyhow::bail!(
                "the input ends before line {}, which the first run with --resume-id {} has read",
                cut.first_line,
                self.id
            ),
        }
    }

    fn write(&mut self, records: &[JournalRecord]) -> anyhow::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let bytes = records.iter().map(line).collect::<Vec<_>>().concat();
        self.file.write_all(&bytes).and_then(|()| self.file.sync_data()).context("the journal")
    }
}

impl JournalWriter {
    /// Appends an outcome. The file is not synced: if the record is lost, the next run sends the
    /// batch again.
    pub(super) fn decided(&mut self, outcome: &BatchOutcome) -> io::Result<()> {
        let decided = Decided {
            first_line: outcome.first_line,
            lines: outcome.lines,
            applied: outcome.applied,
            skipped: outcome.skipped,
            unknown: outcome.unknown.clone().ranges(),
            failed: outcome.failed.clone().ranges(),
        };
        self.0.write_all(&line(&JournalRecord::Decided(decided)))
    }

    /// Appends a split. When this returns, both halves may be sent.
    pub(super) fn split(&mut self, into: &[SendJob; 2]) -> anyhow::Result<()> {
        let into = [into[0].cut(), into[1].cut()];
        let bytes = line(&JournalRecord::Split { first_line: into[0].first_line, into });
        self.0.write_all(&bytes).and_then(|()| self.0.sync_data()).context("the journal")
    }
}

impl Decided {
    fn outcome(self) -> BatchOutcome {
        let mut reasons = Reasons::default();
        reasons.add_ranges("unknown since an earlier run", &self.unknown);
        reasons.add_ranges("rejected in an earlier run", &self.failed);
        BatchOutcome {
            first_line: self.first_line,
            lines: self.lines,
            applied: self.applied,
            skipped: self.skipped,
            unknown: LineSet::of(self.unknown),
            failed: LineSet::of(self.failed),
            not_applied: LineSet::default(),
            is_final: true,
            is_resumed: true,
            is_replayed: false,
            reasons,
        }
    }
}

fn line(record: &JournalRecord) -> Vec<u8> {
    let mut line = serde_json::to_vec(record).expect("text and numbers can be written");
    line.push(b'\n');
    line
}

/// The default directory of journals: `$XDG_STATE_HOME/dkc`, or `~/.local/state/dkc`.
pub(super) fn default_folder() -> Option<PathBuf> {
    let set =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("dkc"))
}

/// The file of a journal.
pub(super) fn path(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("count-{id}.journal"))
}

/// Checks an id: characters that are allowed in a file name and in a token.
pub(super) fn id(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if (1..=64).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err("an id is 1 to 64 of A-Z a-z 0-9 _ . -".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::super::batches::Batches;
    use super::*;

    fn open(folder: &Path) -> Journal {
        Journal::open(folder, "id", "words").expect("a journal")
    }

    /// Reads all batches of an input, cut as the journal records, and otherwise into two lines.
    fn read(journal: &Journal, input: &'static str) -> Vec<LineBatch> {
        let input = BufReader::new(input.as_bytes());
        let mut batches = Batches::new(input, 2);
        batches.cuts = journal.cuts();
        std::iter::from_fn(|| batches.next().expect("it is memory")).collect()
    }

    /// Formats a batch to send as `token in_doubt`, and a known outcome as `applied/lines`.
    fn formatted(next: &[Admitted]) -> Vec<String> {
        let format = |next: &Admitted| match next {
            Admitted::Send(job) => {
                let (_, lines) = job.token.key.split_once('-').expect("after the series");
                format!("{lines} {}", job.in_doubt)
            }
            Admitted::Known(outcome) => format!("{}/{}", outcome.applied, outcome.lines),
        };
        next.iter().map(format).collect()
    }

    fn issued(next: &Admitted) -> u64 {
        match next {
            Admitted::Send(job) => job.token.issued_at_ms.expect("it has one"),
            Admitted::Known(_) => panic!("it is known"),
        }
    }

    #[test]
    fn the_next_run_sends_what_was_not_decided_as_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut first = open(folder.path());
        let next = first.admit(read(&first, "a\nb\nc\nd\ne\n")).expect("all new");
        assert_eq!(formatted(&next), ["1-2 false", "3-2 false", "5-1 false"]);
        let at = issued(&next[2]);
        let mut writer = first.writer().expect("writer");
        let outcome =
            BatchOutcome { first_line: 3, lines: 2, applied: 2, ..BatchOutcome::default() };
        writer.decided(&outcome).expect("it is written");
        drop((first, writer));
        std::thread::sleep(std::time::Duration::from_millis(2));

        let mut second = open(folder.path());
        // There is more of it now, and the last line has an end.
        let next = second.admit(read(&second, "a\nb\nc\nd\ne\nf\n")).expect("the same input");
        assert_eq!(formatted(&next), ["1-2 true", "2/2", "5-1 true", "6-1 false"]);
        assert_eq!(issued(&next[2]), at);
        assert!(issued(&next[3]) > at);
    }

    #[test]
    fn a_torn_record_was_not_sent() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut first = open(folder.path());
        first.admit(read(&first, "a\nb\nc\n")).expect("all new");
        drop(first);
        let path = path(folder.path(), "id");
        let text = fs::read_to_string(&path).expect("text");
        fs::write(&path, &text[..text.len() - 5]).expect("written");
        let mut second = open(folder.path());
        let next = second.admit(read(&second, "a\nb\nx\n")).expect("the second cut is gone");
        assert_eq!(formatted(&next), ["1-2 true", "3-1 false"]);
        drop(second);
        let mut third = open(folder.path());
        let next = third.admit(read(&third, "a\nb\nx\n")).expect("the torn record is gone");
        assert_eq!(formatted(&next), ["1-2 true", "3-1 true"]);
    }

    #[test]
    fn tokens_are_of_one_journal_only() {
        let key = |folder: &Path| {
            let mut journal = open(folder);
            let next = journal.admit(read(&journal, "a\n")).expect("new or the same");
            match &next[..] {
                [Admitted::Send(job)] => job.token.key.clone(),
                _ => panic!("it is to be sent"),
            }
        };
        let [one, other] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        assert_eq!(key(one.path()), key(one.path()));
        assert_ne!(key(one.path()), key(other.path()));
    }

    #[test]
    fn a_split_batch_stays_split() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut first = open(folder.path());
        let next = first.admit(read(&first, "a\nb\nc\nd\n")).expect("all new");
        let Some(Admitted::Send(job)) = next.last() else { panic!("it is to be sent") };
        let halves = job.batch.halves().expect("two lines");
        let halves = halves.map(|half| SendJob::new(first.series(), half));
        let mut writer = first.writer().expect("writer");
        writer.split(&halves).expect("it is written");
        let outcome =
            BatchOutcome { first_line: 3, lines: 1, applied: 1, ..BatchOutcome::default() };
        writer.decided(&outcome).expect("it is written");
        drop((first, writer));
        let mut second = open(folder.path());
        let next = second.admit(read(&second, "a\nb\nc\nd\ne\n")).expect("the same input");
        assert_eq!(formatted(&next), ["1-2 true", "1/1", "4-1 true", "5-1 false"]);
        let Admitted::Send(job) = &next[2] else { panic!("it is to be sent") };
        assert_eq!(job.token, halves[1].token);
    }

    #[test]
    fn another_input_is_detected_before_it_is_sent() {
        for input in
            ["a\nb\nc\nx\n", "a\nb\nc\n", "a\nb\n", "a\nb\n\nd\n", "a\nb\nc\nd", "b\na\nc\nd\n"]
        {
            let folder = tempfile::tempdir().expect("a folder");
            let mut first = open(folder.path());
            first.admit(read(&first, "a\nb\nc\nd\n")).expect("all new");
            drop(first);
            let mut second = open(folder.path());
            let admitted = second.admit(read(&second, input)).and_then(|_| second.input_ended());
            // A missing last line end makes no difference.
            assert_eq!(admitted.is_err(), input != "a\nb\nc\nd", "{input:?}");
        }
    }

    #[test]
    fn one_count_at_a_time_and_of_one_namespace() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = open(folder.path());
        let refused = |folder: &Path, namespace| {
            let opened = Journal::open(folder, "id", namespace);
            opened.err().expect("it is not opened").downcast::<UsageError>()
        };
        let why = refused(folder.path(), "words").expect("a usage error").0;
        assert!(why.contains("is running"), "{why}");
        drop(first);
        let why = refused(folder.path(), "other").expect("a usage error").0;
        assert!(why.contains("\"words\""), "{why}");
        fs::write(path(folder.path(), "id"), "{}\n").expect("written");
        assert!(refused(folder.path(), "words").is_err());
        // A folder that cannot be created.
        let file = path(folder.path(), "id");
        let why = refused(&file, "words").expect("a usage error").0;
        assert!(why.contains("--resume-dir"), "{why}");
    }
}
