//! The life of connections and the ways of messages, over the links of the
//! [`network`](super::network).

use engine::ids::{Conn, StoreBoot};
use engine::message::{HealthReport, NodeQuery, NodeQueryReply};

use super::checker::Violation;
use super::codec;
use super::core::Core;
use super::event::{ProcessInput, SimEvent};
use super::network::{LinkStage, Side, SimLink, conn, link_of};
use super::place::{Place, ProcessId};
use super::plan::faults::FaultKind;
use super::wire::WireMessage;

/// The time after which a process dials again, or gives a silent link up.
const DIAL_TIMEOUT: u64 = 300_000;

impl Core {
    /// Begins a connection. The answer is `Dialled` or `DialFailed` under the returned number.
    pub fn dial(&mut self, dialler: ProcessId, to: Place) -> u64 {
        let id = self.net.next;
        self.net.next += 1;
        let link = SimLink {
            dialler,
            to,
            acceptor: None,
            stage: LinkStage::Dialling,
            dialled_at: 0,
            open: [true, false],
            open_until: [u64::MAX; 2],
            last: [0; 2],
            stuck: [Vec::new(), Vec::new()],
            held_up: [false; 2],
            last_message: None,
        };
        self.net.links.insert(id, link);
        let delay = self.way(dialler.place, to);
        self.after(delay, SimEvent::DialArrives { link: id });
        id
    }

    /// The dial arrives. `running`: the process that listens there now, if there is one, and its
    /// store.
    pub fn dial_arrives(
        &mut self,
        id: u64,
        running: Option<(ProcessId, Option<StoreBoot>)>,
    ) -> Option<(ProcessId, ProcessInput)> {
        let link = self.net.links.get_mut(&id)?;
        let (from, to) = (link.dialler.place, link.to);
        if self.net.is_blocked(from, to) || self.net.is_blocked(to, from) {
            self.dial_hangs(id);
            return None;
        }
        let delay = self.way(to, from);
        let Some((acceptor, peer)) = running else {
            self.after(delay, SimEvent::DialEnds { link: id, refused: true });
            return None;
        };
        let at = self.now + delay;
        let link = self.net.links.get_mut(&id).expect("looked up above");
        link.acceptor = Some(acceptor);
        link.stage = LinkStage::Standing;
        link.open = [true, true];
        // The first messages of the acceptor arrive after the dialler knows that the link is
        // established.
        link.last[Side::Dialler.index()] = at;
        link.dialled_at = at;
        let dialler = link.dialler;
        let input = ProcessInput::Dialled { dial: id, conn: conn(id, Side::Dialler), peer };
        self.at(at, SimEvent::Input(dialler, input));
        Some((acceptor, ProcessInput::Accepted { conn: conn(id, Side::Acceptor), from }))
    }

    /// The dial gets neither a refusal nor an answer.
    pub fn dial_hangs(&mut self, id: u64) {
        self.after(DIAL_TIMEOUT, SimEvent::DialEnds { link: id, refused: false });
    }

    pub fn dial_ends(&mut self, id: u64, refused: bool) -> Option<(ProcessId, ProcessInput)> {
        let link = self.net.links.remove(&id)?;
        Some((link.dialler, ProcessInput::DialFailed { dial: id, refused }))
    }

    /// Sends on one end. Nothing happens if this end has already learned of the link's death.
    pub fn send(&mut self, from: Conn, wire: WireMessage) {
        let (id, side) = link_of(from);
        let to = side.other();
        let Some(link) = self.net.links.get(&id) else { return };
        let delay = self.way(link.place(side), link.place(to));
        let now = self.now;
        let link = self.net.links.get_mut(&id).expect("looked up above");
        if !link.open[side.index()] {
            return;
        }
        let crossed = if self.plan.codec { codec::cross(wire) } else { Ok(wire) };
        let wire = match crossed {
            Ok(wire) => wire,
            Err(why) => {
                let detail = format!("a message of {from:?} is refused: {why}");
                self.oracle.violations.push(Violation { promise: "codec", detail });
                return;
            }
        };
        let beside = matches!(wire, WireMessage::Rows { .. });
        let at = if beside { now + delay } else { (now + delay).max(link.last[to.index()]) };
        link.last[to.index()] = link.last[to.index()].max(at);
        self.at(at, SimEvent::Deliver { link: id, to, wire });
    }

