//! The problem that a client gets for each [`Failure`] of the batcher.

use engine::batcher::{Failure, Outcome};

use crate::problem::{Kind, Problem};

/// The problem of a failed write.
pub(crate) fn of_write(failure: Failure) -> Problem {
    let (kind, detail) = kind_and_detail(failure);
    match failure.outcome() {
        Outcome::NotApplied => Problem::new(kind, detail),
        Outcome::Unknown => Problem::unknown(kind, detail),
    }
}

/// The problem of a failed bounded read, which was sent to the primary last.
pub(crate) fn of_bounded_read(failure: Failure) -> Problem {
    match failure {
        Failure::Deadline | Failure::Slow => Problem::new(
            Kind::NoPrimary,
            "no follower could prove its value young enough, and no primary answered in time",
        ),
        failure => of_read(failure),
    }
}

/// The problem of a failed read. A read changes nothing, so its outcome is never unknown. What
/// is 413 or 429 of a write is 503 of a read, if the batcher refused it.
pub(crate) fn of_read(failure: Failure) -> Problem {
    let problem = match failure {
        Failure::Deadline | Failure::Slow => {
            Problem::new(Kind::Deadline, "no answer came before the deadline")
        }
        failure => Problem { outcome: Outcome::NotApplied, ..of_write(failure) },
    };
    match problem.kind {
        Kind::Overloaded | Kind::TooLarge => {
            let status = hyper::StatusCode::SERVICE_UNAVAILABLE;
            Problem { status, ..problem }
        }
        _ => problem,
    }
}

fn kind_and_detail(failure: Failure) -> (Kind, &'static str) {
    match failure {
        Failure::NoShard => (Kind::NoPrimary, "the cluster has no shard for this counter yet"),
        Failure::NoSession => {
            (Kind::NoSession, "this gateway has not registered with etcd yet, or etcd is away")
        }
        Failure::NoPrimary => (
            Kind::NoPrimary,
            "no node that leads a shard which this needs could be reached in time",
        ),
        Failure::Frozen => (
            Kind::Frozen,
            "a shard that this needs has too few replicas that answer: it takes no writes until \
             one returns",
        ),
        Failure::Overloaded => {
            (Kind::Overloaded, "a node that leads a shard which this needs is overloaded")
        }
        Failure::QueueFull => (Kind::Overloaded, "the queues of this gateway are full"),
        Failure::Slow => (
            Kind::Overloaded,
            "the deadline passed while the request waited in this gateway; it was not sent",
        ),
        Failure::NoSpace => {
            (Kind::NoSpace, "the disk of a node that holds a shard which this needs is nearly full")
        }
        Failure::TooLarge => (Kind::TooLarge, "more bytes than a node takes in one piece"),
        Failure::Stopping => (Kind::Stopping, "this gateway is stopping: use another one"),
        Failure::Malformed => (Kind::Internal, "the replicas could not read what was sent: a bug"),
        Failure::Deadline => (
            Kind::Deadline,
            "the deadline passed after the request was sent: it may have been applied, or may be \
             yet",
        ),
        Failure::SessionExpired | Failure::SessionAbandoned => (
            Kind::SessionLost,
            "the gateway's session ended before an answer came: the request may have been applied",
        ),
        Failure::TokenReused => (
            Kind::TokenReused,
            "another request has this Idempotency-Key, and this one was not applied: give each \
             request its own key",
        ),
        Failure::TokenTooOld => (
            Kind::TokenTooOld,
            "the request was issued longer ago than Idempotency-Keys are kept: it was not applied \
             now, and it is unknown whether it was applied earlier",
        ),
        Failure::TokenQuota => (
            Kind::Quota,
            "a shard that this needs keeps as many records of Idempotency-Keys as it may: try \
             again when the oldest have expired",
        ),
        Failure::ResultGone => (
            Kind::SessionLost,
            "the request was applied earlier, and its result is no longer known",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::outcome_name;

    /// The status, the kind and the outcome.
    type Summary = (u16, &'static str, &'static str);

    fn summary(problem: &Problem) -> Summary {
        (problem.status.as_u16(), problem.kind.name(), outcome_name(problem.outcome))
    }

    #[track_caller]
    fn check(failure: Failure, write: Summary, read: Summary) {
        assert_eq!(summary(&of_write(failure)), write, "write {failure:?}");
        assert_eq!(summary(&of_read(failure)), read, "read {failure:?}");
    }

    #[test]
    fn a_bounded_read_without_an_answer_has_no_primary() {
        for failure in [Failure::Deadline, Failure::Slow, Failure::NoPrimary] {
            let problem = of_bounded_read(failure);
            assert_eq!(summary(&problem), (503, "no-primary", "not-applied"), "{failure:?}");
        }
        assert_eq!(of_bounded_read(Failure::Frozen), of_read(Failure::Frozen));
    }

    #[test]
    fn failures() {
        const NOT: &str = "not-applied";
        let both = |failure, want| check(failure, want, want);
        both(Failure::NoShard, (503, "no-primary", NOT));
        both(Failure::NoSession, (503, "no-session", NOT));
        both(Failure::NoPrimary, (503, "no-primary", NOT));
        both(Failure::Frozen, (503, "frozen", NOT));
        both(Failure::NoSpace, (503, "no-space", NOT));
        both(Failure::Stopping, (503, "stopping", NOT));
        both(Failure::Malformed, (500, "internal", NOT));
        check(Failure::Overloaded, (429, "overloaded", NOT), (503, "overloaded", NOT));
        check(Failure::QueueFull, (429, "overloaded", NOT), (503, "overloaded", NOT));
        check(Failure::TokenReused, (422, "token-reused", NOT), (422, "token-reused", NOT));
        check(Failure::TokenTooOld, (410, "token-too-old", "unknown"), (410, "token-too-old", NOT));
        check(Failure::TokenQuota, (429, "quota", NOT), (429, "quota", NOT));
        check(Failure::TooLarge, (413, "too-large", NOT), (503, "too-large", NOT));
        check(Failure::Slow, (429, "overloaded", NOT), (504, "deadline", NOT));
        check(Failure::Deadline, (504, "deadline", "unknown"), (504, "deadline", NOT));
        for failure in [Failure::SessionExpired, Failure::SessionAbandoned, Failure::ResultGone] {
            check(failure, (504, "session-lost", "unknown"), (504, "session-lost", NOT));
        }
    }
}
