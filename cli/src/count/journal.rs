//! What a count with `--resume-id` remembers, so that the next run of it sends the same requests.
//!
//! A token makes a repeated request count once, but only if it *is* the same request: the same lines under the same
//! token, with the issue time of the first send. Lines of a pipe are cut into batches by the clock, `--batch` may change,
//! and an issue time of now would count a batch again whose record the service has dropped. So none of the three is
//! derived anew: the cut, the sum and the issue time of a batch are on disk **before it is sent**, and what became of it
//! is noted afterwards. The next run cuts the input as noted, compares sums, takes over what was decided, and sends the
//! rest again as it was. If that is later than the service's idempotency window it is told "too old" for those few, and
//! reports them as unknown; it never counts one twice.
//!
//! A proxy may find a request too large; then nothing of it was applied, and its lines are two requests from there on: that
//! is on disk, too, before the first of them is sent.
//!
//! ```text
//!   {"begun":{"namespace":"words","series":"6f1c…"}}
//!   {"cut":{"first_line":1,"lines":5000,"sum":1234,"issued_at_ms":1700000000000}}
//!   {"decided":{"first_line":1,"lines":5000,"applied":5000,"skipped":0,"unknown":[],"failed":[]}}
//! ```
//!
//! The tokens begin with a random number, the *series*, that is in the journal and nowhere else: two machines that count
//! under one id, or two inputs, never take each other's requests for their own. So without its file an id begins anew.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use bench::http::Token;
use serde::{Deserialize, Serialize};
use storage_node::folders::make_durably;

use super::batch::Batch;
use super::lines::{LineRange, Lines};
use super::pending::Outcome;
use super::reasons::Reasons;
use crate::client::fresh_id;

/// One line of the file.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Begun {
        namespace: String,
        series: String,
    },
    Cut(Cut),
    /// A cut, and the two that take its place.
    Split {
        first_line: u64,
        into: [Cut; 2],
    },
    Decided(Decided),
}

/// Lines that make one request.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Cut {
    first_line: u64,
    lines: u64,
    sum: u64,
    issued_at_ms: u64,
}

/// What became of them for good.
#[derive(Debug, Deserialize, Serialize)]
struct Decided {
    first_line: u64,
    lines: u64,
    applied: u64,
    skipped: u64,
    unknown: Vec<LineRange>,
    failed: Vec<LineRange>,
}

/// A batch and what it is sent under.
pub(super) struct Job {
    pub(super) batch: Batch,
    pub(super) token: Token,
    /// An earlier run may have sent it.
    pub(super) in_doubt: bool,
}

