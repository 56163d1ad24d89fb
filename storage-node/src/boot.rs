//! Drives one start: [`engine::boot`] decides who this process is and whether it may run; here is what it waits for.
//!
//! ```text
//!   lock the folder, recover ──▶ etcd? ──▶ meta? ──▶ wait until node/{uuid} is gone
//!     ──▶ read store/{uuid} and name/{name}, look ──▶ log, fsync ──▶ CAS ──▶ read again, look ──▶ listen, register
//! ```
//!
//! Two processes of one store are also told apart by what needs a network: who holds the store's key in etcd, and who
//! answers at the address of its record.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use engine::boot::{self, Claim, Holder, Refusal, Seen, Start, Step, Wish};
use engine::config::ShardConfig;
use engine::ids::{Boot, StoreBoot, StoreId};
use engine::message::{NodeQuery, NodeQueryReply};
use engine::node::Event;
use engine::records::{Meta, NameRecord, NodeRecord, StoreRecord, StoreStatus};
use engine::store::log::Record as LogRecord;
use metastore::{BootGuard, Error, Kept, Metastore, Outcome, Pause, Settings};
use telemetry::Health;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::disk::{Disk, Opened};
use crate::exit::Exit;
use crate::inbox::Told;
use crate::options::Options;

/// Between two tries of something that is waited for.
const TRY_EVERY: Duration = Duration::from_millis(100);
/// Of an etcd that does not answer, in the end.
const TRY_AGAIN_LONGEST: Duration = Duration::from_secs(1);
/// What a start waits for is said after this, and then again this often.
const SAY_AFTER: Duration = Duration::from_secs(1);
const SAY_EVERY: Duration = Duration::from_secs(60);
/// A node that is alive answers a probe within this.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// How much later than it should etcd may delete the key of a lease that ran out.
const EXPIRY_LATE_MAX: Duration = Duration::from_secs(1);
/// Writing the first record takes milliseconds; a disk that takes this long is broken.
const FIRST_WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// What a start found out.
#[derive(Debug)]
pub struct Booted {
    pub me: StoreBoot,
    pub guard: BootGuard,
    pub listener: TcpListener,
    /// Where others dial.
    pub address: String,
    /// The store is suspect: none of its copies may be trusted to be promoted.
    pub suspect: bool,
}

/// The disk as it was opened, and where its events arrive.
#[derive(Debug)]
pub struct OpenDisk {
    pub disk: Disk,
    pub told: mpsc::Receiver<Told>,
    /// The next group to be written.
    pub next_group: u64,
    /// What the disk told before there was a machine to hear it.
    pub early: Vec<Event>,
}

/// Waits for an etcd that answers.
pub async fn connect(options: &Options, health: &Health) -> Result<Metastore, Exit> {
    let settings = Settings::new(options.etcd.clone(), &options.cluster);
    wait(health, "etcd", async || Metastore::connect(&settings).await.map(Some)).await
}

/// Waits for the cluster's settings: the leading coordinator makes them.
pub async fn meta(metastore: &Metastore, health: &Health) -> Result<Meta, Exit> {
    let read = async || Ok(metastore.get::<Meta>(&()).await?.map(|kept| kept.record));
    wait(health, "meta", read).await
}

/// Tries until there is something; meanwhile `/readyz` says what is waited for.
async fn wait<T>(
    health: &Health,
    what: &'static str,
    mut attempt: impl AsyncFnMut() -> Result<Option<T>, Error>,
) -> Result<T, Exit> {
    let mut pause = Pause::new(TRY_EVERY, TRY_AGAIN_LONGEST);
    let mut say_at = Instant::now() + SAY_AFTER;
    health.not_ready(what);
    loop {
        let error = match attempt().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) if error.is_transient() => Some(error),
            Err(error) if error.is_misfit() => return Err(Exit::Usage(format!("--etcd: {error}"))),
            Err(error) => return Err(Exit::Failed(format!("{what}: {error}"))),
        };
        let reason = error.as_ref().map_or(what, Error::reason);
        health.not_ready(reason);
        if Instant::now() >= say_at {
            say_at = Instant::now() + SAY_EVERY;
            match &error {
                Some(error) => warn!(reason, %error, "waiting for etcd"),
                None => warn!(reason, "waiting"),
            }
        }
        match error {
            Some(_) => pause.wait().await,
            // A coordinator may make it at any moment.
            None => sleep(TRY_EVERY).await,
        }
    }
}

