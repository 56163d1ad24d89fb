//! The one thread that writes the log. It may be held up, or fail, for as long as it likes.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use tracing::{Dispatch, Level, error, info, warn};

use super::queue::{Queue, Work};
use super::repeats::Repeated;

/// A pipe that is full, and that somebody has set not to block, is tried again after this.
const FULL_PIPE_AGAIN: Duration = Duration::from_millis(20);

/// Writes what a queue holds.
pub(crate) struct Writer<W> {
    queue: Queue,
    output: W,
    /// How the writer's own lines are formatted.
    dispatch: Dispatch,
    /// The last line could be written.
    works: bool,
    /// What stands at the end of the output is half a line.
    torn: bool,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(queue: Queue, output: W, dispatch: Dispatch) -> Self {
        Self { queue, output, dispatch, works: true, torn: false }
    }

    /// For as long as the process lives.
    pub(crate) fn run(mut self) -> ! {
        self.queue.begin();
        loop {
            match self.queue.next(self.works) {
                Work::Write(line) => self.write_or_lose(&line),
                Work::TellRepeated(repeated) => {
                    for line in self.say(|| repeated.iter().for_each(tell)) {
                        self.write_or_lose(&line);
                    }
                }
                Work::TellLost(lines) => self.tell_lost(lines),
            }
        }
    }

    /// Formats what `tell` says as lines of the log.
    fn say(&self, tell: impl FnOnce()) -> Vec<Vec<u8>> {
        tracing::dispatcher::with_default(&self.dispatch, tell);
        self.queue.take_own()
    }

    fn tell_lost(&mut self, lines: u64) {
        let tell =
            || error!(lines, "{lines} lines of the log were lost: they could not be written");
        let told = self.say(tell);
        // Nothing is said where not even errors are wanted.
        if told.iter().all(|line| self.write(line).is_ok()) {
            self.queue.told_lost(lines);
        }
    }

    fn write_or_lose(&mut self, line: &[u8]) {
        if self.write(line).is_err() {
            self.queue.lose(1);
        }
    }

    /// One whole line, beginning a new one.
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
        written.map_err(|Torn { after, why }| {
            self.torn |= after > 0;
            why
        })
    }
}

/// How much of a line was written, and why the rest was not.
struct Torn {
    after: usize,
    why: io::Error,
}

fn write_all(output: &mut impl Write, line: &[u8]) -> Result<(), Torn> {
    let mut after = 0;
    while after < line.len() {
        match output.write(&line[after..]) {
            Ok(0) => return Err(Torn { after, why: io::ErrorKind::WriteZero.into() }),
            Ok(count) => after += count,
            Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
            Err(why) if why.kind() == io::ErrorKind::WouldBlock => thread::sleep(FULL_PIPE_AGAIN),
            Err(why) => return Err(Torn { after, why }),
        }
    }
    Ok(())
}

