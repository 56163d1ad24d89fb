//! Compiles the processor check that runs at the start of `dkc`, for any x86-64, whatever processor
//! the rest is compiled for.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=src/processor.c");
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return;
    }
    let features = env::var("CARGO_CFG_TARGET_FEATURE").expect("cargo sets it for build scripts");
    let mut check = cc::Build::new();
    check.file("src/processor.c").inherit_rustflags(false).flag("-march=x86-64").warnings(true);
    for feature in features.split(',') {
        check.define(&format!("NEEDS_{}", feature.replace(['.', '-'], "_")), None);
    }
    // The check is linked as an object and not as a library: nothing refers to it, and a linker
    // takes from a library only objects that are referred to.
    for object in check.compile_intermediates() {
        println!("cargo::rustc-link-arg-bins={}", object.display());
    }
}
