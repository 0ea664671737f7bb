//! The shipped migration-controller, run in the lab with its own rights and no more.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout_at};

use crate::lab::routed::CLUSTER_ROUTER;
use crate::lab::{Host, Lab, ProcessId, Prompt, prefer_at_start};

use super::agents::{AGENTS_PORT, OF_CONTROLLER};
use super::{Gate, http, tail_of};

/// Where it serves metrics and probes, in central's network namespace.
const SERVES: &str = "127.0.0.1:9402";
/// A start takes a fraction of a second; the rest is for a busy machine.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// Its thread that has the agents' streams.
const STREAMS: &str = "agents";
/// What Kubernetes gives a pod by default (terminationGracePeriodSeconds).
const GRACE: Duration = Duration::from_secs(30);

/// The migration-controller of a lab.
#[derive(Debug)]
pub struct Controller {
    program: PathBuf,
    central: Host,
    environment: Vec<(&'static str, String)>,
    log: PathBuf,
    child: Option<Child>,
}

impl Controller {
    /// Describes the controller of a lab; nothing runs yet. `kubeconfig` is its identity.
    pub(super) fn new(lab: &Lab, program: &Path, kubeconfig: &Path) -> Result<Self> {
        ensure!(
            program.is_file(),
            "there is no {}: `make build` builds it, --controller names another place",
            program.display()
        );
        let central = lab.central().clone();
        Ok(Self {
            program: program.to_owned(),
            environment: vec![
                ("KUBECONFIG", kubeconfig.display().to_string()),
                ("SEGUE_NB", lab.nb_endpoint()),
                ("SEGUE_SB", lab.sb_endpoint()),
                // There is nothing routed until a router of this name is there.
                ("SEGUE_CLUSTER_ROUTER", CLUSTER_ROUTER.to_owned()),
                ("SEGUE_METRICS_ADDRESS", SERVES.to_owned()),
                // As in the manifest; whether there are agents is theirs to say.
                ("SEGUE_AGENTS", format!("[::]:{AGENTS_PORT}")),
                (
                    "SEGUE_AGENTS_TLS_DIR",
                    central.path(OF_CONTROLLER).display().to_string(),
                ),
                // The stand-in tears a finished pod's network down within two seconds.
                ("SEGUE_POD_GONE_GRACE", "5".to_owned()),
                ("RUST_LOG", "info,migration_controller=debug".to_owned()),
            ],
            log: central.path("/var/log/migration-controller.log"),
            central,
            child: None,
        })
    }

    /// Whether it was started, and neither stopped nor killed since.
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Starts it and returns once it says that it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time, with the end of its log.
    pub async fn start(&mut self) -> Result<()> {
        self.start_with(None).await
    }

    /// Ends it, if it runs, and starts it with its way to the Northbound through a gate, or with none.
    ///
    /// # Errors
    /// Those of [`stop`](Self::stop) and [`start`](Self::start).
    pub async fn restart(&mut self, gate: Option<&Gate>) -> Result<()> {
        self.stop().await?;
        self.start_with(gate).await
    }

    async fn start_with(&mut self, gate: Option<&Gate>) -> Result<()> {
        ensure!(self.child.is_none(), "the controller runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| self.log.display().to_string())?;
        let mut command = self.central.netns_command(&self.program)?;
        prefer_at_start(&mut command, Prompt::Reconciles);
        command
            .env_clear()
            .envs(self.environment.iter().cloned())
            .envs(gate.map(|gate| ("SEGUE_NB", gate.endpoint())))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = Command::from(command).kill_on_drop(true).spawn();
        let child = child.with_context(|| self.program.display().to_string())?;
        let id = child.id().map(|pid| ProcessId::of(pid.cast_signed()));
        if let Some(Ok(id)) = &id {
            id.prefer();
        }
        self.child = Some(child);
        self.ready().await?;
        if let Some(Ok(id)) = id {
            id.hasten_threads(STREAMS, Prompt::Reacts);
        }
        Ok(())
    }

    /// Kills it as a crash would, and returns once it is gone.
    pub async fn crash(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else {
            bail!("the controller does not run");
        };
        child.kill().await.context("kill the controller")
    }

    /// Asks it to end, as Kubernetes does.
    ///
    /// # Errors
    /// When it does not end in time or with an error.
    pub async fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid {
            kill(Pid::from_raw(pid), Signal::SIGTERM).context("SIGTERM to the controller")?;
        }
        let ended = tokio::time::timeout(GRACE, child.wait())
            .await
            .context("the controller did not end on SIGTERM")?
            .context("the controller")?;
        ensure!(
            ended.success(),
            "the controller ended with {ended}{}",
            self.log_tail()
        );
        Ok(())
    }

    /// Where its log is.
    pub fn log(&self) -> &Path {
        &self.log
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + READY_DEADLINE;
        let mut last = "no answer".to_owned();
        while Instant::now() < deadline {
            let ended = match &mut self.child {
                Some(child) => child.try_wait().context("the controller")?,
                None => bail!("the controller does not run"),
            };
            if let Some(ended) = ended {
                self.child = None;
                bail!("the controller ended with {ended}{}", self.log_tail());
            }
            match timeout_at(deadline, http::ask(SERVES, "/readyz")).await {
                Ok(Ok(answer)) if answer.starts_with("HTTP/1.1 200") => return Ok(()),
                Ok(Ok(answer)) => last = answer,
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => {}
            }
            // It listens when it listens: nothing announces that to another process.
            sleep(Duration::from_millis(10)).await;
        }
        bail!(
            "the controller was not ready within 30 s, last: {last}{}",
            self.log_tail()
        )
    }

    fn log_tail(&self) -> String {
        tail_of(&self.log)
    }
}

/// Whether the controller says that it is ready. The caller is in central's network namespace.
pub(super) async fn is_ready() -> std::io::Result<bool> {
    http::is_ready(SERVES).await
}

/// What the controller's `/metrics` says. The caller is in central's network namespace.
pub async fn metrics() -> Result<String> {
    let metrics = http::get(SERVES, "/metrics").await;
    metrics.context("the controller's /metrics")
}
