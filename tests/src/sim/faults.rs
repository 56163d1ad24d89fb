//! The faults of a run: which ones, when, and when they end.

use super::cluster::SimCluster;
use super::coordinators::CoordinatorHost;
use super::etcd::{EtcdHealth, EtcdSnapshot};
use super::event::SimEvent;
use super::gateways::GatewayHost;
use super::nodes::NodeHost;
use super::place::{Place, ProcessId, place_of};
use super::plan::faults::FaultKind;
use super::struck::Undo;

impl SimCluster {
    pub fn fault(&mut self) {
        if self.core.now >= self.core.plan.faults_until {
            return;
        }
        let every = self.core.plan.fault_every;
        let next = self.core.rng.between(every / 2, every * 3 / 2);
        if self.core.at_rest {
            // Nothing would be in flight.
            return self.core.after(20_000, SimEvent::Fault);
        }
        self.core.after(next, SimEvent::Fault);
        let kinds = self.core.plan.faults.clone();
        let Some(kind) = self.core.rng.pick(&kinds) else { return };
        *self.faults.counts.entry(kind).or_default() += 1;
        if self.clients.in_flight() == 0 {
            self.faults.idle += 1;
        }
        self.core.trace.note(self.core.now, || format!("fault: {kind:?}"));
        self.strike(kind);
    }

    fn strike(&mut self, kind: FaultKind) {
        match kind {
            FaultKind::NodeKill | FaultKind::NodePower => {
                let node = self.core.rng.index(self.nodes.len());
                self.crash_node(node, kind == FaultKind::NodePower);
            }
            FaultKind::NodeAway => {
                let node = self.core.rng.index(self.nodes.len());
                let power_lost = self.core.rng.percent(50);
                self.nodes[node].crash(&mut self.core, power_lost);
                let back = self.core.rng.between(2_000_000, 8_000_000);
                self.goes_away(node, back);
            }
            FaultKind::AllPower => {
                for node in 0..self.nodes.len() {
                    self.crash_node(node, true);
                }
            }
            FaultKind::GatewayKill => {
                let at = self.core.rng.index(self.gateways.len());
                self.gateways[at].crash(&mut self.core);
                let place = self.gateways[at].place;
                self.restart_later(place, 1_000_000);
            }
            FaultKind::CoordinatorKill => {
                let at = self.core.rng.index(self.coordinators.len());
                self.coordinators[at].crash(&mut self.core);
                let place = self.coordinators[at].place;
                self.restart_later(place, 1_000_000);
            }
            FaultKind::NodeLeave => {
                let node = self.core.rng.index(self.nodes.len());
                self.nodes[node].leave(&mut self.core);
            }
            FaultKind::NodePause => {
                let node = self.corner()[0];
                self.pause(node);
            }
            FaultKind::GatewayPause => {
                let at = self.core.rng.index(self.gateways.len());
                self.pause(self.gateways[at].place);
            }
            FaultKind::CoordinatorPause => {
                let at = self.core.rng.index(self.coordinators.len());
                self.pause(self.coordinators[at].place);
            }
            FaultKind::ClockJump => {
                let node = self.core.rng.index(self.nodes.len());
                let far =
                    self.core.rng.pick(&[5_000, 5_000, 3_600_000, 260_000_000]).expect("four");
                let ahead_ms = self.core.rng.between(0, 2 * far) as i64 - far as i64;
                // All nodes as one: a shard sees the same when the cluster was off for days.
                let all = self.core.rng.percent(30);
                let set = if all { 0..self.nodes.len() } else { node..node + 1 };
                for node in set {
                    self.nodes[node].set_clock(ahead_ms);
                    self.core.clocks_set.insert(node);
                }
            }
            FaultKind::Snap => {
                let place = self.any_process();
                for link in self.core.net.standing_at(place) {
                    self.core.cut_soon(link);
                }
            }
            FaultKind::Straggle => {
                let standing = self.core.net.standing();
                for _ in 0..self.core.rng.between(1, 8) {
                    if let Some(link) = self.core.rng.pick(&standing) {
                        self.core.cut_with_stragglers(link);
                    }
                }
            }
            FaultKind::Swizzle => self.swizzle(),
            FaultKind::Flap => self.flap(),
            FaultKind::Island => self.island(),
            FaultKind::EtcdSlow => {
                self.core.etcd.slow = true;
                self.end_later(Undo::EtcdSlow);
            }
            FaultKind::EtcdRestored => {
                let image = Box::new(self.core.etcd.snapshot());
                self.end_later(Undo::Snapshot(image));
            }
            FaultKind::LeaseRevoke => self.core.etcd_revoke_one(),
            FaultKind::LeaseProlong => self.core.etcd_prolong_leases(),
            FaultKind::LyingKeepAlive => {
                self.core.etcd.lies = true;
                self.end_later(Undo::EtcdLies);
            }
            FaultKind::WatchBreak => self.core.etcd_break_watches(|_| true),
            FaultKind::WatchMiss => {
                self.core.etcd.forgets = true;
                self.end_later(Undo::EtcdForgets);
            }
            FaultKind::Cut => {
                let standing = self.core.net.standing();
                for _ in 0..self.core.rng.between(1, 4) {
                    if let Some(link) = self.core.rng.pick(&standing) {
                        self.core.cut(link);
                    }
                }
            }
            FaultKind::Partition => self.partition(),
            FaultKind::OneWay => {
                let pair = (self.any_place(), self.any_place());
                if pair.0 != pair.1 {
                    self.block_for(vec![pair]);
                }
            }
            FaultKind::SlowLine => self.slow_line(),
            FaultKind::Orphan => self.orphan(),
            FaultKind::Exile => self.exile(),
            FaultKind::SlowDisk => {
                let node = self.core.rng.index(self.nodes.len());
                self.nodes[node].disk.slowness = self.core.rng.between(5, 100);
                self.end_later(Undo::Disk(node));
            }
            FaultKind::StalledDisk => {
                let node = self.core.rng.index(self.nodes.len());
                let until = self.core.now + self.core.rng.between(100_000, 2_500_000);
                self.nodes[node].disk.stalled_until = until;
            }
            FaultKind::EtcdStop => {
                self.core.etcd.health = EtcdHealth::Stopped;
                self.end_later(Undo::Etcd);
            }
            FaultKind::EtcdDead => {
                self.core.etcd.health = EtcdHealth::Dead;
                self.end_later(Undo::Etcd);
            }
            FaultKind::LeaseWipe => self.core.etcd_wipe_leases(),
        }
    }

