//! Retention: dropping rows of sessions that are gone, and idempotency records whose time is over.

mod sessions;
mod tokens;

use crate::ids::Now;
use crate::node::settings::Settings;

#[derive(Clone, Debug)]
pub(super) struct Retention {
    sessions: sessions::SessionCollection,
    next_expire: Now,
}

impl Retention {
    /// Creates the retention of a node at its start.
    pub(in crate::node) fn new(now: Now, settings: &Settings) -> Self {
        Self {
            sessions: sessions::SessionCollection::new(now, settings.collect_every_ms),
            next_expire: now.plus_ms(settings.limits().bucket_ms()),
        }
    }
}