    /// A message arrives, unless the link is dead at that end or its direction blocked.
    pub fn deliver(
        &mut self,
        id: u64,
        to: Side,
        wire: WireMessage,
    ) -> Option<(ProcessId, ProcessInput)> {
        let link = self.net.links.get_mut(&id)?;
        if !link.open[to.index()] || self.now >= link.open_until[to.index()] {
            return None;
        }
        if let Some(left) = &mut link.last_message {
            *left = left.saturating_sub(1);
            if *left == 0 {
                // The link dies in the middle of the message: neither it nor anything after it
                // arrives.
                link.open_until[to.index()] = self.now;
                self.cut(id);
                return None;
            }
        }
        let stuck = &mut link.stuck[to.index()];
        // Queued messages go first, also when the direction is open again.
        let waits = !stuck.is_empty() || link.held_up[to.index()];
        if waits || self.net.blocked.contains(&(link.place(to.other()), link.place(to))) {
            self.net.links.get_mut(&id)?.stuck[to.index()].push(wire);
            return None;
        }
        Some((link.process(to)?, ProcessInput::Received { conn: conn(id, to), wire }))
    }

    /// Delivers the messages that were stuck, in order.
    pub fn drain(&mut self, id: u64, to: Side) -> Vec<(ProcessId, ProcessInput)> {
        let Some(link) = self.net.links.get_mut(&id) else { return Vec::new() };
        link.held_up[to.index()] = false;
        if self.net.blocked.contains(&(link.place(to.other()), link.place(to))) {
            return Vec::new();
        }
        let wires = std::mem::take(&mut link.stuck[to.index()]);
        let live = link.open[to.index()] && self.now < link.open_until[to.index()];
        let Some(process) = link.process(to).filter(|_| live) else { return Vec::new() };
        let input = |wire| (process, ProcessInput::Received { conn: conn(id, to), wire });
        wires.into_iter().map(input).collect()
    }

    /// The process at this end closes the link. Messages that it has sent still arrive, or part of
    /// them.
    pub fn close(&mut self, end: Conn) {
        let (id, side) = link_of(end);
        let Some(link) = self.net.links.get_mut(&id) else { return };
        link.open[side.index()] = false;
        let other = side.other();
        if !link.open[other.index()] {
            self.net.links.remove(&id);
            return;
        }
        let fin = link.last[other.index()];
        let delay = self.delay();
        let at = if self.rng.percent(50) { fin.max(self.now + delay) } else { self.now + delay };
        self.die(id, other, at);
    }

    /// The link dies. Each end learns it at its own time; one may need a time-out for it.
    pub fn cut(&mut self, id: u64) {
        let slow = self.rng.below(4);
        for (at, side) in [Side::Dialler, Side::Acceptor].into_iter().enumerate() {
            let delay = self.delay();
            let late = if slow == at as u64 { self.rng.between(100_000, 1_500_000) } else { 0 };
            let closes = self.now + delay + late;
            let lost = self.rng.between(0, delay);
            let now = self.now;
            if let Some(link) = self.net.links.get_mut(&id) {
                let until = &mut link.open_until[side.index()];
                *until = (*until).min(now + lost);
            }
            self.die(id, side, closes);
        }
    }

    /// The link dies with one of its next messages, before or after it or in its middle.
    pub fn cut_soon(&mut self, id: u64) {
        self.cut_within(id, 30);
    }