/// What etcd says of a store and of the name that it is to have.
#[derive(Default)]
struct Known {
    record: Option<Kept<StoreRecord>>,
    counted_on: bool,
    name: Option<Kept<NameRecord>>,
    /// The store that the name's record names, if it is another one.
    holder: Option<Holder>,
}

impl Known {
    fn seen(&self) -> Seen<'_> {
        Seen {
            record: self.record.as_ref().map(|kept| &kept.record),
            holder: self.holder.as_ref(),
            counted_on: self.counted_on,
        }
    }

    /// Where the holder of the name was last.
    fn address(&self) -> &str {
        self.holder.as_ref().map_or("", |holder| holder.record.address.as_str())
    }
}

/// What a start needs to know of its process and its cluster.
pub struct Starting<'a> {
    pub options: &'a Options,
    pub metastore: &'a Metastore,
    pub meta: &'a Meta,
    pub health: &'a Health,
}

impl Starting<'_> {
    /// Becomes the store whose data lies here, or a new one.
    pub async fn identify(&self, disk: &mut OpenDisk, opened: &Opened) -> Result<Booted, Exit> {
        self.health.not_ready("identity");
        if opened.identity.is_none() && !opened.damage.is_empty() {
            // It must not become a new store: somebody may count on the old one's promises.
            let folder = self.options.data.display();
            let why = opened.damage.join("; ");
            return Err(Exit::Disk(format!("{folder} no longer says which store it is: {why}")));
        }
        let fresh = StoreId(random()?);
        let known = opened.identity.clone();
        let suspect = opened.is_suspect();
        let wish = Wish { name: self.options.name.clone(), replace: self.options.replaces() };
        let mut start = Start::new(self.meta.cluster, wish, suspect, known, fresh)
            .map_err(|refusal| self.refused(fresh, refusal, &Known::default(), opened))?;
        let store = start.store();
        let mut bound = None;
        let mut looks = 0;
        loop {
            let known = self.read_records(store).await?;
            looks += 1;
            if looks == 1 && known.holder.is_none() && self.options.replaces() {
                warn!(
                    "--replace has nothing to do here: take it away, or it may be obeyed by mistake"
                );
            }
            let step = start.look(known.seen(), random()?);
            let claim =
                match step.map_err(|refusal| self.refused(store, refusal, &known, opened))? {
                    Step::Claim(claim) => claim,
                    Step::Serve { boot, nonce, suspect } => {
                        let (listener, address) = match bound {
                            Some(bound) => bound,
                            None => self.listen().await?,
                        };
                        match suspect {
                            true => disk.disk.suspicion_noted(),
                            false => disk.disk.trusted(),
                        }
                        info!(%store, boot = boot.0, address, suspect, "identity claimed");
                        let me = StoreBoot { store, boot };
                        let guard = BootGuard { store, boot, nonce };
                        return Ok(Booted { me, guard, listener, address, suspect });
                    }
                };
            self.check_silent(store, known.record.as_ref()).await?;
            // Before the boot number is used up, and only now: nobody may take us for the run before.
            let (_, address) = match &mut bound {
                Some(bound) => bound,
                none => none.insert(self.listen().await?),
            };
            let Claim { log, boot, nonce, status, replaces } = claim;
            if let Some(store) = replaces {
                let name = &self.options.name;
                warn!(name, %store, "takes the name of another store");
            }
            if let Some(identity) = log {
                let identity = LogRecord::Identity(identity);
                tokio::task::block_in_place(|| disk.write_durably(identity))?;
            }
            let record = self.record(boot, nonce, status, address.clone());
            self.claim(store, record, known).await?;
        }
    }

    /// What etcd says of the store, read once no process is registered as it, and of the name that it is to have.
    async fn read_records(&self, store: StoreId) -> Result<Known, Exit> {
        let record = self.await_turn(store).await?;
        let is_gone = record.as_ref().is_some_and(|kept| kept.record.status.is_gone());
        let counted_on = is_gone && self.is_counted_on(store).await?;
        let id = &self.options.name;
        let name = self.read(async || self.metastore.get::<NameRecord>(id).await).await?;
        let other = name.as_ref().map(|kept| kept.record.store).filter(|other| *other != store);
        let holder = match other {
            Some(other) => self.holder(other).await?,
            None => None,
        };
        Ok(Known { record, counted_on, name, holder })
    }

    async fn holder(&self, store: StoreId) -> Result<Option<Holder>, Exit> {
        let kept = self.read(async || self.metastore.get::<StoreRecord>(&store).await).await?;
        let Some(Kept { record, .. }) = kept else { return Ok(None) };
        let answers = self.answers(&record.address, store).await;
        let counted_on = self.is_counted_on(store).await?;
        Ok(Some(Holder { store, record, answers, counted_on }))
    }

    /// What a refusal means to whoever started this process.
    fn refused(&self, store: StoreId, refusal: Refusal, known: &Known, opened: &Opened) -> Exit {
        let folder = self.options.data.display();
        Exit::Refused(match refusal {
            Refusal::OtherCluster { cluster } => format!(
                "the data in {folder} belongs to cluster {cluster:032x}, and etcd's cluster {:?} is {:032x}: check --etcd, \
                 --cluster and --data",
                self.options.cluster, self.meta.cluster
            ),
            Refusal::Forgotten => format!(
                "etcd does not know store {store} of {folder}: was etcd's data lost or restored? \
                 Start nothing more and read \"Back up etcd\" in docs/operations.md"
            ),
            Refusal::NotOurs { boot } if !opened.damage.is_empty() => format!(
                "damage has taken from {folder} which start of store {store} it was last (etcd knows of boot {}): {}. It \
                 must not run. If it is a copy: put the store's own folder back, or start the node that has it. Only if \
                 there is none any more: start on an empty folder with --replace, and the other nodes fill it",
                boot.0,
                opened.damage.join("; ")
            ),
            Refusal::NotOurs { boot } => format!(
                "the data in {folder} is not what store {store} had when it last started (boot {}): the disk was rolled \
                 back to an older state, or the folder was copied and the copy was started. It must not run. Put the \
                 store's own folder back, or start the node that has it. Only if that one is gone for good: start on an \
                 empty folder with --replace, and the other nodes fill it",
                boot.0
            ),
            Refusal::GivenUp { status } => format!(
                "store {store} of {folder} was given up ({status:?}), and no shard counts on its copies any more: others \
                 have its places, and this folder's data will not be used again, under any name. Has another store the \
                 name {:?} now? Then start that one, on its own folder. A new node needs an empty folder and a --name of \
                 its own; --replace only if the store that has the name now is gone for good",
                self.options.name
            ),
            Refusal::NameRuns { store } => format!(
                "the name {:?} belongs to store {store} at {}, which is running: choose another --name, or start on its own \
                 data folder",
                self.options.name,
                known.address()
            ),
            Refusal::NameTaken { store } => self.name_taken(store, known),
        })
    }

    fn name_taken(&self, store: StoreId, known: &Known) -> String {
        let (name, folder) = (&self.options.name, self.options.data.display());
        let holds = match &known.record {
            Some(Kept { record, .. }) => format!("{folder} holds the store of {:?}", record.name),
            None => format!("{folder} holds no store"),
        };
        let meant = self.options.replace.as_deref().filter(|names| !names.is_empty());
        let not_meant = meant.filter(|_| !self.options.replaces());
        let not_meant = not_meant.map(|names| format!(" (--replace={names} names other nodes)"));
        format!(
            "{holds}, and the name {name:?} belongs to store {store}, last at {}, which is away but not given up. Is its \
             disk not mounted here? Then mount it. Is this another machine, or was another started with this name at the \
             same moment? Then choose another --name. Only if the data of that store is gone for good: start with \
             --replace, and this one takes its name and its places{}",
            known.address(),
            not_meant.unwrap_or_default()
        )
    }

    async fn is_counted_on(&self, store: StoreId) -> Result<bool, Exit> {
        let listed = self.read(async || self.metastore.list::<ShardConfig>().await).await?;
        Ok(boot::is_counted_on(store, listed.all.iter().map(|kept| &kept.record), None))
    }

    /// Waits until no process is registered as this store. Returns the store's record, read after that.
    async fn await_turn(&self, store: StoreId) -> Result<Option<Kept<StoreRecord>>, Exit> {
        let mut renewals = Renewals::default();
        let mut said = false;
        loop {
            let key = self.read(async || self.metastore.get::<NodeRecord>(&store).await).await?;
            let Some(key) = key else { break };
            if !said {
                info!(%store, boot = key.record.boot.0, address = key.record.address,
                    "waiting until the run before this one is forgotten by etcd");
                said = true;
            }
            let running = |how: &str| {
                Exit::Refused(format!(
                    "store {store} is running at {}: {how}. Was the data folder copied?",
                    key.record.address
                ))
            };
            if self.answers(&key.record.address, store).await {
                return Err(running("it answers a probe"));
            }
            let left = self.read(async || self.metastore.lease_left(key.lease).await).await?;
            if renewals.seen(key.lease, left.map(|lease| lease.left), Instant::now()) {
                return Err(running("its lease is renewed"));
            }
            sleep(TRY_EVERY).await;
        }
        self.read(async || self.metastore.get::<StoreRecord>(&store).await).await
    }

    /// Nobody answers as this store. All leases may vanish though every process is well, so a missing key proves nothing.
    async fn check_silent(
        &self,
        store: StoreId,
        record: Option<&Kept<StoreRecord>>,
    ) -> Result<(), Exit> {
        let Some(Kept { record, .. }) = record else { return Ok(()) };
        if self.answers(&record.address, store).await {
            return Err(Exit::Refused(format!(
                "store {store} is running at {}: it answers a probe. Was the data folder copied?",
                record.address
            )));
        }
        Ok(())
    }

    async fn listen(&self) -> Result<(TcpListener, String), Exit> {
        let listen = self.options.listen;
        let failed = |error| Exit::Usage(format!("--listen {listen}: can't listen there: {error}"));
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let address = self.options.advertise.clone().unwrap_or_else(|| bound.to_string());
        Ok((listener, address))
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

    /// Tries to make etcd know this run, and whose the name is. What came of it is seen by reading.
    async fn claim(&self, store: StoreId, ours: StoreRecord, known: Known) -> Result<(), Exit> {
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
        let outcome = txn.commit().await;
        match outcome {
            Ok(Outcome::Done { .. }) => Ok(()),
            Ok(lost) => {
                warn!(%store, ?lost, "claim of the store's identity to be looked at again");
                Ok(())
            }
            Err(error) if error.is_transient() => Ok(()),
            Err(error) => Err(Exit::Failed(format!("etcd refuses this store's record: {error}"))),
        }
    }

    /// Reads from etcd, however long it is away.
    async fn read<T>(&self, attempt: impl AsyncFn() -> Result<T, Error>) -> Result<T, Exit> {
        loop {
            match attempt().await {
                Ok(found) => {
                    // An etcd that answers and takes no changes is why this takes so long.
                    let reason = self.metastore.takes_no_changes().unwrap_or("identity");
                    self.health.not_ready(reason);
                    return Ok(found);
                }
                Err(error) if error.is_transient() => self.health.not_ready(error.reason()),
                Err(error) => return Err(Exit::Failed(format!("etcd: {error}"))),
            }
            sleep(TRY_EVERY).await;
        }
    }

    /// A process there says that it is this store.
    async fn answers(&self, address: &str, store: StoreId) -> bool {
        let asked = timeout(PROBE_TIMEOUT, ask_who(self.meta.cluster, address)).await;
        matches!(asked, Ok(Some(who)) if who.store == store)
    }
}

