//! The `node-hooks` binary; everything is in the library.

use clap::Parser;
use node_hooks::{Cli, run};

// Two: one that is busy with a launcher's JSON or a TLS handshake must not keep a pause waiting, and
// a node's other processors are the guests'.
#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    run(Cli::parse()).await
}
