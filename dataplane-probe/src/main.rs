//! `dataplane-probe`: the command line.

mod cli;
mod commands;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Nothing could be measured, in contrast to 1: measured, and a threshold exceeded.
const CANNOT: u8 = 2;

fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .init();
    match commands::execute(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("dataplane-probe: {error:#}");
            ExitCode::from(CANNOT)
        }
    }
}
