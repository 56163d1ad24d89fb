//! No record names fewer members of the in-sync set than `min_in_sync`: below it nothing commits,
//! or fewer copies than were asked for hold what was acknowledged.

use engine::shard_record::ShardRecord;

use super::Violation;

pub fn check(config: &ShardRecord, min_in_sync: usize, violations: &mut Vec<Violation>) {
    if config.isr.len() < min_in_sync {
        let detail = format!("{config:?} has fewer than {min_in_sync} members in sync");
        violations.push(Violation { promise: "floor", detail });
    }
}
