//! Reports to the coordinator, and the graceful stop that the last of them announce.
//!
//! A node that stops reports that it leaves: other nodes take over what it leads, and it leaves the
//! in-sync sets. The coordinator handles a process that leaves like a dead one, at once and without
//! a probe, so everything goes the way that it goes after a death, without the time to detect it.
//! Nothing here is needed for safety: the node leads and acknowledges until it receives a higher
//! epoch, as always; and what it has ordered by then and not committed is sent again by the
//! gateways, the same bytes, to the new primary.

use crate::ids::Now;
use crate::message::HealthReport;
use crate::node::event::Effect;
use crate::node::membership::HealthView;
use crate::node::peers::Peers;
use crate::node::shared::NodeTurn;
use crate::replica::trust::Trust;
use crate::shard_record::ShardRecord;

#[derive(Clone, Debug, Default)]
pub(super) struct Reporter {
    /// The last report.
    reported: HealthReport,
    next_report: Now,
    leaving: Leaving,
}

#[derive(Clone, Debug, Default)]
enum Leaving {
    #[default]
    No,
    /// The process leaves, and waits until then at the latest.
    Until(Now),
    Left,
}

impl Reporter {
    /// Creates the reporter of a node at its start: the first report is due.
    pub(super) fn new(now: Now) -> Self {
        Self { next_report: now, ..Self::default() }
    }

    /// Returns the last report.
    #[cfg(test)]
    pub(super) fn reported(&self) -> &HealthReport {
        &self.reported
    }

    /// Begins to leave, and reports it at once.
    pub(super) fn leave(&mut self, turn: &mut NodeTurn<'_>, peers: &Peers) {
        if matches!(self.leaving, Leaving::No) {
            self.leaving = Leaving::Until(turn.now.plus_ms(turn.settings.timing.leave_within_ms));
            self.report(turn, peers);
        }
    }

    /// Stops waiting: there is no leading coordinator that could name other primaries.
    pub(super) fn on_leave_not_reported(&mut self, now: Now) {
        if matches!(self.leaving, Leaving::Until(_)) {
            self.leaving = Leaving::Until(now);
        }
    }

    /// Lets the process end once this node has handed over what it leads, or has waited for long
    /// enough.
    pub(super) fn finish_leaving(&mut self, turn: &mut NodeTurn<'_>, peers: &Peers) {
        let Leaving::Until(until) = self.leaving else { return };
        let mut records = turn.shards.records.values().map(|record| &record.0);
        if turn.now >= until || !records.any(|record| is_still_needed(turn, peers, record)) {
            self.leaving = Leaving::Left;
            turn.effects.push(Effect::Left);
        }
    }

    /// Reports to the coordinator, on change and periodically, what etcd does not contain.
    pub(super) fn report(&mut self, turn: &mut NodeTurn<'_>, peers: &Peers) {
        let silent_after_ms = turn.settings.silent_after_ms;
        let mut report = HealthReport {
            silent: peers.health().silent(turn.now, silent_after_ms),
            leaving: !matches!(self.leaving, Leaving::No),
            full: turn.storage.is_disk_full(),
            ..HealthReport::default()
        };
        let is_silent = |&store: &_| peers.is_silent(store, turn.now, turn.settings);
        for (replica, primary) in turn.shards.led() {
            let others = || primary.record.isr.iter().filter(|&&store| store != turn.me.store);
            if primary.frozen {
                let hindered_by = HealthView::of(turn, peers).hindered_by(replica.shard);
                report.frozen.push((replica.shard, hindered_by));
            }
            let alone = others().count() > 0 && others().all(is_silent);
            let damaged = matches!(replica.trust, Trust::Wrong(_));
            let cut_off = alone && !peers.health().has_contact(turn.now, silent_after_ms);
            if damaged || cut_off {
                report.resigned.push(replica.shard);
            }
        }
        let due = std::mem::take(&mut turn.shards.to_report) || turn.now >= self.next_report;
        if report != self.reported || due {
            self.next_report = turn.now.plus_ms(turn.settings.timing.report_every_ms);
            self.reported = report.clone();
            turn.effects.push(Effect::Report(report));
        }
    }
}

/// Returns whether this node has yet to hand over the shard: it leads the shard or is in its
/// in-sync set, and the other members could do without it.
fn is_still_needed(turn: &NodeTurn<'_>, peers: &Peers, record: &ShardRecord) -> bool {
    let me = turn.me.store;
    let reachable = |&&store: &&_| store != me && !peers.is_silent(store, turn.now, turn.settings);
    let others = record.isr.iter().filter(reachable).count();
    let leads = record.primary == turn.me && others > 0;
    // At `min_in_sync` no member may leave.
    let follows = record.isr.contains(&me) && record.room(turn.settings.min_in_sync) > 0;
    leads || follows && others > 0
}