    /// A snapshot begins to be sent. In runs that cut connections some are interrupted: they are
    /// rare, and soon over.
    pub fn copy_begins(&mut self, conn: Conn) {
        let cuts =
            [FaultKind::Cut, FaultKind::Snap].iter().any(|kind| self.plan.faults.contains(kind));
        if cuts && self.is_faulty() && self.rng.percent(25) {
            self.cut_within(link_of(conn).0, 4);
        }
    }

    fn cut_within(&mut self, id: u64, messages: u64) {
        let last = self.rng.between(1, messages);
        if let Some(link) = self.net.links.get_mut(&id) {
            link.last_message = Some(last);
        }
    }

    /// One end learns that the link is dead, and may make another; but its messages are in buffers
    /// on the way, and all of them arrive, later than those on the new link.
    pub fn cut_with_stragglers(&mut self, id: u64) {
        let sender = if self.rng.percent(70) { Side::Dialler } else { Side::Acceptor };
        let delay = self.delay();
        let late = self.rng.between(5_000, 1_000_000);
        let Some(link) = self.net.links.get_mut(&id) else { return };
        if link.stage != LinkStage::Standing {
            return;
        }
        let receiver = sender.other();
        link.held_up[receiver.index()] = true;
        link.open_until[sender.index()] = self.now;
        self.die(id, sender, self.now + delay);
        let arrives = self.now + delay + late;
        self.at(arrives, SimEvent::Drain { link: id, to: receiver });
        self.die(id, receiver, arrives + 1);
    }

    fn die(&mut self, id: u64, side: Side, at: u64) {
        if let Some(link) = self.net.links.get_mut(&id) {
            link.stage = LinkStage::Dead;
            let at = if side == Side::Dialler { at.max(link.dialled_at) } else { at };
            self.at(at, SimEvent::Close { link: id, side });
        }
    }

    /// This end learns that its link is dead.
    pub fn closed(&mut self, id: u64, side: Side) -> Option<(ProcessId, ProcessInput)> {
        let link = self.net.links.get_mut(&id)?;
        if !std::mem::take(&mut link.open[side.index()]) {
            return None;
        }
        let process = link.process(side);
        if !link.open[side.other().index()] {
            self.net.links.remove(&id);
        }
        Some((process?, ProcessInput::Closed { conn: conn(id, side) }))
    }

    /// Cuts all links of a process that is gone. If its machine still runs, the others are reset at
    /// once; else they learn it by a time-out.
    pub fn process_died(&mut self, process: ProcessId, machine_runs: bool) {
        let ids: Vec<u64> = self.net.links.keys().copied().collect();
        for id in ids {
            let Some(link) = self.net.links.get_mut(&id) else { continue };
            let side = if link.dialler == process {
                Side::Dialler
            } else if link.acceptor == Some(process) {
                Side::Acceptor
            } else {
                continue;
            };
            let dialling = link.stage == LinkStage::Dialling;
            link.open[side.index()] = false;
            let other = side.other();
            if dialling || !link.open[other.index()] {
                self.net.links.remove(&id);
                continue;
            }
            let delay = self.delay();
            let lost = self.rng.between(0, delay);
            let now = self.now;
            let link = self.net.links.get_mut(&id).expect("looked up above");
            let until = &mut link.open_until[other.index()];
            *until = (*until).min(now + lost);
            let late = if machine_runs { 0 } else { self.rng.between(500_000, 2_000_000) };
            self.die(id, other, now + delay + late);
        }
    }

    /// Blocks one direction. Links across it hang, and are given up after a while.
    pub fn block(&mut self, from: Place, to: Place) {
        self.net.block(from, to);
        let crossing: Vec<u64> = self
            .net
            .links
            .iter()
            .filter(|(_, link)| {
                let ends = (link.dialler.place, link.to);
                ends == (from, to) || ends == (to, from)
            })
            .map(|(&id, _)| id)
            .collect();
        for link in crossing {
            let after = self.rng.between(200_000, 3_000_000);
            self.after(after, SimEvent::LinkTimeout { link });
        }
    }

