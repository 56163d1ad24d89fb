//! Measures the memtable: nanoseconds per add, and per counter of the sort for a flush.
//!
//! `cargo run --profile ci -p tests --bin table-speed`

use std::io::Write;
use std::time::Instant;

use engine::key;
use engine::store::table::Table;
use tests::sim::rng::Rng;

const ADDS: usize = 4_000_000;
/// The number of adds of one batch.
const BATCH: usize = 50;

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout();
    for counters in [1, 1_000_000, 4_000_000] {
        let (add, sort, bytes) = measure(counters);
        writeln!(
            out,
            "{counters} counters of {bytes} bytes: add {add} ns, sorting {sort} ns per counter"
        )?;
    }
    Ok(())
}

fn measure(counters: usize) -> (u128, u128, usize) {
    let mut random = Rng::new(1);
    let names: Vec<_> = (0..counters).map(|number| format!("ns\0{number:08}")).collect();
    // The names are in the order of use, like those of a batch, so only cache misses of the table
    // count.
    let picked = |_| {
        let name = names[random.below(counters as u64) as usize].as_bytes();
        let name: [u8; 11] = name.try_into().expect("a name of eleven bytes");
        (name, key::hash(&name))
    };
    let picks: Vec<_> = (0..ADDS).map(picked).collect();
    let mut table = Table::new();
    for name in &names {
        table.add(name.as_bytes(), key::hash(name.as_bytes()), 1);
    }
    let begun = Instant::now();
    for batch in picks.chunks(BATCH) {
        let hashes: Vec<_> = batch.iter().map(|&(_, hash)| hash).collect();
        table.prefetch(&hashes);
        for (name, hash) in batch {
            table.add(name, *hash, 1);
        }
    }
    let add = begun.elapsed().as_nanos() / ADDS as u128;
    let bytes = table.bytes() / counters;
    let begun = Instant::now();
    let rows = table.seal().sorted().count();
    (add, begun.elapsed().as_nanos() / rows as u128, bytes)
}
