//! The one thread that writes the log. Its writes may block or fail for any length of time.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use tracing::{Dispatch, Level, error, info, warn};

use super::queue::{LineQueue, WriterWork};
use super::repeats::SuppressedLines;

/// The pause before a full pipe in non-blocking mode is tried again.
const FULL_PIPE_AGAIN: Duration = Duration::from_millis(20);

/// Writes the lines of a queue to an output.
pub(crate) struct LineWriter<W> {
    queue: LineQueue,
    output: W,
    /// The subscriber that formats the writer's own lines.
    dispatch: Dispatch,
    /// `true` if the last line could be written.
    works: bool,
    /// `true` if the output ends with half a line.
    torn: bool,
}

impl<W: Write> LineWriter<W> {
    pub(crate) fn new(queue: LineQueue, output: W, dispatch: Dispatch) -> Self {
        Self { queue, output, dispatch, works: true, torn: false }
    }

    /// Writes lines for as long as the process lives.
    pub(crate) fn run(mut self) -> ! {
        self.queue.begin();
        loop {
            match self.queue.next(self.works) {
                WriterWork::Write(line) => self.write_or_lose(&line),
                WriterWork::ReportSuppressed(suppressed) => {
                    for line in self.format_own(|| suppressed.iter().for_each(log_suppressed)) {
                        self.write_or_lose(&line);
                    }
                }
                WriterWork::ReportLost(lines) => self.report_lost(lines),
            }
        }
    }

    /// Formats what `log` logs and returns it as lines.
    fn format_own(&self, log: impl FnOnce()) -> Vec<Vec<u8>> {
        tracing::dispatcher::with_default(&self.dispatch, log);
        self.queue.take_own()
    }

    fn report_lost(&mut self, lines: u64) {
        let log = || error!(lines, "{lines} log lines were lost: they could not be written");
        let report = self.format_own(log);
        // There are no lines if not even errors are logged.
        if report.iter().all(|line| self.write(line).is_ok()) {
            self.queue.reported_lost(lines);
        }
    }

    fn write_or_lose(&mut self, line: &[u8]) {
        if self.write(line).is_err() {
            self.queue.lose(1);
        }
    }

    /// Writes one whole line, after a line break if the output ends with half a line.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let written = match self.torn {
            true => write_all(&mut self.output, b"\n"),
            false => Ok(()),
        };
        let written = written.and_then(|()| {
            self.torn = false;
            write_all(&mut self.output, line)
        });
        self.works = written.is_ok();
        written.map_err(|PartialWrite { after, why }| {
            self.torn |= after > 0;
            why
        })
    }
}

/// The end of a line that was written in part, and the error that stopped it.
struct PartialWrite {
    after: usize,
    why: io::Error,
}

fn write_all(output: &mut impl Write, line: &[u8]) -> Result<(), PartialWrite> {
    let mut after = 0;
    while after < line.len() {
        match output.write(&line[after..]) {
            Ok(0) => return Err(PartialWrite { after, why: io::ErrorKind::WriteZero.into() }),
            Ok(count) => after += count,
            Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
            Err(why) if why.kind() == io::ErrorKind::WouldBlock => thread::sleep(FULL_PIPE_AGAIN),
            Err(why) => return Err(PartialWrite { after, why }),
        }
    }
    Ok(())
}

