//! The identity of a process: [`engine::node::boot`] decides which store this is and whether it may
//! run; this file performs what it waits for.
//!
//! Two processes of one store are also distinguished by means that need a network: the holder of
//! the store's key in etcd, and the process that answers at the address of its record.

use std::time::{Duration, Instant};

use engine::ids::{Boot, StoreBoot, StoreId};
use engine::message::{NodeQuery, NodeQueryReply};
use engine::node::boot::{
    self, EtcdState, NameHolder, NameRequest, Start, StartRefusal, StartStep, StoreClaim,
};
use engine::records::{Meta, NameRecord, NodeRecord, StoreRecord, StoreStatus};
use engine::shard_record::ShardRecord;
use engine::store::log::LogRecord;
use metastore::{BootGuard, CasOutcome, Error, Metastore, Revisioned};
use process::ProcessExit;
use telemetry::Health;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::disk::DiskContents;
use crate::options::Options;
use crate::start::open::OpenDisk;

/// The pause between two attempts.
const TRY_EVERY: Duration = Duration::from_millis(100);
/// The time-out of a probe.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// The longest delay with which etcd deletes the key of an expired lease.
const EXPIRY_LATE_MAX: Duration = Duration::from_secs(1);

/// The outcome of a start.
#[derive(Debug)]
pub(crate) struct Booted {
    /// The store and the boot of this process.
    pub(crate) me: StoreBoot,
    /// The condition of writes to etcd that only this boot may make.
    pub(crate) guard: BootGuard,
    /// The listener of the gRPC port.
    pub(crate) listener: TcpListener,
    /// The address that others dial.
    pub(crate) address: String,
    /// The record of the store in etcd.
    pub(crate) record: StoreRecord,
    /// The store is suspect: none of its copies may be promoted.
    pub(crate) suspect: bool,
}

/// The records in etcd about a store and the name that it is to have.
#[derive(Default)]
struct EtcdRecords {
    record: Option<Revisioned<StoreRecord>>,
    trusted_member: bool,
    name: Option<Revisioned<NameRecord>>,
    /// The store that the name's record names, if it is another one.
    holder: Option<NameHolder>,
}

impl EtcdRecords {
    fn etcd_state(&self) -> EtcdState<'_> {
        EtcdState {
            record: self.record.as_ref().map(|kept| &kept.record),
            holder: self.holder.as_ref(),
            trusted_member: self.trusted_member,
        }
    }

    /// Returns the last address of the name's holder.
    fn address(&self) -> &str {
        self.holder.as_ref().map_or("", |holder| holder.record.address.as_str())
    }
}

/// The process and the cluster of a start.
pub(crate) struct StartUp<'a> {
    /// The options of the process.
    pub(crate) options: &'a Options,
    /// The client of etcd.
    pub(crate) metastore: &'a Metastore,
    /// The settings of the cluster.
    pub(crate) meta: &'a Meta,
    /// The readiness of the process.
    pub(crate) health: &'a Health,
}

