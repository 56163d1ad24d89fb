//! Queries to the service that coordinators have for operators.

use std::time::Duration;

use anyhow::Context;
use process::Pings;
use proto::wire::operator_client::OperatorClient;
use tonic::transport::Channel;
use tonic::{Response, Status};

/// Sends one query to the coordinator at this address, which has to answer within this time.
/// `pings` notice a connection that has gone silent before that.
pub(crate) async fn ask<T>(
    address: &str,
    within: Duration,
    pings: Pings,
    query: impl AsyncFnOnce(&mut OperatorClient<Channel>) -> Result<Response<T>, Status>,
) -> anyhow::Result<T> {
    let asked = async {
        let endpoint = process::endpoint(address, pings)?;
        let mut client = proto::limited!(OperatorClient::new(endpoint.connect().await?));
        anyhow::Ok(query(&mut client).await?.into_inner())
    };
    let answer = tokio::time::timeout(within, asked).await;
    answer.context("no answer in time")?.with_context(|| format!("coordinator {address}"))
}
