//! `--check-config`: checks what can be checked without starting the role.
//!
//! The settings go to stdout as an equivalent configuration file, and the findings to stderr. A
//! condition that only delays a start, such as an etcd that does not answer, is a warning.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use engine::records::Meta;
use engine::store::log::group::Owner;
use metastore::{EtcdInspection, Metastore, Settings, failover_bound};

use crate::config::ParsedConfig;
use crate::exit::CommandExit;
use crate::output::{self, note};

/// Prints and checks the settings. `warnings` are printed, too; `own` is the role's check of
/// its settings and of the cluster that etcd holds, if there is one.
pub(crate) async fn run(
    parsed: &ParsedConfig,
    warnings: &[String],
    own: impl Fn(Option<&Meta>) -> Result<(), String>,
) -> anyhow::Result<CommandExit> {
    output::result(parsed.print().trim_end())?;
    warnings.iter().for_each(|warning| note!("warning: {warning}"));
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
        note!("--data {data}: holds store {store} of cluster {cluster:032x}");
    }
    if errors.is_empty() {
        let own = |made: Option<&Meta>| match (owner, made) {
            (Some((data, owner)), Some(made)) if owner.cluster != made.cluster => Err(format!(
                "--data {}: holds data of another cluster; the cluster in etcd is {:032x}: check \
                 --etcd, --cluster and --data",
                data.display(),
                made.cluster
            )),
            _ => own(made),
        };
        errors.extend(etcd(role, own).await.err());
    }
    for error in &errors {
        note!("error: {error}");
    }
    Ok(if errors.is_empty() { CommandExit::Done } else { CommandExit::Usage })
}

/// Returns an error for each address that cannot be bound. All listeners are kept until the last
/// address was tried, so that two equal addresses of this role are found, too.
fn listeners(role: &ArgMatches) -> Vec<String> {
    let flags = ["listen", "http", "metrics", "grpc"];
    let given = flags
        .into_iter()
        .filter_map(|flag| Some((flag, *role.try_get_one::<SocketAddr>(flag).ok().flatten()?)));
    let bound: Vec<_> = given.map(|(flag, at)| (flag, at, TcpListener::bind(at))).collect();
    let failed = |(flag, at, bound): &(&str, SocketAddr, std::io::Result<TcpListener>)| {
        let error = bound.as_ref().err()?;
        Some(format!("--{flag} {at}: cannot listen on this address: {error}"))
    };
    bound.iter().filter_map(failed).collect()
}

/// Returns the owner of the data in the folder, if there is any. The error is the reason why a node
/// cannot use the folder.
fn folder(data: &Path) -> Result<Option<Owner>, String> {
    if data.exists() && !data.is_dir() {
        return Err("not a directory".into());
    }
    // A missing folder is created at start: its closest existing ancestor must be writable.
    let there = data.ancestors().find(|path| path.exists() || path.as_os_str().is_empty());
    let there = there.filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(there, access)
        .map_err(|error| format!("{} is not writable: {error}", there.display()))?;
    storage_node::inspect::owner(data).map_err(|error| error.to_string())
}

/// Prints warnings about etcd; the error is a condition that prevents a start.
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
    let EtcdInspection { version, warning, granted_s, .. } =
        match Metastore::inspect(&settings, ttl_s).await {
            Ok(inspection) => inspection,
            Err(error) if error.is_transient() => {
                note!("warning: --etcd {named}: {error}: a start would wait until etcd answers");
                return Ok(());
            }
            Err(error) => return Err(format!("--etcd {named}: {error}")),
        };
    note!("etcd {version} answers");
    if let Some(warning) = warning {
        note!("warning: --etcd {named}: {warning}; this etcd has version {version}");
    }
    if granted_s > ttl_s {
        let within = failover_bound(granted_s).as_secs();
        note!(
            "warning: --lease-ttl {ttl_s}: this etcd grants no lease below {granted_s} s (1.5 \
             times its election timeout), so a process that fails silently is replaced within \
             {within} s"
        );
    }
    let store = Metastore::connect(&settings).await.map_err(|error| error.to_string())?;
    match store.get::<Meta>(&()).await {
        Ok(Some(kept)) => own(Some(&kept.record)),
        Ok(None) => {
            note!("cluster {cluster:?} does not exist yet: a coordinator will create it");
            Ok(())
        }
        Err(error) => Err(format!("--cluster {cluster}: {error}")),
    }
}
