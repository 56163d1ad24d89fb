//! Messages as they cross a process boundary: encoded by `proto`, and read again from the bytes.
//!
//! What a message loses on that way, or what its reader refuses, no run that hands over values would notice. `proto` pulls
//! in gRPC, so it is a feature (`codec`), which `./test` turns on; without it messages cross as they are. Rows of copies
//! have a stream and tests of their own.

use super::network::Wire;

/// The message as the other end reads it.
#[cfg(not(feature = "codec"))]
pub fn cross(wire: Wire) -> Result<Wire, String> {
    Ok(wire)
}

/// The message as the other end reads it; or why it refuses it.
#[cfg(feature = "codec")]
pub fn cross(wire: Wire) -> Result<Wire, String> {
    use proto::wire as on_the_wire;
    Ok(match wire {
        Wire::ToFollower(message) => {
            Wire::ToFollower(through::<on_the_wire::ToFollower, _>(message)?)
        }
        Wire::FromFollower(message) => {
            Wire::FromFollower(through::<on_the_wire::FromFollower, _>(message)?)
        }
        Wire::ToNode(message) => Wire::ToNode(through::<on_the_wire::ToNode, _>(message)?),
        Wire::ToGateway(reply) => Wire::ToGateway(through::<on_the_wire::ToGateway, _>(reply)?),
        rows @ (Wire::Rows { .. } | Wire::RowsRefused { .. }) => rows,
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
