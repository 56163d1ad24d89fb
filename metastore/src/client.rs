//! The connection to etcd: the version check, and typed linearizable reads.
//!
//! Every call has a deadline, since a stopped etcd keeps a connection open and does not reply.
//! Every read is linearizable: a serializable read may be arbitrarily old, and every record is read
//! in order to act on it.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use engine::codec::Malformed;
use engine::history::{History, WentBack};
use engine::records::Meta;
use etcd_client::{
    Client, ConnectOptions, GetOptions, GetResponse, KeyValue, KvClient, ResponseHeader,
    TxnResponse, WatchClient,
};
use tracing::{error, warn};

use crate::backoff::CallBackoff;
use crate::{CasOutcome, Error, EtcdRecord, tls};

/// The size limit of one reply. The records of all 65,536 shards that a cluster can have, with full
/// member lists, need about 30 MiB; tonic's own limit of 4 MiB would make a cluster of 15,000
/// shards unreadable.
const REPLY_BYTES_MAX: usize = 64 << 20;

/// The settings of a [`Metastore`].
#[derive(Clone, Debug)]
pub struct Settings {
    /// `host:port` or `http://host:port` of each etcd member.
    pub endpoints: Vec<String>,
    /// The cluster's name, 1 to 64 of `a-z A-Z 0-9 _ . -`. All keys of the cluster are below
    /// `/dkc/{cluster}/`.
    pub cluster: String,
    /// The time limit of a call. An etcd member that lost its leader needs about 1 s to find
    /// another one.
    pub call_timeout: Duration,
}

impl Settings {
    /// Returns settings with the default time limit of a call, 2 s.
    pub fn new(endpoints: Vec<String>, cluster: &str) -> Self {
        Self { endpoints, cluster: cluster.to_owned(), call_timeout: Duration::from_secs(2) }
    }
}

/// A record with its key and its revisions in etcd.
#[derive(Clone, Debug, PartialEq)]
pub struct Revisioned<R: EtcdRecord> {
    /// The part of the key that identifies the record among those of its kind.
    pub id: R::Id,
    /// The decoded value.
    pub record: R,
    /// The create_revision of the key; a key that is deleted and created again has a new one.
    pub created: u64,
    /// The mod_revision of the key, which a compare-and-set compares.
    pub modified: u64,
    /// The lease that the key is bound to; 0 if it is bound to no lease.
    pub lease: i64,
}

/// All records of one kind at one revision.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed<R: EtcdRecord> {
    /// The records, in the order of their keys.
    pub all: Vec<Revisioned<R>>,
    /// The etcd revision at which they were read.
    pub revision: u64,
}

/// The keys of one cluster in an etcd. Cheap to clone; clones share the connections.
///
/// All calls go to one member until that member does not reply; then they go to the next member.
/// (The client library would spread calls over all members: with one of three down every third call
/// would fail, and a transaction that fails so is [`Unknown`](crate::CasOutcome::Unknown), which
/// takes another write to resolve.)
#[derive(Clone)]
pub struct Metastore {
    /// A client for each member.
    members: Arc<[Client]>,
    /// The number of the current member, modulo the number of members.
    turn: Arc<AtomicUsize>,
    prefix: Arc<str>,
    call_timeout: Duration,
    /// The value of `meta` that the process [stays with](Self::stay_with). Every transaction
    /// compares it, so the sessions that it makes belong to the etcd of that incarnation.
    pub(crate) joined: Arc<OnceLock<Vec<u8>>>,
    /// The highest revision that any clone has received: no reply may be from an earlier history.
    history: Arc<Mutex<History>>,
    /// The backoff of reads, and below that of transactions.
    pub(crate) reads: Arc<CallBackoff>,
    pub(crate) writes: Arc<CallBackoff>,
}

impl Metastore {
    /// Connects, and refuses an etcd that dkc can't use.
    ///
    /// A transient error means "not reachable now": a starting process logs it and tries again. The
    /// connections belong to the runtime that this is called on.
    pub async fn connect(settings: &Settings) -> Result<Self, Error> {
        let store = Self::open(settings).await?;
        let version = store.find_member(&settings.endpoints).await?;
        if judge_version(&version) == VersionSupport::Old {
            warn!(version, "{OLD}");
        }
        Ok(store)
    }

