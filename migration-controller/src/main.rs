//! The `migration-controller` binary; everything is in the library.

use clap::Parser;
use migration_controller::{Cli, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    run(Cli::parse()).await
}
