//! A relay between a process and its etcd that distinguishes calls: a single reply can be lost,
//! held back and overtaken.
//!
//! `etcd::Relay` only knows bytes: it loses all replies or none, and the loss of all is noticed in
//! other ways, too. The tests of all roles use this relay.
#![allow(dead_code, reason = "each test binary that includes this uses a part of it")]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};

/// The fate of one call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fate {
    /// The call passes; the plan is for a later one.
    Pass,
    /// The call takes effect, and its reply is lost.
    LoseAnswer,
    /// The call never reaches etcd.
    LoseCall,
    /// The call reaches etcd once [`Calls::release`] is called.
    HoldCall,
    /// The call takes effect; the reply arrives once [`Calls::release`] is called. Replies to later
    /// calls arrive before.
    HoldAnswer,
    /// The call never reaches etcd, and etcd seems to refuse it.
    Refuse,
    /// The call is a `Status`, and the reply contains this version.
    ReplyVersion(&'static str),
}

/// The relay. Clones share it.
#[derive(Clone)]
pub(crate) struct Calls {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    etcd: Channel,
    plan: Mutex<Plan>,
    /// The number of calls of [`Calls::release`].
    released: watch::Sender<u32>,
}

#[derive(Default)]
struct Plan {
    /// The fates of the next calls of each method, such as `Txn`, in the order of the calls.
    fates: VecDeque<(&'static str, Fate)>,
    seen: VecDeque<String>,
    held: usize,
}

impl Calls {
    pub(crate) async fn start(to: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let etcd = Endpoint::from_shared(format!("http://{to}")).expect("an address");
        let (etcd, plan) = (etcd.tcp_nodelay(true).connect_lazy(), Mutex::default());
        let shared = Arc::new(Shared { etcd, plan, released: watch::Sender::new(0) });
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let server = Server::builder()
            .add_service(Pass::<Kv>::new(&shared))
            .add_service(Pass::<Lease>::new(&shared))
            .add_service(Pass::<Watch>::new(&shared))
            .add_service(Pass::<Maintenance>::new(&shared));
        tokio::spawn(server.serve_with_incoming(incoming));
        Self { port, shared }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Plans the fate of the next call of a method for which none is planned yet.
    pub(crate) fn next(&self, method: &'static str, fate: Fate) {
        self.shared.plan().fates.push_back((method, fate));
    }

    /// Lets the held calls and replies continue.
    pub(crate) fn release(&self) {
        self.shared.released.send_modify(|times| *times += 1);
    }

    /// Returns the number of calls of a method so far.
    pub(crate) fn seen(&self, method: &str) -> usize {
        self.shared.plan().seen.iter().filter(|&seen| seen == method).count()
    }

    /// Waits until all planned calls have happened, or are held.
    pub(crate) async fn happened(&self) {
        let began = Instant::now();
        while !self.shared.plan().fates.is_empty() {
            assert!(began.elapsed() < Duration::from_secs(20), "no such call came");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until so many calls are held.
    pub(crate) async fn holds(&self, count: usize) {
        let began = Instant::now();
        while self.shared.plan().held != count {
            assert!(began.elapsed() < Duration::from_secs(20), "{} are", self.shared.plan().held);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Shared {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().expect("no panic while it is held")
    }

    fn fate_of(&self, method: &str) -> Option<Fate> {
        let mut plan = self.plan();
        plan.seen.push_back(method.to_owned());
        let at = plan.fates.iter().position(|(of, _)| *of == method)?;
        plan.fates.remove(at).map(|(_, fate)| fate)
    }

    async fn call(&self, request: Request<Body>) -> Response<Body> {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let fate = self.fate_of(&method);
        match fate {
            Some(Fate::LoseCall) => return lost(),
            Some(Fate::HoldCall) => self.hold().await,
            Some(Fate::Refuse) => return Status::permission_denied("by the relay").into_http(),
            Some(Fate::ReplyVersion(version)) => return status_of(version),
            _ => {}
        }
        let answer = self.pass_on(request).await;
        match fate {
            Some(Fate::LoseAnswer) => return lost(),
            Some(Fate::HoldAnswer) => self.hold().await,
            _ => {}
        }
        answer
    }

    async fn pass_on(&self, request: Request<Body>) -> Response<Body> {
        let mut etcd = self.etcd.clone();
        let answered = async {
            poll_fn(|cx| etcd.poll_ready(cx)).await?;
            etcd.call(request).await
        };
        answered.await.unwrap_or_else(|error| Status::unavailable(error.to_string()).into_http())
    }

    async fn hold(&self) {
        let mut released = self.released.subscribe();
        self.plan().held += 1;
        // The sender is a field of this relay.
        let _released = released.changed().await;
        self.plan().held -= 1;
    }
}

/// Returns the reply that a client sees when its connection breaks.
fn lost() -> Response<Body> {
    Status::unavailable("the relay has lost it").into_http()
}

/// Returns the reply to a `Status`: an uncompressed message, its length, and field 2, the version.
fn status_of(version: &str) -> Response<Body> {
    let message = format!("\x12{}{version}", version.len() as u8 as char);
    let framed = format!("\0\0\0\0{}{message}", message.len() as u8 as char);
    let answered = Response::builder().header("content-type", "application/grpc");
    answered.header("grpc-status", "0").body(Body::new(framed)).expect("a response")
}

/// One of etcd's services.
struct Pass<S> {
    shared: Arc<Shared>,
    service: std::marker::PhantomData<fn() -> S>,
}

impl<S> Pass<S> {
    fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), service: std::marker::PhantomData }
    }
}

impl<S> Clone for Pass<S> {
    fn clone(&self) -> Self {
        Self::new(&self.shared)
    }
}

macro_rules! services {
    ($($service:ident = $name:literal),* $(,)?) => {
        $(struct $service;

        impl NamedService for Pass<$service> {
            const NAME: &'static str = $name;
        })*
    };
}

services! {
    Kv = "etcdserverpb.KV",
    Lease = "etcdserverpb.Lease",
    Watch = "etcdserverpb.Watch",
    Maintenance = "etcdserverpb.Maintenance",
}

impl<S> Service<Request<Body>> for Pass<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { Ok(shared.call(request).await) })
    }
}
