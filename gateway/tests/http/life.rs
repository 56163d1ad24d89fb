//! Starting, losing etcd, stopping.

use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use engine::ids::StoreId;
use engine::message::Report;
use engine::records::GatewayRecord;
use metastore::Candidate;
use proto::wire;
use proto::wire::reports_server::{Reports, ReportsServer};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::calls::{Calls, Fate};
use crate::client::Client;
use crate::cluster::{Cluster, Gateway, led_by, meta, options, register, until};
use crate::node::{Mood, Node};
use engine::ids::Slots;

const INCREMENT: &str = "POST /v1/counters/ns/k/increment";

/// It listens from the start, says what it waits for, and refuses clearly meanwhile.
#[test]
fn what_a_starting_gateway_waits_for() {
    let mut cluster = Cluster::empty();
    cluster.etcd.kill();
    cluster.start_gateway();
    let mut client = cluster.client();
    #[track_caller]
    fn waits_for(client: &mut Client, reason: &str) {
        let said = |client: &mut Client, path| {
            let answer = client.get(path);
            (answer.status, answer.body)
        };
        until(reason, || said(client, "/readyz") == (503, format!("{reason}\n")));
        assert_eq!(said(client, "/readyz?all"), (503, format!("{reason}\n")));
        let probed = client.call("OPTIONS /readyz", &[], b"");
        assert_eq!((probed.status, probed.body.as_str()), (503, ""));
        let answer = client.call(INCREMENT, &["Request-Timeout-Ms: 100"], b"");
        assert_eq!((answer.status, answer.outcome().as_str()), (503, "not-applied"), "{answer:?}");
        assert!(["1", "2", "3"].contains(&answer.headers["retry-after"].as_str()));
        let answer = client.call("GET /v1/counters/ns/k", &["Request-Timeout-Ms: 100"], b"");
        assert_eq!((answer.status, answer.outcome().as_str()), (503, "not-applied"), "{answer:?}");
        assert_eq!(client.get("/livez").status, 200);
        assert_eq!(client.get("/v1/cluster").status, 200);
    }
    waits_for(&mut client, "etcd");
    cluster.etcd_runs();
    waits_for(&mut client, "meta");
    let store = cluster.store();
    cluster.block_on(store.create(&(), &meta(1))).unwrap();
    waits_for(&mut client, "map: 0 of 1 nodes");
    assert_eq!(client.get("/v1/cluster").json()["waiting_for"], "0 of 1 nodes");
    let node = Node::start(1, 1, ([127, 0, 0, 1], 0).into(), vec![Slots::ALL]);
    cluster.block_on(register(&store, &node));
    waits_for(&mut client, "map: shards to be placed");
    cluster.block_on(store.create(&engine::ids::ShardId(0), &led_by(&node, Slots::ALL))).unwrap();
    until("it is ready", || client.get("/readyz").status == 200);
    assert_eq!(client.call(INCREMENT, &[], b"").status, 200);
}