    fn crash_node(&mut self, node: usize, power_lost: bool) {
        self.nodes[node].crash(&mut self.core, power_lost);
        let place = self.nodes[node].place;
        self.restart_later(place, 2_000_000);
    }

    /// Nothing else starts the node before then, but the end of all faults.
    pub fn goes_away(&mut self, node: usize, for_micros: u64) {
        let node = &mut self.nodes[node];
        node.away_until = node.away_until.max(self.core.now + for_micros);
        let place = node.place;
        self.core.at(node.away_until, SimEvent::Restart { place });
    }

    fn restart_later(&mut self, place: Place, within: u64) {
        let after = self.core.rng.between(1_000, within);
        self.core.after(after, SimEvent::Restart { place });
    }

    fn pause(&mut self, place: Place) {
        let Some(process) = self.listening(place) else { return };
        let outputs = if self.core.rng.percent(50) { 0 } else { self.core.rng.between(1, 40) };
        // Shorter than any time-out; long enough to be given up; for longer than its session lasts.
        let longest = match self.core.rng.below(3) {
            0 => 200_000,
            1 => 1_500_000,
            _ => 4_500_000,
        };
        let lasts = self.core.rng.between(1_000, longest);
        self.core.pause(process, outputs, lasts);
    }

    /// Pairs are separated at times of their own, and connected again in another order.
    fn swizzle(&mut self) {
        let all = self.all_places();
        for (at, &a) in all.iter().enumerate() {
            for &b in &all[at + 1..] {
                if !self.core.rng.percent(35) {
                    continue;
                }
                let parts = self.core.rng.between(0, 600_000);
                let meets = self.core.rng.between(600_000, 2_500_000);
                let both = self.core.rng.percent(70);
                for pair in [Some((a, b)), both.then_some((b, a))].into_iter().flatten() {
                    self.core.after(parts, SimEvent::FaultStep { pair, blocks: true });
                    self.core.after(meets, SimEvent::FaultStep { pair, blocks: false });
                }
            }
        }
    }

