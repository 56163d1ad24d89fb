//! `--check-config`: what can be known without starting.
//!
//! The settings go to standard output, as a file that means the same; what was found goes to standard error. What would
//! only make a start wait, an etcd that does not answer, is a warning.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use engine::records::Meta;
use engine::store::log::group::Owner;
use metastore::{Metastore, Probe, Settings, failover_bound};

use crate::config::Parsed;
use crate::exit::Exit;
use crate::output;

/// Prints and checks. `oddities` are printed as warnings; `own` is what the role says of its settings and of the cluster that stands in etcd, if there is one.
pub(crate) async fn run(
    parsed: &Parsed,
    oddities: &[String],
    own: impl Fn(Option<&Meta>) -> Result<(), String>,
) -> anyhow::Result<Exit> {
    output::result(parsed.print().trim_end())?;
    oddities.iter().for_each(|oddity| output::note(&format!("warning: {oddity}")));
    let role = parsed.role();
    let mut errors: Vec<String> = own(None).err().into_iter().collect();
    errors.extend(listeners(role));
    let mut owner = None;
    if let Some(data) = role.try_get_one::<PathBuf>("data").ok().flatten() {
        match folder(data) {
            Ok(found) => owner = found.map(|owner| (data.as_path(), owner)),
            Err(why) => errors.push(format!("--data {}: {why}", data.display())),
        }
    }
    if let Some((data, Owner { cluster, store })) = owner {
        let data = data.display();
        output::note(&format!("--data {data}: holds store {store} of cluster {cluster:032x}"));
    }
    if errors.is_empty() {
        let own = |made: Option<&Meta>| match (owner, made) {
            (Some((data, owner)), Some(made)) if owner.cluster != made.cluster => Err(format!(
                "--data {}: holds data of another cluster than etcd's, which is {:032x}: check --etcd, --cluster and --data",
                data.display(),
                made.cluster
            )),
            _ => own(made),
        };
        errors.extend(etcd(role, own).await.err());
    }
    for error in &errors {
        output::note(&format!("error: {error}"));
    }
    Ok(if errors.is_empty() { Exit::Done } else { Exit::Usage })
}

/// Addresses that can't be listened on. All are held until the last one is tried: two of one's own must differ too.
fn listeners(role: &ArgMatches) -> Vec<String> {
    let flags = ["listen", "http", "metrics", "grpc"];
    let given = flags
        .into_iter()
        .filter_map(|flag| Some((flag, *role.try_get_one::<SocketAddr>(flag).ok().flatten()?)));
    let bound: Vec<_> = given.map(|(flag, at)| (flag, at, TcpListener::bind(at))).collect();
    let failed = |(flag, at, bound): &(&str, SocketAddr, std::io::Result<TcpListener>)| {
        let error = bound.as_ref().err()?;
        Some(format!("--{flag} {at}: can't listen there: {error}"))
    };
    bound.iter().filter_map(failed).collect()
}

/// Whose data is there, if anybody's; or why a node can't have its own there.
fn folder(data: &Path) -> Result<Option<Owner>, String> {
    if data.exists() && !data.is_dir() {
        return Err("it is no folder".into());
    }
    // Made at the start, if it is not there.
    let there = data.ancestors().find(|path| path.exists() || path.as_os_str().is_empty());
    let there = there.filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(there, access)
        .map_err(|error| format!("{} can't be written to: {error}", there.display()))?;
    storage_node::inspect::owner(data).map_err(|error| error.to_string())
}

/// Notes what is odd; the error is what a start would refuse.
async fn etcd(
    role: &ArgMatches,
    own: impl Fn(Option<&Meta>) -> Result<(), String>,
) -> Result<(), String> {
    let endpoints: Vec<String> =
        role.get_many("etcd").expect("every role has it").cloned().collect();
    let named = endpoints.join(",");
    let cluster: &String = role.get_one("cluster").expect("every role has it");
    let ttl_s: u32 = *role.get_one("lease_ttl").expect("every role has it");
    let settings = Settings::new(endpoints, cluster);
    let Probe { version, warning, granted_s, .. } = match Metastore::probe(&settings, ttl_s).await {
        Ok(probe) => probe,
        Err(error) if error.is_transient() => {
            output::note(&format!("warning: --etcd {named}: {error}: a start would wait for it"));
            return Ok(());
        }
        Err(error) => return Err(format!("--etcd {named}: {error}")),
    };
    output::note(&format!("etcd {version} answers"));
    if let Some(warning) = warning {
        output::note(&format!("warning: --etcd {named}: {warning}: this one is {version}"));
    }
    if granted_s > ttl_s {
        let within = failover_bound(granted_s).as_secs();
        output::note(&format!(
            "warning: --lease-ttl {ttl_s}: this etcd grants no lease below {granted_s} s (1.5 times its election timeout), \
             so a process that stops without a word is replaced within {within} s"
        ));
    }
    let store = Metastore::connect(&settings).await.map_err(|error| error.to_string())?;
    match store.get::<Meta>(&()).await {
        Ok(Some(kept)) => own(Some(&kept.record)),
        Ok(None) => {
            output::note(&format!(
                "cluster {cluster:?} is not made yet: a coordinator will make it"
            ));
            Ok(())
        }
        Err(error) => Err(format!("--cluster {cluster}: {error}")),
    }
}
