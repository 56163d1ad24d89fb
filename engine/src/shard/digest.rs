//! The digest of a shard's counters: two replicas that hold the same counters have the same digest.
//!
//! The digest is Σ H(name) · value mod 2^128, H odd. A sum is kept up to date without reading
//! anything (adding δ adds `H·δ`) and does not depend on any order; a weight that is odd has an
//! inverse, so a change of any one value always changes the digest. A counter of 0 weighs nothing,
//! so it does not matter whether it is absent or stored as 0.

use crate::key;

/// H: the weight of one unit of this counter. Never changes: digests in shard records on disk
/// depend on it.
pub fn weight(name: &[u8]) -> u128 {
    weight_of(key::hash(name))
}

/// H of a counter whose name has this [`key::hash`]: the hash, made odd.
pub fn weight_of(hash: u128) -> u128 {
    hash | 1
}

/// The share of a counter at `value` in the digest; also the change of the digest when `value` is
/// added.
pub fn share(weight: u128, value: i128) -> u128 {
    weight.wrapping_mul(value as u128)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(before: i128, delta: i128) {
        let weight = weight(b"ns\0k");
        let after = before.wrapping_add(delta);
        assert_eq!(
            share(weight, before).wrapping_add(share(weight, delta)),
            share(weight, after),
            "{before} + {delta}"
        );
    }

    #[test]
    fn adding_to_a_counter_adds_to_the_digest() {
        check(0, 5);
        check(5, -7);
        check(i128::MAX, 1);
        check(i128::MIN, -1);
    }

    /// Golden test: digests are on disk and compared between builds.
    #[test]
    fn the_weight_of_a_counter_never_changes() {
        assert_eq!(weight(b"likes\0video-1"), key::hash(b"likes\0video-1") | 1);
        assert_eq!(weight(b"likes\0video-1") & 1, 1);
    }
}
