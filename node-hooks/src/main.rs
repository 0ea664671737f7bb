//! The `node-hooks` binary; everything is in the library.

use clap::Parser;
use node_hooks::{Cli, run};

// One thread: what must not wait has one of its own, and a node's other processors are the guests'.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    run(Cli::parse()).await
}
