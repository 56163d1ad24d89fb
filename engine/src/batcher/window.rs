//! The window of messages to one node: how many may be without an answer, and for how long.
//!
//! Fewer and larger messages are cheaper for everybody: a message costs the node a group and a
//! round to its followers, whatever it carries. So the window clocks itself by the answers. While a
//! message is out, operations gather; a further message goes only if it carries twice as much as
//! the last one, or if that one is late. Under load everything for a node therefore travels
//! together, however many shards there are, and the messages grow with the load. (With as much
//! instead of twice as much, two messages alternate for ever where there are shards enough, and
//! each carries two thirds of what one would.)
//!
//! A message is *late* by the time that answers take, since any fixed time is wrong for some load:
//! with one of 5 ms, answers that took 10 ms made the window useless, and the messages that were
//! too small for that reason made answers take 10 ms. A message that is later still has *lapsed*:
//! it no longer counts, so a shard that is not answered delays the others of its node only for that
//! long.

use std::collections::VecDeque;

use crate::ids::Now;

/// The limits of a window. Percentages of time are of the smoothed one that answers take.
#[derive(Clone, Copy, Debug)]
pub struct WindowSettings {
    /// The number of messages that may be without an answer.
    pub messages: usize,
    /// A further message carries at least this part of the load of the last one, in percent.
    pub load_percent: usize,
    /// The age at which a message is late, in percent: a smaller one may follow it.
    pub late_percent: u64,
    /// The age at which a message has lapsed, in percent, within the next two limits.
    pub lapse_percent: u64,
    /// A message does not lapse before this time.
    pub lapse_us_min: u64,
    /// A message lapses after this time, however long answers take.
    pub lapse_us_max: u64,
}

impl Default for WindowSettings {
    fn default() -> Self {
        Self {
            messages: 2,
            load_percent: 200,
            late_percent: 150,
            lapse_percent: 400,
            lapse_us_min: 5_000,
            lapse_us_max: 100_000,
        }
    }
}

/// The weight of the newest answer in the smoothed time is one of this many parts, as in TCP.
const SMOOTHING: u64 = 8;

/// The messages without an answer on one connection. See the module.
#[derive(Clone, Debug, Default)]
pub struct SendWindow {
    messages: u64,
    /// The messages whose answers are missing or incomplete, in the order of their numbers.
    unanswered: VecDeque<SentMessage>,
    /// The smoothed time from a message to its last answer; 0 before the first.
    answer_us: u64,
}

#[derive(Clone, Debug)]
struct SentMessage {
    number: u64,
    sent: Now,
    /// From then on a smaller message may follow.
    late: Now,
    /// From then on the message does not count.
    lapses: Now,
    /// The number of answers that are missing.
    missing: usize,
    /// The number of operations, or of keys.
    load: usize,
}

impl SendWindow {
    /// The number of the next message.
    pub fn next_message(&self) -> u64 {
        self.messages + 1
    }

    /// Notes that the next message was sent. It will get so many answers, and carries this load.
    pub fn sent(&mut self, now: Now, answers: usize, load: usize, settings: WindowSettings) {
        self.messages += 1;
        let after = |percent: u64| self.answer_us * percent / 100;
        let longest = settings.lapse_us_max.max(settings.lapse_us_min);
        let lapse_us = after(settings.lapse_percent).clamp(settings.lapse_us_min, longest);
        let late_us = after(settings.late_percent).min(lapse_us);
        self.unanswered.push_back(SentMessage {
            number: self.messages,
            sent: now,
            late: Now(now.0.saturating_add(late_us)),
            lapses: Now(now.0.saturating_add(lapse_us)),
            missing: answers,
            load,
        });
    }

    /// Notes an answer to a message.
    pub fn answered(&mut self, now: Now, number: u64) {
        let Ok(at) = self.unanswered.binary_search_by_key(&number, |message| message.number) else {
            return;
        };
        let message = &mut self.unanswered[at];
        message.missing -= 1;
        if message.missing == 0 {
            let took_us = now.0.saturating_sub(message.sent.0);
            self.unanswered.remove(at);
            self.took(took_us);
        }
    }

    fn took(&mut self, us: u64) {
        self.answer_us = match self.answer_us {
            0 => us,
            smoothed => (smoothed * (SMOOTHING - 1) + us) / SMOOTHING,
        };
    }

    /// The load that the next message must have to be sent at once: 0 if any will do. `None` if the
    /// window is full.
    pub fn least_load(&mut self, now: Now, settings: WindowSettings) -> Option<usize> {
        self.drop_oldest(now, settings);
        let counting = self.counting(now);
        if counting >= settings.messages {
            return None;
        }
        let last = self.unanswered.back().filter(|last| counting > 0 && last.late > now);
        Some(last.map_or(0, |last| (last.load * settings.load_percent).div_ceil(100)))
    }