impl StartUp<'_> {
    /// Settles the identity: becomes the store whose data is here, or a new one.
    pub(crate) async fn identify(&self, disk: &mut OpenDisk) -> Result<Booted, ProcessExit> {
        self.health.not_ready("identity");
        let opened = &disk.contents;
        if opened.identity.is_none() && !opened.damage.is_empty() {
            // A new store must not begin here: others may rely on the old one's promises.
            let folder = self.options.data.display();
            let why = opened.damage.join("; ");
            return Err(ProcessExit::Disk(format!(
                "{folder} no longer identifies its store: {why}"
            )));
        }
        let fresh = StoreId(random()?);
        let known = opened.identity.clone();
        let suspect = opened.is_suspect();
        let request =
            NameRequest { name: self.options.name.clone(), replace: self.options.replaces() };
        let mut start = Start::new(self.meta.cluster, request, suspect, known, fresh)
            .map_err(|refusal| self.refused(fresh, refusal, &EtcdRecords::default(), opened))?;
        let store = start.store();
        let mut bound = None;
        let mut looks = 0;
        loop {
            let known = self.read_records(store).await?;
            looks += 1;
            if looks == 1 && known.holder.is_none() && self.options.replaces() {
                warn!(
                    "--replace has no effect here: remove it, or it may take effect by mistake \
                     later"
                );
            }
            let step = start.next_step(known.etcd_state(), random()?);
            let claim = match step
                .map_err(|refusal| self.refused(store, refusal, &known, &disk.contents))?
            {
                StartStep::Claim(claim) => claim,
                StartStep::Serve { boot, nonce, suspect } => {
                    let (listener, address) = match bound {
                        Some(bound) => bound,
                        None => self.options.listen.bind().await?,
                    };
                    match suspect {
                        true => disk.disk.suspicion_noted(),
                        false => disk.disk.trusted(),
                    }
                    info!(%store, boot = boot.0, address, suspect, "identity claimed");
                    let me = StoreBoot { store, boot };
                    let guard = BootGuard { store, boot, nonce };
                    let claimed = known.record.map(|kept| kept.record);
                    let record = claimed.unwrap_or_else(|| {
                        self.record(boot, nonce, StoreStatus::Active, address.clone())
                    });
                    return Ok(Booted { me, guard, listener, address, record, suspect });
                }
            };
            self.check_silent(store, known.record.as_ref()).await?;
            // The listener opens before the boot number is used up, and not earlier: this process
            // must not be mistaken for the previous boot.
            let (_, address) = match &mut bound {
                Some(bound) => bound,
                none => none.insert(self.options.listen.bind().await?),
            };
            let StoreClaim { log, boot, nonce, status, replaces } = claim;
            if let Some(store) = replaces {
                let running = |address: &str, how: &str| self.name_runs(store, address, how);
                self.await_gone(store, running).await?;
                let name = &self.options.name;
                warn!(name, %store, "taking over the name of another store");
            }
            if let Some(identity) = log {
                let identity = LogRecord::Identity(identity);
                disk.write_durably(identity).await?;
            }
            let record = self.record(boot, nonce, status, address.clone());
            self.claim(store, record, replaces, known).await?;
        }
    }

    /// Reads the records about the store, once no process is registered as it, and about its name.
    async fn read_records(&self, store: StoreId) -> Result<EtcdRecords, ProcessExit> {
        let running = |address: &str, how: &str| {
            format!("store {store} is running at {address}: {how}. Was the data folder copied?")
        };
        self.await_gone(store, running).await?;
        let record = self.read(async || self.metastore.get::<StoreRecord>(&store).await).await?;
        let is_gone = record.as_ref().is_some_and(|kept| kept.record.status.is_gone());
        let trusted_member = is_gone && self.is_trusted_member(store).await?;
        let id = &self.options.name;
        let name = self.read(async || self.metastore.get::<NameRecord>(id).await).await?;
        let other = name.as_ref().map(|kept| kept.record.store).filter(|other| *other != store);
        let holder = match other {
            Some(other) => self.holder(other).await?,
            None => None,
        };
        Ok(EtcdRecords { record, trusted_member, name, holder })
    }

    async fn holder(&self, store: StoreId) -> Result<Option<NameHolder>, ProcessExit> {
        let kept = self.read(async || self.metastore.get::<StoreRecord>(&store).await).await?;
        let Some(Revisioned { record, .. }) = kept else { return Ok(None) };
        let answers = self.answers(&record.address, store).await;
        let trusted_member = self.is_trusted_member(store).await?;
        Ok(Some(NameHolder { store, record, answers, trusted_member }))
    }

    /// Returns the text of a refusal for the operator.
    fn refused(
        &self,
        store: StoreId,
        refusal: StartRefusal,
        known: &EtcdRecords,
        opened: &DiskContents,
    ) -> ProcessExit {
        let folder = self.options.data.display();
        ProcessExit::Refused(match refusal {
            StartRefusal::OtherCluster { cluster } => format!(
                "the data in {folder} belongs to cluster {cluster:032x}, and etcd's cluster {:?} \
                 is {:032x}: check --etcd, --cluster and --data",
                self.options.cluster.cluster, self.meta.cluster
            ),
            StartRefusal::Forgotten => format!(
                "etcd does not know store {store} of {folder}: was etcd's data lost or restored? \
                 Start nothing more and read \"etcd has lost its majority or its data\" in \
                 docs/runbooks.md"
            ),
            StartRefusal::NotOurs { boot } if !opened.damage.is_empty() => format!(
                "damage in {folder} makes the last boot of store {store} unknown (etcd records \
                 boot {}): {}. It must not run. If the folder is a copy: put the store's own \
                 folder back, or start the node that has it. Only if there is none any more: start \
                 on an empty folder with --replace, and the other nodes fill it",
                boot.0,
                opened.damage.join("; ")
            ),
            StartRefusal::NotOurs { boot } => format!(
                "the data in {folder} is not what store {store} had when it last started (boot \
                 {}): the disk was rolled back to an older state, or the folder was copied and the \
                 copy was started. It must not run. Put the store's own folder back, or start the \
                 node that has it. Only if that one is gone for good: start on an empty folder \
                 with --replace, and the other nodes fill it",
                boot.0
            ),
            StartRefusal::GivenUp { status } => format!(
                "store {store} of {folder} was given up ({status:?}), and no shard relies on its \
                 copies any more: others have its places, and this folder's data will not be used \
                 again, under any name. If another store has the name {:?} now: start that one, on \
                 its own folder. A new node needs an empty folder and a --name of its own; \
                 --replace only if the store that has the name now is gone for good",
                self.options.name
            ),
            StartRefusal::NameRuns { store } => {
                self.name_runs(store, known.address(), "it answers a probe")
            }
            StartRefusal::NameTaken { store } => self.name_taken(store, known),
        })
    }

    fn name_runs(&self, store: StoreId, address: &str, how: &str) -> String {
        format!(
            "the name {:?} belongs to store {store} at {address}, which is running ({how}): choose \
             another --name, or start on its own data folder",
            self.options.name
        )
    }

    fn name_taken(&self, store: StoreId, known: &EtcdRecords) -> String {
        let (name, folder) = (&self.options.name, self.options.data.display());
        let holds = match &known.record {
            Some(Revisioned { record, .. }) => {
                format!("{folder} holds the store of {:?}", record.name)
            }
            None => format!("{folder} holds no store"),
        };
        let meant = self.options.replace.as_deref().filter(|names| !names.is_empty());
        let not_meant = meant.filter(|_| !self.options.replaces());
        let not_meant = not_meant.map(|names| format!(" (--replace={names} names other nodes)"));
        format!(
            "{holds}, and the name {name:?} belongs to store {store}, last at {}, which is away \
             but not given up. Is its disk not mounted here? Then mount it. Is this another \
             machine, or was another started with this name at the same moment? Then choose \
             another --name. Only if the data of that store is gone for good: start with \
             --replace, and this one takes its name and its places{}",
            known.address(),
            not_meant.unwrap_or_default()
        )
    }

    async fn is_trusted_member(&self, store: StoreId) -> Result<bool, ProcessExit> {
        let listed = self.read(async || self.metastore.list::<ShardRecord>().await).await?;
        Ok(boot::is_trusted_member(store, listed.all.iter().map(|kept| &kept.record), None))
    }

    /// Waits until no process is registered as this store. `running` formats the error about a live
    /// one, from its address and the evidence.
    async fn await_gone(
        &self,
        store: StoreId,
        running: impl Fn(&str, &str) -> String,
    ) -> Result<(), ProcessExit> {
        let mut renewals = Renewals::default();
        let mut logged = false;
        loop {
            let key = self.read(async || self.metastore.get::<NodeRecord>(&store).await).await?;
            let Some(key) = key else { return Ok(()) };
            let address = &key.record.address;
            if !logged {
                info!(%store, boot = key.record.boot.0, address,
                    "waiting for the previous process's lease to expire");
                logged = true;
            }
            if self.answers(address, store).await {
                return Err(ProcessExit::Refused(running(address, "it answers a probe")));
            }
            let left = self.read(async || self.metastore.lease_left(key.lease).await).await?;
            if renewals.observe(key.lease, left.map(|lease| lease.left), Instant::now()) {
                return Err(ProcessExit::Refused(running(address, "its lease is renewed")));
            }
            sleep(TRY_EVERY).await;
        }
    }

    /// Checks that no process answers as this store. All leases may vanish though every process is
    /// well, so a missing key proves nothing.
    async fn check_silent(
        &self,
        store: StoreId,
        record: Option<&Revisioned<StoreRecord>>,
    ) -> Result<(), ProcessExit> {
        let Some(Revisioned { record, .. }) = record else { return Ok(()) };
        if self.answers(&record.address, store).await {
            return Err(ProcessExit::Refused(format!(
                "store {store} is running at {}: it answers a probe. Was the data folder copied?",
                record.address
            )));
        }
        Ok(())
    }

    fn record(&self, boot: Boot, nonce: u128, status: StoreStatus, address: String) -> StoreRecord {
        let options = self.options;
        StoreRecord {
            name: options.name.clone(),
            address,
            zone: options.zone.clone(),
            host: options.host_label(),
            boot,
            nonce,
            status,
        }
    }

    /// Tries to write this boot into etcd, and the owner of the name. The outcome is found by
    /// reading.
    async fn claim(
        &self,
        store: StoreId,
        ours: StoreRecord,
        replaces: Option<StoreId>,
        known: EtcdRecords,
    ) -> Result<(), ProcessExit> {
        let (id, name) = (&self.options.name, NameRecord { store });
        let txn = self.metastore.txn();
        let txn = match &known.record {
            Some(kept) => txn.replace(&store, &ours, kept.modified),
            None => txn.create(&store, &ours),
        };
        let txn = match &known.name {
            Some(kept) => txn.replace(id, &name, kept.modified),
            None => txn.create(id, &name),
        };
        // The store that loses its name must not have registered meanwhile: a running process keeps
        // its name.
        let txn = match &replaces {
            Some(other) => txn.if_absent::<NodeRecord>(other),
            None => txn,
        };
        let outcome = txn.commit().await;
        match outcome {
            Ok(CasOutcome::Done { .. }) => Ok(()),
            Ok(lost) => {
                warn!(%store, ?lost, "identity claim not confirmed, re-reading");
                Ok(())
            }
            Err(error) if error.is_transient() => Ok(()),
            Err(error) => {
                Err(ProcessExit::Failed(format!("etcd refuses this store's record: {error}")))
            }
        }
    }

    /// Reads from etcd, for as long as it is away.
    async fn read<T>(&self, attempt: impl AsyncFn() -> Result<T, Error>) -> Result<T, ProcessExit> {
        loop {
            match attempt().await {
                Ok(found) => {
                    // An etcd that answers reads but accepts no writes is why this takes so long.
                    let reason = self.metastore.write_failure().unwrap_or("identity");
                    self.health.not_ready(reason);
                    return Ok(found);
                }
                Err(error) if error.is_transient() => self.health.not_ready(error.reason()),
                Err(error) => return Err(ProcessExit::Failed(format!("etcd: {error}"))),
            }
            sleep(TRY_EVERY).await;
        }
    }

    /// Returns whether a process at that address answers as this store.
    async fn answers(&self, address: &str, store: StoreId) -> bool {
        let asked = timeout(PROBE_TIMEOUT, ask_who(self.meta.cluster, address)).await;
        matches!(asked, Ok(Some(who)) if who.store == store)
    }
}

