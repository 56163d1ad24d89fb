//! Makes the prost and tonic code from `proto/dkc/v1`.

fn main() -> std::io::Result<()> {
    let files = ["common", "gateway", "peer", "control"];
    let paths: Vec<String> =
        files.iter().map(|file| format!("proto/dkc/v1/{file}.proto")).collect();
    // `bytes` fields are slices of the message that came in: a batch is not copied on its way.
    tonic_prost_build::configure().bytes(".").compile_protos(&paths, &["proto".into()])
}
