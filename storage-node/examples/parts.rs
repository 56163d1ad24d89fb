//! One figure for each part that was chosen, as the README quotes them: gRPC, RocksDB, LZ4.
//!
//! `cargo run --profile ci -p storage-node --example parts`
//!
//! Generator and server share the machine and one process, so figures are comparable only within
//! one run.

use std::io::Write;
use std::time::{Duration, Instant};

use engine::ids::{CopyNo, Slots};
use engine::key::{self, CounterKey};
use engine::shard::state::ShardState;
use engine::store::table::{SealedTable, Table};
use proto::wire::gateway_client::GatewayClient;
use proto::wire::gateway_server::{Gateway, GatewayServer};
use proto::wire::{self, reply, to_node};
use proto::{CHUNK_BYTES_MAX, limited};
use storage_node::state::{StateSettings, StateStore};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

const COUNTERS: u64 = 1_000_000;
const READS: u64 = 100_000;
const MESSAGES: usize = 50_000;
/// A batch of one blind increment, as it crosses the wire.
const BATCH_BYTES: usize = 70;
/// The shards of a node that leads a third of 24.
const BATCHES: usize = 8;

fn main() -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let one = runtime.block_on(crossing(BATCH_BYTES))?;
    let packed = runtime.block_on(crossing(BATCH_BYTES * BATCHES))? / BATCHES as u32;
    writeln!(
        out,
        "gRPC: {one:?} per message of one batch, {packed:?} per batch in messages of {BATCHES}"
    )?;

    let folder = tempfile::tempdir()?;
    let state = StateStore::open(&folder.path().join("state"), StateSettings::default())?;
    let shards = [(CopyNo(1), ShardState { slots: Slots::ALL, ..ShardState::default() })];
    let frozen = table();
    let begun = Instant::now();
    state.flush(&frozen, &shards, |_| {})?;
    let flush = begun.elapsed();
    let bytes = bytes_of(&folder.path().join("state"))? / COUNTERS;
    writeln!(
        out,
        "RocksDB: {COUNTERS} counters sorted, written and ingested in {flush:?}; {bytes} bytes of \
         disk each"
    )?;
    writeln!(out, "RocksDB: {:?} per counter read, 100 in one call", reads(&state)?)?;
    writeln!(out, "{}", squeezed(&state)?)?;
    Ok(())
}

fn name(number: u64) -> Vec<u8> {
    // Spread, so that neighbours on disk (they lie by hash) have nothing in common, as real names.
    format!("ns\0video-{:011}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 100_000_000_000).into()
}

fn table() -> SealedTable {
    let mut table = Table::new();
    for number in 0..COUNTERS {
        let name = name(number);
        table.add(&name, key::hash(&name), i128::from(1 + number % 1_000));
    }
    table.seal()
}

fn reads(state: &StateStore) -> anyhow::Result<Duration> {
    let view = state.view();
    let counter = |number: u64| CounterKey::new(b"ns", &name(number * 7_919 % COUNTERS)[3..]);
    let keys: Vec<_> = (0..READS).filter_map(|number| counter(number).ok()).collect();
    let begun = Instant::now();
    let mut found = 0;
    for keys in keys.chunks(100) {
        found += view.values(keys)?.iter().flatten().count();
    }
    anyhow::ensure!(found as u64 == READS, "{found} of {READS} counters have a row");
    Ok(begun.elapsed() / READS as u32)
}

/// Packs the shard as a snapshot and returns the sizes and the rate.
fn squeezed(state: &StateStore) -> anyhow::Result<String> {
    let (mut chunk, mut raw, mut small, mut spent) = (Vec::new(), 0, 0, Duration::ZERO);
    let mut pack = |chunk: &mut Vec<u8>| {
        let begun = Instant::now();
        small += lz4_flex::compress(chunk).len();
        spent += begun.elapsed();
        raw += chunk.len();
        chunk.clear();
    };
    state.view().rows(Slots::ALL, |key, value| {
        chunk.extend_from_slice(key);
        chunk.extend_from_slice(value);
        if chunk.len() >= CHUNK_BYTES_MAX {
            pack(&mut chunk);
        }
        Ok(true)
    })?;
    pack(&mut chunk);
    let rate = raw as f64 / spent.as_secs_f64() / 1e6;
    Ok(format!(
        "LZ4: {raw} bytes of rows become {small} on their way to another node, at {rate:.0} MB/s"
    ))
}

fn bytes_of(folder: &std::path::Path) -> std::io::Result<u64> {
    std::fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}

struct Echo;

#[tonic::async_trait]
impl Gateway for Echo {
    type SessionStream = ReceiverStream<Result<wire::ToGateway, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<wire::ToNode>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut messages = request.into_inner();
        let (send, receive) = mpsc::channel(64);
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                let Some(to_node::Kind::Frame(frame)) = message.kind else { return };
                let applied =
                    wire::Applied { values: frame.batches, time_ms: 0, tokens: Default::default() };
                let read = wire::ReadReply {
                    id: 1,
                    kind: Some(wire::read_reply::Kind::Values(applied)),
                    staleness_us: 0,
                };
                let reply = wire::Reply { kind: Some(reply::Kind::Read(read)) };
                if send.send(Ok(vec![reply].into())).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }
}

/// Time per message there and back over loopback, with many in flight at once.
async fn crossing(bytes: usize) -> anyhow::Result<Duration> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server =
        tonic::transport::Server::builder().add_service(limited!(GatewayServer::new(Echo)));
    let server = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let mut client = limited!(GatewayClient::connect(format!("http://{address}")).await?);
    let (send, messages) = mpsc::channel(64);
    let mut replies = client.session(ReceiverStream::new(messages)).await?.into_inner();
    let begun = Instant::now();
    tokio::spawn(async move {
        for message in 0..MESSAGES as u64 {
            let frame = wire::Frame { message, batches: vec![7; bytes].into() };
            let message = wire::ToNode { kind: Some(to_node::Kind::Frame(frame)) };
            if send.send(message).await.is_err() {
                return;
            }
        }
    });
    for _ in 0..MESSAGES {
        anyhow::ensure!(replies.message().await?.is_some(), "the stream ended");
    }
    let took = begun.elapsed() / MESSAGES as u32;
    server.abort();
    Ok(took)
}
