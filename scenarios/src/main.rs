//! Command line of the lab and its scenarios.

use std::process::ExitCode;

use clap::Parser;

mod cli;
mod cli_bench;
mod cli_blackout;
mod cli_capture;
mod cli_lab;
mod cli_run;
mod cli_serve;
mod cli_vm;

fn main() -> ExitCode {
    cli::Cli::parse().run()
}
