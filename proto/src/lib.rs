//! The gRPC services, and the checked conversion between their messages and the engine's types.
//!
//! `proto/dkc/v1/*.proto` specify each message; [`wire`] is the code generated from them. The
//! engine never sees a wire type, and drivers never read one field by field: they convert.
//!
//! ```text
//!   engine value ─ From ─▶ wire message ─ prost, HTTP/2 ─▶ wire message ─ TryFrom ─▶ engine value
//! ```
//!
//! The conversion to a wire message can't fail. The conversion from one checks everything once
//! ([`Invalid`] names the field), so no later code has to check it again, and no byte from a socket
//! reaches an assert. Checksums and chains are not checked here: they are part of the protocol,
//! which is the engine's.
//!
//! Batches, entries and shard records are sent as the engine encodes them, in `bytes` fields: there
//! is one codec for wire and disk, and payloads are slices of the received message.

mod common;
mod control;
mod gateway;
mod invalid;
mod merged;
mod open;
mod operator;
mod peer;
mod snapshot;

pub use control::query_of;
pub use invalid::Invalid;
pub use merged::{Merged, REPLIES_BYTES};
pub use open::{AcceptedOpen, OpenError, VERSION, VERSION_OLDEST};
pub use snapshot::{CHUNK_BYTES_MAX, SnapshotDecoder, SnapshotEncoder, SnapshotEvent};

/// The generated messages, clients and servers.
pub mod wire {
    #![allow(unreachable_pub, unused_qualifications, missing_docs, clippy::all)]
    tonic::include_proto!("dkc.v1");
}

/// The services and messages as reflection describes them: an encoded `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("descriptors");

/// The largest message in either direction, in bytes. It must be set at both ends of every channel:
/// tonic's default limit is 4 MiB for received messages, and sent ones have no limit.
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