    fn flap(&mut self) {
        let one = self.any_process();
        let mut others = self.all_places();
        others.retain(|&other| other != one);
        if self.core.rng.percent(50) {
            let other = self.core.rng.pick(&others);
            others.retain(|&place| Some(place) == other);
        }
        let mut at = 0;
        for _ in 0..self.core.rng.between(2, 8) {
            let parts = at + self.core.rng.between(1_000, 300_000);
            at = parts + self.core.rng.between(10_000, 400_000);
            for pair in others.iter().flat_map(|&other| [(one, other), (other, one)]) {
                self.core.after(parts, SimEvent::FaultStep { pair, blocks: true });
                self.core.after(at, SimEvent::FaultStep { pair, blocks: false });
            }
        }
    }

    pub fn fault_step(&mut self, (from, to): (Place, Place), blocks: bool) {
        if !blocks {
            self.core.unblock(from, to);
        } else if self.core.is_faulty() {
            self.core.block(from, to);
        }
    }

    fn orphan(&mut self) {
        let at = self.core.rng.index(self.gateways.len());
        let (place, lease) = (self.gateways[at].place, self.gateways[at].lease());
        for link in self.core.net.standing_at(place) {
            self.core.cut(link);
        }
        if let Some(lease) = lease {
            self.core.etcd_revoke(lease);
        }
        let nodes = self.nodes.iter().map(|node| node.place);
        let pairs: Vec<_> = nodes.flat_map(|node| [(place, node), (node, place)]).collect();
        for &(from, to) in &pairs {
            self.core.block(from, to);
        }
        let after = self.core.rng.between(20_000, 900_000);
        self.end_after(Undo::Unblock(pairs), after);
    }

    /// The island's processes see no difference at first; the others replace them all. They may
    /// still reach etcd, but its watches deliver nothing to them.
    fn island(&mut self) {
        let records: Vec<_> = self.core.etcd.shards().map(|(config, _)| config.clone()).collect();
        if records.is_empty() {
            return;
        }
        let record = &records[self.core.rng.index(records.len())];
        let followers: Vec<_> =
            record.isr.iter().copied().filter(|&store| store != record.primary.store).collect();
        let mut island = vec![place_of(record.primary.store)];
        island.extend(self.core.rng.pick(&followers).map(place_of));
        island.push(Place::Gateway(self.core.rng.index(self.gateways.len()) as u8));
        let mut others = self.all_places();
        others.retain(|other| !island.contains(other));
        let reaches_etcd = self.core.rng.percent(50);
        if reaches_etcd {
            self.core.etcd.deaf.extend(&island);
            self.core.etcd_break_watches(|place| island.contains(&place));
            others.retain(|&other| other != Place::Etcd);
        }
        let mut pairs = Vec::new();
        for other in others {
            pairs.extend(island.iter().flat_map(|&place| [(place, other), (other, place)]));
        }
        for &(from, to) in &pairs {
            self.core.block(from, to);
        }
        let after = self.core.rng.between(500_000, 5_000_000);
        self.end_after(Undo::Island(pairs, island), after);
    }

    fn any_process(&mut self) -> Place {
        let mut all = self.all_places();
        all.retain(|&place| place != Place::Etcd);
        self.core.rng.pick(&all).expect("there are nodes")
    }

    fn any_place(&mut self) -> Place {
        let nodes = self.nodes.len() as u64;
        let gateways = self.gateways.len() as u64;
        let coordinators = self.coordinators.len() as u64;
        match self.core.rng.below(nodes + gateways + coordinators + 1) {
            at if at < nodes => Place::Node(at as u16),
            at if at < nodes + gateways => Place::Gateway((at - nodes) as u8),
            at if at < nodes + gateways + coordinators => {
                Place::Coordinator((at - nodes - gateways) as u8)
            }
            _ => Place::Etcd,
        }
    }

    fn all_places(&self) -> Vec<Place> {
        let nodes = (0..self.nodes.len()).map(|at| Place::Node(at as u16));
        let gateways = (0..self.gateways.len()).map(|at| Place::Gateway(at as u8));
        let coordinators = (0..self.coordinators.len()).map(|at| Place::Coordinator(at as u8));
        nodes.chain(gateways).chain(coordinators).chain([Place::Etcd]).collect()
    }

