//! Connections: in order and at most once within one, anything at all between two.
//!
//! A link is a connection as a whole, with two ends; each process knows its end as a [`Conn`]. Each
//! end learns of its death at a time of its own, and a message is lost only by that death: always a
//! suffix of what was sent, never one from the middle. A blocked direction keeps what is sent (as
//! TCP does) until it opens or the link dies. A restarted process, or the next dial, gets a fresh
//! link, and so a fresh [`Conn`] at each end.

use std::collections::{BTreeMap, BTreeSet};

use engine::ids::Conn;

use super::place::{Place, ProcessId};
use super::wire::WireMessage;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    Dialler,
    Acceptor,
}

impl Side {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Dialler => Self::Acceptor,
            Self::Acceptor => Self::Dialler,
        }
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

/// The ends of a link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum LinkStage {
    Dialling,
    Standing,
    Dead,
}

#[derive(Debug)]
pub(super) struct SimLink {
    pub(super) dialler: ProcessId,
    pub(super) to: Place,
    pub(super) acceptor: Option<ProcessId>,
    pub(super) stage: LinkStage,
    /// The time at which the dialler learns that the link is established: nothing arrives there
    /// before.
    pub(super) dialled_at: u64,
    /// Per side: this end has not yet learned that the link is dead.
    pub(super) open: [bool; 2],
    /// Per receiving side: nothing arrives from here on.
    pub(super) open_until: [u64; 2],
    /// Per receiving side: the last arrival, so that the next is not before it.
    pub(super) last: [u64; 2],
    /// Per receiving side: messages sent while the direction was blocked, or held up.
    pub(super) stuck: [Vec<WireMessage>; 2],
    /// Per receiving side: arriving messages wait in some buffer on the way.
    pub(super) held_up: [bool; 2],
    /// The link dies with this one of the messages to come, of either direction.
    pub(super) last_message: Option<u64>,
}

impl SimLink {
    pub(super) fn place(&self, side: Side) -> Place {
        match side {
            Side::Dialler => self.dialler.place,
            Side::Acceptor => self.to,
        }
    }

    pub(super) fn process(&self, side: Side) -> Option<ProcessId> {
        match side {
            Side::Dialler => Some(self.dialler),
            Side::Acceptor => self.acceptor,
        }
    }
}

/// All links, and the directions that are blocked.
#[derive(Default)]
pub struct SimNetwork {
    pub(super) links: BTreeMap<u64, SimLink>,
    pub(super) next: u64,
    pub(super) blocked: BTreeSet<(Place, Place)>,
    /// Additional delay of messages in a direction.
    pub(super) slow: BTreeMap<(Place, Place), u64>,
}

/// The number of a link's end, as its process knows it.
pub(super) fn conn(link: u64, side: Side) -> Conn {
    Conn(link * 2 + side.index() as u64)
}

pub(super) fn link_of(conn: Conn) -> (u64, Side) {
    (conn.0 / 2, if conn.0.is_multiple_of(2) { Side::Dialler } else { Side::Acceptor })
}

impl SimNetwork {
    pub fn is_blocked(&self, from: Place, to: Place) -> bool {
        !self.blocked.is_empty() && self.blocked.contains(&(from, to))
    }

    pub fn block(&mut self, from: Place, to: Place) {
        self.blocked.insert((from, to));
    }

    /// The established links, for a fault to choose from.
    pub fn standing(&self) -> Vec<u64> {
        let standing = self.links.iter().filter(|(_, link)| link.stage == LinkStage::Standing);
        standing.map(|(&id, _)| id).collect()
    }

    /// The established links with an end at this place.
    pub fn standing_at(&self, place: Place) -> Vec<u64> {
        let mut standing = self.standing();
        standing.retain(|id| {
            let link = &self.links[id];
            link.dialler.place == place || link.to == place
        });
        standing
    }
}
