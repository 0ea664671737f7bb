//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use handover::{Deadlines, FlipPolicy, FlipTiming, GatePolicy, OnTimeout};
use ovsdb_rs::Endpoints;

use crate::api::RoutingMode;
use crate::policy::{LONGEST, Settings};

/// Hands the OVN ports of a KubeVirt VM over to the node it migrates to.
///
/// Watches migrations, prepares the VM's logical switch ports on the target node before the guest
/// gets there, and makes the node where the guest ends up their only place. What it does is on
/// record in Handover objects (`kubectl get handovers -A`).
///
/// Kubernetes is found as kubectl finds it: KUBECONFIG, else ~/.kube/config, else the pod's service
/// account.
#[derive(Debug, Parser)]
#[command(
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) run: Option<RunArgs>,
}

/// What to do other than to run.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the custom resource definitions as YAML and exit.
    Crd,
}

/// How to run.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// OVN Northbound: `tcp:HOST:PORT` or `unix:PATH`, several of a cluster separated by commas.
    #[arg(long, env = "SEGUE_NB", value_name = "ENDPOINTS")]
    pub(crate) nb: Endpoints,

    /// OVN Southbound, likewise.
    #[arg(long, env = "SEGUE_SB", value_name = "ENDPOINTS")]
    pub(crate) sb: Endpoints,

    /// Name of the cluster router of the routed topology: the router that every node's switch is
    /// on. Without it nothing routes by a guest's place, and nothing is looked for.
    #[arg(long, env = "SEGUE_CLUSTER_ROUTER", value_name = "NAME")]
    pub(crate) cluster_router: Option<String>,

    /// Where to serve /metrics, /healthz and /readyz.
    #[arg(
        long,
        env = "SEGUE_METRICS_ADDRESS",
        value_name = "ADDRESS:PORT",
        default_value = "[::]:9464"
    )]
    pub(crate) metrics_address: SocketAddr,

    /// Where the nodes' agents connect to; empty for no agents.
    #[arg(
        long,
        env = "SEGUE_AGENTS",
        value_name = "ADDRESS:PORT",
        default_value = "[::]:9465"
    )]
    pub(crate) agents: Listen,

    /// Directory with tls.crt and tls.key, the controller's own for agents, and ca.crt, which signs
    /// the nodes'. Read again when they change. Without it no agent is let in.
    #[arg(long, env = "SEGUE_AGENTS_TLS_DIR", value_name = "DIRECTORY")]
    pub(crate) agents_tls_dir: Option<PathBuf>,

    /// How log lines look. What is logged is chosen by RUST_LOG, for instance
    /// `info,migration_controller=debug`.
    #[arg(long, env = "SEGUE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,

    /// How many VMs to work on at a time.
    #[arg(long, env = "SEGUE_CONCURRENCY", value_name = "N", default_value_t = 8,
        value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) concurrency: u16,

    /// How long a port's readiness waits for chassis other than source and target to follow. A dead
    /// node must not hold up every migration.
    #[arg(long, env = "SEGUE_PEERS_DEADLINE", value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    pub(crate) peers_deadline: Duration,

    /// How long after a migration's success to wait for the source to give the port up, before the
    /// target becomes its only place all the same.
    #[arg(long, env = "SEGUE_RELEASE_DEADLINE", value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(crate) release_deadline: Duration,

    /// How long after a migration's end the port may take to be bound where the guest runs, before
    /// the handover is called Failed. It still ends well if the world allows it later.
    #[arg(long, env = "SEGUE_ESTABLISH_DEADLINE", value_name = "SECONDS", default_value = "90", value_parser = seconds)]
    pub(crate) establish_deadline: Duration,

    /// On which sign routes that depend on a guest's place follow it, where no HandoverPolicy says.
    #[arg(long, env = "SEGUE_FLIP", value_enum, default_value_t = Flip::OnResume)]
    pub(crate) flip: Flip,

    /// For how long after a guest resumed its traffic with the outside stays with the gateway that
    /// it had, where no HandoverPolicy says; at most a day. More than 0 outweighs `OnPause`, be it
    /// --flip's or a policy's: routes that stay do not go ahead.
    #[arg(long, env = "SEGUE_KEEP_EGRESS", value_name = "SECONDS", default_value = "0", value_parser = up_to_a_day)]
    pub(crate) keep_egress: Duration,

    /// How long a migration that an agent asks about waits for its network, where no HandoverPolicy
    /// says. At most 25: virt-handler itself waits for 30.
    #[arg(long, env = "SEGUE_GATE_DEADLINE", value_name = "SECONDS", default_value_t = 15,
        value_parser = clap::value_parser!(u16).range(1..=25))]
    pub(crate) gate_deadline: u16,

    /// What then, where no HandoverPolicy says.
    #[arg(long, env = "SEGUE_GATE_ON_TIMEOUT", value_enum, default_value_t = Timeout::Ignore)]
    pub(crate) gate_on_timeout: Timeout,

    /// How long after its last container a finished pod may still hold its network interface.
    #[arg(long, env = "SEGUE_POD_GONE_GRACE", value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub(crate) pod_gone_grace: Duration,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// On which sign routes follow a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Flip {
    /// When it runs on the target.
    OnResume,
    /// When it pauses on the source. Needs an agent there.
    OnPause,
}