    /// A node, mostly one that leads, and mostly a gateway: places that one switch could separate
    /// from all others. The node comes first.
    fn corner(&mut self) -> Vec<Place> {
        let leading: Vec<_> =
            self.core.etcd.shards().map(|(config, _)| place_of(config.primary.store)).collect();
        let any = Place::Node(self.core.rng.index(self.nodes.len()) as u16);
        let leads = self.core.rng.pick(&leading).filter(|_| self.core.rng.percent(70));
        let mut places = vec![leads.unwrap_or(any)];
        if self.core.rng.percent(60) {
            places.push(Place::Gateway(self.core.rng.index(self.gateways.len()) as u8));
        }
        places
    }

    fn slow_line(&mut self) {
        let corner = self.corner();
        // Each direction by itself: often only one of them is slow.
        let mut lag = |chance| match self.core.rng.percent(chance) {
            true => self.core.rng.between(20_000, 1_000_000),
            false => 0,
        };
        let (incoming, outgoing) = (lag(75), lag(50));
        let mut pairs = Vec::new();
        for other in self.all_places().into_iter().filter(|other| !corner.contains(other)) {
            for &place in &corner {
                self.core.slow_down(other, place, incoming);
                self.core.slow_down(place, other, outgoing);
                pairs.extend([(other, place), (place, other)]);
            }
        }
        self.end_later(Undo::Slow(pairs));
    }

    fn exile(&mut self) {
        let left = self.corner();
        let node = left[0];
        let (mut opens, mut later) = (Vec::new(), Vec::new());
        for &a in &left {
            for b in self.all_places() {
                if !left.contains(&b) {
                    let opens_later = matches!(b, Place::Etcd | Place::Coordinator(_));
                    if opens_later { &mut later } else { &mut opens }.extend([(a, b), (b, a)]);
                }
            }
        }
        for &(from, to) in opens.iter().chain(&later) {
            self.core.block(from, to);
        }
        // The work falls to the others, and their disks are slow because of it.
        if self.core.rng.percent(40) {
            for at in 0..self.nodes.len() {
                self.nodes[at].disk.slowness = self.core.rng.between(5, 100);
                self.end_later(Undo::Disk(at));
            }
        }
        self.end_later(Undo::Exile { node, opens, later });
    }

    /// The others may have continued without the exiled node: most of them die now, and it reaches
    /// those that come back first.
    fn exile_returns(
        &mut self,
        node: Place,
        opens: Vec<(Place, Place)>,
        later: Vec<(Place, Place)>,
    ) {
        let striking = self.core.now < self.core.plan.faults_until;
        for other in 0..self.nodes.len() {
            if striking && self.nodes[other].place != node && self.core.rng.percent(70) {
                let power_lost = self.core.rng.percent(50);
                self.crash_node(other, power_lost);
            }
        }
        for at in 0..self.coordinators.len() {
            if striking && self.core.rng.percent(70) {
                self.coordinators[at].crash(&mut self.core);
                let place = self.coordinators[at].place;
                self.restart_later(place, 1_000_000);
            }
        }
        for (from, to) in opens {
            self.core.unblock(from, to);
        }
        if self.core.rng.percent(50) {
            // The node reaches etcd at once, but each kind of record arrives in its own time.
            later.into_iter().for_each(|(from, to)| self.core.unblock(from, to));
        } else {
            self.end_later(Undo::Unblock(later));
        }
    }

    /// Splits all processes in two, or cuts one off from some of the others.
    fn partition(&mut self) {
        let all = self.all_places();
        let one = self.core.rng.pick(&all).expect("there are nodes");
        let splits = self.core.rng.percent(50);
        let mut left: Vec<Place> = Vec::new();
        for &place in &all {
            if place == one || (splits && self.core.rng.percent(40)) {
                left.push(place);
            }
        }
        let mut pairs = Vec::new();
        for &a in &left {
            for &b in &all {
                if !left.contains(&b) && (splits || self.core.rng.percent(60)) {
                    pairs.extend([(a, b), (b, a)]);
                }
            }
        }
        self.block_for(pairs);
    }

    fn block_for(&mut self, pairs: Vec<(Place, Place)>) {
        for &(from, to) in &pairs {
            self.core.block(from, to);
        }
        self.end_later(Undo::Unblock(pairs));
    }