#[test]
fn without_etcd_it_serves_on() {
    let mut cluster = Cluster::start(2);
    let mut client = cluster.client();
    cluster.etcd.kill();
    let began = Instant::now();
    // Longer than the lease lives.
    while began.elapsed() < Duration::from_secs(3) {
        assert_eq!(client.call(INCREMENT, &[], b"").status, 200);
        assert_eq!(client.get("/v1/counters/ns/k").status, 200);
        assert_eq!(client.get("/readyz").status, 200);
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = client.get("/v1/cluster").json();
    assert_eq!(told["nodes"][0]["state"], "up", "it answers, whatever etcd thinks");
    let store = {
        cluster.etcd_runs();
        cluster.store()
    };
    // The lease may have run out: then every worker has a new key, and a new session.
    until("both workers are registered", || {
        cluster.block_on(store.list::<GatewayRecord>()).unwrap().all.len() == 2
    });
    until("it is ready", || client.get("/readyz").status == 200);
    assert_eq!(client.call(INCREMENT, &[], b"").status, 200);
}

#[test]
fn a_lost_lease_means_new_sessions_and_nothing_else() {
    let cluster = Cluster::start(1);
    let store = cluster.store();
    let mut client = cluster.client();
    let keys = || cluster.block_on(store.list::<GatewayRecord>()).unwrap().all;
    let before = keys();
    let workers: Vec<_> = before.iter().map(|kept| kept.record.worker).collect();
    assert_eq!(before.len(), 2);
    assert!(workers.contains(&0) && workers.contains(&1), "{workers:?}");
    assert!(before.iter().all(|kept| kept.record.address == cluster.address().to_string()));
    for kept in &before {
        cluster.block_on(store.delete::<GatewayRecord>(&kept.id, kept.modified)).unwrap();
    }
    until("new keys are there", || {
        let now = keys();
        let newer = |created| before.iter().all(|kept| kept.created < created);
        now.len() == 2 && now.iter().all(|kept| newer(kept.created))
    });
    for _ in 0..20 {
        assert_eq!(client.call(INCREMENT, &[], b"").status, 200);
    }
    assert_eq!(cluster.nodes[0].value("ns", b"k"), 20);
}

#[test]
fn a_graceful_stop_finishes_what_is_under_way() {
    let mut cluster = Cluster::start(1);
    let store = cluster.store();
    cluster.nodes[0].set_mood(Mood::Holds);
    let (mut client, mut idle) = (cluster.client(), cluster.client());
    assert_eq!(idle.get("/livez").status, 200);
    client.request(INCREMENT, &[], b"{\"delta\":3}");
    until("it is under way", || cluster.nodes[0].value("ns", b"k") == 3);
    let address = cluster.address();
    let stopped = cluster.gateway.take().unwrap().stop();
    assert!(idle.is_closed(), "an idle connection stays open");
    until("nobody is let in any more", || TcpStream::connect(address).is_err());
    assert!(!stopped.is_finished());
    cluster.nodes[0].set_mood(Mood::Serves);
    assert_eq!(client.answer(false).json()["applied"], 3);
    assert!(client.is_closed());
    stopped.join().unwrap().unwrap();
    let left = cluster.block_on(store.list::<GatewayRecord>()).unwrap().all;
    assert_eq!(left.len(), 0, "the lease was not given back");
}

/// Balancers see first that it goes; whoever comes all the same is served, and told to come on another connection.
#[test]
fn a_stopping_gateway_serves_on_for_a_while() {
    let mut cluster = Cluster::without_gateway(1);
    cluster.start_gateway_with(|options| options.drain_seconds = 3);
    cluster.ready();
    let address = cluster.address();
    let mut kept = cluster.client();
    assert_eq!(kept.call(INCREMENT, &[], b"").headers["keep-alive"], "timeout=75");
    let began = Instant::now();
    let stopped = cluster.gateway.take().unwrap().stop();
    until("it says that it stops", || {
        let answer = Client::new(address).get("/readyz");
        (answer.status, answer.body.as_str()) == (503, "stopping\n")
    });
    for mut client in [kept, Client::new(address)] {
        let answer = client.call(INCREMENT, &[], b"");
        assert_eq!((answer.status, answer.headers["connection"].as_str()), (200, "close"));
        assert!(!answer.headers.contains_key("keep-alive"));
        assert!(client.is_closed());
    }
    assert!(began.elapsed() < Duration::from_secs(3), "this machine is too slow for this test");
    stopped.join().unwrap().unwrap();
    assert!(began.elapsed() >= Duration::from_secs(3));
    assert_eq!(cluster.nodes[0].value("ns", b"k"), 3);
    assert!(TcpStream::connect(address).is_err());
}

/// A second signal, or Ctrl-C.
#[test]
fn a_drain_can_be_cut_short() {
    let mut cluster = Cluster::without_gateway(1);
    cluster.start_gateway_with(|options| options.drain_seconds = 3600);
    cluster.ready();
    let address = cluster.address();
    let gateway = cluster.gateway.take().unwrap();
    let drains = || until("it drains", || Client::new(address).get("/readyz").status == 503);
    gateway.stop_in_a_hurry(drains).unwrap();
}

/// What is in the socket when it stops was sent in time.
#[test]
fn a_request_that_was_sent_before_the_stop_is_answered() {
    let mut cluster = Cluster::start(1);
    let mut clients: Vec<_> = (0..100).map(|_| cluster.client()).collect();
    for client in &mut clients {
        assert_eq!(client.get("/livez").status, 200);
    }
    for client in &mut clients {
        client.request(INCREMENT, &[], b"");
    }
    let stopped = cluster.gateway.take().unwrap().stop();
    let answers = clients.iter_mut().map(|client| client.answer(false));
    let applied = answers.filter(|answer| match answer.status {
        200 => true,
        _ => {
            assert_eq!(
                (answer.kind(), answer.outcome()),
                ("stopping".into(), "not-applied".into())
            );
            false
        }
    });
    assert_eq!(applied.count() as i128, cluster.nodes[0].value("ns", b"k"));
    assert!(clients.iter_mut().all(Client::is_closed));
    stopped.join().unwrap().unwrap();
}

/// Nobody learns by a broken connection that a gateway has ended.
#[test]
fn what_is_open_at_the_end_gets_a_definite_answer() {
    let mut cluster = Cluster::start(2);
    let (sent, unsent) = (cluster.key_of(0, "a"), cluster.key_of(1, "b"));
    cluster.nodes[0].set_mood(Mood::Swallows);
    cluster.nodes[1].kill();
    let mut watching = cluster.client();
    until("it has noticed", || watching.get("/readyz?all").body == "connection to node-2\n");
    let long = "Request-Timeout-Ms: 60000";
    let ask = |line: String| {
        let mut client = cluster.client();
        client.request(&line, &[long], b"");
        client
    };
    let mut out = ask(format!("POST /v1/counters/ns/{sent}/increment"));
    let mut waiting = ask(format!("POST /v1/counters/ns/{unsent}/increment"));
    let mut reading = ask(format!("GET /v1/counters/ns/{unsent}"));
    let mut half = cluster.client();
    let head = format!("{INCREMENT} HTTP/1.1\r\nHost: x\r\n{long}\r\nContent-Length: 11\r\n\r\n");
    half.send(format!("{head}{{\"del").as_bytes());
    until("it was sent", || cluster.nodes[0].state().batches > 0);
    let stopped = cluster.gateway.take().unwrap().stop();
    let told = |client: &mut Client| {
        let answer = client.answer(false);
        (answer.status, answer.kind(), answer.outcome())
    };
    let definite = (503, "stopping".to_owned(), "not-applied".to_owned());
    assert_eq!(told(&mut waiting), definite);
    assert_eq!(told(&mut reading), definite);
    assert_eq!(told(&mut half), definite);
    assert_eq!(told(&mut out), (504, "deadline".to_owned(), "unknown".to_owned()));
    stopped.join().unwrap().unwrap();
}

/// What can't be finished is not waited for beyond 10 s; here its own deadline ends it.
#[test]
fn a_stop_does_not_wait_for_a_dead_node() {
    let mut cluster = Cluster::start(1);
    cluster.nodes[0].set_mood(Mood::Swallows);
    let mut client = cluster.client();
    client.request(INCREMENT, &["Request-Timeout-Ms: 300"], b"");
    until("it was sent", || cluster.nodes[0].state().batches > 0);
    let began = Instant::now();
    let stopped = cluster.gateway.take().unwrap().stop();
    let answer = client.answer(false);
    assert_eq!((answer.status, answer.outcome().as_str()), (504, "unknown"));
    stopped.join().unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_port_that_is_taken_is_a_setting_to_be_changed() {
    let cluster = Cluster::empty();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let http = taken.local_addr().unwrap();
    let options = gateway::Options { http, ..options(cluster.etcd.endpoint()) };
    let served = cluster.block_on(gateway::serve(
        options,
        |_| {},
        std::future::pending(),
        std::future::pending(),
    ));
    let fatal = served.unwrap_err();
    assert_eq!(fatal.exit_code(), 2);
    assert!(fatal.to_string().contains(&http.to_string()), "{fatal}");
}

/// Waiting helps against neither, so a supervisor is to see an exit code: an etcd that is too old, and a cluster that a newer
/// build has made.
#[test]
fn what_no_waiting_helps_against_ends_it() {
    #[track_caller]
    fn ends(cluster: &Cluster, etcd: String, why: &str) {
        let served =
            gateway::serve(options(etcd), |_| {}, std::future::pending(), std::future::pending());
        let fatal = cluster.block_on(served).unwrap_err();
        assert_eq!(fatal.exit_code(), 2);
        assert!(fatal.to_string().contains(why), "{fatal}");
    }
    let cluster = Cluster::empty();
    let etcd = cluster.etcd.endpoint();
    let calls = cluster.block_on(Calls::start(etcd.clone()));
    calls.next("Status", Fate::SayVersion("3.4.27"));
    ends(&cluster, calls.endpoint(), "3.4.27 is too old");
    // etcd speaks JSON too: at /dkc/test/meta a format that nobody knows.
    let newer = br#"{"key": "L2RrYy90ZXN0L21ldGE=", "value": "/w=="}"#;
    let put = Client::new(etcd.parse().unwrap()).call("POST /v3/kv/put", &[], newer);
    assert_eq!(put.status, 200, "{put:?}");
    ends(&cluster, etcd, "written by a newer dkc");
}

/// Trap T10: etcd was restored from a backup, or is another one. A map from there could name a primary that was deposed.
#[test]
fn an_etcd_whose_history_went_back_is_not_followed() {
    let mut cluster = Cluster::start(1);
    let mut client = cluster.client();
    let page = |client: &mut Client| client.get("/v1/cluster").json()["shards"].clone();
    let before = page(&mut client);
    cluster.etcd_begins_anew();
    until("it is told", || {
        let answer = client.get("/readyz?all");
        (answer.status, answer.body.as_str()) == (503, "etcd-went-back\n")
    });
    assert_eq!(client.get("/readyz").status, 200, "it serves on");
    assert_eq!(page(&mut client), before, "the last map");
    assert_eq!(client.call("GET /v1/counters/ns/k", &[], b"").status, 200);
}

#[derive(Clone, Default)]
struct Coordinator(Arc<Mutex<Vec<Report>>>);

#[tonic::async_trait]
impl Reports for Coordinator {
    async fn report(
        &self,
        request: Request<wire::NodeReport>,
    ) -> Result<Response<wire::Empty>, Status> {
        let report = request.into_inner();
        assert_eq!(report.from, None);
        self.0.lock().unwrap().push(report.try_into()?);
        Ok(Response::new(wire::Empty {}))
    }
}

/// So that a failover need not wait for a lease to run out.
#[test]
fn a_refused_connection_is_reported() {
    let mut cluster = Cluster::without_gateway(2);
    let coordinator = Coordinator::default();
    let store = cluster.store();
    cluster.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        store.create(&(), &Candidate { address }).await.unwrap();
        let server = Server::builder().add_service(ReportsServer::new(coordinator.clone()));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    });
    cluster.gateway = Some(Gateway::start(options(cluster.etcd.endpoint())));
    cluster.ready();
    assert!(coordinator.0.lock().unwrap().is_empty());
    cluster.nodes[1].kill();
    until("it is reported", || !coordinator.0.lock().unwrap().is_empty());
    let reports = coordinator.0.lock().unwrap().clone();
    assert!(reports.iter().all(|report| report.silent == [StoreId(2)]), "{reports:?}");
}