    /// Checks one member after the other until one is usable, and returns its version.
    ///
    /// A refusal by one member decides nothing as long as another one may still reply, since it may
    /// come from a proxy before etcd that is not ready. If all members refuse, the refusal is
    /// returned.
    pub(crate) async fn find_member(&self, endpoints: &[String]) -> Result<String, Error> {
        let (mut unreached, mut refused) = (None, None);
        for _ in endpoints {
            let turn = self.turn.load(Ordering::Relaxed);
            match self.check_member(&endpoints[turn % endpoints.len()]).await {
                Ok(version) => return Ok(version),
                Err(error) if error.is_transient() => unreached = Some(error),
                Err(error) => refused = Some(error),
            }
            self.next_member(turn);
        }
        Err(unreached.or(refused).expect("there is a member"))
    }

    /// Returns the version of the current member, if that member serves this process.
    async fn check_member(&self, endpoint: &str) -> Result<String, Error> {
        let version = match self.version().await {
            Ok(version) => version,
            Err(error) if error.is_transient() && tls::is_required(endpoint).await => {
                return Err(Error::RequiresTls(endpoint.to_owned()));
            }
            Err(error) => return Err(error),
        };
        if judge_version(&version) == VersionSupport::TooOld {
            return Err(Error::TooOld(version));
        }
        // A read is needed to find out whether etcd requires authentication.
        self.range("get", self.key::<Meta>(&()), None).await?;
        Ok(version)
    }