impl Job {
    pub(super) fn new(series: &str, batch: Batch) -> Self {
        let token = token(series, &batch, now_ms());
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

/// The lines are in it: those of a half begin where those of the whole did.
fn token(series: &str, batch: &Batch, issued_at_ms: u64) -> Token {
    let key = format!("{series}-{}-{}", batch.first_line(), batch.line_count());
    Token { key, issued_at_ms: Some(issued_at_ms) }
}

fn now_ms() -> u64 {
    // A clock before 1970 is refused by the service as too old.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// What is to be done with a batch that was read.
pub(super) enum Next {
    Send(Job),
    /// It was decided by an earlier run.
    Known(Outcome),
}

pub(super) struct Journal {
    id: String,
    series: String,
    file: File,
    /// What earlier runs cut and this one has not come to yet.
    earlier: VecDeque<Cut>,
    decided: BTreeMap<u64, Decided>,
}

/// Takes down what became of batches.
pub(super) struct Notes(File);

/// Why there is no journal.
#[derive(Debug)]
pub(super) enum NoJournal {
    /// The user can do something about it.
    Usage(String),
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for NoJournal {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl Journal {
    /// Opens that of `id`, or begins one.
    pub(super) fn open(folder: &Path, id: &str, namespace: &str) -> Result<Self, NoJournal> {
        let path = path(folder, id);
        let shown = || path.display().to_string();
        // Whose home is not theirs, or read-only, as in a container.
        let elsewhere = |error: String| {
            NoJournal::Usage(format!(
                "{error}: name a folder that can be written to with --resume-dir"
            ))
        };
        make_durably(folder).map_err(|error| elsewhere(error.to_string()))?;
        let open = File::options().create(true).read(true).append(true).open(&path);
        let mut file = open.map_err(|error| elsewhere(format!("{}: {error}", shown())))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(NoJournal::Usage(format!(
                    "another dkc count with --resume-id {id} runs"
                )));
            }
            Err(fs::TryLockError::Error(error)) => {
                return Err(anyhow::Error::from(error).context(shown()).into());
            }
        }
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(shown)?;
        // What is after the last line end was being written when the machine stopped: it was not sent.
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
                return Err(NoJournal::Usage(why));
            }
            None => {
                journal.series = fresh_id().context("/dev/urandom")?;
                let series = journal.series.clone();
                journal.write(&[Record::Begun { namespace: namespace.to_owned(), series }])?;
            }
        }
        // The file's name, too, which an earlier run may have left to a power cut.
        File::open(folder).and_then(|folder| folder.sync_all()).with_context(shown)?;
        Ok(journal)
    }

    /// The namespace that was counted to.
    fn load(&mut self, text: &str) -> anyhow::Result<Option<String>> {
        let mut begun = None;
        let mut next_line = 1;
        for (number, line) in (1..).zip(text.lines()) {
            let record = serde_json::from_str(line).with_context(|| format!("line {number}"))?;
            match record {
                Record::Begun { namespace, series } => {
                    begun = Some(namespace);
                    self.series = series;
                }
                Record::Cut(cut) => {
                    anyhow::ensure!(cut.first_line == next_line, "line {number} does not follow");
                    next_line += cut.lines;
                    self.earlier.push_back(cut);
                }
                Record::Split { first_line, into } => {
                    let find = self.earlier.binary_search_by_key(&first_line, |cut| cut.first_line);
                    let at = find.ok().with_context(|| format!("line {number} splits nothing"))?;
                    let lines = into.iter().map(|cut| cut.lines).sum::<u64>();
                    anyhow::ensure!(lines == self.earlier[at].lines, "line {number} does not fit");
                    self.earlier[at] = into[1];
                    self.earlier.insert(at, into[0]);
                }
                Record::Decided(decided) => {
                    self.decided.insert(decided.first_line, decided);
                }
            }
        }
        Ok(begun)
    }

    /// What the tokens of this count begin with.
    pub(super) fn series(&self) -> &str {
        &self.series
    }

    /// How many lines each batch had that was cut by now.
    pub(super) fn cuts(&self) -> VecDeque<u64> {
        self.earlier.iter().map(|cut| cut.lines).collect()
    }

    pub(super) fn notes(&self) -> io::Result<Notes> {
        Ok(Notes(self.file.try_clone()?))
    }

    /// Batches in the order of the input, each once. When this returns they may be sent.
    pub(super) fn admit(&mut self, batches: Vec<Batch>) -> anyhow::Result<Vec<Next>> {
        let mut cuts = Vec::new();
        let mut next = Vec::with_capacity(batches.len());
        for batch in batches {
            let first_line = batch.first_line();
            let Some(cut) = self.earlier.pop_front() else {
                let job = Job::new(&self.series, batch);
                cuts.push(Record::Cut(job.cut()));
                next.push(Next::Send(job));
                continue;
            };
            if (cut.first_line, cut.lines, cut.sum) != (first_line, batch.line_count(), batch.sum())
            {
                let last = cut.first_line + cut.lines - 1;
                anyhow::bail!(
                    "lines {first_line} to {last} are not what they were when the count with --resume-id {} began: from \
                     there on this run counted nothing. It goes on with the same input, and with the same options that \
                     say what a key is; another input needs another id",
                    self.id
                );
            }
            next.push(match self.decided.remove(&first_line) {
                Some(decided) => Next::Known(decided.outcome()),
                None => {
                    let token = token(&self.series, &batch, cut.issued_at_ms);
                    Next::Send(Job { batch, token, in_doubt: true })
                }
            });
        }
        self.write(&cuts)?;
        Ok(next)
    }

    /// The input has ended: has it all that an earlier run has read?
    pub(super) fn input_ended(&self) -> anyhow::Result<()> {
        match self.earlier.front() {
            None => Ok(()),
            Some(cut) => anyhow::bail!(
                "the input ends before line {}, which it had when the count with --resume-id {} began",
                cut.first_line,
                self.id
            ),
        }
    }

    fn write(&mut self, records: &[Record]) -> anyhow::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for record in records {
            put(&mut bytes, record);
        }
        self.file.write_all(&bytes).and_then(|()| self.file.sync_data()).context("the journal")
    }
}

