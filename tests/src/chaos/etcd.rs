//! etcd as an operator handles it, over its JSON gateway: who leads, leases, compaction.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::fleet::{ETCD_PORT, Fleet, Role};
use crate::cluster::http::Client;

/// While a fault waits here no other is healed: each would last longer than it says.
const DEADLINE: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::ZERO;
const REVOKES_WITHIN: Duration = Duration::from_secs(3);

/// The first member that answers, except those that don't.
fn ask(fleet: &Fleet, path: &str, body: &Value) -> Result<Value, String> {
    let mut why = "no etcd".to_owned();
    for name in fleet.names(Role::Etcd) {
        match ask_one(fleet, &name, path, body) {
            Ok(answer) => return Ok(answer),
            Err(error) => why = error,
        }
    }
    Err(why)
}

fn ask_one(fleet: &Fleet, name: &str, path: &str, body: &Value) -> Result<Value, String> {
    let member = fleet.member(name);
    if !member.can_answer() {
        return Err(format!("etcd {name} is down or stopped"));
    }
    let mut client = Client::new(&member.at(ETCD_PORT)).with_grace(GRACE);
    match client.call("POST", path, &[], body.to_string().as_bytes(), DEADLINE) {
        Ok(answer) if answer.status == 200 => Ok(answer.body),
        other => Err(format!("etcd {name} {path}: {other:?}")),
    }
}

/// The member that leads.
pub fn leader(fleet: &Fleet) -> Result<String, String> {
    for name in fleet.names(Role::Etcd) {
        let Ok(status) = ask_one(fleet, &name, "/v3/maintenance/status", &json!({})) else {
            continue;
        };
        let leader = &status["leader"];
        if leader.is_string() && *leader == status["header"]["member_id"] {
            return Ok(name);
        }
    }
    Err("no etcd member leads".to_owned())
}

/// Revokes every lease there is, as far as etcd answers; returns how many.
pub fn revoke_all(fleet: &Fleet) -> Result<usize, String> {
    let listed = ask(fleet, "/v3/lease/leases", &json!({}))?;
    let mut revoked = 0;
    let begun = Instant::now();
    for lease in listed["leases"].as_array().into_iter().flatten() {
        if begun.elapsed() > REVOKES_WITHIN {
            break;
        }
        // One that ran out since it was listed is gone as well.
        revoked += usize::from(ask(fleet, "/v3/lease/revoke", &json!({"ID": lease["ID"]})).is_ok());
    }
    Ok(revoked)
}

/// Drops all history up to now, from disk too. Returns the revision.
pub fn compact(fleet: &Fleet) -> Result<String, String> {
    let status = ask(fleet, "/v3/maintenance/status", &json!({}))?;
    let revision = status["header"]["revision"].as_str().ok_or("no revision")?.to_owned();
    ask(fleet, "/v3/kv/compaction", &json!({"revision": revision, "physical": true}))?;
    for name in fleet.names(Role::Etcd) {
        // One that is down has nothing to tidy.
        let _may_be_down = ask_one(fleet, &name, "/v3/maintenance/defragment", &json!({}));
    }
    Ok(revision)
}
