//! The first message of every stream: the version and the cluster of the sender.
//!
//! A newer version is refused, because it could be understood only in part; older ones down to
//! [`VERSION_OLDEST`] are accepted. A process of another cluster (a port used twice, a copied
//! configuration file) is refused before it can act as a member of this one.

use crate::Invalid;
use crate::wire;

/// The version of the messages that this build sends.
pub const VERSION: u32 = 1;
/// The oldest version that this build accepts.
pub const VERSION_OLDEST: u32 = 1;

/// The content of an accepted `open`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AcceptedOpen {
    /// The version of the messages on this stream: that of the sender.
    pub version: u32,
    /// The dialler's number of the connection, 0 except on `Follow` and `Snapshot` streams.
    pub connection: u64,
}

/// The reason why an `open` was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OpenError {
    /// The sender uses a version that this build does not support.
    #[error(
        "the sender uses message version {theirs}, this build supports {VERSION_OLDEST} to \
         {VERSION}: update this process first"
    )]
    Version {
        /// The version of the sender.
        theirs: u32,
    },
    /// The sender belongs to another cluster. The text does not contain this process's cluster: any
    /// process that knows it is accepted as a member.
    #[error("the sender belongs to cluster {theirs:032x}, this process to another one")]
    Cluster {
        /// The cluster of the sender.
        theirs: u128,
    },
    /// The message is invalid, or not an `open`.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

impl From<OpenError> for tonic::Status {
    fn from(refused: OpenError) -> Self {
        Self::failed_precondition(refused.to_string())
    }
}

impl wire::Open {
    /// An `open` of this build's version. `connection` is 0 except on `Follow` and `Snapshot`
    /// streams.
    pub fn new(cluster: u128, connection: u64) -> Self {
        Self {
            version: VERSION,
            cluster_high: (cluster >> 64) as u64,
            cluster_low: cluster as u64,
            connection,
        }
    }

    /// Checks version and cluster against those of this process.
    pub fn accept(&self, cluster: u128) -> Result<AcceptedOpen, OpenError> {
        if !(VERSION_OLDEST..=VERSION).contains(&self.version) {
            return Err(OpenError::Version { theirs: self.version });
        }
        let theirs = u128::from(self.cluster_high) << 64 | u128::from(self.cluster_low);
        if theirs != cluster {
            return Err(OpenError::Cluster { theirs });
        }
        Ok(AcceptedOpen { version: self.version, connection: self.connection })
    }

    /// Like [`Open::accept`](Self::accept), for the optional field of a request.
    pub fn accept_required(open: Option<&Self>, cluster: u128) -> Result<AcceptedOpen, OpenError> {
        open.ok_or(Invalid::Missing("open"))?.accept(cluster)
    }
}

impl wire::ToNode {
    /// The first message of a gateway's stream.
    pub fn opening(cluster: u128) -> Self {
        Self { kind: Some(wire::to_node::Kind::Open(wire::Open::new(cluster, 0))) }
    }

    /// Accepts the first message of a gateway's stream.
    pub fn accept(&self, cluster: u128) -> Result<AcceptedOpen, OpenError> {
        match &self.kind {
            Some(wire::to_node::Kind::Open(open)) => open.accept(cluster),
            _ => Err(OpenError::Invalid(Invalid::Missing("open"))),
        }
    }
}

impl wire::ToFollower {
    /// The first message of a peer's stream.
    pub fn opening(cluster: u128, connection: u64) -> Self {
        Self { kind: Some(wire::to_follower::Kind::Open(wire::Open::new(cluster, connection))) }
    }

    /// Accepts the first message of a peer's stream.
    pub fn accept(&self, cluster: u128) -> Result<AcceptedOpen, OpenError> {
        match &self.kind {
            Some(wire::to_follower::Kind::Open(open)) => open.accept(cluster),
            _ => Err(OpenError::Invalid(Invalid::Missing("open"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u128 = 0xfeed_0000_0000_0000_0000_0000_0000_0001;

    #[track_caller]
    fn check(open: wire::Open, want: Result<AcceptedOpen, OpenError>) {
        assert_eq!(open.accept(CLUSTER), want);
    }

    #[test]
    fn a_process_of_this_cluster_and_version_is_accepted() {
        check(wire::Open::new(CLUSTER, 9), Ok(AcceptedOpen { version: VERSION, connection: 9 }));
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let newer = wire::Open { version: VERSION + 1, ..wire::Open::new(CLUSTER, 0) };
        check(newer, Err(OpenError::Version { theirs: VERSION + 1 }));
        let text = OpenError::Version { theirs: 2 }.to_string();
        assert!(text.contains("uses message version 2"), "{text}");
    }

    #[test]
    fn another_cluster_is_refused() {
        for other in [CLUSTER ^ 1, CLUSTER ^ 1 << 127] {
            let want = OpenError::Cluster { theirs: other };
            let text = want.to_string();
            assert!(!text.contains(&format!("{CLUSTER:032x}")), "{text}");
            check(wire::Open::new(other, 0), Err(want));
        }
    }

    #[test]
    fn a_stream_that_does_not_open_is_refused() {
        let missing = Err(OpenError::Invalid(Invalid::Missing("open")));
        assert_eq!(wire::ToNode { kind: None }.accept(CLUSTER), missing);
        assert_eq!(wire::ToFollower { kind: None }.accept(CLUSTER), missing);
        assert_eq!(wire::Open::accept_required(None, CLUSTER), missing);
        assert!(wire::ToNode::opening(CLUSTER).accept(CLUSTER).is_ok());
        assert_eq!(wire::ToFollower::opening(CLUSTER, 4).accept(CLUSTER).unwrap().connection, 4);
    }
}