/// At the level of what was not said, so that whoever wants that hears of it.
fn tell(Repeated { level, line, times }: &Repeated) {
    let message = "more lines like this were not written";
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
    use crate::log::queue::Limits;
    use crate::log::repeats::Often;
    use crate::log::{LogOptions, dispatch};

    const LIMIT: Duration = Duration::from_secs(20);

    /// An output that can be full, or not drained.
    #[derive(Clone, Default)]
    struct Output(Arc<(Mutex<Inside>, Condvar)>);

    #[derive(Default)]
    struct Inside {
        text: String,
        /// Bytes that still find room.
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
        queue: Queue,
        dropped: Counter,
        _scope: tracing::dispatcher::DefaultGuard,
    }

    /// A log of this thread.
    fn log(limits: Limits) -> Log {
        let (output, dropped) = (Output::default(), Counter::default());
        let queue = Queue::new(limits, dropped.clone());
        let dispatch = dispatch(LogOptions::default(), false, queue.clone());
        let writer = Writer::new(queue.clone(), output.clone(), dispatch.clone());
        thread::spawn(|| writer.run());
        let _scope = tracing::dispatcher::set_default(&dispatch);
        Log { output, queue, dropped, _scope }
    }

    fn soon() -> Limits {
        Limits { again_after: Duration::from_millis(5), ..Limits::default() }
    }

    #[test]
    fn lines_are_written_in_order_and_the_last_ones_before_the_end() {
        let log = log(soon());
        for number in 0..100 {
            info!(number, "said");
        }
        log.queue.flush(LIMIT);
        let text = log.output.until("said", |_| true);
        let numbers: Vec<_> =
            text.lines().map(|line| line.split_once("number=").unwrap().1).collect();
        assert_eq!(numbers, (0..100).map(|number| number.to_string()).collect::<Vec<_>>());
        assert_eq!(log.dropped.get(), 0);
    }

    /// A file system that fills in the middle of a line, and has room again later: also if nobody logs then.
    #[test]
    fn what_could_not_be_written_is_counted_and_told_of() {
        let log = log(soon());
        log.output.change(|inside| inside.room = Some(10));
        warn!("torn");
        warn!("lost");
        let tries = log.output.0.0.lock().unwrap().tries;
        log.output.until("tried again", |inside| inside.tries > tries + 5);
        assert_eq!(log.dropped.get(), 2);
        log.output.change(|inside| inside.room = None);
        let text = log.output.until("told", |inside| inside.text.contains("were lost"));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines.len(), lines[0].len()), (2, 10), "half a line, then a whole one: {text}");
        assert!(lines[1].contains("2 lines of the log were lost"), "{text}");
        warn!("goes on");
        let text = log.output.until("going on", |inside| inside.text.contains("goes on"));
        assert_eq!(text.matches("were lost").count(), 1, "{text}");
        assert_eq!(log.dropped.get(), 2, "as before");
    }

    #[test]
    fn a_pipe_that_nobody_drains_holds_nobody_up() {
        let often = Often { place_max: 10_000, ..Often::default() };
        let log = log(Limits { bytes_max: 1_000, often, ..soon() });
        log.output.change(|inside| inside.blocked = true);
        for number in 0..1_000 {
            info!(number, "said");
        }
        assert!(log.dropped.get() > 900, "{}", log.dropped.get());
        // The end does not wait for it either.
        log.queue.flush(Duration::from_millis(1));
        log.output.change(|inside| inside.blocked = false);
        let text = log.output.until("told", |inside| inside.text.contains("were lost"));
        assert!(text.contains("number=0"), "{text}");
    }

    #[test]
    fn lines_that_are_said_too_often_are_told_once_with_their_number() {
        let often = Often { period: Duration::from_millis(50), same_max: 2, place_max: 100 };
        let log = log(Limits { often, ..soon() });
        for _ in 0..10 {
            warn!("again");
        }
        let text = log.output.until("told", |inside| inside.text.contains("not written"));
        let told = text.lines().find(|line| line.contains("not written")).unwrap();
        assert!(told.contains("WARN") && told.contains("again"), "{told}");
        log.queue.flush(LIMIT);
        let text = log.output.until("all told", |_| true);
        let times = text.lines().filter_map(|line| line.split_once("times=")?.1.split(' ').next());
        let times: u32 = times.map(|times| times.parse::<u32>().unwrap()).sum();
        let said = text.lines().filter(|line| line.ends_with("WARN again")).count();
        assert_eq!(said + times as usize, 10, "{text}");
        assert!(said >= 2, "{text}");
        assert_eq!(log.dropped.get(), 0, "none of them was lost");
    }

    /// Both ways to say it are lines that the format's readers take.
    #[test]
    fn what_is_told_is_json_where_lines_are() {
        let options = LogOptions { log_format: crate::Format::Json, ..LogOptions::default() };
        let queue = Queue::new(soon(), Counter::default());
        let dispatch = dispatch(options, false, queue.clone());
        let output = Output::default();
        let writer = Writer::new(queue.clone(), output.clone(), dispatch.clone());
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