    fn end_later(&mut self, undo: Undo) {
        let after = self.core.rng.between(50_000, 3_000_000);
        self.end_after(undo, after);
    }

    fn end_after(&mut self, undo: Undo, after: u64) {
        self.faults.next += 1;
        let fault = self.faults.next;
        self.faults.running.insert(fault, undo);
        self.core.after(after, SimEvent::FaultEnds { fault });
    }

    pub fn fault_ends(&mut self, fault: u64) {
        let Some(undo) = self.faults.running.remove(&fault) else { return };
        match undo {
            Undo::Unblock(pairs) => self.unblock(pairs),
            Undo::Island(pairs, island) => {
                self.unblock(pairs);
                self.core.etcd.deaf.retain(|place| !island.contains(place));
            }
            Undo::Slow(pairs) => {
                for (from, to) in pairs {
                    self.core.slow_down(from, to, 0);
                }
            }
            Undo::Exile { node, opens, later } => self.exile_returns(node, opens, later),
            Undo::Disk(node) => self.nodes[node].disk.slowness = 1,
            Undo::Etcd => self.core.etcd_resume(),
            Undo::EtcdSlow => self.core.etcd.slow = false,
            Undo::EtcdLies => self.core.etcd.lies = false,
            Undo::EtcdForgets => self.core.etcd.forgets = false,
            Undo::Snapshot(image) => self.restore_etcd(*image),
            Undo::EtcdRestored => self.core.etcd_put_right(),
        }
    }

    fn unblock(&mut self, pairs: Vec<(Place, Place)>) {
        for (from, to) in pairs {
            self.core.unblock(from, to);
        }
    }

    /// Restores a snapshot only where every process has seen something newer: no other could detect
    /// it, and nothing is promised then.
    fn restore_etcd(&mut self, image: EtcdSnapshot) {
        let etcd = &self.core.etcd;
        let all_could_tell = self.running().all(|process| !etcd.could_follow(process, &image));
        let is_up = etcd.health == EtcdHealth::Up && !etcd.is_restored();
        if self.core.is_faulty() && is_up && all_could_tell {
            self.core.trace.note(self.core.now, || "etcd is restored from a snapshot".into());
            self.core.etcd_restore(image);
            self.end_later(Undo::EtcdRestored);
        }
    }

    pub(super) fn running(&self) -> impl Iterator<Item = ProcessId> {
        let nodes = self.nodes.iter().filter(|node| !node.is_down()).map(NodeHost::process);
        let gateways = self.gateways.iter().filter(|at| !at.is_down()).map(GatewayHost::process);
        let coordinators = self.coordinators.iter().filter(|at| !at.is_down());
        let chaos = (!self.chaos.is_down()).then(|| self.chaos.process());
        nodes.chain(gateways).chain(coordinators.map(CoordinatorHost::process)).chain(chaos)
    }

    /// Restarts each process that does not follow etcd any more.
    pub fn etcd_put_right(&mut self) {
        let left: Vec<_> =
            self.running().filter(|&process| self.core.etcd.is_left_by(process)).collect();
        for ProcessId { place, .. } in left {
            match place {
                Place::Node(at) => self.nodes[at as usize].crash(&mut self.core, false),
                Place::Gateway(at) => self.gateways[at as usize].crash(&mut self.core),
                Place::Coordinator(at) => self.coordinators[at as usize].crash(&mut self.core),
                Place::Chaos => self.chaos.crash(),
                Place::Twin | Place::Etcd => {}
            }
            self.restart_later(place, 500_000);
        }
    }

    /// Everything works again.
    pub fn heal(&mut self) {
        self.core.trace.note(self.core.now, || "all faults are over".into());
        for fault in self.faults.running.keys().copied().collect::<Vec<_>>() {
            self.fault_ends(fault);
        }
        self.core.unblock_all();
        self.core.resume_all();
        for node in &mut self.nodes {
            node.is_put_back(&mut self.core);
            // A clock that stays behind for an hour keeps token records for an hour longer: clients
            // wait for room.
            node.set_clock(0);
            node.disk.slowness = 1;
            node.disk.stalled_until = 0;
        }
        self.twin = None;
        self.start_all();
    }
}
