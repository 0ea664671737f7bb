//! The Kubernetes of a lab that is left running: the process that it is in, and how that is started.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::{ExitCode, Stdio};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Args, ValueEnum as _};
use scenarios::cluster::{Cluster, Hook, Kept, Parts, Segue, log_of_kept};
use scenarios::kubevirt::Role;
use scenarios::lab::{Lab, LabName, Progress};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli_run::{self, PartsArgs};

/// The hidden subcommand.
pub(crate) const VERB: &str = "lab-serve";
/// How much of the log an error shows.
const TAIL_LINES: usize = 15;

/// Arguments of the hidden subcommand.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[arg(long)]
    name: LabName,

    #[command(flatten)]
    kubernetes: KubernetesArgs,
}

/// What a lab has besides OVN and libvirt.
#[derive(Debug, Args)]
pub(crate) struct KubernetesArgs {
    #[command(flatten)]
    parts: PartsArgs,

    /// Leaves this role of KubeVirt to the real component: nothing stands in for it. Repeatable.
    #[arg(long = "without-role", value_enum, value_name = "ROLE")]
    without_roles: Vec<Role>,

    /// Leaves segue's agents out, which otherwise run on every node.
    #[arg(long)]
    without_agents: bool,
}

/// What the process tells the one who started it, one JSON document a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Told {
    Step(String),
    Detail(String),
    Ready(Kept),
    Failed(String),
}

impl KubernetesArgs {
    pub(crate) fn parts(&self) -> Result<Parts> {
        let mut parts = self.parts.parts()?;
        parts
            .roles
            .retain(|role| !self.without_roles.contains(role));
        Ok(parts)
    }

    pub(crate) fn with_agents(&self) -> bool {
        !self.without_agents
    }
}

// === The process ===

/// Runs a cluster until SIGTERM. This process is in central's network namespace already.
pub(crate) fn serve(args: &ServeArgs) -> Result<ExitCode> {
    // Ctrl-C goes to the terminal's foreground group: it is meant for others.
    nix::unistd::setsid().context("setsid")?;
    cli_run::log_into(std::io::stderr)?;
    let runtime = tokio::runtime::Runtime::new().context("tokio runtime")?;
    let ended = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
        serve_until(&mut terminate, args).await
    });
    if let Err(error) = &ended {
        tracing::error!("{error:#}");
        // Nobody listens any more once the cluster was ready: then the log has it.
        _ = tell(&Told::Failed(format!("{error:#}")));
    }
    ended.map(|()| ExitCode::SUCCESS)
}

async fn serve_until(terminate: &mut Signal, args: &ServeArgs) -> Result<()> {
    let lab = Lab::attach(&args.name)?;
    let parts = args.kubernetes.parts()?;
    let with_agents = args.kubernetes.with_agents();
    let starting = async {
        let cluster = Cluster::start(&lab, &parts, &Telling).await?;
        if with_agents {
            Telling.step("Starting the agents");
            let segue = Segue::WithAgents(Hook::default());
            cluster.run_segue(segue).await?;
        }
        anyhow::Ok(cluster)
    };
    let cluster = tokio::select! {
        cluster = starting => cluster?,
        _ = terminate.recv() => bail!("terminated"),
    };
    let agents = lab.nodes().filter(|_| with_agents).cloned().collect();
    let told = Kept::new(&cluster, &parts, agents).and_then(|kept| tell(&Told::Ready(kept)));
    if told.is_ok() {
        tracing::info!("ready");
        terminate.recv().await;
    }
    // Where it could not be told, whoever wanted the cluster is gone.
    let stopped = cluster.stop().await;
    tracing::info!("everything has ended");
    told.and(stopped)
}

/// Tells the one who started this process, on standard output.
fn tell(told: &Told) -> Result<()> {
    let mut line = serde_json::to_string(told)?;
    line.push('\n');
    std::io::stdout()
        .write_all(line.as_bytes())
        .context("whoever started this is gone")
}

struct Telling;

impl Progress for Telling {
    fn step(&self, what: &str) {
        tracing::info!("{what}");
        // Where nobody listens, the end of the work finds out.
        _ = tell(&Told::Step(what.to_owned()));
    }

    fn detail(&self, line: &str) {
        _ = tell(&Told::Detail(line.to_owned()));
    }
}

// === Its start ===

/// Starts the process for a lab and returns once its cluster is ready. The process outlives this one.
///
/// # Errors
/// When the cluster does not come up, with the reason and the end of the log. The process is then
/// gone, or goes with the lab.
pub(crate) async fn start(
    lab: &Lab,
    parts: &Parts,
    with_agents: bool,
    progress: &dyn Progress,
) -> Result<Kept> {
    let log = log_of_kept(lab);
    let output = File::create(&log).with_context(|| log.display().to_string())?;
    let exe = std::env::current_exe().context("path of this program")?;
    let mut command = lab.central().netns_command(exe)?;
    command
        .args([VERB, "--name", lab.name().as_str()])
        .arg("--controller")
        .arg(&parts.controller)
        .arg("--guest-probe")
        .arg(&parts.probe)
        .arg("--manifests")
        .arg(&parts.manifests);
    if !with_agents {
        command.arg("--without-agents");
    }
    if let Some(node_hooks) = &parts.node_hooks {
        command.arg("--node-hooks").arg(node_hooks);
    }
    if let Some(accel) = parts.accel.to_possible_value() {
        command.args(["--accel", accel.get_name()]);
    }
    for role in Role::ALL.iter().filter(|role| !parts.roles.contains(role)) {
        command.args(["--without-role", &role.to_string()]);
    }
    command
        // No directory is kept busy for as long as the lab lives.
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(output);
    let mut child = tokio::process::Command::from(command)
        .spawn()
        .context("start this program again")?;
    let told = child.stdout.take().context("a pipe to the new process")?;
    let mut lines = BufReader::new(told).lines();
    while let Some(line) = lines
        .next_line()
        .await
        .context("a pipe to the new process")?
    {
        match serde_json::from_str(&line).with_context(|| format!("{VERB} said {line:?}"))? {
            Told::Step(what) => progress.step(&what),
            Told::Detail(line) => progress.detail(&line),
            Told::Ready(kept) => return Ok(kept),
            Told::Failed(why) => {
                return Err(anyhow!("{why}")).context("Kubernetes did not come up");
            }
        }
    }
    let ended = child.wait().await.context("the new process")?;
    bail!(
        "Kubernetes did not come up: {VERB} ended with {ended}{}",
        tail(&log)
    )
}

fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let tail = lines.get(lines.len().saturating_sub(TAIL_LINES)..);
    format!(
        "; the end of {}:\n{}",
        log.display(),
        tail.unwrap_or_default().join("\n")
    )
}
