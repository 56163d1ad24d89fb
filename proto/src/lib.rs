//! What crosses a process boundary: the gRPC services, and checked conversion between their
//! messages and the engine's types.
//!
//! `proto/dkc/v1/*.proto` says what stands in each message; [`wire`] is the code made from it. The
//! engine never sees a wire type and drivers never read one field by field: they convert.
//!
//! ```text
//!   engine value ── From ──▶ wire message ── prost, HTTP/2 ──▶ wire message ── TryFrom ──▶ engine value
//! ```
//!
//! Going out can't fail. Coming in checks everything once ([`Invalid`] names the field), so behind
//! it nothing has to be doubted again, and no byte from a socket reaches an assert. What is not
//! checked here: sums and chains, which belong to the protocol and are the engine's.
//!
//! Batches, entries and shard records cross as the engine encodes them, inside `bytes` fields: one
//! codec for wire and disk, and payloads are slices of the message they came in.

mod common;
mod control;
mod gateway;
mod invalid;
mod open;
mod peer;
mod snapshot;

pub use common::{shard_of, slots_of};
pub use control::query_of;
pub use invalid::Invalid;
pub use open::{Greeting, Refused, VERSION, VERSION_OLDEST};
pub use snapshot::{CHUNK_BYTES_MAX, Rows, RowsWriter, SnapshotEvent};

/// The generated messages, clients and servers.
pub mod wire {
    #![allow(unreachable_pub, unused_qualifications, missing_docs, clippy::all)]
    tonic::include_proto!("dkc.v1");
}

/// The services and messages as reflection describes them: an encoded `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("descriptors");

/// No message is larger, in either direction: both ends of every channel are told (tonic's own
/// limit for what comes in is 4 MiB, and there is none for what goes out).
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Sets [`MESSAGE_BYTES_MAX`] for both directions of a generated client or server.
#[macro_export]
macro_rules! limited {
    ($end:expr) => {
        $end.max_decoding_message_size($crate::MESSAGE_BYTES_MAX)
            .max_encoding_message_size($crate::MESSAGE_BYTES_MAX)
    };
}

// A batch of the largest allowed size and its header fit into one message.
const _: () = assert!(engine::batch::BATCH_BYTES_LIMIT + (1 << 20) < MESSAGE_BYTES_MAX);
