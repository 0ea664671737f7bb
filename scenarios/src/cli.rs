//! The command line.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use scenarios::lab::{
    ProcessId, contain,
    node::{self, InitStage},
};

use crate::{cli_bench, cli_capture, cli_lab, cli_run, cli_serve};

/// Runs real live migrations on a real lab and reports what the guest's peers saw.
///
/// The lab is OVN, Open vSwitch, libvirt and QEMU on several hosts that are namespaces of this machine. It needs root,
/// changes nothing outside its own namespaces, and is removed without a trace.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Brings the lab up, takes it down, looks into it.
    Lab(cli_lab::LabArgs),
    /// Runs scenarios on a lab of their own, and reports what the guests' peers saw.
    ///
    /// Exits with 0 when every check of every scenario held, with 1 otherwise.
    Run(cli_run::RunArgs),
    /// Measures: how long OVN takes to follow, and what peers of a guest see of its migrations.
    Bench(cli_bench::BenchArgs),
    /// Recomputes what happened in a migration from its capture files alone, to be compared with the report.
    ///
    /// A scenario with `capture: true` has tcpdump run on the client and on both nodes. From the sequence numbers in the
    /// probe's packets follows where each packet passed and which were lost or came twice, in each direction; from what
    /// the VM's packets say, how many it received; from the times, the longest gap and the longest TCP stall. Neither
    /// the report nor the probe's own account is read.
    Capture(cli_capture::CaptureArgs),
    /// Runs as the first process of a host.
    #[command(name = node::INIT_VERB, hide = true)]
    NodeInit {
        #[arg(long, value_enum, default_value_t)]
        stage: InitStage,
        spec: String,
    },
    /// Runs a program in a host as a container runtime would.
    #[command(name = contain::VERB, hide = true)]
    Contained {
        #[arg(long, value_enum, default_value_t)]
        stage: InitStage,
        spec: String,
    },
    /// Runs the Kubernetes of a lab that is left running.
    #[command(name = cli_serve::VERB, hide = true)]
    LabServe(cli_serve::ServeArgs),
    /// Runs a command inside a host.
    #[command(name = node::EXEC_VERB, hide = true)]
    NodeExec {
        #[arg(long)]
        init: ProcessId,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

impl Cli {
    pub(crate) fn run(self) -> ExitCode {
        let result = match self.command {
            Command::Lab(args) => cli_lab::run(args),
            Command::Run(args) => cli_run::run(&args),
            Command::Bench(args) => cli_bench::run(&args),
            Command::Capture(args) => cli_capture::run(&args),
            Command::LabServe(args) => cli_serve::serve(&args),
            // These change namespaces of the calling thread, so no runtime may have started.
            Command::NodeInit { stage, spec } => serde_json::from_str(&spec)
                .map_err(Into::into)
                .and_then(|spec| node::run_init(stage, &spec))
                .map(|()| ExitCode::SUCCESS),
            Command::Contained { stage, spec } => serde_json::from_str(&spec)
                .map_err(Into::into)
                .and_then(|spec| contain::run(stage, &spec)),
            Command::NodeExec { init, command } => node::run_in_node(init, &command),
        };
        result.unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        })
    }
}