impl Notes {
    /// Not synced: what gets lost is asked of the service again.
    pub(super) fn decided(&mut self, outcome: &Outcome) -> io::Result<()> {
        let mut bytes = Vec::new();
        put(
            &mut bytes,
            &Record::Decided(Decided {
                first_line: outcome.first_line,
                lines: outcome.lines,
                applied: outcome.applied,
                skipped: outcome.skipped,
                unknown: outcome.unknown.clone().ranges(),
                failed: outcome.failed.clone().ranges(),
            }),
        );
        self.0.write_all(&bytes)
    }

    /// When this returns both may be sent.
    pub(super) fn split(&mut self, into: &[Job; 2]) -> anyhow::Result<()> {
        let into = [into[0].cut(), into[1].cut()];
        let mut bytes = Vec::new();
        put(&mut bytes, &Record::Split { first_line: into[0].first_line, into });
        self.0.write_all(&bytes).and_then(|()| self.0.sync_data()).context("the journal")
    }
}

impl Decided {
    fn outcome(self) -> Outcome {
        let mut reasons = Reasons::default();
        reasons.add_ranges("an earlier run could not find out", &self.unknown);
        reasons.add_ranges("could not be counted by an earlier run", &self.failed);
        Outcome {
            first_line: self.first_line,
            lines: self.lines,
            applied: self.applied,
            skipped: self.skipped,
            unknown: Lines::of(self.unknown),
            failed: Lines::of(self.failed),
            not_applied: Lines::default(),
            is_final: true,
            is_resumed: true,
            is_replayed: false,
            reasons,
        }
    }
}

fn put(bytes: &mut Vec<u8>, record: &Record) {
    serde_json::to_writer(&mut *bytes, record).expect("a Vec takes every byte");
    bytes.push(b'\n');
}

/// Where journals are kept, unless it was said: `$XDG_STATE_HOME/dkc`, or `~/.local/state/dkc`.
pub(super) fn default_folder() -> Option<PathBuf> {
    let set =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("dkc"))
}

pub(super) fn path(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("count-{id}.journal"))
}

