//! Messages that are ready together travel together.
//!
//! A message on a gRPC stream costs about a microsecond at each end, whatever its size. Under load
//! many small ones wait at a time.

use std::pin::Pin;
use std::task::{Context, Poll};

use prost::Message;
use tokio_stream::Stream;

/// A message to a gateway has as many replies as are ready, until it is as large as this.
///
/// The largest reply fits beside them: it has the values of the largest message of reads.
pub const REPLIES_BYTES: usize = 1 << 20;

/// A stream of lists: each has all items that the inner stream had ready, in their order.
#[derive(Debug)]
pub struct Merged<S> {
    items: S,
    bytes_max: usize,
}

impl<S> Merged<S> {
    /// Creates the stream. A list ends with the item that makes it as large as `bytes_max`, or
    /// larger, encoded.
    pub fn new(items: S, bytes_max: usize) -> Self {
        Self { items, bytes_max }
    }
}

impl<S: Stream<Item: Message> + Unpin> Stream for Merged<S> {
    type Item = Vec<S::Item>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let (mut list, mut bytes) = (Vec::new(), 0);
        while bytes < self.bytes_max || list.is_empty() {
            match Pin::new(&mut self.items).poll_next(context) {
                Poll::Ready(Some(item)) => {
                    bytes += item.encoded_len();
                    list.push(item);
                }
                Poll::Ready(None) if list.is_empty() => return Poll::Ready(None),
                Poll::Pending if list.is_empty() => return Poll::Pending,
                // The inner stream is polled again for the next list.
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(list))
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use engine::batcher::BatchSizes;
    use engine::ids::TimeMs;
    use engine::message::{NodeReply, ReadResult};

    use super::*;
    use crate::MESSAGE_BYTES_MAX;
    use crate::wire::{Slots, ToGateway};

    /// A message of reads is closed at this many bytes of names, each of at least one byte in a
    /// namespace of one, by a request of at most 100,000 keys.
    #[test]
    fn the_largest_reply_fits_beside_others() {
        let keys = BatchSizes::default().read_message_bytes / b"n\0k".len() + 100_000;
        let values = vec![i128::MIN; keys];
        let found = ReadResult { values, staleness_us: u64::MAX, time: TimeMs(u64::MAX) };
        let reply = ToGateway::from(NodeReply::Read { id: u64::MAX, result: Ok(found) });
        let bytes = REPLIES_BYTES + reply.encoded_len();
        assert!(bytes <= MESSAGE_BYTES_MAX, "{bytes}");
    }

    #[tokio::test]
    async fn what_is_ready_is_one_list_up_to_the_limit() {
        let item = |lo| Slots { lo, hi: 7 };
        let (send, receive) = tokio::sync::mpsc::unbounded_channel();
        let items = tokio_stream::wrappers::UnboundedReceiverStream::new(receive);
        let two = 2 * item(1).encoded_len();
        let mut lists = Merged::new(items, two);
        (1..=3).for_each(|lo| send.send(item(lo)).unwrap());
        assert_eq!(lists.next().await, Some(vec![item(1), item(2)]));
        assert_eq!(lists.next().await, Some(vec![item(3)]));
        send.send(item(4)).unwrap();
        drop(send);
        assert_eq!(lists.next().await, Some(vec![item(4)]));
        assert_eq!(lists.next().await, None);
    }
}