    /// The time at which [`SendWindow::least_load`] may be lower without an answer, if it is not 0.
    pub fn opens_at(&self, now: Now, settings: WindowSettings) -> Option<Now> {
        let counting = self.unanswered.iter().filter(|message| message.lapses > now);
        match self.counting(now) < settings.messages {
            true => self.unanswered.back().map(|last| last.late),
            false => counting.map(|message| message.lapses).min(),
        }
    }

    fn counting(&self, now: Now) -> usize {
        self.unanswered.iter().filter(|message| message.lapses > now).count()
    }

    /// Drops the messages that can't count whatever answers take: their answers may never come.
    fn drop_oldest(&mut self, now: Now, settings: WindowSettings) {
        while let Some(oldest) = self.unanswered.front()
            && oldest.lapses <= now
            && oldest.sent.0.saturating_add(settings.lapse_us_max) <= now.0
        {
            self.unanswered.pop_front();
            self.took(settings.lapse_us_max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: WindowSettings = WindowSettings {
        messages: 2,
        load_percent: 200,
        late_percent: 150,
        lapse_percent: 400,
        lapse_us_min: 5_000,
        lapse_us_max: 100_000,
    };

    /// A window whose answers have taken this long.
    fn after(answer_us: u64) -> SendWindow {
        SendWindow { answer_us, ..SendWindow::default() }
    }

    #[test]
    fn a_place_is_free_when_all_answers_came_or_after_a_while() {
        let mut window = SendWindow::default();
        window.sent(Now(0), 2, 0, SETTINGS);
        assert_eq!(window.least_load(Now(10), SETTINGS), Some(0));
        window.sent(Now(10), 1, 0, SETTINGS);
        for answers in 0..2 {
            assert_eq!(window.least_load(Now(10), SETTINGS), None, "{answers} of 2 answers");
            assert_eq!(window.opens_at(Now(10), SETTINGS), Some(Now(5_000)));
            window.answered(Now(10), 1);
        }
        assert_eq!(window.least_load(Now(10), SETTINGS), Some(0));
        window.sent(Now(20), 1, 0, SETTINGS);
        assert_eq!(window.opens_at(Now(5_009), SETTINGS), Some(Now(5_010)));
        assert_eq!(window.least_load(Now(5_009), SETTINGS), None);
        assert_eq!(window.least_load(Now(5_010), SETTINGS), Some(0));
        // Late answers, and answers to messages that were never sent, free nothing.
        window.answered(Now(6_000), 2);
        window.answered(Now(6_000), 99);
        assert_eq!(window.next_message(), 4);
    }

    #[test]
    fn a_second_message_is_twice_as_large_or_the_first_one_is_late() {
        let mut window = after(10_000);
        window.sent(Now(0), 1, 7, SETTINGS);
        assert_eq!(window.least_load(Now(14_999), SETTINGS), Some(14));
        assert_eq!(window.opens_at(Now(14_999), SETTINGS), Some(Now(15_000)));
        assert_eq!(window.least_load(Now(15_000), SETTINGS), Some(0));
        window.sent(Now(15_000), 1, 3, SETTINGS);
        assert_eq!(window.least_load(Now(15_000), SETTINGS), None);
        assert_eq!(window.opens_at(Now(15_000), SETTINGS), Some(Now(40_000)));
        // The first one has lapsed, the second one is late.
        assert_eq!(window.least_load(Now(40_000), SETTINGS), Some(0));
    }

    #[test]
    fn a_message_lapses_within_limits_whatever_answers_take() {
        for (answer_us, lapse_us) in
            [(0, 5_000), (1_000, 5_000), (9_000, 36_000), (80_000, 100_000)]
        {
            let mut window = after(answer_us);
            window.sent(Now(0), 1, 0, SETTINGS);
            window.sent(Now(0), 1, 0, SETTINGS);
            assert_eq!(window.opens_at(Now(0), SETTINGS), Some(Now(lapse_us)), "{answer_us}");
        }
    }

    /// Answers take ten times as long from one moment to the next, as when a disk becomes slow. All
    /// messages lapse at first, and the time is learnt all the same.
    #[test]
    fn answers_that_come_after_the_lapse_are_learnt_from() {
        let mut window = after(1_000);
        for at in (0..).step_by(50_000).take(40) {
            window.sent(Now(at), 1, 1, SETTINGS);
            assert!(window.least_load(Now(at + 49_999), SETTINGS).is_some());
            window.answered(Now(at + 50_000), window.messages);
        }
        assert!((45_000..=50_000).contains(&window.answer_us), "{}", window.answer_us);
        // An answer that never comes counts as one that takes as long as a message can count.
        window.sent(Now(9_000_000), 1, 1, SETTINGS);
        window.least_load(Now(9_100_000), SETTINGS);
        assert!(window.unanswered.is_empty());
        assert!(window.answer_us > 50_000);
    }
}
