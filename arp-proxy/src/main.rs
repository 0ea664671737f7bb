//! The `arp-proxy` binary.

mod cli;
mod http;
mod run;

use clap::Parser;

// One thread: an answer takes microseconds, and handing frames over to another core would take longer.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    run::run(cli::Cli::parse()).await
}