    /// Creates the clients without a call to etcd.
    pub(crate) async fn open(settings: &Settings) -> Result<Self, Error> {
        cluster_name(&settings.cluster).map_err(|why| Error::Refused("the cluster's name", why))?;
        let options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(1))
            // Detects a member that vanished without closing the connection. etcd treats pings
            // that are less than 5 s apart, or without a call in flight, as an attack and closes
            // the connection.
            .with_keep_alive(Duration::from_secs(6), Duration::from_secs(3))
            .with_keep_alive_while_idle(false)
            // A member that is cut off from its leader reports that instead of not replying.
            .with_require_leader(true);
        let mut members = Vec::new();
        for endpoint in &settings.endpoints {
            let connecting = Client::connect([endpoint], Some(options.clone())).await;
            members.push(connecting.map_err(|error| Error::from_client("connecting", error))?);
        }
        if members.is_empty() {
            let why = "none is named".into();
            return Err(Error::Refused("etcd's addresses", why));
        }
        // The first member is chosen at random, so that not all processes use the same one.
        let turn = Arc::new(AtomicUsize::new(fastrand::usize(..members.len())));
        let prefix = format!("/dkc/{}/", settings.cluster).into();
        let call_timeout = settings.call_timeout;
        let (joined, history, reads, writes) = Default::default();
        let members = members.into();
        Ok(Self { members, turn, prefix, call_timeout, joined, history, reads, writes })
    }

    /// Returns the version that the current member reports.
    pub(crate) async fn version(&self) -> Result<String, Error> {
        let mut maintenance = self.client().maintenance_client();
        let status = self.call("status", maintenance.status()).await?;
        Ok(status.version().to_owned())
    }

    /// Reads one record linearizably. Returns `None` if its key does not exist.
    pub async fn get<R: EtcdRecord>(&self, id: &R::Id) -> Result<Option<Revisioned<R>>, Error> {
        let (reply, _) = self.range("get", self.key::<R>(id), None).await?;
        reply.kvs().first().map(|kv| self.read::<R>(kv)).transpose()
    }

    /// Reads all records of one kind linearizably at one revision.
    ///
    /// One malformed record fails the whole list: a list that silently lacks a record is worse than
    /// no list.
    pub async fn list<R: EtcdRecord>(&self) -> Result<Listed<R>, Error> {
        let options = GetOptions::new().with_prefix();
        let (reply, revision) = self.range("list", self.folder::<R>(), Some(options)).await?;
        let all = reply.kvs().iter().map(|kv| self.read::<R>(kv)).collect::<Result<_, _>>()?;
        Ok(Listed { all, revision })
    }

    /// Reads keys linearizably, and returns them with the etcd revision of the read.
    pub(crate) async fn range(
        &self,
        what: &'static str,
        key: String,
        options: Option<GetOptions>,
    ) -> Result<(GetResponse, u64), Error> {
        let reading = async {
            let asked = self.begin_call()?;
            let mut kv = self.kv();
            let reply = self.call(what, kv.get(key, options)).await?;
            let revision = self.answered(asked, reply.header())?;
            Ok((reply, revision))
        };
        self.with_backoff(&self.reads, reading).await
    }

    /// Runs a call and delays its failure, for longer the more calls have failed before.
    pub(crate) async fn with_backoff<T>(
        &self,
        backoff: &CallBackoff,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let began = backoff.begin();
        let answer = call.await;
        match &answer {
            Ok(_) => backoff.succeeded(),
            Err(error) => backoff.failed(began, self.members.len(), error.reason()).await,
        }
        answer
    }

    /// Returns why etcd refuses writes, as a word for `/readyz`; `None` if the last write
    /// succeeded.
    pub fn write_failure(&self) -> Option<&'static str> {
        self.writes.last_failure()
    }

    /// Returns whether the current member reports that its quota is used up, so that it refuses
    /// writes.
    pub async fn is_full(&self) -> Result<bool, Error> {
        let mut maintenance = self.client().maintenance_client();
        let status = self.call("status", maintenance.status()).await?;
        Ok(status.errors().iter().any(|error| error.contains("NOSPACE")))
    }

    /// Returns whether all replies so far were from one history of etcd. Once one was not, no more
    /// calls are made.
    pub fn is_followed(&self) -> bool {
        self.history().before_call().is_ok()
    }

    /// Begins a call, and returns the revision that its reply is compared with in
    /// [`answered`](Self::answered).
    pub(crate) fn begin_call(&self) -> Result<u64, Error> {
        self.history().before_call().map_err(Error::WentBack)
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        // No code panics while it holds this lock.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the revision of a linearizable reply, which may not be lower than the highest one
    /// that was known when the call began.
    fn answered(&self, asked: u64, header: Option<&ResponseHeader>) -> Result<u64, Error> {
        let revision = revision(header)?;
        self.checked(|history| history.check_answer(asked, revision))?;
        Ok(revision)
    }

    /// Checks a reply. The first one of another history is logged, once for all clones.
    fn checked(
        &self,
        check: impl FnOnce(&mut History) -> Result<(), WentBack>,
    ) -> Result<(), Error> {
        let mut history = self.history();
        let was_followed = history.before_call().is_ok();
        let checked = check(&mut history);
        if let Err(WentBack { was, now }) = checked
            && was_followed
        {
            error!(
                was,
                now,
                "etcd's history went back, so it is not followed any more: if it was restored from \
                 a backup, start nothing and read \"etcd has lost its majority or its data\" in \
                 docs/runbooks.md"
            );
        }
        checked.map_err(Error::WentBack)
    }

    /// Returns the outcome of a transaction, and the revision that it created.
    pub(crate) fn outcome(&self, asked: u64, reply: &TxnResponse) -> Result<CasOutcome, Error> {
        if !reply.succeeded() {
            self.answered(asked, reply.header())?;
            return Ok(CasOutcome::Failed);
        }
        let revision = revision(reply.header())?;
        self.checked(|history| history.check_write(asked, revision))?;
        Ok(CasOutcome::Done { mod_revision: revision })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.members[self.turn.load(Ordering::Relaxed) % self.members.len()]
    }

    pub(crate) fn kv(&self) -> KvClient {
        self.client().kv_client().max_decoding_message_size(REPLY_BYTES_MAX)
    }

    pub(crate) fn watcher(&self) -> WatchClient {
        self.client().watch_client().max_decoding_message_size(REPLY_BYTES_MAX)
    }

    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(crate) fn folder<R: EtcdRecord>(&self) -> String {
        format!("{}{}", self.prefix, R::FOLDER)
    }

    pub(crate) fn key<R: EtcdRecord>(&self, id: &R::Id) -> String {
        format!("{}{}{}", self.prefix, R::FOLDER, R::name(id))
    }

    /// Returns the id of the record that a key names.
    pub(crate) fn id_of<R: EtcdRecord>(&self, key: &[u8]) -> Result<R::Id, Error> {
        let folder = self.folder::<R>();
        let name = key.strip_prefix(folder.as_bytes()).and_then(|name| str::from_utf8(name).ok());
        name.and_then(R::id).ok_or_else(|| malformed(key, Malformed("key")))
    }

    pub(crate) fn read<R: EtcdRecord>(&self, kv: &KeyValue) -> Result<Revisioned<R>, Error> {
        let id = self.id_of::<R>(kv.key())?;
        let record = R::decode(kv.value()).map_err(|error| malformed(kv.key(), error))?;
        if !record.belongs_at(&id) {
            return Err(malformed(kv.key(), Malformed("record of another key")));
        }
        let created = positive(kv.create_revision());
        Ok(Revisioned {
            id,
            record,
            created,
            modified: positive(kv.mod_revision()),
            lease: kv.lease(),
        })
    }

    /// Waits for a reply for as long as a call may take.
    pub(crate) async fn call<T>(
        &self,
        what: &'static str,
        answer: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Error> {
        self.call_within(self.call_timeout, what, answer).await
    }

    pub(crate) async fn call_within<T>(
        &self,
        limit: Duration,
        what: &'static str,
        answer: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Error> {
        let turn = self.turn.load(Ordering::Relaxed);
        let answer = match tokio::time::timeout(limit, answer).await {
            Ok(answer) => answer.map_err(|error| Error::from_client(what, error)),
            Err(_) => Err(Error::Slow(what, format!("no answer in {limit:?}"))),
        };
        if answer.as_ref().is_err_and(Error::is_transient) {
            self.next_member(turn);
        }
        answer
    }

    /// Moves on to the next member, once: many calls may have failed at the current one.
    fn next_member(&self, turn: usize) {
        let next = turn.wrapping_add(1);
        let _moved = self.turn.compare_exchange(turn, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Parses the name of a cluster. A slash would put one cluster's keys among those of another.
pub fn cluster_name(text: &str) -> Result<String, String> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if (1..=64).contains(&text.len()) && text.bytes().all(fine) {
        return Ok(text.to_owned());
    }
    Err("1 to 64 of A-Z a-z 0-9 _ . - are allowed".to_owned())
}

fn malformed(key: &[u8], malformed: Malformed) -> Error {
    Error::Malformed { key: String::from_utf8_lossy(key).into_owned(), malformed }
}

/// Converts a revision from etcd, which is signed on the wire and never negative.
pub(crate) fn positive(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

/// Returns the revision of a read. A reply without a revision can't be placed in etcd's history, so
/// it is an error.
fn revision(header: Option<&ResponseHeader>) -> Result<u64, Error> {
    match header.map(|header| positive(header.revision())) {
        Some(revision) if revision > 0 => Ok(revision),
        _ => Err(Error::NoAnswer("a read", "the answer names no revision".into())),
    }
}

/// The warning for [`VersionSupport::Old`].
pub(crate) const OLD: &str = "etcd below 3.5.6 can lose consistency in a crash";

#[derive(Debug, Eq, PartialEq)]
pub(crate) enum VersionSupport {
    Good,
    /// The version works, with bugs that etcd's maintainers warn of.
    Old,
    TooOld,
}

pub(crate) fn judge_version(version: &str) -> VersionSupport {
    // "3.6.0-rc.1" counts as 3.6.0.
    let release = version.split('-').next().unwrap_or(version);
    let mut parts = release.split('.').map(|part| part.parse::<u32>().ok());
    let mut next = || parts.next().flatten();
    match (next(), next(), next()) {
        (Some(major), Some(minor), patch) => match (major, minor, patch.unwrap_or(0)) {
            good if good >= (3, 5, 6) => VersionSupport::Good,
            old if old >= (3, 5, 0) => VersionSupport::Old,
            _ => VersionSupport::TooOld,
        },
        // A server without a version that can be read is not supported.
        _ => VersionSupport::TooOld,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(given: &str, want: VersionSupport) {
        assert_eq!(judge_version(given), want, "{given}");
    }

    #[test]
    fn versions_are_judged() {
        check("3.4.23", VersionSupport::TooOld);
        check("3.5.0", VersionSupport::Old);
        check("3.5.5", VersionSupport::Old);
        check("3.5.6", VersionSupport::Good);
        check("3.5.16", VersionSupport::Good);
        check("3.6.0-rc.1", VersionSupport::Good);
        check("4.0", VersionSupport::Good);
        check("2.3.8", VersionSupport::TooOld);
        check("", VersionSupport::TooOld);
        check("unknown", VersionSupport::TooOld);
    }

    #[test]
    fn an_answer_without_a_revision_is_none() {
        assert!(revision(None).is_err_and(|error| error.is_transient()));
    }

    #[test]
    fn names_are_one_part_of_a_key() {
        for fine in ["dkc", "a", "Eu-West_1.b"] {
            assert!(cluster_name(fine).is_ok(), "{fine}");
        }
        for wrong in ["", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(cluster_name(wrong).is_err(), "{wrong}");
        }
    }
}
