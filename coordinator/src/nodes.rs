//! Questions to storage nodes: are you alive, where do your logs end, please step down.
//!
//! A connection per node is kept open, so that a probe costs one message. **A refused connection and silence are told
//! apart**: the first is a process that has gone, known at once; the second may be a network that is slow.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::time::Duration;

use engine::coordinator::{Event, ProbeResult};
use engine::ids::{Epoch, ShardId, StoreBoot, StoreId};
use engine::message::{NodeQuery, NodeQueryReply};
use proto::wire;
use proto::wire::control_client::ControlClient;
use telemetry::Vital;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tracing::{debug, warn};

use crate::etcd::Told;

/// Who has not answered a probe by then is silent (DESIGN §9).
const PROBE_LIMIT: Duration = Duration::from_millis(150);
/// The machine itself waits for less; what comes later may still help the next decision.
const GATHER_LIMIT: Duration = Duration::from_millis(150);
/// A primary answers when what it has ordered is on its disk.
const STEP_DOWN_LIMIT: Duration = Duration::from_secs(1);

pub(crate) struct Nodes {
    told: mpsc::Sender<Told>,
    links: BTreeMap<StoreId, Link>,
    /// Addresses that nobody can dial: each was logged once.
    undialable: BTreeMap<StoreId, String>,
    vital: Vital,
}

struct Link {
    address: String,
    client: ControlClient<Channel>,
}

/// Why there is no answer.
enum Miss {
    /// Nothing listens there.
    Refused,
    Silent,
}

impl Nodes {
    pub(crate) fn new(told: mpsc::Sender<Told>, vital: Vital) -> Self {
        Self { told, links: BTreeMap::new(), undialable: BTreeMap::new(), vital }
    }

    pub(crate) fn probe(&mut self, asked: Asked<'_>, probe: u64) {
        let Some(client) = self.client(&asked) else {
            return self.tell_now(Event::Probed { probe, result: ProbeResult::Silent });
        };
        let question = asked.question(NodeQuery::Probe { to: asked.to });
        let told = self.told.clone();
        self.spawn(async move {
            let result = match ask(client, question, PROBE_LIMIT).await {
                Ok(NodeQueryReply::Probe { from, fsync_age_ms }) => {
                    ProbeResult::Alive { from, fsync_age_ms }
                }
                Ok(_) | Err(Miss::Silent) => ProbeResult::Silent,
                Err(Miss::Refused) => ProbeResult::Refused,
            };
            tell(told, Event::Probed { probe, result }).await;
        });
    }

    pub(crate) fn gather(&mut self, asked: Asked<'_>, gather: u64, shards: Vec<ShardId>) {
        let to = asked.to;
        let Some(client) = self.client(&asked) else {
            return self.tell_now(Event::Gathered { gather, store: to.store, ends: None });
        };
        let question = asked.question(NodeQuery::Gather { shards });
        let told = self.told.clone();
        self.spawn(async move {
            let ends = match ask(client, question, GATHER_LIMIT).await {
                // Another process of that store may hold another log.
                Ok(NodeQueryReply::Gather { from, ends }) if from == to => Some(ends),
                _ => None,
            };
            tell(told, Event::Gathered { gather, store: to.store, ends }).await;
        });
    }

    pub(crate) fn step_down(&mut self, asked: Asked<'_>, shard: ShardId, epoch: Epoch) {
        let Some(client) = self.client(&asked) else {
            return self.tell_now(Event::SteppedDown { shard, epoch, end: None });
        };
        let question = asked.question(NodeQuery::StepDown { shard, epoch });
        let told = self.told.clone();
        self.spawn(async move {
            let end = match ask(client, question, STEP_DOWN_LIMIT).await {
                Ok(NodeQueryReply::StepDown { shard: of, end }) if of == shard => end,
                _ => None,
            };
            tell(told, Event::SteppedDown { shard, epoch, end }).await;
        });
    }