/// Who answers there, if anybody of this cluster does.
async fn ask_who(cluster: u128, address: &str) -> Option<StoreBoot> {
    // Whom it is meant for does not matter: the answer names who it is from.
    let probe = NodeQuery::Probe { to: StoreBoot::default() };
    match crate::ask(cluster, address, probe).await {
        Ok(NodeQueryReply::Probe { from, .. }) => Some(from),
        _ => None,
    }
}

impl OpenDisk {
    pub fn new(disk: Disk, next_group: u64, told: mpsc::Receiver<Told>) -> Self {
        Self { disk, told, next_group, early: Vec::new() }
    }

    /// Writes a group of one record and waits for its fsync.
    fn write_durably(&mut self, record: LogRecord) -> Result<(), Exit> {
        let group = self.next_group;
        self.next_group += 1;
        self.disk.write(record);
        self.disk.sync(group);
        let until = Instant::now() + FIRST_WRITE_TIMEOUT;
        loop {
            match self.told.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Told::Disk(event)) => match self.disk.accept(event) {
                    Event::Durable { group: done } if done >= group => return Ok(()),
                    other => self.early.push(other),
                },
                Ok(Told::Exit(exit)) => return Err(exit),
                // Nobody else speaks before the loop begins.
                Ok(_) => {}
                Err(_) => {
                    return Err(Exit::Failed(format!(
                        "disk: no fsync in {FIRST_WRITE_TIMEOUT:?}: it hangs, or has no room"
                    )));
                }
            }
        }
    }
}

