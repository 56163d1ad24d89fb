//! The connection to etcd: the version check, and typed linearizable reads.
//!
//! Every call has a deadline, since a stopped etcd keeps a connection open and says nothing. Every read is linearizable:
//! a serializable one may be arbitrarily old (trap T40), and everything here is read in order to act on it.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use engine::codec::Malformed;
use engine::history::History;
use engine::records::Meta;
use etcd_client::{
    Client, ConnectOptions, GetOptions, GetResponse, KeyValue, KvClient, ResponseHeader,
    TxnResponse, WatchClient,
};
use tracing::warn;

use crate::pause::Pace;
use crate::{Error, Outcome, Record, tls};

/// The most that one answer may hold. All 65,536 shards that there could be, with every list of theirs full, need about
/// 30 MiB; tonic's own limit of 4 MiB would make a cluster of 15,000 shards unreadable.
const REPLY_BYTES_MAX: usize = 64 << 20;

#[derive(Clone, Debug)]
pub struct Settings {
    /// `host:port` or `http://host:port` of each etcd member.
    pub endpoints: Vec<String>,
    /// The cluster's name: all its keys lie below `/dkc/{cluster}/`. 1 to 64 of `a-z A-Z 0-9 _ . -`.
    pub cluster: String,
    /// How long a call may take. An etcd member that lost its leader needs about 1 s to find another one.
    pub call_timeout: Duration,
}

impl Settings {
    pub fn new(endpoints: Vec<String>, cluster: &str) -> Self {
        Self { endpoints, cluster: cluster.to_owned(), call_timeout: Duration::from_secs(2) }
    }
}

/// A record with its place in etcd's history.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept<R: Record> {
    pub id: R::Id,
    pub record: R,
    /// Revision at which the key was made; a key deleted and made again has a new one.
    pub created: u64,
    /// Revision of its last change: what a compare-and-set compares.
    pub modified: u64,
    /// The lease that it lives by; 0 is none.
    pub lease: i64,
}

/// Everything of one kind at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed<R: Record> {
    pub all: Vec<Kept<R>>,
    /// etcd's revision at that moment.
    pub revision: u64,
}

/// One cluster's part of an etcd. Cheap to clone; clones share the connections.
///
/// One member is asked for everything until it gives no answer; then it is the next one's turn. (The client library
/// would spread calls over all members, and with one of three down every third call would fail; a transaction that
/// fails so is [`Unknown`](crate::Outcome::Unknown) and costs a settling.)
#[derive(Clone)]
pub struct Metastore {
    /// A client for each member.
    members: Arc<[Client]>,
    /// Whose turn it is.
    turn: Arc<AtomicUsize>,
    prefix: Arc<str>,
    call_timeout: Duration,
    /// Shared by all clones: an answer to one call is measured by what any other has heard.
    history: Arc<Mutex<History>>,
    /// Reads that failed in a row, and transactions.
    pub(crate) reads: Arc<Pace>,
    pub(crate) writes: Arc<Pace>,
}

impl Metastore {
    /// Connects, and refuses an etcd that is none for dkc. A transient error means "not reachable now": a starting process
    /// says so and tries again. The connections belong to the runtime that this is called on.
    pub async fn connect(settings: &Settings) -> Result<Self, Error> {
        let store = Self::open(settings).await?;
        let version = store.find_member(&settings.endpoints).await?;
        if judge_version(&version) == Verdict::Old {
            warn!(version, "{OLD}");
        }
        Ok(store)
    }

    /// Asks one member after the other, until one is found to be fit. Says its version.
    ///
    /// A member that refuses to serve us decides nothing as long as another one may yet answer, since what refuses may be
    /// no etcd but a proxy before it that is not ready. If all refuse, that is the answer.
    pub(crate) async fn find_member(&self, endpoints: &[String]) -> Result<String, Error> {
        let (mut unreached, mut refused) = (None, None);
        for _ in endpoints {
            let turn = self.turn.load(Ordering::Relaxed);
            match self.check_member(&endpoints[turn % endpoints.len()]).await {
                Ok(version) => return Ok(version),
                Err(error) if error.is_transient() => unreached = Some(error),
                Err(error) => refused = Some(error),
            }
            self.pass_on(turn);
        }
        Err(unreached.or(refused).expect("there is a member"))
    }

    /// The version of the member whose turn it is, if it serves us.
    async fn check_member(&self, endpoint: &str) -> Result<String, Error> {
        let version = match self.version().await {
            Ok(version) => version,
            Err(error) if error.is_transient() && tls::is_spoken(endpoint).await => {
                return Err(Error::SpeaksTls { endpoint: endpoint.to_owned() });
            }
            Err(error) => return Err(error),
        };
        if judge_version(&version) == Verdict::TooOld {
            return Err(Error::TooOld { found: version });
        }
        // Whether it wants a user is known by a read only.
        self.range("get", self.key::<Meta>(&()), None).await?;
        Ok(version)
    }