/// What becomes of a migration whose network is not ready in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Timeout {
    /// It goes.
    Ignore,
    /// It is refused, and asked about again.
    Fail,
}

/// An address to listen on, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listen(pub(crate) Option<SocketAddr>);

impl FromStr for Listen {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address = (!text.is_empty()).then(|| text.parse()).transpose()?;
        Ok(Self(address))
    }
}

impl RunArgs {
    /// How handovers are done where no policy says otherwise.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            deadlines: Deadlines {
                peers: self.peers_deadline,
                release: self.release_deadline,
                establish: self.establish_deadline,
            },
            mode: RoutingMode::default(),
            flip: FlipPolicy {
                timing: match self.flip {
                    Flip::OnResume => FlipTiming::OnResume,
                    Flip::OnPause => FlipTiming::OnPause,
                },
                keep_egress: self.keep_egress,
            },
            gate: GatePolicy {
                deadline: Duration::from_secs(self.gate_deadline.into()),
                on_timeout: match self.gate_on_timeout {
                    Timeout::Ignore => OnTimeout::Ignore,
                    Timeout::Fail => OnTimeout::Fail,
                },
            },
        }
    }

    /// The cluster router's name. An empty one, as an unset variable of a manifest gives it, is none.
    pub(crate) fn cluster_router(&self) -> Option<&str> {
        self.cluster_router
            .as_deref()
            .filter(|name| !name.is_empty())
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "expected a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn up_to_a_day(text: &str) -> Result<Duration, String> {
    let time = seconds(text)?;
    let fits = time.as_secs_f64() <= LONGEST;
    fits.then_some(time)
        .ok_or_else(|| format!("it can be 0 to {LONGEST} seconds"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["migration-controller"], args].concat())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn endpoints_are_required_to_run_and_only_then() {
        let error = parse(&["--nb", "tcp:127.0.0.1:6641"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("--sb <ENDPOINTS>"), "{error}");
        assert!(matches!(
            parse(&["crd"]).unwrap().command,
            Some(Command::Crd)
        ));
    }

    #[test]
    fn a_wrong_endpoint_is_named() {
        let error = parse(&["--nb", "127.0.0.1:6641", "--sb", "unix:/s"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("--nb") && error.contains("127.0.0.1:6641"),
            "{error}"
        );
    }

    #[test]
    fn agents_can_be_switched_off_and_a_gate_is_shorter_than_virt_handlers() {
        let run = |args: &[&str]| {
            let endpoints = ["--nb", "unix:/n", "--sb", "unix:/s"];
            let cli = parse(&[&endpoints, args].concat())?;
            Ok::<_, clap::Error>(cli.run.unwrap())
        };
        let default = run(&[]).unwrap();
        assert_eq!(default.agents.0.map(|at| at.port()), Some(9465));
        assert_eq!(default.settings().gate, GatePolicy::default());
        assert_eq!(run(&["--agents", ""]).unwrap().agents, Listen(None));
        assert!(run(&["--agents", "9465"]).is_err());
        assert!(run(&["--gate-deadline", "26"]).is_err());
        let failing = run(&["--gate-deadline", "3", "--gate-on-timeout", "fail"]).unwrap();
        let gate = failing.settings().gate;
        assert_eq!(
            (gate.deadline.as_secs(), gate.on_timeout),
            (3, OnTimeout::Fail)
        );
    }

    #[test]
    fn egress_is_kept_for_a_day_at_most() {
        let run = |keep| {
            let endpoints = ["--nb", "unix:/n", "--sb", "unix:/s"];
            parse(&[&endpoints[..], &["--keep-egress", keep]].concat())
        };
        let settings = run("86400").unwrap().run.unwrap().settings();
        assert_eq!(settings.flip.keep_egress, Duration::from_hours(24));
        let error = run("86400.5").unwrap_err().to_string();
        assert!(error.contains("0 to 86400 seconds"), "{error}");
        assert!(run("-1").is_err());
    }

    #[test]
    fn deadlines_take_fractions_and_refuse_nonsense() {
        let run = |deadline| {
            parse(&[
                "--nb",
                "unix:/n",
                "--sb",
                "unix:/s",
                "--peers-deadline",
                deadline,
            ])
        };
        let settings = run("0.5").unwrap().run.unwrap().settings();
        assert_eq!(settings.deadlines.peers, Duration::from_millis(500));
        assert!(run("-1").is_err());
        assert!(run("soon").is_err());
    }
}