/// Letters that may stand in a file name and in a token.
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

    /// All batches of an input, cut as the journal says and else into two lines.
    fn read(journal: &Journal, input: &'static str) -> Vec<Batch> {
        let input = BufReader::new(input.as_bytes());
        let mut batches = Batches::new(input, 2).cut_as(journal.cuts());
        std::iter::from_fn(|| batches.next().expect("it is memory")).collect()
    }

    /// `token issued_at in_doubt` of what is to be sent, `applied/lines` of what is known.
    fn said(next: &[Next]) -> Vec<String> {
        let say = |next: &Next| match next {
            Next::Send(job) => {
                let (_, lines) = job.token.key.split_once('-').expect("behind the series");
                format!("{lines} {}", job.in_doubt)
            }
            Next::Known(outcome) => format!("{}/{}", outcome.applied, outcome.lines),
        };
        next.iter().map(say).collect()
    }

    fn issued(next: &Next) -> u64 {
        match next {
            Next::Send(job) => job.token.issued_at_ms.expect("it has one"),
            Next::Known(_) => panic!("it is known"),
        }
    }

    #[test]
    fn the_next_run_sends_what_was_not_decided_as_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut first = open(folder.path());
        let next = first.admit(read(&first, "a\nb\nc\nd\ne\n")).expect("all new");
        assert_eq!(said(&next), ["1-2 false", "3-2 false", "5-1 false"]);
        let at = issued(&next[2]);
        let mut notes = first.notes().expect("notes");
        let outcome = Outcome { first_line: 3, lines: 2, applied: 2, ..Outcome::default() };
        notes.decided(&outcome).expect("it is written");
        drop((first, notes));
        std::thread::sleep(std::time::Duration::from_millis(2));

        let mut second = open(folder.path());
        // There is more of it now, and the last line has an end.
        let next = second.admit(read(&second, "a\nb\nc\nd\ne\nf\n")).expect("the same input");
        assert_eq!(said(&next), ["1-2 true", "2/2", "5-1 true", "6-1 false"]);
        assert_eq!(issued(&next[2]), at);
        assert!(issued(&next[3]) > at);
    }

    #[test]
    fn what_was_being_written_was_not_sent() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut first = open(folder.path());
        first.admit(read(&first, "a\nb\nc\n")).expect("all new");
        drop(first);
        let path = path(folder.path(), "id");
        let text = fs::read_to_string(&path).expect("text");
        fs::write(&path, &text[..text.len() - 5]).expect("written");
        let mut second = open(folder.path());
        let next = second.admit(read(&second, "a\nb\nx\n")).expect("the second cut is gone");
        assert_eq!(said(&next), ["1-2 true", "3-1 false"]);
        drop(second);
        let mut third = open(folder.path());
        let next = third.admit(read(&third, "a\nb\nx\n")).expect("what is torn is no longer there");
        assert_eq!(said(&next), ["1-2 true", "3-1 true"]);
    }

    #[test]
    fn tokens_are_of_one_journal_only() {
        let key = |folder: &Path| {
            let mut journal = open(folder);
            let next = journal.admit(read(&journal, "a\n")).expect("new or the same");
            match &next[..] {
                [Next::Send(job)] => job.token.key.clone(),
                _ => panic!("it is to be sent"),
            }
        };
        let [one, other] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        assert_eq!(key(one.path()), key(one.path()));
        assert_ne!(key(one.path()), key(other.path()));
    }

    #[test]
    fn what_was_split_stays_split() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut first = open(folder.path());
        let next = first.admit(read(&first, "a\nb\nc\nd\n")).expect("all new");
        let Some(Next::Send(job)) = next.last() else { panic!("it is to be sent") };
        let halves = job.batch.halves().expect("two lines");
        let halves = halves.map(|half| Job::new(first.series(), half));
        let mut notes = first.notes().expect("notes");
        notes.split(&halves).expect("it is written");
        let outcome = Outcome { first_line: 3, lines: 1, applied: 1, ..Outcome::default() };
        notes.decided(&outcome).expect("it is written");
        drop((first, notes));
        let mut second = open(folder.path());
        let next = second.admit(read(&second, "a\nb\nc\nd\ne\n")).expect("the same input");
        assert_eq!(said(&next), ["1-2 true", "1/1", "4-1 true", "5-1 false"]);
        let Next::Send(job) = &next[2] else { panic!("it is to be sent") };
        assert_eq!(job.token, halves[1].token);
    }

    #[test]
    fn another_input_is_noticed_before_it_is_sent() {
        for input in
            ["a\nb\nc\nx\n", "a\nb\nc\n", "a\nb\n", "a\nb\n\nd\n", "a\nb\nc\nd", "b\na\nc\nd\n"]
        {
            let folder = tempfile::tempdir().expect("a folder");
            let mut first = open(folder.path());
            first.admit(read(&first, "a\nb\nc\nd\n")).expect("all new");
            drop(first);
            let mut second = open(folder.path());
            let admitted = second.admit(read(&second, input)).and_then(|_| second.input_ended());
            // A line end that was not there says nothing else.
            assert_eq!(admitted.is_err(), input != "a\nb\nc\nd", "{input:?}");
        }
    }

    #[test]
    fn one_count_at_a_time_and_of_one_namespace() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = open(folder.path());
        let refused = |namespace| match Journal::open(folder.path(), "id", namespace) {
            Err(NoJournal::Usage(why)) => why,
            _ => panic!("it is not refused"),
        };
        assert!(refused("words").contains("runs"));
        drop(first);
        assert!(refused("other").contains("\"words\""));
        fs::write(path(folder.path(), "id"), "{}\n").expect("written");
        assert!(matches!(Journal::open(folder.path(), "id", "words"), Err(NoJournal::Failed(_))));
        // Where no folder can be made.
        let file = path(folder.path(), "id");
        let Err(NoJournal::Usage(why)) = Journal::open(&file, "id", "words") else {
            panic!("a file is no folder")
        };
        assert!(why.contains("--resume-dir"), "{why}");
    }
}
