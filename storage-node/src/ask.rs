//! One query to a storage node, on a connection of its own.

use engine::message::{NodeQuery, NodeQueryReply};
use proto::wire;
use proto::wire::control_client::ControlClient;

use crate::peers::{self, PeerLimits};

/// Sends a query to the node of this cluster at that address. The error is a text for people.
pub async fn ask(cluster: u128, address: &str, query: NodeQuery) -> Result<NodeQueryReply, String> {
    let endpoint = peers::endpoint(address, PeerLimits::default());
    let endpoint = endpoint.map_err(|error| error.to_string())?;
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let mut client = proto::limited!(ControlClient::new(channel));
    let reply = client.query(wire::NodeQuery::new(cluster, query)).await;
    let reply = reply.map_err(|status| status.message().to_owned())?;
    NodeQueryReply::try_from(reply.into_inner()).map_err(|invalid| invalid.to_string())
}
