//! The choice of keys: which of `keys` counters the next increment goes to.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};

/// The exponent of `zipf` without a number: that of YCSB, where the most popular of a million keys
/// gets 7 % of all increments.
const USUAL_EXPONENT: f64 = 0.99;

/// The distribution of increments over the keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KeyDistribution {
    /// Every key is equally likely.
    Uniform,
    /// The key of rank `r` has a probability in proportion to `1 / r^exponent`.
    Zipf(f64),
    /// All increments go to one key.
    One,
    /// Every key gets one increment, and the load ends after the last one.
    Each,
}

impl FromStr for KeyDistribution {
    type Err = String;

    /// Parses `uniform`, `zipf` (0.99), `zipf:EXPONENT`, `one` or `each`.
    fn from_str(text: &str) -> Result<Self, String> {
        let exponent = |text: &str| text.parse().ok().filter(|value| (0.01..=10.0).contains(value));
        match text.split_once(':') {
            None => match text {
                "uniform" => Ok(Self::Uniform),
                "zipf" => Ok(Self::Zipf(USUAL_EXPONENT)),
                "one" => Ok(Self::One),
                "each" => Ok(Self::Each),
                _ => Err("a distribution is uniform, zipf, zipf:EXPONENT, one or each".to_owned()),
            },
            Some(("zipf", number)) => exponent(number)
                .map(Self::Zipf)
                .ok_or_else(|| "the exponent of zipf is 0.01 to 10".to_owned()),
            Some(_) => Err("only zipf has a number".to_owned()),
        }
    }
}

impl fmt::Display for KeyDistribution {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => formatter.write_str("uniform"),
            Self::Zipf(exponent) => write!(formatter, "zipf:{exponent}"),
            Self::One => formatter.write_str("one"),
            Self::Each => formatter.write_str("each"),
        }
    }
}

/// The keys of a run, which its clients share.
#[derive(Clone, Debug)]
pub struct KeySpace {
    keys: u64,
    distribution: KeyDistribution,
    /// The first key that has no increment yet, for [`KeyDistribution::Each`].
    unused: Arc<AtomicU64>,
}

impl KeySpace {
    /// Returns the keys 0 to `keys - 1`; there is at least one.
    pub fn new(keys: u64, distribution: KeyDistribution) -> Self {
        Self { keys: keys.max(1), distribution, unused: Arc::default() }
    }

    /// Returns a chooser for one client. Its choices depend on `seed` alone, so that each run uses
    /// the same keys.
    pub fn chooser(&self, seed: u64) -> KeyChooser {
        let zipf = match self.distribution {
            KeyDistribution::Zipf(exponent) => Zipf::new(self.keys as f64, exponent).ok(),
            _ => None,
        };
        KeyChooser { space: self.clone(), random: SmallRng::seed_from_u64(seed), zipf }
    }
}

/// Chooses the keys of one client.
#[derive(Clone, Debug)]
pub struct KeyChooser {
    space: KeySpace,
    random: SmallRng,
    zipf: Option<Zipf<f64>>,
}

impl KeyChooser {
    /// Replaces `into` by the keys of the next request: `count` of them, or fewer at the end of
    /// [`KeyDistribution::Each`], and none behind it.
    pub fn choose(&mut self, count: usize, into: &mut Vec<u64>) {
        into.clear();
        let keys = self.space.keys;
        match (self.space.distribution, self.zipf) {
            (KeyDistribution::Each, _) => {
                let first = self.space.unused.fetch_add(count as u64, Ordering::Relaxed);
                into.extend(first.min(keys)..(first + count as u64).min(keys));
            }
            (KeyDistribution::One, _) => into.resize(count, 0),
            (_, Some(zipf)) => {
                let ranks = zipf.sample_iter(&mut self.random).take(count);
                // Ranks begin at 1.
                into.extend(ranks.map(|rank| rank as u64 - 1));
            }
            (_, None) => into.extend((0..count).map(|_| self.random.random_range(0..keys))),
        }
    }

    /// Returns true with a probability of `percent`.
    pub fn one_in_hundred(&mut self, percent: u32) -> bool {
        percent > 0 && self.random.random_range(0..100) < percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(distribution: KeyDistribution, keys: u64, count: usize) -> Vec<u64> {
        let mut into = vec![99];
        KeySpace::new(keys, distribution).chooser(7).choose(count, &mut into);
        into
    }

    #[test]
    fn uniform_keys_are_spread_evenly() {
        let mut seen = [0_u32; 10];
        drawn(KeyDistribution::Uniform, 10, 10_000).iter().for_each(|&key| seen[key as usize] += 1);
        assert!(seen.iter().all(|&count| (850..1150).contains(&count)), "{seen:?}");
    }

    #[test]
    fn zipf_keys_have_their_shares() {
        let (keys, count) = (1_000_000, 200_000);
        let chosen = drawn(KeyDistribution::Zipf(0.99), keys, count);
        assert!(chosen.iter().all(|&key| key < keys));
        let sum: f64 = (1..=keys).map(|rank| (rank as f64).powf(-0.99)).sum();
        for key in [0, 1, 9] {
            let want = ((key + 1) as f64).powf(-0.99) / sum;
            let got = chosen.iter().filter(|&&other| other == key).count() as f64 / count as f64;
            assert!((got / want - 1.0).abs() < 0.1, "key {key}: {got} instead of {want}");
        }
    }

    #[test]
    fn one_key_is_one_key() {
        assert_eq!(drawn(KeyDistribution::One, 10, 3), [0, 0, 0]);
    }

    #[test]
    fn each_key_is_chosen_once_by_all_clients_together() {
        let space = KeySpace::new(10, KeyDistribution::Each);
        let (mut left, mut right) = (space.chooser(1), space.chooser(2));
        let (mut all, mut some) = (Vec::<u64>::new(), Vec::new());
        for _ in 0..3 {
            left.choose(4, &mut some);
            all.extend(&some);
            right.choose(1, &mut some);
            all.extend(&some);
        }
        assert_eq!(all, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn equal_seeds_choose_equal_keys() {
        let uniform = KeyDistribution::Uniform;
        assert_eq!(drawn(uniform, 1000, 5), drawn(uniform, 1000, 5));
        assert_eq!(
            drawn(KeyDistribution::Zipf(1.2), 9, 5),
            drawn(KeyDistribution::Zipf(1.2), 9, 5)
        );
    }

    #[test]
    fn texts_of_distributions() {
        #[track_caller]
        fn check(text: &str, want: Option<KeyDistribution>) {
            let parsed = text.parse::<KeyDistribution>();
            assert_eq!(parsed.clone().ok(), want);
            if let Ok(distribution) = parsed {
                assert_eq!(distribution.to_string().parse(), Ok(distribution));
            }
        }
        check("uniform", Some(KeyDistribution::Uniform));
        check("zipf", Some(KeyDistribution::Zipf(0.99)));
        check("zipf:1.5", Some(KeyDistribution::Zipf(1.5)));
        check("one", Some(KeyDistribution::One));
        check("each", Some(KeyDistribution::Each));
        check("zipf:-1", None);
        check("zipf:nan", None);
        check("one:2", None);
        check("", None);
    }
}
