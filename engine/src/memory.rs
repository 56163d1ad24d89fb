//! The memory that values take, so that the counted bytes are the bytes in use.
//!
//! The sizes are those of the allocator that production uses (jemalloc): a request is rounded up to
//! one of four sizes between two powers of two, so up to a fifth of a block is unused.

/// The bytes that the allocator gives to a request of this size.
pub const fn allocated(bytes: usize) -> usize {
    match bytes {
        0 => 0,
        1..=8 => 8,
        9..=128 => bytes.next_multiple_of(16),
        _ => bytes.next_multiple_of(1 << ((bytes - 1).ilog2() - 2)),
    }
}

/// The bytes that a byte string takes beside the value that holds it: its bytes and their reference
/// count.
pub const fn of_bytes(len: usize) -> usize {
    if len == 0 { 0 } else { allocated(len) + 32 }
}

/// The bytes that the nodes of a `BTreeMap` of so many entries take. A node has room for eleven;
/// one that was filled in ascending order, as most are here, holds six.
pub const fn of_map<K, V>(len: usize) -> usize {
    let node = allocated(11 * (size_of::<K>() + size_of::<V>()) + 16);
    len.div_ceil(6) * node
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_allocator() {
        let check = |bytes, want| assert_eq!(allocated(bytes), want, "{bytes}");
        check(1, 8);
        check(9, 16);
        check(128, 128);
        check(129, 160);
        check(161, 192);
        check(256, 256);
        check(257, 320);
        check(4_096, 4_096);
        check(4_097, 5_120);
        check(262_145, 327_680);
    }
}