    pub fn link_timeout(&mut self, id: u64) {
        // A dial ends by its own time-out.
        let standing = |link: &&SimLink| link.stage == LinkStage::Standing;
        let Some(link) = self.net.links.get(&id).filter(standing) else { return };
        let (a, b) = (link.dialler.place, link.to);
        if self.net.is_blocked(a, b) || self.net.is_blocked(b, a) {
            self.cut(id);
        }
    }

    /// Opens a direction again; stuck messages are delivered, in order.
    pub fn unblock(&mut self, from: Place, to_place: Place) {
        self.net.blocked.remove(&(from, to_place));
        let ids: Vec<u64> = self.net.links.keys().copied().collect();
        for id in ids {
            for to in [Side::Dialler, Side::Acceptor] {
                let Some(link) = self.net.links.get(&id) else { continue };
                let direction = (link.place(to.other()), link.place(to));
                if direction == (from, to_place) && !link.stuck[to.index()].is_empty() {
                    let delay = self.delay();
                    self.after(delay, SimEvent::Drain { link: id, to });
                }
            }
        }
    }

    /// The time that a message takes from one place to another.
    pub fn way(&mut self, from: Place, to: Place) -> u64 {
        self.delay() + self.lag(from, to)
    }

    /// The delay that congestion adds.
    pub fn lag(&self, from: Place, to: Place) -> u64 {
        self.net.slow.get(&(from, to)).copied().unwrap_or(0)
    }

    /// Sets the additional delay; zero: none. (Within a connection, messages after a late one wait
    /// for it.)
    pub fn slow_down(&mut self, from: Place, to: Place, lag: u64) {
        self.net.slow.insert((from, to), lag);
    }

    pub fn unblock_all(&mut self) {
        for (from, to) in self.net.blocked.clone() {
            self.unblock(from, to);
        }
    }

    // ---- single queries, without a link --------------------------------------------------------

    pub fn query(&mut self, from: ProcessId, to: Place, query: u64, message: NodeQuery) {
        if self.net.is_blocked(from.place, to) {
            return;
        }
        let delay = self.way(from.place, to);
        if let Some(late) = self.repeats() {
            let message = message.clone();
            self.after(delay + late, SimEvent::Query { to, from, query, message });
        }
        self.after(delay, SimEvent::Query { to, from, query, message });
    }

    /// Now and then a query or a report arrives once more, when it is outdated.
    fn repeats(&mut self) -> Option<u64> {
        let some = self.plan.faults.contains(&FaultKind::Straggle) && self.is_faulty();
        (some && self.rng.percent(5)).then(|| self.rng.between(10_000, 3_000_000))
    }

    /// Sends a health report to every coordinator: only the leading one listens.
    pub fn report(&mut self, from: ProcessId, me: Option<StoreBoot>, report: &HealthReport) {
        for index in 0..self.plan.coordinators {
            let to = Place::Coordinator(index);
            if !self.net.is_blocked(from.place, to) {
                let delay = self.way(from.place, to);
                if let Some(late) = self.repeats() {
                    let report = report.clone();
                    self.after(delay + late, SimEvent::Report { to, from: me, report });
                }
                self.after(delay, SimEvent::Report { to, from: me, report: report.clone() });
            }
        }
    }

    pub fn query_reply(&mut self, from: Place, to: ProcessId, query: u64, reply: NodeQueryReply) {
        if self.net.is_blocked(from, to.place) {
            return;
        }
        let delay = self.way(from, to.place);
        self.input_after(delay, to, ProcessInput::QueryReply { query, reply });
    }

    pub fn dialled_place(&self, link: u64) -> Option<Place> {
        Some(self.net.links.get(&link)?.to)
    }
}