/// Returns the identity of the process of this cluster that answers there, if there is one.
async fn ask_who(cluster: u128, address: &str) -> Option<StoreBoot> {
    // The addressee does not matter: the answer names its sender.
    let probe = NodeQuery::Probe { to: StoreBoot::default() };
    match crate::ask(cluster, address, probe).await {
        Ok(NodeQueryReply::Probe { from, .. }) => Some(from),
        _ => None,
    }
}

/// Distinguishes a lease that is renewed from one that is only slow to expire.
///
/// etcd reports the remaining time of a lease in whole seconds, rounded down, so with a TTL of 2 s
/// a renewed lease and an expiring one look alike for a second. But the expiring one must be gone
/// by the earliest end that any look has promised. One look too many may be an etcd that changed
/// its leader, which prolongs every lease once; two prove a live process.
#[derive(Debug, Default)]
struct Renewals {
    lease: i64,
    ends_by: Option<Instant>,
    outlived: u32,
}

impl Renewals {
    /// Notes that the lease's key still exists. Returns `true` once that proves that a process
    /// renews it.
    fn observe(&mut self, lease: i64, left: Option<Duration>, now: Instant) -> bool {
        if lease != self.lease {
            // The process that holds the key has made another lease: it lives if it does so again.
            let outlived = if self.lease == 0 { 0 } else { self.outlived + 1 };
            *self = Self { lease, ends_by: None, outlived };
        }
        // The lease is gone, and its key not yet.
        let Some(left) = left else { return false };
        let end = now + left + Duration::from_secs(1);
        match self.ends_by {
            Some(by) if now > by + EXPIRY_LATE_MAX => {
                self.outlived += 1;
                self.ends_by = Some(end);
            }
            Some(by) => self.ends_by = Some(by.min(end)),
            None => self.ends_by = Some(end),
        }
        self.outlived >= 2
    }
}

