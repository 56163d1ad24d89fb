//! Generates the prost and tonic code from `proto/dkc/v1`.

fn main() -> std::io::Result<()> {
    let files = ["common", "gateway", "peer", "control", "operator"];
    let paths: Vec<String> =
        files.iter().map(|file| format!("proto/dkc/v1/{file}.proto")).collect();
    // The descriptors that reflection serves, comments included.
    let descriptors = std::env::var_os("OUT_DIR").expect("cargo sets it for build scripts");
    let descriptors = std::path::Path::new(&descriptors).join("descriptors.bin");
    // `bytes` fields are slices of the received message. Data that outlives the message is copied
    // when it is converted to an engine type: the payload of a batch, the names of a read.
    tonic_prost_build::configure()
        .bytes(".")
        .file_descriptor_set_path(descriptors)
        .compile_protos(&paths, &["proto".into()])
}
