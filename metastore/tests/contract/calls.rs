//! A relay between a process and its etcd that knows single calls: one answer of many can be lost, held back and overtaken.
//!
//! `etcd::Relay` knows bytes only: it loses all answers or none, and what loses all of them is noticed in other ways too.
//! Used by the tests of all roles.
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

/// What becomes of one call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fate {
    /// Nothing: it is a later one that is meant.
    Pass,
    /// It has its effect, and its answer is lost.
    LoseAnswer,
    /// It never reaches etcd.
    LoseCall,
    /// It reaches etcd once [`Calls::release`] is called.
    HoldCall,
    /// It has its effect; the answer arrives once [`Calls::release`] is called. Later calls are answered before.
    HoldAnswer,
    /// It never reaches etcd, and etcd seems to refuse it.
    Refuse,
    /// It is a `Status`, and is answered by an etcd of this version.
    SayVersion(&'static str),
}

/// The relay. Cloned, it is the same.
#[derive(Clone)]
pub(crate) struct Calls {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    etcd: Channel,
    plan: Mutex<Plan>,
    /// How often it was released.
    released: watch::Sender<u32>,
}

#[derive(Default)]
struct Plan {
    /// What becomes of the next calls of a method, such as `Txn`; the first of a method is for its next call.
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

    /// This becomes of the next call of a method for which nothing is planned yet.
    pub(crate) fn next(&self, method: &'static str, fate: Fate) {
        self.shared.plan().fates.push_back((method, fate));
    }

    /// What is held goes on.
    pub(crate) fn release(&self) {
        self.shared.released.send_modify(|times| *times += 1);
    }

    /// How many calls of a method have come.
    pub(crate) fn seen(&self, method: &str) -> usize {
        self.shared.plan().seen.iter().filter(|&seen| seen == method).count()
    }

    /// Waits until all that was planned has happened, or is being held.
    pub(crate) async fn happened(&self) {
        let began = Instant::now();
        while !self.shared.plan().fates.is_empty() {
            assert!(began.elapsed() < Duration::from_secs(20), "no such call came");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until so many calls are being held.
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
        self.plan.lock().expect("nobody panics holding it")
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
            Some(Fate::SayVersion(version)) => return status_of(version),
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
        // Its sender is here.
        let _released = released.changed().await;
        self.plan().held -= 1;
    }
}

/// As from a connection that broke.
fn lost() -> Response<Body> {
    Status::unavailable("the relay has lost it").into_http()
}

/// What a `Status` is answered with: a message that is not compressed, its length, and field 2, the version.
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