/// Tells a lease that is renewed from one that only takes long to end.
///
/// etcd says how long a lease has left in whole seconds, rounded down, so with a TTL of 2 s a renewed lease and a dying one
/// look alike for a second. But the dying one must be gone by the earliest end that any look has promised. One look too
/// many may be an etcd that changed its leader, which prolongs every lease once; two are a process that lives.
#[derive(Debug, Default)]
struct Renewals {
    lease: i64,
    ends_by: Option<Instant>,
    outlived: u32,
}

impl Renewals {
    /// The lease's key still stands. True: somebody renews it.
    fn seen(&mut self, lease: i64, left: Option<Duration>, now: Instant) -> bool {
        if lease != self.lease {
            // The process that holds the key has made another lease: it lives, if it does that again.
            let outlived = if self.lease == 0 { 0 } else { self.outlived + 1 };
            *self = Self { lease, ends_by: None, outlived };
        }
        // The lease is gone, its key not yet.
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

/// Notes in etcd that this store's disk has failed, if etcd can be reached. At the next start the store is suspect.
pub async fn note_suspect(metastore: &Metastore, guard: BootGuard) {
    let note = async {
        let kept = metastore.get::<StoreRecord>(&guard.store).await.ok()??;
        if (kept.record.boot, kept.record.nonce) != (guard.boot, guard.nonce) {
            return None;
        }
        let record = StoreRecord { status: StoreStatus::Suspect, ..kept.record };
        metastore.replace(&guard.store, &record, kept.modified).await.ok()
    };
    match timeout(Duration::from_secs(1), note).await {
        Ok(Some(Outcome::Done { .. })) => info!(store = %guard.store, "noted as suspect"),
        _ => warn!(store = %guard.store, "could not be noted as suspect"),
    }
}

/// 128 bits that nobody else has.
fn random() -> Result<u128, Exit> {
    use std::io::Read;
    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| Exit::Failed(format!("no random numbers: {error}")))?;
    Ok(u128::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at a lease every 100 ms; `left` says what etcd tells at that time (in ms), none that the key is gone.
    #[track_caller]
    fn check(until_ms: u64, left: impl Fn(u64) -> Option<u64>, want: Option<std::ops::Range<u64>>) {
        let start = Instant::now();
        let mut renewals = Renewals::default();
        let found = (0..until_ms).step_by(100).find(|&ms| {
            let left = left(ms).map(Duration::from_secs);
            renewals.seen(7, left, start + Duration::from_millis(ms))
        });
        match (found, want) {
            (None, None) => {}
            (Some(at), Some(range)) => assert!(range.contains(&at), "refused after {at} ms"),
            (found, want) => panic!("{found:?} instead of {want:?}"),
        }
    }

    #[test]
    fn a_renewed_lease_is_told_from_a_dying_one() {
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
