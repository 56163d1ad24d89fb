//! A client of etcd: transactions of one put, over its JSON gateway.
//!
//! A counter on etcd needs a read before each transaction, and a comparison in it. The put alone is
//! measured, so the figure is in etcd's favour.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use client::{HttpConnection, HttpRequest, Media, Url};

use crate::keys::{KeyChooser, KeySpace};
use crate::load::{LoadClient, LoadOutcome};

const DEADLINE: Duration = Duration::from_secs(10);

/// Returns the client of this number, for the members at `urls`.
pub fn transaction_client(urls: &[Url], keys: &KeySpace, number: usize) -> TransactionClient {
    TransactionClient {
        connection: HttpConnection::new(urls[number % urls.len()].clone()),
        chooser: keys.chooser(number as u64),
        keys: Vec::new(),
    }
}

/// A client with one connection.
#[derive(Debug)]
pub struct TransactionClient {
    connection: HttpConnection,
    chooser: KeyChooser,
    keys: Vec<u64>,
}

impl LoadClient for TransactionClient {
    async fn call(&mut self) -> Option<LoadOutcome> {
        self.chooser.choose(1, &mut self.keys);
        let body = transaction(*self.keys.first()?);
        let url = self.connection.url().clone();
        let request =
            HttpRequest::post(&url, "/v3/kv/txn", DEADLINE, None, Media::Json, body.as_bytes());
        Some(match self.connection.call(&request, DEADLINE).await {
            Ok(answer) if answer.status == 200 => {
                let text = String::from_utf8_lossy(&answer.body);
                let is_done = text.contains("\"succeeded\":true");
                if is_done {
                    LoadOutcome::Applied(1)
                } else {
                    LoadOutcome::Failed(text.into_owned())
                }
            }
            Ok(answer) => LoadOutcome::Failed(String::from_utf8_lossy(&answer.body).into_owned()),
            Err(error) => LoadOutcome::Failed(error.to_string()),
        })
    }
}

fn transaction(key: u64) -> String {
    let (key, value) = (BASE64_STANDARD.encode(format!("k{key}")), BASE64_STANDARD.encode("1"));
    format!(r#"{{"success":[{{"requestPut":{{"key":"{key}","value":"{value}"}}}}]}}"#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_is_one_put() {
        let put = r#"{"success":[{"requestPut":{"key":"azc=","value":"MQ=="}}]}"#;
        assert_eq!(transaction(7), put);
    }
}
