//! Reads: values are captured, proved to be current or young enough, and returned.
//!
//! [`captured`] holds the values that were taken at one moment, [`read_index`] proves that this
//! node led when it captured something, and [`bounded`] serves reads of bounded staleness on
//! followers.

mod bounded;
mod captured;
mod read_index;

use crate::ids::{Conn, Now};
use crate::node::shared::NodeTurn;

pub(super) use captured::ReadRequest;
pub(super) use read_index::answer_round;

#[derive(Clone, Debug, Default)]
pub(super) struct Reads {
    captured: captured::CapturedReads,
    read_index: read_index::ReadIndex,
    bounded: bounded::Bounded,
}

impl Reads {
    /// Handles a read: linearizable, or of values that are at most this old.
    pub(in crate::node) fn on_read(
        &mut self,
        turn: &mut NodeTurn<'_>,
        request: ReadRequest,
        max_staleness_ms: Option<u64>,
    ) {
        match max_staleness_ms {
            None => self.on_linearizable_read(turn, request),
            Some(ms) => self.on_bounded_read(turn, request, ms),
        }
    }

    /// Discards the reads of a gateway whose connection is closed.
    pub(in crate::node) fn on_gateway_gone(&mut self, conn: Conn) {
        self.forget_reads(conn);
        self.forget_bounded_reads(conn);
    }

    /// Discards what belongs to a closed connection between nodes.
    pub(in crate::node) fn on_closed(&mut self, conn: Conn) {
        self.forget_proof_request(conn);
        self.forget_captured_commits(conn);
    }

    /// Returns when to handle a tick although no event has come.
    pub(in crate::node) fn deadline(&self) -> Option<Now> {
        self.read_index.deadline().into_iter().chain(self.bounded.deadline()).min()
    }

    /// Returns the number of reads that wait for a value or for a proof.
    pub(in crate::node) fn waiting(&self) -> usize {
        self.captured.len() + self.bounded.len()
    }

    /// Returns the bytes of memory of the waiting reads, as counted.
    pub(in crate::node) fn counted_bytes(&self) -> usize {
        self.captured.bytes() + self.bounded.bytes()
    }

    /// Returns the same, computed from every read.
    pub(in crate::node) fn walked_bytes(&self) -> usize {
        self.captured.walked_bytes() + self.bounded.walked_bytes()
    }
}
