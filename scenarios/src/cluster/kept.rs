//! A cluster that is left running with its lab, in a process of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kube::Client;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::kubernetes::{Assets, client_of_kubeconfig};
use crate::lab::{Host, Lab, LabName, ProcessId};

use super::{Agents, Cluster, Parts, controller};

/// How long the process may take to end when asked to. The controller and the servers end within a
/// second or two; what is left after this is killed with the rest of the lab.
const GRACE: Duration = Duration::from_secs(10);

/// What [`Kept::health`] calls the process with KubeVirt's roles.
pub const STAND_IN: &str = "stand-in for KubeVirt";
/// Longer than a server that serves takes to answer, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a lab's state directory says of the cluster on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    process: ProcessId,
    kubectl: PathBuf,
    kubeconfig: PathBuf,
    probe: PathBuf,
    /// Names of the stand-in's roles that are on.
    roles: Vec<String>,
    /// The hosts that agents run on.
    agents: Vec<Host>,
}

impl Kept {
    /// Describes a cluster of this process, with agents on these hosts.
    pub fn new(cluster: &Cluster, parts: &Parts, agents: Vec<Host>) -> Result<Self> {
        Ok(Self {
            process: ProcessId::of(std::process::id().cast_signed())?,
            kubectl: Assets::find()?.program("kubectl"),
            kubeconfig: cluster.plane.admin_kubeconfig(),
            probe: parts.probe.clone(),
            roles: parts.roles.iter().map(ToString::to_string).collect(),
            agents,
        })
    }

    /// Writes it down for those who come after.
    pub fn store(&self, lab: &LabName) -> Result<()> {
        let path = path(lab);
        let text = serde_json::to_vec_pretty(self)?;
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    /// The cluster of a lab; `None` where there is OVN and libvirt only.
    pub fn load(lab: &LabName) -> Result<Option<Self>> {
        let path = path(lab);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .with_context(|| path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Whether the process with the stand-in for KubeVirt runs.
    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// Names of the stand-in's roles that are on.
    pub fn roles(&self) -> &[String] {
        &self.roles
    }

    /// The guests' dataplane-probe: static, so it runs on this machine as well.
    pub fn probe(&self) -> &Path {
        &self.probe
    }

    /// kubectl with all rights. It has to run in central's network.
    pub fn kubectl(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.envs(self.kubectl_environment());
        command
    }

    /// What [`kubectl`](Self::kubectl) is, for a person to type in central's network.
    pub fn kubectl_line(&self) -> String {
        let mut words: Vec<_> = self
            .kubectl_environment()
            .iter()
            .map(|(name, value)| format!("{name}={}", value.display()))
            .collect();
        words.push(self.kubectl.display().to_string());
        words.join(" ")
    }

    /// kubectl remembers for hours what an API at an address served (KUBECACHEDIR, by default below
    /// the home directory); every lab's API is at the same.
    fn kubectl_environment(&self) -> [(&'static str, PathBuf); 2] {
        let cache = self.kubeconfig.with_file_name("kubectl-cache");
        [
            ("KUBECONFIG", self.kubeconfig.clone()),
            ("KUBECACHEDIR", cache),
        ]
    }

    /// A client with all rights. The calling process is in central's network namespace.
    pub async fn client(&self) -> Result<Client> {
        Ok(client_of_kubeconfig(&self.kubeconfig).await?)
    }

    /// What runs, by name, and whether it serves. The calling process is in central's network
    /// namespace.
    pub async fn health(&self) -> Vec<(String, bool)> {
        let api = async {
            self.client()
                .await?
                .apiserver_version()
                .await
                .map_err(anyhow::Error::from)
        };
        let api = tokio::time::timeout(PATIENCE, api).await;
        let controller = tokio::time::timeout(PATIENCE, controller::is_ready()).await;
        let mut health = vec![
            ("kube-apiserver".to_owned(), matches!(api, Ok(Ok(_)))),
            (
                "migration-controller".to_owned(),
                matches!(controller, Ok(Ok(true))),
            ),
            (STAND_IN.to_owned(), self.is_alive()),
        ];
        for host in &self.agents {
            let name = format!("node-hooks on {}", host.name());
            health.push((name, Agents::is_ready(host).await));
        }
        health
    }

    /// Asks the process to end everything in order, and returns once it is gone.
    ///
    /// # Errors
    /// When it is not gone after 10 s: then it is left to the teardown of the lab.
    pub fn stop(&self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + GRACE;
        while self.is_alive() {
            if Instant::now() > deadline {
                bail!(
                    "process {} did not end within {} s",
                    self.process,
                    GRACE.as_secs()
                );
            }
            // It is not a child of this process: nothing announces its end.
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn path(lab: &LabName) -> PathBuf {
    lab.state_dir().join("cluster.json")
}

/// Where the process that a cluster is left running in logs.
pub fn log_of_kept(lab: &Lab) -> PathBuf {
    lab.central().path("/var/log/scenarios.log")
}
