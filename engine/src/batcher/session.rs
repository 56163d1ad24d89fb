//! The sessions of a worker: the one whose key exists in etcd, and the one for new batches.

use crate::ids::SessionId;

/// The sessions of one worker. See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct BatchSessions {
    /// The session whose key exists in etcd.
    registered: Option<SessionId>,
    /// The session for new batches: the last one whose key existed, unless it was given up.
    present: Option<SessionId>,
    /// The session that was given up last.
    abandoned: Option<SessionId>,
}

impl BatchSessions {
    pub(super) fn registered(&self) -> Option<SessionId> {
        self.registered
    }

    pub(super) fn present(&self) -> Option<SessionId> {
        self.present
    }

    /// The session for a new batch of a shard in which `ended` has ended.
    pub(super) fn for_shard(&self, ended: Option<SessionId>) -> Option<SessionId> {
        self.present.filter(|_| self.present != ended)
    }

    /// Notes that the worker's key was created or is gone. Returns whether new batches may be made
    /// in its session.
    pub(super) fn register(&mut self, session: Option<SessionId>) -> bool {
        self.registered = session;
        let usable = session.is_some() && session != self.abandoned;
        if usable {
            self.present = session;
        }
        usable
    }

    /// Notes that a session has ended in some shard. Returns whether another is to be requested.
    pub(super) fn abandon(&mut self, session: SessionId) -> bool {
        let is_news = self.present == Some(session) && self.abandoned != Some(session);
        if is_news {
            self.abandoned = Some(session);
        }
        is_news
    }

    /// Makes no batch in this session any more, in any shard.
    pub(super) fn give_up(&mut self, session: SessionId) {
        self.present.take_if(|present| *present == session);
    }
}