/// Records in etcd that this store's disk has failed, if etcd can be reached. At the next start the
/// store is suspect.
pub(crate) async fn note_suspect(metastore: &Metastore, guard: BootGuard) {
    let note = async {
        let kept = metastore.get::<StoreRecord>(&guard.store).await.ok()??;
        if (kept.record.boot, kept.record.nonce) != (guard.boot, guard.nonce) {
            return None;
        }
        let record = StoreRecord { status: StoreStatus::Suspect, ..kept.record };
        metastore.replace(&guard.store, &record, kept.modified).await.ok()
    };
    match timeout(Duration::from_secs(1), note).await {
        Ok(Some(CasOutcome::Done { .. })) => {
            info!(store = %guard.store, "store recorded as suspect")
        }
        _ => warn!(store = %guard.store, "could not record the store as suspect"),
    }
}

/// Returns 128 random bits.
fn random() -> Result<u128, ProcessExit> {
    use std::io::Read;
    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| ProcessExit::Failed(format!("can't read random numbers: {error}")))?;
    Ok(u128::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at a lease every 100 ms; `left` is the remaining time that etcd reports at that time
    /// (in ms), or `None` if the key is gone.
    #[track_caller]
    fn check(until_ms: u64, left: impl Fn(u64) -> Option<u64>, want: Option<std::ops::Range<u64>>) {
        let start = Instant::now();
        let mut renewals = Renewals::default();
        let found = (0..until_ms).step_by(100).find(|&ms| {
            let left = left(ms).map(Duration::from_secs);
            renewals.observe(7, left, start + Duration::from_millis(ms))
        });
        match (found, want) {
            (None, None) => {}
            (Some(at), Some(range)) => assert!(range.contains(&at), "refused after {at} ms"),
            (found, want) => panic!("{found:?} instead of {want:?}"),
        }
    }

    #[test]
    fn a_renewed_lease_is_distinguished_from_an_expiring_one() {
        // TTL 2, renewed every 0.4 s: always 1.
        check(20_000, |_| Some(1), Some(4_000..8_000));
        // TTL 2, last renewed just before the first look; the key goes within a second of the end.
        let dying = |ms: u64| (ms < 2_000).then(|| (2_000 - ms) / 1_000);
        check(3_000, dying, None);
        // TTL 10, renewed every 2 s.
        check(60_000, |ms| Some((10_000 - ms % 2_000) / 1_000), Some(10_000..30_000));
        // An etcd that changed its leader after a second prolongs the lease once.
        let prolonged = |ms: u64| {
            if ms < 1_000 { dying(ms) } else { (ms < 4_000).then(|| (4_000 - ms) / 1_000) }
        };
        check(5_000, prolonged, None);
    }
}
