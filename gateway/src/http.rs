//! Sockets → requests → answers: hyper at the edge of one worker.
//!
//! Settings that a newcomer would change:
//!
//! - `half_close` is on: whoever closes their sending side after the request, as `nc` does, still gets the answer. It
//!   also saves a read per request, since hyper need not look for the end of the connection while it waits.
//! - `pipeline_flush` is off: while anything unread is in its buffer it flushes nothing, so what is no HTTP would be met
//!   with silence instead of a 400.
//! - `writev` is off: nearly every answer is one small piece, cheaper copied behind its head than gathered by the kernel.
//! - A connection ends by an answer that says so, or when its client has nothing under way and nothing in the socket:
//!   hyper's own graceful shutdown would drop a request that was sent and not read yet (see `linger.rs`).
//! - A refused request's body is read and dropped, within bounds, before the answer is given: a socket that is closed
//!   with bytes unread is reset, and the client would never see why it was refused.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use engine::batcher::{Failure, ReadValues, WriteResult};
use engine::idempotency::{Scope, Token};
use engine::ids::{Now, Slot};
use engine::key::CounterKey;
use engine::ops::{Op, OpKind};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{CACHE_CONTROL, CONNECTION, EXPECT, HeaderName, HeaderValue, VARY};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, StatusCode, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use slab::Slab;
use telemetry::{Health, Metrics};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tracing::debug;

use crate::browser::{self, Allowed, Origins};
use crate::failure;
use crate::held::{Answer, Counted, Held};
use crate::lanes::Lanes;
use crate::linger::Gentle;
use crate::metrics::{Counters, Operation};
use crate::openapi;
use crate::problem::{Kind, Problem};
use crate::refusals::Refusals;
use crate::request::{
    self, BODY_BYTES_MAX, Batch, BodyType, FailedItem, Head, Page, ReadQuery, Route,
};
use crate::response::{self, About, Form, Response};
use crate::status;

/// The largest head of a request, and what is read from a socket at once. Whoever sends half a head makes us hold it, on
/// each of ten thousand connections.
const READ_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 64;
/// So much of a refused body is still read, to be able to say why.
const DRAIN_BYTES_MAX: usize = 32 << 20;
const DRAIN_WITHIN: Duration = Duration::from_secs(2);
/// Where clients wait for a place: a connection is closed for them once it has been idle for so long, of as many one.
const SHED_IDLE: Duration = Duration::from_millis(500);
const SHED_SHARE: usize = 8;
/// So much is set aside for a body that is only announced; it grows as it comes.
const ANNOUNCED_BYTES_MAX: usize = 64 * 1024;

static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
/// No answer stays true.
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
const CLOSE: HeaderValue = HeaderValue::from_static("close");

/// What the pages tell of.
#[derive(Clone)]
pub(crate) struct Pages {
    /// Of the gateway itself, and of all that it serves.
    pub(crate) health: Health,
    pub(crate) all: Health,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) board: status::Board,
}

/// How clients are treated.
#[derive(Clone)]
pub(crate) struct Manners {
    /// How long a connection may say nothing, take for a request's head, or not take anything of an answer.
    pub(crate) idle: Duration,
    /// Bytes of bodies and answers that a worker agrees to hold.
    pub(crate) held: usize,
    pub(crate) origins: Origins,
}

/// What the requests of one worker need.
pub(crate) struct Front {
    lanes: Rc<Lanes>,
    pages: Pages,
    counters: Arc<Counters>,
    manners: Manners,
    /// `Keep-Alive`, as every answer has it that is not the last.
    keep_alive: HeaderValue,
    /// Connections that are open, each with its task, and whether they are to end.
    connections: RefCell<Connections>,
    held: Held,
    /// The process ends: who has not sent all of a body by now is waited for no longer.
    over: watch::Sender<bool>,
}

#[derive(Default)]
struct Connections {
    open: Slab<Seat>,
    /// Every answer is the last of its connection.
    leaving: bool,
    /// Each ends as soon as nothing of it is under way.
    stopping: bool,
    /// Waits until all are closed.
    closed: Option<Waker>,
}

