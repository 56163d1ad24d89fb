//! Messages as they cross a process boundary: encoded by `proto`, and decoded from the bytes.
//!
//! A run that passes values would not notice what a message loses on that way, or what its decoder
//! refuses. `proto` pulls in gRPC, so it is a feature (`codec`), which `./test` turns on; without
//! it messages are passed as they are. Rows of copies have a stream and tests of their own.

use super::wire::WireMessage;

/// The message as the receiver decodes it.
#[cfg(not(feature = "codec"))]
pub fn cross(wire: WireMessage) -> Result<WireMessage, String> {
    Ok(wire)
}

/// The message as the receiver decodes it; or why it refuses it.
#[cfg(feature = "codec")]
pub fn cross(wire: WireMessage) -> Result<WireMessage, String> {
    use proto::wire as on_the_wire;
    Ok(match wire {
        WireMessage::ToFollower(message) => {
            WireMessage::ToFollower(through::<on_the_wire::ToFollower, _>(message)?)
        }
        WireMessage::FromFollower(message) => {
            WireMessage::FromFollower(through::<on_the_wire::FromFollower, _>(message)?)
        }
        WireMessage::ToNode(message) => {
            WireMessage::ToNode(through::<on_the_wire::ToNode, _>(message)?)
        }
        WireMessage::ToGateway(reply) => {
            WireMessage::ToGateway(through::<on_the_wire::Reply, _>(reply)?)
        }
        rows @ (WireMessage::Rows { .. } | WireMessage::RowsRefused { .. }) => rows,
    })
}

#[cfg(feature = "codec")]
fn through<W, E>(value: E) -> Result<E, String>
where
    W: prost::Message + Default + From<E>,
    E: TryFrom<W>,
    E::Error: std::fmt::Display,
{
    let bytes = bytes::Bytes::from(W::from(value).encode_to_vec());
    let read = W::decode(bytes).map_err(|error| error.to_string())?;
    E::try_from(read).map_err(|error| error.to_string())
}