    /// Makes the clients without asking etcd anything.
    pub(crate) async fn open(settings: &Settings) -> Result<Self, Error> {
        cluster_name(&settings.cluster)
            .map_err(|why| Error::Refused { what: "the cluster's name", why })?;
        let options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(1))
            // Finds out about a member that vanished without a word. etcd takes pings closer than 5 s, or without
            // a call under way, for an attack and closes the connection.
            .with_keep_alive(Duration::from_secs(6), Duration::from_secs(3))
            .with_keep_alive_while_idle(false)
            // A member cut off from its leader says so instead of keeping us waiting.
            .with_require_leader(true);
        let mut members = Vec::new();
        for endpoint in &settings.endpoints {
            let connecting = Client::connect([endpoint], Some(options.clone())).await;
            members.push(connecting.map_err(|error| Error::from_client("connecting", error))?);
        }
        if members.is_empty() {
            let why = "none is named".into();
            return Err(Error::Refused { what: "etcd's addresses", why });
        }
        // Not all processes at the same member.
        let turn = Arc::new(AtomicUsize::new(fastrand::usize(..members.len())));
        let prefix = format!("/dkc/{}/", settings.cluster).into();
        let call_timeout = settings.call_timeout;
        let (history, reads, writes) = Default::default();
        Ok(Self { members: members.into(), turn, prefix, call_timeout, history, reads, writes })
    }

    /// What etcd says it is.
    pub(crate) async fn version(&self) -> Result<String, Error> {
        let mut maintenance = self.client().maintenance_client();
        let status = self.call("status", maintenance.status()).await?;
        Ok(status.version().to_owned())
    }

    /// One record, read linearizably.
    pub async fn get<R: Record>(&self, id: &R::Id) -> Result<Option<Kept<R>>, Error> {
        Ok(self.get_at(id).await?.0)
    }

    /// One record, and etcd's revision when it was read.
    pub(crate) async fn get_at<R: Record>(
        &self,
        id: &R::Id,
    ) -> Result<(Option<Kept<R>>, u64), Error> {
        let (reply, revision) = self.range("get", self.key::<R>(id), None).await?;
        let kept = reply.kvs().first().map(|kv| self.read::<R>(kv)).transpose()?;
        Ok((kept, revision))
    }

    /// Every record of one kind, read linearizably in one step. One malformed record fails the whole list: a list that
    /// silently lacks somebody is worse than none.
    pub async fn list<R: Record>(&self) -> Result<Listed<R>, Error> {
        let options = GetOptions::new().with_prefix();
        let (reply, revision) = self.range("list", self.folder::<R>(), Some(options)).await?;
        let all = reply.kvs().iter().map(|kv| self.read::<R>(kv)).collect::<Result<_, _>>()?;
        Ok(Listed { all, revision })
    }

    /// Keys and the revision at which they were read, linearizably.
    pub(crate) async fn range(
        &self,
        what: &'static str,
        key: String,
        options: Option<GetOptions>,
    ) -> Result<(GetResponse, u64), Error> {
        let reading = async {
            let asked = self.asks()?;
            let mut kv = self.kv();
            let reply = self.call(what, kv.get(key, options)).await?;
            let revision = self.answered(asked, reply.header())?;
            Ok((reply, revision))
        };
        self.paced(&self.reads, reading).await
    }

    /// A call that, if it fails, says so the later the more have failed before.
    pub(crate) async fn paced<T>(
        &self,
        pace: &Pace,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let began = pace.begins();
        let answer = call.await;
        match &answer {
            Ok(_) => pace.answered(),
            Err(error) => pace.failed(began, self.members.len(), error.reason()).await,
        }
        answer
    }

    /// Why etcd takes no changes, if the last one that was tried failed: in a word, for `/readyz`.
    pub fn takes_no_changes(&self) -> Option<&'static str> {
        self.writes.why()
    }

    /// Whether the member whose turn it is says of itself that its quota is used up: then it takes no changes.
    pub async fn is_full(&self) -> Result<bool, Error> {
        let mut maintenance = self.client().maintenance_client();
        let status = self.call("status", maintenance.status()).await?;
        Ok(status.errors().iter().any(|error| error.contains("NOSPACE")))
    }

    /// No answer yet was from a history that is not the one before. Else nothing is asked any more.
    pub fn is_followed(&self) -> bool {
        self.history().asks().is_ok()
    }

    /// What a call is to keep for [`answered`](Self::answered).
    pub(crate) fn asks(&self) -> Result<u64, Error> {
        self.history().asks().map_err(Error::WentBack)
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner) // Nothing panics while it is held.
    }

    /// The revision of a linearizable answer, if it goes on from where history was when it was asked for.
    fn answered(&self, asked: u64, header: Option<&ResponseHeader>) -> Result<u64, Error> {
        let revision = revision(header)?;
        self.history().answered(asked, revision).map_err(Error::WentBack)?;
        Ok(revision)
    }

    /// What became of a transaction, and the revision that it made.
    pub(crate) fn outcome(&self, asked: u64, reply: &TxnResponse) -> Result<Outcome, Error> {
        if !reply.succeeded() {
            self.answered(asked, reply.header())?;
            return Ok(Outcome::Failed);
        }
        let revision = revision(reply.header())?;
        self.history().written(asked, revision).map_err(Error::WentBack)?;
        Ok(Outcome::Done { revision })
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

    pub(crate) fn folder<R: Record>(&self) -> String {
        format!("{}{}", self.prefix, R::FOLDER)
    }

    pub(crate) fn key<R: Record>(&self, id: &R::Id) -> String {
        format!("{}{}{}", self.prefix, R::FOLDER, R::name(id))
    }

    /// Which record a key names.
    pub(crate) fn id_of<R: Record>(&self, key: &[u8]) -> Result<R::Id, Error> {
        let folder = self.folder::<R>();
        let name = key.strip_prefix(folder.as_bytes()).and_then(|name| str::from_utf8(name).ok());
        name.and_then(R::id).ok_or_else(|| malformed(key, Malformed("key")))
    }

    pub(crate) fn read<R: Record>(&self, kv: &KeyValue) -> Result<Kept<R>, Error> {
        let id = self.id_of::<R>(kv.key())?;
        let record = R::decode(kv.value()).map_err(|error| malformed(kv.key(), error))?;
        if !record.belongs_at(&id) {
            return Err(malformed(kv.key(), Malformed("record of another key")));
        }
        let created = positive(kv.create_revision());
        Ok(Kept { id, record, created, modified: positive(kv.mod_revision()), lease: kv.lease() })
    }

    /// Waits for an answer, but not for ever.
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
            Err(_) => Err(Error::Slow { what, why: format!("no answer in {limit:?}") }),
        };
        if answer.as_ref().is_err_and(Error::is_transient) {
            self.pass_on(turn);
        }
        answer
    }

    /// The next member's turn. Many calls may have failed at this one; it is passed on once.
    fn pass_on(&self, turn: usize) {
        let next = turn.wrapping_add(1);
        let _moved = self.turn.compare_exchange(turn, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// A cluster's name, as a setting. A slash would put one cluster's keys among another's.
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

/// etcd's revisions are signed on the wire and never negative.
pub(crate) fn positive(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

/// The revision that a read was made at. An answer without one can't be placed in history, so it is no answer.
fn revision(header: Option<&ResponseHeader>) -> Result<u64, Error> {
    match header.map(|header| positive(header.revision())) {
        Some(revision) if revision > 0 => Ok(revision),
        _ => Err(Error::NoAnswer { what: "a read", why: "the answer names no revision".into() }),
    }
}

/// Said of [`Verdict::Old`].
pub(crate) const OLD: &str = "etcd below 3.5.6 can lose consistency in a crash";

#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    Good,
    /// Works, with bugs that etcd's makers warn of (trap T9).
    Old,
    TooOld,
}

pub(crate) fn judge_version(version: &str) -> Verdict {
    // "3.6.0-rc.1" is a 3.6.0 here.
    let release = version.split('-').next().unwrap_or(version);
    let mut parts = release.split('.').map(|part| part.parse::<u32>().ok());
    let mut next = || parts.next().flatten();
    match (next(), next(), next()) {
        (Some(major), Some(minor), patch) => match (major, minor, patch.unwrap_or(0)) {
            good if good >= (3, 5, 6) => Verdict::Good,
            old if old >= (3, 5, 0) => Verdict::Old,
            _ => Verdict::TooOld,
        },
        // What does not even say its version is not what we were made for.
        _ => Verdict::TooOld,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(given: &str, want: Verdict) {
        assert_eq!(judge_version(given), want, "{given}");
    }

    #[test]
    fn versions_are_judged() {
        check("3.4.23", Verdict::TooOld);
        check("3.5.0", Verdict::Old);
        check("3.5.5", Verdict::Old);
        check("3.5.6", Verdict::Good);
        check("3.5.16", Verdict::Good);
        check("3.6.0-rc.1", Verdict::Good);
        check("4.0", Verdict::Good);
        check("2.3.8", Verdict::TooOld);
        check("", Verdict::TooOld);
        check("unknown", Verdict::TooOld);
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