/// One connection that is open.
struct Seat {
    task: Option<Waker>,
    /// Since when no request of it is under way; none while one is.
    idle_since: Option<Instant>,
    /// It closes as soon as nothing of it is under way.
    ends: bool,
}

impl Front {
    pub(crate) fn new(
        lanes: Rc<Lanes>,
        pages: Pages,
        counters: Arc<Counters>,
        manners: Manners,
    ) -> Rc<Self> {
        let timeout = format!("timeout={}", manners.idle.as_secs());
        let keep_alive = HeaderValue::from_str(&timeout).expect("digits can stand in a header");
        let held = Held::new(manners.held);
        let (connections, over) = Default::default();
        Rc::new(Self { lanes, pages, counters, manners, keep_alive, connections, held, over })
    }

    /// Serves one connection to its end.
    pub(crate) async fn serve(self: Rc<Self>, stream: TcpStream) {
        let open = Open::new(self.clone());
        let (line_ended, ends) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
        let service = service_fn(|request| {
            let (front, place) = (self.clone(), open.place);
            let (line_ended, ends) = (line_ended.clone(), ends.clone());
            async move {
                // Its body may still be on its way.
                ends.set(false);
                front.is_idle_since(place, None);
                let answer = front.answer(request, place).await;
                front.is_idle_since(place, Some(Instant::now()));
                // What comes from here on belongs to the next head, but for what has been read already.
                line_ended.set(false);
                Ok::<_, Infallible>(answer)
            }
        });
        let stream = Gentle::new(stream, self.manners.idle, ends.clone());
        let stream = Refusals::new(stream, line_ended.clone(), self.counters.clone());
        let connection = http1::Builder::new()
            .half_close(true)
            .writev(false)
            .max_buf_size(READ_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .timer(TokioTimer::new())
            .header_read_timeout(self.manners.idle)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let served = poll_fn(|cx| {
            ends.set(open.is_to_end(cx.waker()));
            connection.as_mut().poll(cx)
        });
        if let Err(error) = served.await {
            debug!(%error, "connection ended");
        }
    }

    /// Every connection ends after the next answer.
    pub(crate) fn leave(&self) {
        self.connections.borrow_mut().leaving = true;
    }

    /// Nobody is waited for any longer.
    pub(crate) fn end(&self) {
        self.over.send_replace(true);
    }

    /// Every connection ends after what it has under way.
    pub(crate) fn stop(&self) {
        let mut connections = self.connections.borrow_mut();
        (connections.leaving, connections.stopping) = (true, true);
        connections.open.iter_mut().for_each(|(_, seat)| seat.wake());
    }

    /// Ends the connections that have been idle for longest, an eighth of all and at least one, so that others find a
    /// place. What has just been used is kept: its client may be about to send.
    pub(crate) fn shed(&self) {
        let mut connections = self.connections.borrow_mut();
        let open = &mut connections.open;
        let ending = open.iter().filter(|(_, seat)| seat.ends).count();
        let many = open.len().div_ceil(SHED_SHARE).saturating_sub(ending);
        let mut idle: Vec<&mut Seat> = open
            .iter_mut()
            .map(|(_, seat)| seat)
            .filter(|seat| {
                !seat.ends && seat.idle_since.is_some_and(|it| it.elapsed() >= SHED_IDLE)
            })
            .collect();
        idle.sort_by_key(|seat| seat.idle_since);
        for seat in idle.into_iter().take(many) {
            seat.ends = true;
            seat.wake();
            self.counters.shed.inc();
        }
    }

    fn is_idle_since(&self, place: usize, since: Option<Instant>) {
        self.connections.borrow_mut().open[place].idle_since = since;
    }

    /// Waits until no connection is open.
    pub(crate) async fn closed(&self) {
        poll_fn(|cx| {
            let mut connections = self.connections.borrow_mut();
            if connections.open.is_empty() {
                return Poll::Ready(());
            }
            connections.closed = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The answer that is given now is the last on its connection.
    fn is_last(&self, place: usize) -> bool {
        let connections = self.connections.borrow();
        connections.leaving || connections.open[place].ends
    }

    async fn answer(&self, request: Request<Incoming>, place: usize) -> Response {
        let (parts, mut body) = request.into_parts();
        let judged = self.manners.origins.judge(&parts.headers);
        let head = match &judged {
            Ok(_) => request::head(&parts).and_then(|head| head.at(self.lanes.clock())),
            Err(problem) => Err(problem.clone()),
        };
        let allowed = judged.unwrap_or_default();
        let operation = head.as_ref().map_or(Operation::None, |head| Operation::of(&head.route));
        let timeout = head.as_ref().map_or(DRAIN_WITHIN, |head| head.timeout);
        let marks = Marks {
            has_forms: head.as_ref().is_ok_and(|head| head.route.has_forms()),
            stays_true: head.as_ref().is_ok_and(|head| head.route == Route::Page(Page::OpenApi)),
        };
        let deadline = Deadline::after(&self.lanes, timeout);
        let mut counted = self.held.nothing();
        let answered = match head {
            _ if allowed.answers_preflight(&parts) => Ok(preflight()),
            Ok(head) => self.respond(head, &mut body, &mut counted, &deadline).await,
            Err(problem) => Err(problem),
        };
        let mut response = match answered {
            // Whoever probes with it wants the status.
            Ok(response) if parts.method == Method::OPTIONS => response.map(|_| Answer::new("")),
            Ok(response) => response,
            Err(problem) => {
                // What came of the body is dropped already, and so is what still comes.
                counted.set(0);
                // Who waits to be told to go on has not sent it yet.
                if !body.is_end_stream() && !parts.headers.contains_key(EXPECT) {
                    let mut over = self.over.subscribe();
                    tokio::select! {
                        () = drain(&mut body, deadline.instant) => {}
                        _ = over.wait_for(|&over| over) => {}
                    }
                }
                response::problem(&problem)
            }
        };
        counted.set(response.body().bytes());
        response.body_mut().count(counted, self.manners.idle);
        self.counters.request(operation, response.status().as_u16());
        self.mark(response.headers_mut(), marks, &allowed);
        if self.is_last(place) {
            response.headers_mut().insert(CONNECTION, CLOSE);
        } else if is_kept(&parts) {
            response.headers_mut().insert(&KEEP_ALIVE, self.keep_alive.clone());
        }
        response
    }

    /// Says for whom an answer is, and that no cache may keep it.
    fn mark(&self, headers: &mut HeaderMap, marks: Marks, allowed: &Allowed) {
        if !marks.stays_true {
            headers.insert(CACHE_CONTROL, NO_STORE);
        }
        let vary = match (marks.has_forms, self.manners.origins.vary()) {
            (true, true) => Some("Accept, Origin"),
            (true, false) => Some("Accept"),
            (false, true) => Some("Origin"),
            (false, false) => None,
        };
        if let Some(vary) = vary {
            headers.insert(VARY, HeaderValue::from_static(vary));
        }
        allowed.tell(headers);
    }

    async fn respond(
        &self,
        head: Head,
        body: &mut Incoming,
        counted: &mut Counted,
        deadline: &Deadline,
    ) -> Result<Response, Problem> {
        let Head { route, body: body_type, token, plain, .. } = head;
        if !route.has_body() && !body.is_end_stream() {
            return Err(request::body_not_wanted());
        }
        let token_of = |scope, also| {
            token.map(|token| Token { scope, token: token.key, issued: token.issued, also })
        };
        if !matches!(route, Route::Page(_)) && self.lanes.is_full() {
            return Err(self.crowded(&route));
        }
        match route {
            Route::Increment { counter, query } => {
                let body = self.read(body, counted, deadline).await?;
                let asked = request::increment(body_type, &body, query)?;
                let about = About::new(&counter, Form { plain, exact: asked.exact });
                let delta = i128::from(asked.delta);
                let kind = match asked.returning {
                    true => OpKind::AddReturning { delta },
                    false => OpKind::Add { delta },
                };
                let op = Op { counter, kind };
                let done = self.write_one(op, token_of(Scope::Counter, 0), deadline).await?;
                if asked.returning && done.value.is_none() {
                    return Err(no_value());
                }
                Ok(done.marked(about.incremented(asked.delta, done.value)))
            }
            Route::Delete { counter, exact } => {
                let about = About::deleted(&counter, Form { plain, exact });
                let op = Op { counter, kind: OpKind::Delete };
                let done = self.write_one(op, token_of(Scope::Counter, 0), deadline).await?;
                Ok(done.marked(about.value(done.value.ok_or_else(no_value)?, None)))
            }
            Route::Get { counter, query: ReadQuery { bounded_ms, exact } } => {
                let about = About::new(&counter, Form { plain, exact });
                let found = self.read_values(vec![counter], bounded_ms, deadline).await?;
                let &value = found.values.first().ok_or_else(no_value)?;
                Ok(about.value(value, bounded_ms.map(|_| found.staleness_ms)))
            }
            Route::GetMany { namespace, query: ReadQuery { bounded_ms, exact } } => {
                let body = self.read(body, counted, deadline).await?;
                let keys = request::keys(&namespace, &body)?;
                if keys.is_empty() {
                    return Ok(response::values(&[], &[], exact, bounded_ms.map(|_| 0)));
                }
                let found = self.read_values(keys.clone(), bounded_ms, deadline).await?;
                if found.values.len() != keys.len() {
                    return Err(no_value());
                }
                let staleness_ms = bounded_ms.map(|_| found.staleness_ms);
                let values = response::values(&keys, &found.values, exact, staleness_ms);
                refusable(values, counted)
            }
            Route::IncrementMany { namespace } => {
                let body = self.read(body, counted, deadline).await?;
                let written = Written { namespace: &namespace, body_type, body: &body };
                let batch = written.items(|bytes| counted.add(bytes))?;
                let token = token_of(Scope::Batch, batch.also());
                Ok(self.write_many(batch, token, written, deadline).await)
            }
            Route::Page(page) => refusable(self.page(page).await, counted),
        }
    }

    /// Too much waits for more to be taken. The machine, which names the reason of all else, does not see these.
    fn crowded(&self, route: &Route) -> Problem {
        let slot = match route {
            Route::Increment { counter, .. }
            | Route::Get { counter, .. }
            | Route::Delete { counter, .. } => Some(counter.slot()),
            _ => None,
        };
        let failure = match slot {
            Some(slot) if self.lanes.is_unled(slot) => Failure::NoPrimary,
            _ => Failure::QueueFull,
        };
        match route.writes() {
            true => failure::of_write(failure),
            false => failure::of_read(failure),
        }
    }

    async fn read_values(
        &self,
        keys: Vec<CounterKey>,
        bounded_ms: Option<u64>,
        deadline: &Deadline,
    ) -> Result<ReadValues, Problem> {
        let found = self.lanes.read(keys, bounded_ms, deadline.at).await;
        found.map_err(match bounded_ms {
            Some(_) => failure::of_bounded_read,
            None => failure::of_read,
        })
    }

    async fn write_one(
        &self,
        op: Op,
        token: Option<Token>,
        deadline: &Deadline,
    ) -> Result<Done, Problem> {
        let result = self.lanes.write(vec![op], token, deadline.at).await;
        let WriteResult { values, replayed, failed } = result;
        self.counters.replays.inc_by(replayed as u64);
        match failed.first() {
            Some(&(_, failure)) => Err(failure::of_write(failure)),
            None => {
                let value = values.first().map(|&(_, value)| value);
                Ok(Done { value, replayed: replayed > 0 })
            }
        }
    }

    async fn write_many(
        &self,
        Batch { ops, indexes, mut failed }: Batch,
        token: Option<Token>,
        written: Written<'_>,
        deadline: &Deadline,
    ) -> Response {
        let items = ops.len() + failed.len();
        if ops.is_empty() {
            return response::batch(items, &failed);
        }
        let result = self.lanes.write(ops, token, deadline.at).await;
        self.counters.replays.inc_by(result.replayed as u64);
        let not_done = result.failed.into_iter().map(|(op, failure)| FailedItem {
            index: indexes[op as usize],
            key: None,
            problem: failure::of_write(failure),
        });
        let understood = failed.len();
        failed.extend(not_done);
        if failed.len() > understood {
            failed.sort_by_key(|item| item.index);
            if response::only_reason(items, &failed).is_none() {
                written.name(&mut failed);
            }
        }
        // All that was applied was applied before: nothing has happened now.
        let done = Done {
            value: None,
            replayed: result.replayed > 0 && result.replayed == items - failed.len(),
        };
        done.marked(response::batch(items, &failed))
    }

    async fn page(&self, page: Page) -> Response {
        let Pages { health, all, metrics, board } = &self.pages;
        let (path, health) = match page {
            Page::Livez => ("/livez", health),
            Page::Readyz => ("/readyz", health),
            Page::ReadyzAll => ("/readyz", all),
            Page::Metrics => ("/metrics", health),
            Page::Cluster => {
                let body = board.cluster().await;
                return response::page(StatusCode::OK, "application/json", body);
            }
            Page::OpenApi => {
                return response::page(StatusCode::OK, "application/json", openapi::text());
            }
        };
        match telemetry::page(path, health, metrics) {
            Some(page) => response::page(page.status, page.content_type, page.body),
            None => response::problem(&Problem::new(Kind::Internal, "a page of ours is missing")),
        }
    }

    /// The whole body. What comes too late or is too large had no effect.
    async fn read(
        &self,
        body: &mut Incoming,
        counted: &mut Counted,
        deadline: &Deadline,
    ) -> Result<Bytes, Problem> {
        if body.is_end_stream() {
            return Ok(Bytes::new());
        }
        if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
            return Err(request::body_too_large());
        }
        let mut over = self.over.subscribe();
        let collected = tokio::time::timeout_at(deadline.instant.into(), collect(body, counted));
        tokio::select! {
            biased;
            collected = collected => collected.unwrap_or_else(|_| {
                let detail = "the body did not come in whole before the deadline";
                Err(Problem::bad_input("body", detail))
            }),
            _ = over.wait_for(|&over| over) => Err(failure::of_write(Failure::Stopping)),
        }
    }
}

/// What is said of an answer because of what was asked for.
struct Marks {
    /// `Accept` chooses its form.
    has_forms: bool,
    /// A cache may keep it.
    stays_true: bool,
}

/// The client means to keep the connection.
fn is_kept(parts: &Parts) -> bool {
    let lines = parts.headers.get_all(CONNECTION).iter().filter_map(|line| line.to_str().ok());
    let mut words = lines.flat_map(|line| line.split(',')).map(str::trim);
    match parts.version {
        Version::HTTP_10 => words.any(|word| word.eq_ignore_ascii_case("keep-alive")),
        _ => !words.any(|word| word.eq_ignore_ascii_case("close")),
    }
}

/// What a browser asks before a script may send something.
fn preflight() -> Response {
    let mut response = Response::new(Answer::new(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    browser::tell_preflight(response.headers_mut());
    response
}

/// The machine answered with fewer values than were asked for.
fn no_value() -> Problem {
    Problem::unknown(Kind::Internal, "an answer without the value that was asked for: a bug")
}

/// What became of one operation that was applied.
struct Done {
    /// If one was asked for.
    value: Option<i128>,
    /// It was applied before, under the same token.
    replayed: bool,
}

impl Done {
    fn marked(&self, response: Response) -> Response {
        if self.replayed { response::replayed(response) } else { response }
    }
}

/// A body of many items, as it came.
struct Written<'a> {
    namespace: &'a str,
    body_type: BodyType,
    body: &'a [u8],
}

impl Written<'_> {
    fn items(&self, room: impl FnMut(usize) -> Result<(), Problem>) -> Result<Batch, Problem> {
        request::increments(self.namespace, self.body_type, self.body, room)
    }

    /// Gives failed items their keys. The operations have gone to the machine, and failing is rare: the body is read
    /// again.
    fn name(&self, failed: &mut [FailedItem]) {
        let Ok(again) = self.items(|_| Ok(())) else { return };
        for item in failed.iter_mut().filter(|item| item.key.is_none()) {
            if let Ok(op) = again.indexes.binary_search(&item.index) {
                item.key = Some(again.ops[op].counter.key().to_vec());
            }
        }
    }
}

/// When a request is over, on both clocks.
struct Deadline {
    at: Now,
    instant: Instant,
}

impl Deadline {
    fn after(lanes: &Lanes, timeout: Duration) -> Self {
        let at = Now(lanes.now().0 + timeout.as_micros() as u64);
        Self { at, instant: Instant::now() + timeout }
    }
}

/// Nothing was changed, so it may be refused if too much is held already.
fn refusable(response: Response, counted: &mut Counted) -> Result<Response, Problem> {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let refused = |problem| Problem { status, ..problem };
    counted.answer(response.body().bytes()).map_err(refused)?;
    Ok(response)
}

async fn collect(body: &mut Incoming, counted: &mut Counted) -> Result<Bytes, Problem> {
    let Some(first) = data(body).await? else {
        return Ok(Bytes::new());
    };
    count(&first, counted)?;
    // Most bodies come in one piece, which is taken as it is.
    let Some(second) = data(body).await? else {
        return Ok(first);
    };
    let expected = first.len() + second.len() + body.size_hint().lower() as usize;
    let mut all = BytesMut::with_capacity(expected.min(ANNOUNCED_BYTES_MAX));
    all.extend_from_slice(&first);
    let mut next = Some(second);
    while let Some(piece) = next {
        count(&piece, counted)?;
        all.extend_from_slice(&piece);
        next = data(body).await?;
    }
    Ok(all.freeze())
}

fn count(piece: &Bytes, counted: &mut Counted) -> Result<(), Problem> {
    if counted.bytes() + piece.len() > BODY_BYTES_MAX {
        return Err(request::body_too_large());
    }
    counted.add(piece.len())
}

/// The next piece of a body.
async fn data(body: &mut Incoming) -> Result<Option<Bytes>, Problem> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            // What is no data is trailers, which say nothing that we know.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(error)) => {
                return Err(Problem::bad_input("body", format!("can't be read: {error}")));
            }
        }
    }
}

