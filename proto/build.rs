//! Makes the prost and tonic code from `proto/dkc/v1`.

fn main() -> std::io::Result<()> {
    let files = ["common", "gateway", "peer", "control"];
    let paths: Vec<String> =
        files.iter().map(|file| format!("proto/dkc/v1/{file}.proto")).collect();
    // What reflection shows of them, comments included.
    let descriptors = std::env::var_os("OUT_DIR").expect("cargo sets it for build scripts");
    let descriptors = std::path::Path::new(&descriptors).join("descriptors.bin");
    // `bytes` fields are slices of the message that came in. What outlives its message is copied out of it
    // when it is converted to an engine type: a batch's payload, a read's names.
    tonic_prost_build::configure()
        .bytes(".")
        .file_descriptor_set_path(descriptors)
        .compile_protos(&paths, &["proto".into()])
}
