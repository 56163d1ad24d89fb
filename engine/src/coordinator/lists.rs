//! The lists of all records: the one in flight, and the time of the next.

use crate::coordinator::{CoordinatorTurn, Effect, Listing, Settings};
use crate::ids::Now;

/// The list that is in flight, and the time of the next one.
#[derive(Debug, Default)]
pub(super) struct ListRequests {
    /// A list has come back, so all records are loaded.
    listed: bool,
    in_flight: Option<(u64, Now)>,
    /// Another list must begin when the present one is back.
    again: bool,
    next: Now,
}

impl ListRequests {
    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    pub(super) fn is_in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Requests a list that begins now, or as soon as the one in flight is back. Returns whether it
    /// begins now.
    pub(super) fn request(&mut self, turn: &mut CoordinatorTurn<'_>) -> bool {
        if self.in_flight.is_some() {
            self.again = true;
            return false;
        }
        let list = turn.fresh_id();
        self.in_flight = Some((list, turn.now));
        self.again = false;
        self.next = turn.now.plus_ms(turn.settings.relist_every_ms);
        turn.effects.push(Effect::List { list });
        true
    }

    /// Takes the answer to a list. Returns the records, if it is the list in flight and etcd has
    /// answered.
    pub(super) fn on_listed(
        &mut self,
        turn: &CoordinatorTurn<'_>,
        list: u64,
        listing: Option<Listing>,
    ) -> Option<Listing> {
        self.in_flight.take_if(|(in_flight, _)| *in_flight == list)?;
        if listing.is_none() {
            self.next = turn.now.plus_ms(turn.settings.timing.list_retry_ms);
        }
        listing
    }

    /// Notes that all records are loaded. Returns whether they were not before.
    pub(super) fn note_loaded(&mut self) -> bool {
        !std::mem::replace(&mut self.listed, true)
    }

    /// Returns whether a list was requested while the last one was in flight.
    pub(super) fn is_wanted_again(&self) -> bool {
        self.again
    }

    /// Returns whether a list is due. One that takes too long is given up, and repeated.
    pub(super) fn is_due(&mut self, turn: &CoordinatorTurn<'_>) -> bool {
        let due = turn.now >= self.next_deadline(turn.settings);
        if due {
            self.in_flight = None;
        }
        due
    }

    pub(super) fn next_deadline(&self, settings: &Settings) -> Now {
        match self.in_flight {
            Some((_, since)) => since.plus_ms(settings.timing.list_timeout_ms),
            None => self.next,
        }
    }
}
