//! Every connection is an open file, and a process may have only so many.
//!
//! The soft limit is often 1,024, for programs that use `select`, which cannot count further. The hard one is what the
//! administrator allows: so much is taken.

use rustix::process::{Resource, getrlimit, setrlimit};
use tracing::warn;

/// 10,000 connections, and what a gateway has open besides.
const WANTED: u64 = 10_240;

/// Raises the soft limit to the hard one; says so if it stays low.
pub(crate) fn allow_many() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            warn!(%error, "the limit of open files could not be raised");
        }
    }
    // None: no limit at all.
    if let Some(allowed) = getrlimit(Resource::Nofile).current
        && allowed < WANTED
    {
        warn!(
            allowed,
            wanted = WANTED,
            "few connections are possible: raise the hard limit of open files (ulimit -Hn, LimitNOFILE=)"
        );
    }
}
