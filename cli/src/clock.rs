//! Times of the wall clock, as commands print them: in UTC.

const DAY_MS: u64 = 86_400_000;

/// Formats a time in ms since 1970 as `12:03:04`.
pub(crate) fn time_of_day(at_ms: u64) -> String {
    let seconds = at_ms / 1_000;
    format!("{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

/// Formats a time as `12:03:04`, or with its date if that is a day or more before `now_ms`.
pub(crate) fn moment(at_ms: u64, now_ms: u64) -> String {
    let time = time_of_day(at_ms);
    if now_ms.saturating_sub(at_ms) < DAY_MS {
        return time;
    }
    let (year, month, day) = date(at_ms / DAY_MS);
    format!("{year:04}-{month:02}-{day:02} {time}")
}

/// The date of a day since 1970-01-01, by Howard Hinnant's algorithm: years begin in March, so that
/// a leap day is the last one.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let of_month = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_today_has_no_date() {
        let at = 1_000 * DAY_MS + 43_384_999;
        assert_eq!(time_of_day(at), "12:03:04");
        assert_eq!(moment(at, at + DAY_MS - 1), "12:03:04");
        assert_eq!(moment(at, at + DAY_MS), "1972-09-27 12:03:04");
        assert_eq!(moment(at, at - 1), "12:03:04", "another machine's clock is ahead");
    }

    #[test]
    fn dates() {
        let all = [0, 58, 59, 789, 11_016, 20_423].map(date);
        let want = [
            (1970, 1, 1),
            (1970, 2, 28),
            (1970, 3, 1),
            (1972, 2, 29),
            (2000, 2, 29),
            (2025, 12, 1),
        ];
        assert_eq!(all, want);
    }
}
