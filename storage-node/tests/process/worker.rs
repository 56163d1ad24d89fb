//! A gateway worker, as far as a node sees it.

use std::collections::VecDeque;
use std::time::Duration;

use engine::batch::{Batch, Codec};
use engine::ids::{BatchSeq, Revision, SessionId, Slots};
use engine::key::CounterKey;
use engine::message::{
    BatchReply, GatewayMessage, NodeReply, ReadResult, Refusal, ShardAvailability,
};
use engine::ops::{self, Op, OpKind};
use proto::wire;
use proto::wire::gateway_client::GatewayClient;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::harness::{CLUSTER_ID, Node};

/// An answer that takes longer will not come.
const TIMEOUT: Duration = Duration::from_secs(10);

/// One session on one connection. Reconnected to another node, the session goes on.
pub(crate) struct Worker {
    session: SessionId,
    batch_seq: u64,
    message: u64,
    reads: u64,
    send: mpsc::UnboundedSender<wire::ToNode>,
    replies: Streaming<wire::ToGateway>,
    /// Replies of the last message.
    ready: VecDeque<NodeReply>,
}

impl Worker {
    pub(crate) async fn connect(node: &Node, session: u64) -> Self {
        Self::on(&node.channel().await, session).await
    }

    /// A session on a connection that others may have sessions on too.
    pub(crate) async fn on(channel: &Channel, session: u64) -> Self {
        let (send, replies) = open(channel).await;
        let session = SessionId(Revision { incarnation: 1, revision: session });
        let ready = VecDeque::new();
        Self { session, batch_seq: 0, message: 0, reads: 0, send, replies, ready }
    }

    /// Goes on with the same session elsewhere.
    pub(crate) async fn reconnect(&mut self, node: &Node) {
        (self.send, self.replies) = open(&node.channel().await).await;
        self.ready.clear();
        self.message = 0;
    }

    /// Adds to a counter; answers the value after it.
    pub(crate) async fn add(&mut self, key: &str, delta: i64) -> i128 {
        self.batch_seq += 1;
        self.add_again(key, delta).await
    }

    /// Sends the last batch once more, the same bytes under the same number, until it is taken.
    pub(crate) async fn add_again(&mut self, key: &str, delta: i64) -> i128 {
        loop {
            match self.send_add(key, delta).await {
                BatchReply::Applied { values, .. } => return values[0],
                // The new primary has not begun yet.
                BatchReply::Refused(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Sends the last batch and returns whatever comes of this send.
    pub(crate) async fn send_add(&mut self, key: &str, delta: i64) -> BatchReply {
        let sent = self.post_add(key, delta);
        loop {
            if let NodeReply::Answer { message, answer, batch_seq, session, .. } =
                self.reply().await
                && message == sent
            {
                assert_eq!((session, batch_seq), (self.session, BatchSeq(self.batch_seq)));
                return answer;
            }
        }
    }

    /// Sends the last batch; its answer is not waited for.
    pub(crate) fn post_add(&mut self, key: &str, delta: i64) -> u64 {
        self.message += 1;
        let kind = OpKind::AddReturning { delta: delta.into() };
        let payload = ops::encode(&[Op { counter: counter(key), kind }]);
        let batch_seq = BatchSeq(self.batch_seq);
        let batch =
            Batch::seal(Slots::ALL, self.session, batch_seq, batch_seq, Codec::Raw, payload);
        let frame = GatewayMessage::Frame { message: self.message, batches: vec![batch] };
        self.send.send(frame.into()).expect("the stream stands");
        self.message
    }

    /// Waits until the shard is reported as frozen. Before that a batch may only be refused for
    /// that reason.
    pub(crate) async fn until_frozen(&mut self) {
        loop {
            match self.reply().await {
                NodeReply::ShardState { state: ShardAvailability::Frozen, .. } => return,
                NodeReply::Answer { answer, .. } => {
                    assert_eq!(answer, BatchReply::Refused(Refusal::Frozen))
                }
                _ => {}
            }
        }
    }

    pub(crate) fn next_batch(&mut self) {
        self.batch_seq += 1;
    }

    /// Reads a counter, asking again while it is refused.
    pub(crate) async fn read(&mut self, key: &str) -> i128 {
        loop {
            match self.try_read(key).await {
                Ok(result) => return result.values[0],
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    pub(crate) async fn try_read(&mut self, key: &str) -> Result<ReadResult, Refusal> {
        self.reads += 1;
        let (asked, keys) = (self.reads, vec![counter(key)]);
        let read =
            GatewayMessage::Read { id: asked, slots: Slots::ALL, keys, max_staleness_ms: None };
        self.send.send(read.into()).expect("the stream stands");
        loop {
            if let NodeReply::Read { id, result } = self.reply().await
                && id == asked
            {
                return result;
            }
        }
    }

    /// Asks, and does not look at the answer.
    pub(crate) fn post_read(&mut self, key: &str) {
        self.reads += 1;
        let keys = vec![counter(key)];
        let read = GatewayMessage::Read {
            id: self.reads,
            slots: Slots::ALL,
            keys,
            max_staleness_ms: None,
        };
        // Once the stream has ended, so has what is being tested.
        let _ended = self.send.send(read.into());
    }

    /// Returns whether nothing more can be sent on the stream.
    pub(crate) fn is_cut_off(&self) -> bool {
        self.send.is_closed()
    }

    async fn reply(&mut self) -> NodeReply {
        self.try_reply().await.expect("the stream stands")
    }

    /// Returns `None` if the node has closed the stream.
    pub(crate) async fn try_reply(&mut self) -> Option<NodeReply> {
        while self.ready.is_empty() {
            let message = tokio::time::timeout(TIMEOUT, self.replies.message()).await;
            let message = message.expect("an answer in time").ok().flatten()?;
            let replies = message.into_replies();
            self.ready.extend(replies.map(|reply| reply.expect("a valid reply")));
        }
        self.ready.pop_front()
    }
}

fn counter(key: &str) -> CounterKey {
    CounterKey::new(b"test", key.as_bytes()).expect("a valid name")
}

async fn open(
    channel: &Channel,
) -> (mpsc::UnboundedSender<wire::ToNode>, Streaming<wire::ToGateway>) {
    let mut client = proto::limited!(GatewayClient::new(channel.clone()));
    let (send, messages) = mpsc::unbounded_channel();
    let opening = tokio_stream::once(wire::ToNode::opening(CLUSTER_ID));
    let stream = opening.chain(UnboundedReceiverStream::new(messages));
    let replies = client.session(stream).await.expect("the node takes the stream");
    (send, replies.into_inner())
}
