//! The draws of a seed for each limit and each wait: as shipped, or anything from tiny up to that.
//!
//! A limit that no run makes small hides code that was never tested: catching up from the log on
//! disk never ended where segments were as large as shipped, and no seed found it, because none had
//! ever reached the end of a block. So every limit of the state machines and of the models is drawn
//! here, most of them log-uniformly, and `sim` prints the distribution.
//!
//! Some seeds draw everything as shipped, some almost nothing. All draws come from a stream of
//! their own.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use super::rng::Rng;

/// Returns whether to draw a fault that is outside of the promises, too: an image of a disk from
/// the middle of a run is put back (docs/reliability.md, "Images of a disk"). `DKC_SIM_ALL=1` turns
/// it on, to see what such a disk does.
pub fn are_images_of_a_run_drawn() -> bool {
    static ALL: OnceLock<bool> = OnceLock::new();
    *ALL.get_or_init(|| std::env::var_os("DKC_SIM_ALL").is_some())
}

/// A run of some seconds fills a log that is as short as this.
const TIGHT_BYTES: usize = 8 << 10;

/// One limit as a seed drew it.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    pub value: u64,
    pub shipped: u64,
}

/// All draws of a seed, by name.
pub type Drawings = BTreeMap<&'static str, Drawn>;

/// The stream of draws and its record, see the module.
pub struct Draws {
    pub rng: Rng,
    /// The percentage of the limits that are not as shipped.
    small_percent: u64,
    /// The percentage of the waits that are not as shipped.
    short_percent: u64,
    /// Logs are short and entries are large: logs get too long, and are trimmed, carried and
    /// replaced all the time.
    tight_log: bool,
    /// The stream of the limits that came later: the seeds recorded before them stay as they are.
    later: Rng,
    pub drawings: Drawings,
}

impl Draws {
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed.rotate_left(9) ^ 0xD3A3_11B7_5EED);
        let small_percent = [0, 10, 40, 90][rng.index(4)];
        let short_percent = if rng.percent(20) { 0 } else { 100 };
        let tight_log = rng.percent(10);
        let later = Rng::new(seed.rotate_left(21) ^ 0x1A7E_D4A3);
        Self { rng, small_percent, short_percent, tight_log, later, drawings: Drawings::new() }
    }

    /// Draws a limit of the log: like any other, or in some seeds so small that runs of some
    /// seconds reach it again and again.
    pub fn log_size(&mut self, name: &'static str, least: usize, shipped: usize) -> usize {
        if !self.tight_log {
            return self.size(name, least, shipped);
        }
        let value = self.log_uniform(least as u64, shipped.min(TIGHT_BYTES) as u64);
        self.note(name, value, shipped as u64);
        value as usize
    }

    /// Returns whether entries are large compared to the log.
    pub fn has_tight_log(&self) -> bool {
        self.tight_log
    }

    /// Draws a limit: as shipped, or anything between `least` and that.
    pub fn size(&mut self, name: &'static str, least: usize, shipped: usize) -> usize {
        let value = match self.rng.percent(self.small_percent) {
            true => self.log_uniform(least as u64, shipped as u64),
            false => shipped as u64,
        };
        self.note(name, value, shipped as u64);
        value as usize
    }

    /// Draws a limit as [`Self::size`] does, from the later stream.
    pub fn later_size(&mut self, name: &'static str, least: usize, shipped: usize) -> usize {
        std::mem::swap(&mut self.rng, &mut self.later);
        let value = self.size(name, least, shipped);
        std::mem::swap(&mut self.rng, &mut self.later);
        value
    }

    /// Draws a wait in milliseconds: as shipped, or, in most seeds, one that a run of some seconds
    /// can reach.
    pub fn wait(&mut self, name: &'static str, least: u64, most: u64, shipped: u64) -> u64 {
        let value = match self.rng.percent(self.short_percent) {
            true => self.rng.between(least, most),
            false => shipped,
        };
        self.note(name, value, shipped);
        value
    }

    /// Draws small values as often as large ones, power by power.
    pub fn log_uniform(&mut self, least: u64, most: u64) -> u64 {
        let powers = (most / least.max(1)).max(1).ilog2();
        let from = least.max(1) << self.rng.between(0, powers.into());
        self.rng.between(from.min(most), (2 * from).min(most))
    }

    pub fn note(&mut self, name: &'static str, value: u64, shipped: u64) {
        self.drawings.insert(name, Drawn { value, shipped });
    }
}

/// The draws of many seeds: a line for each limit.
#[derive(Default)]
pub struct Distribution(BTreeMap<&'static str, Vec<Drawn>>);

impl Distribution {
    pub fn add(&mut self, drawings: &Drawings) {
        for (&name, &drawn) in drawings {
            self.0.entry(name).or_default().push(drawn);
        }
    }

    pub fn lines(&self) -> Vec<String> {
        let line = |(name, all): (&&str, &Vec<Drawn>)| {
            let mut others: Vec<u64> = all
                .iter()
                .filter(|drawn| drawn.value != drawn.shipped)
                .map(|drawn| drawn.value)
                .collect();
            others.sort();
            let shipped = all.first().map_or(0, |drawn| drawn.shipped);
            let percent = 100 * (all.len() - others.len()) / all.len().max(1);
            let at = |percent: usize| {
                let at = (others.len() * percent / 100).min(others.len().saturating_sub(1));
                others.get(at).map_or("none".into(), u64::to_string)
            };
            format!(
                "{name}: {shipped} in {percent} %, else {} … {} … {} … {} … {}",
                at(0),
                at(25),
                at(50),
                at(75),
                at(100),
            )
        };
        self.0.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_between_the_least_and_what_is_shipped() {
        for seed in 0..2_000 {
            let mut draws = Draws::from_seed(seed);
            let value = draws.size("x", 3, 1_000);
            assert!((3..=1_000).contains(&value), "seed {seed}: {value}");
        }
    }
}
