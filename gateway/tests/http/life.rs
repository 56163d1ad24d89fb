//! Start, loss of etcd, and stop of a gateway.

use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use engine::ids::StoreId;
use engine::message::HealthReport;
use engine::records::GatewayRecord;
use metastore::CoordinatorRecord;
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

/// A starting gateway listens at once, reports the reason why it is not ready, and refuses requests
/// as not applied.
#[test]
fn a_starting_gateway_reports_its_reason() {
    let mut cluster = Cluster::empty();
    cluster.etcd.kill();
    cluster.start_gateway();
    let mut client = cluster.client();
    #[track_caller]
    fn waits_for(client: &mut Client, reason: &str) {
        let get = |client: &mut Client, path| {
            let answer = client.get(path);
            (answer.status, answer.body)
        };
        until(reason, || get(client, "/readyz") == (503, format!("{reason}\n")));
        assert_eq!(get(client, "/readyz?all"), (503, format!("{reason}\n")));
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
    // Longer than the TTL of the lease.
    while began.elapsed() < Duration::from_secs(3) {
        assert_eq!(client.call(INCREMENT, &[], b"").status, 200);
        assert_eq!(client.get("/v1/counters/ns/k").status, 200);
        assert_eq!(client.get("/readyz").status, 200);
        std::thread::sleep(Duration::from_millis(20));
    }
    let page = client.get("/v1/cluster").json();
    assert_eq!(page["nodes"][0]["state"], "up", "the node answers, with or without etcd");
    let store = {
        cluster.etcd_runs();
        cluster.store()
    };
    // The lease may have expired: then every worker gets a new key and a new session.
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
fn a_graceful_stop_finishes_requests_in_flight() {
    let mut cluster = Cluster::start(1);
    let store = cluster.store();
    cluster.nodes[0].set_mood(Mood::Holds);
    let (mut client, mut idle) = (cluster.client(), cluster.client());
    assert_eq!(idle.get("/livez").status, 200);
    client.request(INCREMENT, &[], b"{\"delta\":3}");
    until("it is in flight", || cluster.nodes[0].value("ns", b"k") == 3);
    let address = cluster.address();
    let stopped = cluster.gateway.take().unwrap().stop();
    assert!(idle.is_closed(), "an idle connection stays open");
    until("new connections are refused", || TcpStream::connect(address).is_err());
    assert!(!stopped.is_finished());
    cluster.nodes[0].set_mood(Mood::Serves);
    assert_eq!(client.answer(false).json()["applied"], 3);
    assert!(client.is_closed());
    stopped.join().unwrap().unwrap();
    let left = cluster.block_on(store.list::<GatewayRecord>()).unwrap().all;
    assert_eq!(left.len(), 0, "the lease was not revoked");
}

/// Load balancers see first that the gateway stops. Clients that still come are served, and every
/// answer closes its connection.
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
    until("it reports that it stops", || {
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

/// A second SIGTERM, or Ctrl-C, ends the drain early.
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

/// A request that is in the socket when the gateway stops was sent in time.
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

/// A stopping gateway breaks no connection without an answer.
#[test]
fn requests_that_are_open_at_the_end_are_answered() {
    let mut cluster = Cluster::start(2);
    let (sent, unsent) = (cluster.key_of(0, "a"), cluster.key_of(1, "b"));
    cluster.nodes[0].set_mood(Mood::Swallows);
    cluster.nodes[1].kill();
    let mut watching = cluster.client();
    until("it has noticed", || watching.get("/readyz?all").body == "connection to node-2\n");
    let long = "Request-Timeout-Ms: 60000";
    let send = |line: String| {
        let mut client = cluster.client();
        client.request(&line, &[long], b"");
        client
    };
    let mut in_flight = send(format!("POST /v1/counters/ns/{sent}/increment"));
    let mut waiting = send(format!("POST /v1/counters/ns/{unsent}/increment"));
    let mut reading = send(format!("GET /v1/counters/ns/{unsent}"));
    let mut half = cluster.client();
    let head = format!("{INCREMENT} HTTP/1.1\r\nHost: x\r\n{long}\r\nContent-Length: 11\r\n\r\n");
    half.send(format!("{head}{{\"del").as_bytes());
    until("it was sent", || cluster.nodes[0].state().batches > 0);
    let stopped = cluster.gateway.take().unwrap().stop();
    let problem = |client: &mut Client| {
        let answer = client.answer(false);
        (answer.status, answer.kind(), answer.outcome())
    };
    let not_applied = (503, "stopping".to_owned(), "not-applied".to_owned());
    assert_eq!(problem(&mut waiting), not_applied);
    assert_eq!(problem(&mut reading), not_applied);
    assert_eq!(problem(&mut half), not_applied);
    assert_eq!(problem(&mut in_flight), (504, "deadline".to_owned(), "unknown".to_owned()));
    stopped.join().unwrap().unwrap();
}

/// A stop waits for an unfinished request for 10 s at most; here the deadline of the request ends
/// it earlier.
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
fn a_port_in_use_is_a_wrong_setting() {
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
    assert_eq!(fatal.code(), 2);
    assert!(fatal.to_string().contains(&http.to_string()), "{fatal}");
}

/// An etcd that is too old and a cluster of a newer build end the gateway, so that a supervisor
/// sees the exit code: waiting resolves neither.
#[test]
fn errors_that_waiting_can_not_resolve_end_the_gateway() {
    #[track_caller]
    fn ends(cluster: &Cluster, etcd: String, why: &str) {
        let served =
            gateway::serve(options(etcd), |_| {}, std::future::pending(), std::future::pending());
        let fatal = cluster.block_on(served).unwrap_err();
        assert_eq!(fatal.code(), 2);
        assert!(fatal.to_string().contains(why), "{fatal}");
    }
    let cluster = Cluster::empty();
    let etcd = cluster.etcd.endpoint();
    let calls = cluster.block_on(Calls::start(etcd.clone()));
    calls.next("Status", Fate::ReplyVersion("3.4.27"));
    ends(&cluster, calls.endpoint(), "3.4.27 is too old");
    // Through the JSON API of etcd: a record of an unknown format at /dkc/test/meta.
    let newer = br#"{"key": "L2RrYy90ZXN0L21ldGE=", "value": "/w=="}"#;
    let put = Client::new(etcd.parse().unwrap()).call("POST /v3/kv/put", &[], newer);
    assert_eq!(put.status, 200, "{put:?}");
    ends(&cluster, etcd, "written by a newer dkc");
}

/// etcd was restored from a backup, or replaced by another one. Its shard map could name a primary
/// that was deposed.
#[test]
fn an_etcd_whose_history_went_back_is_not_followed() {
    let mut cluster = Cluster::start(1);
    let mut client = cluster.client();
    let page = |client: &mut Client| client.get("/v1/cluster").json()["shards"].clone();
    let before = page(&mut client);
    cluster.replace_etcd();
    until("the gateway has noticed", || {
        let answer = client.get("/readyz?all");
        (answer.status, answer.body.as_str()) == (503, "etcd-went-back\n")
    });
    assert_eq!(client.get("/readyz").status, 200, "it serves on");
    assert_eq!(page(&mut client), before, "the last map");
    assert_eq!(client.call("GET /v1/counters/ns/k", &[], b"").status, 200);
}

#[derive(Clone, Default)]
struct Coordinator(Arc<Mutex<Vec<HealthReport>>>);

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

/// The report lets a failover begin before the lease of the node expires.
#[test]
fn a_refused_connection_is_reported() {
    let mut cluster = Cluster::without_gateway(2);
    let coordinator = Coordinator::default();
    let store = cluster.store();
    cluster.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        store.create(&(), &CoordinatorRecord { address }).await.unwrap();
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