    /// The connection to a node; none if nobody knows where it is.
    fn client(&mut self, asked: &Asked<'_>) -> Option<ControlClient<Channel>> {
        let address = asked.address?;
        let store = asked.to.store;
        if self.links.get(&store).is_none_or(|link| link.address != address) {
            let client = match dial(address) {
                Ok(client) => client,
                Err(why) => {
                    self.say_undialable(asked, address, &why);
                    return None;
                }
            };
            self.undialable.remove(&store);
            self.links.insert(store, Link { address: address.to_owned(), client });
        }
        self.links.get(&store).map(|link| link.client.clone())
    }

    /// Once for each address, since it is asked several times a second.
    fn say_undialable(&mut self, asked: &Asked<'_>, address: &str, why: &str) {
        let store = asked.to.store;
        if self.undialable.get(&store).is_none_or(|said| said != address) {
            self.undialable.insert(store, address.to_owned());
            warn!(node = asked.name, %store, address, why,
                "a node can't be dialled and gets no shards: start it again with another --advertise");
        }
    }

    /// Answers without asking anybody.
    fn tell_now(&self, event: Event) {
        self.spawn(tell(self.told.clone(), event));
    }

    /// The machine waits for the answer to each of its questions.
    fn spawn(&self, question: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.vital.job("a question to a node", question));
    }
}

/// Whom to ask, and what they must hear to answer.
pub(crate) struct Asked<'a> {
    pub(crate) to: StoreBoot,
    /// For people.
    pub(crate) name: String,
    pub(crate) address: Option<&'a str>,
    pub(crate) cluster: u128,
}

impl Asked<'_> {
    fn question(&self, query: NodeQuery) -> wire::NodeQuery {
        wire::NodeQuery::new(self.cluster, query)
    }
}

/// Connects when it is first asked something, and again whenever the connection is gone.
fn dial(address: &str) -> Result<ControlClient<Channel>, String> {
    let address = metastore::advertised(address)?;
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|error| error.to_string())?;
    let endpoint = endpoint
        .connect_timeout(Duration::from_secs(1))
        .tcp_nodelay(true)
        // A connection that fell silent without an end is given up, so that a node that can be reached again is not
        // asked over the old one, which sends again ever more rarely.
        .http2_keep_alive_interval(Duration::from_secs(1))
        .keep_alive_timeout(Duration::from_secs(1))
        .keep_alive_while_idle(true);
    Ok(proto::limited!(ControlClient::new(endpoint.connect_lazy())))
}

/// Every question may be asked twice: answering changes nothing, and stepping down names its epoch.
async fn ask(
    mut client: ControlClient<Channel>,
    question: wire::NodeQuery,
    limit: Duration,
) -> Result<NodeQueryReply, Miss> {
    let asking = async {
        match client.query(question.clone()).await {
            // The connection had ended meanwhile. Whether somebody listens is known after dialling.
            Err(status) if was_cut(&status) => client.query(question).await,
            answer => answer,
        }
    };
    match tokio::time::timeout(limit, asking).await {
        Ok(Ok(reply)) => NodeQueryReply::try_from(reply.into_inner()).map_err(|error| {
            warn!(%error, "a node's answer can't be read");
            Miss::Silent
        }),
        Ok(Err(status)) if is_refused(&status) => Err(Miss::Refused),
        Ok(Err(status)) => {
            debug!(%status, "no answer");
            Err(Miss::Silent)
        }
        Err(_) => Err(Miss::Silent),
    }
}

/// It was the connection that failed, not the process at its end that refused; and not for want of a listener.
fn was_cut(status: &Status) -> bool {
    status.source().is_some() && !is_refused(status)
}

fn is_refused(status: &Status) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = status.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            return true;
        }
        cause = error.source();
    }
    false
}

