//! The one source of chance: every choice of a run comes from its seed, through here.
//!
//! SplitMix64: small, fast, and its output for a seed will never change with a crate's version, so
//! a seed written into a test finds the same run forever.

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A separate stream: drawing from it does not move the others.
    pub fn fork(&mut self) -> Self {
        Self(self.word())
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 ≤ result < n. The bias is below 2⁻⁴⁰ for the small n used here.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "a choice among nothing");
        self.word() % n
    }

    /// lo ≤ result ≤ hi.
    pub fn between(&mut self, lo: u64, hi: u64) -> u64 {
        lo + self.below(hi - lo + 1)
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, list: &[T]) -> Option<T> {
        if list.is_empty() { None } else { Some(list[self.index(list.len())]) }
    }

    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for at in (1..list.len()).rev() {
            list.swap(at, self.index(at + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded seeds would lose their meaning if this stream changed.
    #[test]
    fn the_stream_never_changes() {
        let mut rng = Rng::new(1);
        assert_eq!([rng.word(), rng.word()], [0x910a_2dec_8902_5cc1, 0xbeeb_8da1_658e_ec67],);
    }
}
