//! Compiles the protocols, without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const FILES: [&str; 2] = [
        "proto/segue/agent/v1/agent.proto",
        "proto/kubevirt/hooks/plugins/v1alpha1/node_hook.proto",
    ];
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