async fn tell(told: mpsc::Sender<Told>, event: Event) {
    let _nobody_listens = told.send(Told::Event(event)).await;
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use engine::ids::{Boot, Seq};
    use engine::message::ShardEnd;
    use proto::wire::control_server::{Control, ControlServer};
    use tokio::net::TcpListener;
    use tokio::runtime::Runtime;
    use tokio::time::Instant;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Request, Response};

    use super::*;

    const CLUSTER: u128 = 7;
    const NODE: StoreBoot = StoreBoot { store: StoreId(1), boot: Boot(1) };

    /// A node that answers, or says nothing at all.
    struct Node {
        cluster: u128,
        me: StoreBoot,
        answers: bool,
    }

    #[tonic::async_trait]
    impl Control for Node {
        async fn query(
            &self,
            request: Request<wire::NodeQuery>,
        ) -> Result<Response<wire::NodeQueryReply>, Status> {
            let request = request.into_inner();
            wire::Open::accept_required(request.open.as_ref(), self.cluster)?;
            if !self.answers {
                std::future::pending::<()>().await;
            }
            let from = self.me;
            let reply = match proto::query_of(request)? {
                NodeQuery::Probe { .. } => NodeQueryReply::Probe { from, fsync_age_ms: 3 },
                NodeQuery::Gather { shards } => {
                    let ends = shards.into_iter().map(|shard| ShardEnd {
                        shard,
                        promised: Epoch(1),
                        last: (Epoch(1), Seq(5)),
                        applied: Seq(5),
                        unfit: false,
                    });
                    NodeQueryReply::Gather { from, ends: ends.collect() }
                }
                NodeQuery::StepDown { shard, epoch } => {
                    NodeQueryReply::StepDown { shard, end: Some((epoch, Seq(5))) }
                }
                NodeQuery::Status => NodeQueryReply::Status {
                    from,
                    replicas: Vec::new(),
                    scrub: Default::default(),
                    full: false,
                },
                NodeQuery::Scrub { .. } => NodeQueryReply::Scrub { from },
            };
            Ok(Response::new(reply.into()))
        }
    }

    /// A process: shut down, its sockets are closed as a killed one's are.
    fn run(node: Node, at: SocketAddr) -> (Runtime, SocketAddr) {
        let runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = { runtime }.worker_threads(1).enable_all().build().expect("a runtime");
        let listener = std::net::TcpListener::bind(at).expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let at = listener.local_addr().expect("it is bound");
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a socket");
            let service = ControlServer::new(node);
            Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
        });
        (runtime, at)
    }

    fn anywhere() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    fn well() -> Node {
        Node { cluster: CLUSTER, me: NODE, answers: true }
    }

    fn asked(to: StoreBoot, address: Option<&str>) -> Asked<'_> {
        Asked { to, name: "node-1".to_owned(), address, cluster: CLUSTER }
    }

    struct Asker {
        nodes: Nodes,
        inbox: mpsc::Receiver<Told>,
        at: String,
    }

    impl Asker {
        fn new(at: SocketAddr) -> Self {
            let (told, inbox) = mpsc::channel(8);
            let (vital, _) = telemetry::vital();
            Self { nodes: Nodes::new(told, vital), inbox, at: at.to_string() }
        }

        async fn answer(&mut self) -> Event {
            let limit = Duration::from_secs(5);
            let told = tokio::time::timeout(limit, self.inbox.recv()).await;
            match told.expect("an answer").expect("a sender lives") {
                Told::Event(event) => event,
                other => panic!("{other:?}"),
            }
        }

        async fn probe(&mut self) -> ProbeResult {
            let asked = asked(NODE, Some(&self.at));
            self.nodes.probe(asked, 9);
            match self.answer().await {
                Event::Probed { probe: 9, result } => result,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_process_that_went_is_refused_and_its_successor_is_seen() {
        let (runtime, at) = run(well(), anywhere());
        let mut asker = Asker::new(at);
        assert_eq!(asker.probe().await, ProbeResult::Alive { from: NODE, fsync_age_ms: 3 });
        runtime.shutdown_background();
        // Known without waiting for the limit, also over the connection that stood. (Shutting down takes a moment.)
        let asked = Instant::now();
        while asker.probe().await != ProbeResult::Refused {
            assert!(asked.elapsed() < Duration::from_secs(5), "never refused");
        }
        let asked = Instant::now();
        assert_eq!(asker.probe().await, ProbeResult::Refused);
        assert!(asked.elapsed() < PROBE_LIMIT, "{:?}", asked.elapsed());

        let newer = StoreBoot { boot: Boot(2), ..NODE };
        let (runtime, _) = run(Node { me: newer, ..well() }, at);
        assert_eq!(asker.probe().await, ProbeResult::Alive { from: newer, fsync_age_ms: 3 });
        runtime.shutdown_background();
    }

    /// A node that is started again may listen elsewhere, and somebody else where it was.
    #[tokio::test]
    async fn a_node_is_asked_where_it_is_now() {
        let (before, at) = run(well(), anywhere());
        let mut asker = Asker::new(at);
        assert_eq!(asker.probe().await, ProbeResult::Alive { from: NODE, fsync_age_ms: 3 });
        let newer = StoreBoot { boot: Boot(2), ..NODE };
        let (after, at) = run(Node { me: newer, ..well() }, anywhere());
        asker.at = at.to_string();
        assert_eq!(asker.probe().await, ProbeResult::Alive { from: newer, fsync_age_ms: 3 });
        before.shutdown_background();
        assert_eq!(asker.probe().await, ProbeResult::Alive { from: newer, fsync_age_ms: 3 });
        after.shutdown_background();
    }

    #[tokio::test]
    async fn silence_is_told_in_time_and_is_not_refusal() {
        let (silent, at) = run(Node { answers: false, ..well() }, anywhere());
        let asked = Instant::now();
        assert_eq!(Asker::new(at).probe().await, ProbeResult::Silent);
        assert!(asked.elapsed() >= PROBE_LIMIT, "{:?}", asked.elapsed());
        silent.shutdown_background();
        // Who answers for another cluster is nobody of ours.
        let (other, at) = run(Node { cluster: CLUSTER + 1, ..well() }, anywhere());
        assert_eq!(Asker::new(at).probe().await, ProbeResult::Silent);
        other.shutdown_background();
    }

    /// Whatever stands in its record; and it is said once, not at each question.
    #[tokio::test]
    async fn a_node_that_can_not_be_dialled_is_silent() {
        let (runtime, at) = run(well(), anywhere());
        for address in ["not an address", "node-9", "0.0.0.0:7001", "", "http://127.0.0.1:1"] {
            let mut asker = Asker::new(at);
            asker.at = address.to_owned();
            for _ in 0..3 {
                assert_eq!(asker.probe().await, ProbeResult::Silent, "{address}");
                assert_eq!(asker.nodes.undialable[&NODE.store], address);
            }
            // Started again with another one.
            asker.at = at.to_string();
            assert!(matches!(asker.probe().await, ProbeResult::Alive { .. }));
            assert!(asker.nodes.undialable.is_empty());
        }
        runtime.shutdown_background();
    }

    #[tokio::test]
    async fn every_question_is_answered_also_when_nobody_can_be_asked() {
        let (runtime, at) = run(well(), anywhere());
        let (to, shard) = (NODE, ShardId(4));
        let mut asker = Asker::new(at);
        for (address, known) in [(Some(at.to_string()), true), (None, false)] {
            let asked = || asked(to, address.as_deref());
            asker.nodes.gather(asked(), 1, vec![shard]);
            let event = asker.answer().await;
            let Event::Gathered { gather: 1, store, ends } = event else { panic!("{event:?}") };
            assert_eq!(store, to.store);
            assert_eq!(ends.map(|ends| ends[0].last), known.then_some((Epoch(1), Seq(5))));
            asker.nodes.step_down(asked(), shard, Epoch(1));
            let event = asker.answer().await;
            let Event::SteppedDown { end, .. } = event else { panic!("{event:?}") };
            assert_eq!(end, known.then_some((Epoch(1), Seq(5))));
        }
        // Where a log of another process of that store ends is no answer.
        let to = StoreBoot { boot: Boot(2), ..NODE };
        let address = at.to_string();
        asker.nodes.gather(asked(to, Some(&address)), 2, vec![shard]);
        let event = asker.answer().await;
        assert!(matches!(event, Event::Gathered { gather: 2, ends: None, .. }), "{event:?}");
        runtime.shutdown_background();
    }
}