/// Reads the rest of a body and drops it, within bounds of size and time.
async fn drain(body: &mut Incoming, until: Instant) {
    let rest = async {
        let mut bytes = 0;
        while bytes < DRAIN_BYTES_MAX {
            match data(body).await {
                Ok(Some(piece)) => bytes += piece.len(),
                Ok(None) | Err(_) => break,
            }
        }
    };
    let until = until.min(Instant::now() + DRAIN_WITHIN);
    let _cut = tokio::time::timeout_at(until.into(), rest).await;
}

impl Seat {
    fn wake(&mut self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }
}

/// A connection's place in the list of open ones.
struct Open {
    front: Rc<Front>,
    place: usize,
}

impl Open {
    fn new(front: Rc<Front>) -> Self {
        let seat = Seat { task: None, idle_since: Some(Instant::now()), ends: false };
        let place = front.connections.borrow_mut().open.insert(seat);
        front.counters.connections.inc();
        Self { front, place }
    }

    /// Whether the connection is to end, since nothing of it is under way. If not, the task is woken when it is.
    fn is_to_end(&self, waker: &Waker) -> bool {
        let mut connections = self.front.connections.borrow_mut();
        let stopping = connections.stopping;
        let seat = &mut connections.open[self.place];
        if !seat.task.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
            seat.task = Some(waker.clone());
        }
        (stopping || seat.ends) && seat.idle_since.is_some()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut connections = self.front.connections.borrow_mut();
        connections.open.remove(self.place);
        self.front.counters.connections.dec();
        if connections.open.is_empty()
            && let Some(waker) = connections.closed.take()
        {
            waker.wake();
        }
    }
}