/// Logs the count of suppressed lines at their own level, so that the same readers see it.
fn log_suppressed(SuppressedLines { level, line, times }: &SuppressedLines) {
    let message = "repeated lines suppressed";
    match *level {
        Level::ERROR => error!(times, line, "{message}"),
        Level::WARN => warn!(times, line, "{message}"),
        _ => info!(times, line, "{message}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Condvar, Mutex};

    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::log::queue::QueueLimits;
    use crate::log::repeats::RepeatLimits;
    use crate::log::{LogOptions, dispatch};

    const LIMIT: Duration = Duration::from_secs(20);

    /// An output that can be full, or not drained.
    #[derive(Clone, Default)]
    struct Output(Arc<(Mutex<Inside>, Condvar)>);

    #[derive(Default)]
    struct Inside {
        text: String,
        /// The number of bytes for which there is room.
        room: Option<usize>,
        blocked: bool,
        tries: usize,
    }

    impl Output {
        fn change(&self, change: impl FnOnce(&mut Inside)) {
            change(&mut self.0.0.lock().unwrap());
            self.0.1.notify_all();
        }

        fn until(&self, what: &str, so: impl Fn(&Inside) -> bool) -> String {
            let waits = |inside: &mut Inside| !so(inside);
            let waited = self.0.1.wait_timeout_while(self.0.0.lock().unwrap(), LIMIT, waits);
            let (inside, timed_out) = waited.unwrap();
            assert!(!timed_out.timed_out(), "not {what}: {}", inside.text);
            inside.text.clone()
        }
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut inside = self.0.0.lock().unwrap();
            inside.tries += 1;
            self.0.1.notify_all();
            let mut inside = self.0.1.wait_while(inside, |inside| inside.blocked).unwrap();
            let count = inside.room.map_or(bytes.len(), |room| room.min(bytes.len()));
            if count == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            inside.room = inside.room.map(|room| room - count);
            inside.text += str::from_utf8(&bytes[..count]).unwrap();
            self.0.1.notify_all();
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Log {
        output: Output,
        queue: LineQueue,
        dropped: Counter,
        _scope: tracing::dispatcher::DefaultGuard,
    }

    /// A log of this thread.
    fn log(limits: QueueLimits) -> Log {
        let (output, dropped) = (Output::default(), Counter::default());
        let queue = LineQueue::new(limits, dropped.clone());
        let dispatch = dispatch(LogOptions::default(), false, queue.clone());
        let writer = LineWriter::new(queue.clone(), output.clone(), dispatch.clone());
        thread::spawn(|| writer.run());
        let _scope = tracing::dispatcher::set_default(&dispatch);
        Log { output, queue, dropped, _scope }
    }

    fn soon() -> QueueLimits {
        QueueLimits { again_after: Duration::from_millis(5), ..QueueLimits::default() }
    }

    #[test]
    fn lines_are_written_in_order_and_the_last_ones_before_the_end() {
        let log = log(soon());
        for number in 0..100 {
            info!(number, "line");
        }
        log.queue.flush(LIMIT);
        let text = log.output.until("written", |_| true);
        let numbers: Vec<_> =
            text.lines().map(|line| line.split_once("number=").unwrap().1).collect();
        assert_eq!(numbers, (0..100).map(|number| number.to_string()).collect::<Vec<_>>());
        assert_eq!(log.dropped.get(), 0);
    }

    /// The file system fills in the middle of a line and has room again later; the report must come
    /// even if nothing is logged then.
    #[test]
    fn lost_lines_are_counted_and_reported() {
        let log = log(soon());
        log.output.change(|inside| inside.room = Some(10));
        warn!("torn");
        warn!("lost");
        let tries = log.output.0.0.lock().unwrap().tries;
        log.output.until("tried again", |inside| inside.tries > tries + 5);
        assert_eq!(log.dropped.get(), 2);
        log.output.change(|inside| inside.room = None);
        let text = log.output.until("reported", |inside| inside.text.contains("were lost"));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines.len(), lines[0].len()), (2, 10), "half a line, then a whole one: {text}");
        assert!(lines[1].contains("2 log lines were lost"), "{text}");
        warn!("goes on");
        let text = log.output.until("going on", |inside| inside.text.contains("goes on"));
        assert_eq!(text.matches("were lost").count(), 1, "{text}");
        assert_eq!(log.dropped.get(), 2, "as before");
    }

    #[test]
    fn a_pipe_that_is_not_drained_blocks_no_thread() {
        let repeat = RepeatLimits { place_max: 10_000, ..RepeatLimits::default() };
        let log = log(QueueLimits { bytes_max: 1_000, repeat, ..soon() });
        log.output.change(|inside| inside.blocked = true);
        for number in 0..1_000 {
            info!(number, "line");
        }
        assert!(log.dropped.get() > 900, "{}", log.dropped.get());
        // The end of the process does not wait for it either.
        log.queue.flush(Duration::from_millis(1));
        log.output.change(|inside| inside.blocked = false);
        log.output.until("reported", |inside| inside.text.contains("were lost"));
        // A writer that was late reports before it writes what is kept.
        log.output.until("kept", |inside| inside.text.contains("number=0"));
    }

    #[test]
    fn repeated_lines_are_reported_once_with_their_number() {
        let repeat =
            RepeatLimits { period: Duration::from_millis(50), same_max: 2, place_max: 100 };
        let log = log(QueueLimits { repeat, ..soon() });
        for _ in 0..10 {
            warn!("again");
        }
        let text = log.output.until("reported", |inside| inside.text.contains("suppressed"));
        let report = text.lines().find(|line| line.contains("suppressed")).unwrap();
        assert!(report.contains("WARN") && report.contains("again"), "{report}");
        log.queue.flush(LIMIT);
        let text = log.output.until("all reported", |_| true);
        let times = text.lines().filter_map(|line| line.split_once("times=")?.1.split(' ').next());
        let times: u32 = times.map(|times| times.parse::<u32>().unwrap()).sum();
        let written = text.lines().filter(|line| line.ends_with("WARN again")).count();
        assert_eq!(written + times as usize, 10, "{text}");
        assert!(written >= 2, "{text}");
        assert_eq!(log.dropped.get(), 0, "none of them was lost");
    }

    /// Both reports are lines that parsers of the format accept.
    #[test]
    fn reports_are_json_where_lines_are() {
        let options = LogOptions { log_format: crate::LogFormat::Json, ..LogOptions::default() };
        let queue = LineQueue::new(soon(), Counter::default());
        let dispatch = dispatch(options, false, queue.clone());
        let output = Output::default();
        let writer = LineWriter::new(queue.clone(), output.clone(), dispatch.clone());
        thread::spawn(|| writer.run());
        tracing::dispatcher::with_default(&dispatch, || {
            (0..7).for_each(|_| error!("a \"quoted\" line"));
        });
        queue.lose(3);
        queue.flush(LIMIT);
        let text = output.until("written", |_| true);
        assert_eq!(text.lines().count(), 7, "{text}");
        assert!(text.lines().all(|line| line.starts_with('{') && line.ends_with('}')), "{text}");
        assert!(text.contains(r#""times":2"#) && text.contains(r#""lines":3"#), "{text}");
    }
}
