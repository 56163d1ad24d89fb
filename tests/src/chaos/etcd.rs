//! Operations on etcd over its JSON gateway: find the leader, revoke leases, compact.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::fleet::{ETCD_PORT, Fleet, Role};
use crate::cluster::http::Client;

/// A short limit, since no other fault is healed while one waits here, and so each would last too
/// long.
const DEADLINE: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::ZERO;
const REVOKES_WITHIN: Duration = Duration::from_secs(3);

/// Returns the answer of the first member that answers.
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

/// Returns the name of the leader.
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
    Err("etcd has no leader".to_owned())
}

/// Revokes all leases, as far as etcd answers. Returns the number of revoked leases.
pub fn revoke_all(fleet: &Fleet) -> Result<usize, String> {
    let listed = ask(fleet, "/v3/lease/leases", &json!({}))?;
    let mut revoked = 0;
    let begun = Instant::now();
    for lease in listed["leases"].as_array().into_iter().flatten() {
        if begun.elapsed() > REVOKES_WITHIN {
            break;
        }
        // A lease that expired since it was listed is gone as well.
        revoked += usize::from(ask(fleet, "/v3/lease/revoke", &json!({"ID": lease["ID"]})).is_ok());
    }
    Ok(revoked)
}

/// Compacts the history up to now and defragments all members. Returns the revision.
pub fn compact(fleet: &Fleet) -> Result<String, String> {
    let status = ask(fleet, "/v3/maintenance/status", &json!({}))?;
    let revision = status["header"]["revision"].as_str().ok_or("no revision")?.to_owned();
    ask(fleet, "/v3/kv/compaction", &json!({"revision": revision, "physical": true}))?;
    for name in fleet.names(Role::Etcd) {
        // A member that is down is skipped.
        let _may_be_down = ask_one(fleet, &name, "/v3/maintenance/defragment", &json!({}));
    }
    Ok(revision)
}
