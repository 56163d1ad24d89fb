//! The first thing said on every stream: which version, which cluster.
//!
//! A newer version is refused rather than half understood; an older one down to
//! [`VERSION_OLDEST`] is spoken to. A process of another cluster (a port used twice, a copied
//! configuration file) is refused before it can be counted among ours.

use crate::Invalid;
use crate::wire;

/// The message version this build speaks.
pub const VERSION: u32 = 1;
/// The oldest one it still understands.
pub const VERSION_OLDEST: u32 = 1;

/// What an accepted `open` said.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Greeting {
    /// The version to speak: the older of the two.
    pub version: u32,
    /// The dialler's number of the connection.
    pub link: u64,
}

/// Why an `open` was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error(
        "speaks message version {theirs}, this build speaks {VERSION_OLDEST} to {VERSION}: \
         update this process first"
    )]
    Version { theirs: u32 },
    /// Which one this process belongs to is not said: whoever knows it may take part.
    #[error("belongs to cluster {theirs:032x}, this process to another one")]
    Cluster { theirs: u128 },
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

impl From<Refused> for tonic::Status {
    fn from(refused: Refused) -> Self {
        Self::failed_precondition(refused.to_string())
    }
}

impl wire::Open {
    pub fn new(cluster: u128, link: u64) -> Self {
        Self {
            version: VERSION,
            cluster_high: (cluster >> 64) as u64,
            cluster_low: cluster as u64,
            link,
        }
    }

    /// Compares what was said with what this process is.
    pub fn accept(&self, cluster: u128) -> Result<Greeting, Refused> {
        if !(VERSION_OLDEST..=VERSION).contains(&self.version) {
            return Err(Refused::Version { theirs: self.version });
        }
        let theirs = u128::from(self.cluster_high) << 64 | u128::from(self.cluster_low);
        if theirs != cluster {
            return Err(Refused::Cluster { theirs });
        }
        Ok(Greeting { version: self.version, link: self.link })
    }

    /// As [`Open::accept`](Self::accept), for the optional field of a request.
    pub fn accept_required(open: Option<&Self>, cluster: u128) -> Result<Greeting, Refused> {
        open.ok_or(Invalid::Missing("open"))?.accept(cluster)
    }
}

impl wire::ToNode {
    /// The first message of a gateway's stream.
    pub fn opening(cluster: u128) -> Self {
        Self { kind: Some(wire::to_node::Kind::Open(wire::Open::new(cluster, 0))) }
    }

    /// Accepts the first message of a gateway's stream.
    pub fn accept(&self, cluster: u128) -> Result<Greeting, Refused> {
        match &self.kind {
            Some(wire::to_node::Kind::Open(open)) => open.accept(cluster),
            _ => Err(Refused::Invalid(Invalid::Missing("open"))),
        }
    }
}

impl wire::ToFollower {
    /// The first message of a peer's stream.
    pub fn opening(cluster: u128, link: u64) -> Self {
        Self { kind: Some(wire::to_follower::Kind::Open(wire::Open::new(cluster, link))) }
    }

    /// Accepts the first message of a peer's stream.
    pub fn accept(&self, cluster: u128) -> Result<Greeting, Refused> {
        match &self.kind {
            Some(wire::to_follower::Kind::Open(open)) => open.accept(cluster),
            _ => Err(Refused::Invalid(Invalid::Missing("open"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u128 = 0xfeed_0000_0000_0000_0000_0000_0000_0001;

    #[track_caller]
    fn check(open: wire::Open, want: Result<Greeting, Refused>) {
        assert_eq!(open.accept(CLUSTER), want);
    }

    #[test]
    fn a_process_of_this_cluster_and_version_is_accepted() {
        check(wire::Open::new(CLUSTER, 9), Ok(Greeting { version: VERSION, link: 9 }));
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let newer = wire::Open { version: VERSION + 1, ..wire::Open::new(CLUSTER, 0) };
        check(newer, Err(Refused::Version { theirs: VERSION + 1 }));
        let said = Refused::Version { theirs: 2 }.to_string();
        assert!(said.contains("speaks message version 2"), "{said}");
    }

    #[test]
    fn another_cluster_is_refused() {
        for other in [CLUSTER ^ 1, CLUSTER ^ 1 << 127] {
            let want = Refused::Cluster { theirs: other };
            let said = want.to_string();
            assert!(!said.contains(&format!("{CLUSTER:032x}")), "{said}");
            check(wire::Open::new(other, 0), Err(want));
        }
    }

    #[test]
    fn a_stream_that_does_not_open_is_refused() {
        let missing = Err(Refused::Invalid(Invalid::Missing("open")));
        assert_eq!(wire::ToNode { kind: None }.accept(CLUSTER), missing);
        assert_eq!(wire::ToFollower { kind: None }.accept(CLUSTER), missing);
        assert_eq!(wire::Open::accept_required(None, CLUSTER), missing);
        assert!(wire::ToNode::opening(CLUSTER).accept(CLUSTER).is_ok());
        assert_eq!(wire::ToFollower::opening(CLUSTER, 4).accept(CLUSTER).unwrap().link, 4);
    }
}
