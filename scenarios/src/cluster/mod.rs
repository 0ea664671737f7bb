//! A lab with Kubernetes on top: a real API, the shipped manifests and controller, and the stand-in
//! for those parts of KubeVirt that drive the domains.
//!
//! # Caveats
//!
//! Everything here connects to the API on central's loopback, so the calling process must be in
//! central's network namespace ([`Host::enter_netns`](crate::lab::Host::enter_netns)) before its
//! tokio runtime starts.

mod agents;
mod controller;
mod gate;
mod http;
mod hypervisor;
mod kept;
mod objects;

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use kube::Client;
use tokio::sync::{Mutex, broadcast};

use crate::cni::kube_ovn::{self, KubeOvn};
use crate::kubernetes::{Assets, ControlPlane, Port, Settings, Spawner};
use crate::kubevirt::{
    Delays, HookCall, KubeVirt, Limits, NodeSpec, Role, Settings as KubeVirtSettings,
};
use crate::lab::{Accel, Lab, Progress};

pub use agents::{Agents, Hook};
pub use controller::{Controller, metrics};
pub use gate::Gate;
pub use hypervisor::LabHypervisor;
pub use kept::{Kept, STAND_IN, log_of_kept};
pub(crate) use objects::{VmPort, cordon_all_but, delete_vm, ensure_namespace, own, vmi, vmim};

/// Where the API listens, in central's network namespace.
const API: Ipv4Addr = Ipv4Addr::LOCALHOST;
const API_PORT: u16 = 6443;
/// Whose rights the controller has: as in `manifests/`.
const NAMESPACE: &str = "segue-system";
const SERVICE_ACCOUNT: &str = "migration-controller";
/// How many lines of a log an error shows.
const LOG_TAIL: usize = 15;

/// The programs and files that a cluster is made of.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The shipped migration-controller.
    pub controller: PathBuf,
    /// The shipped agent, node-hooks, for strategies that need it.
    pub node_hooks: Option<PathBuf>,
    /// A static dataplane-probe, for the guests.
    pub probe: PathBuf,
    /// arp-proxy, for networks whose gateways OVN cannot answer for.
    pub arp_proxy: Option<PathBuf>,
    /// kube-ovn-controller, to take its stand-in's place.
    pub kube_ovn_controller: Option<PathBuf>,
    /// The shipped kustomize base.
    pub manifests: PathBuf,
    /// How guests' processors are had.
    pub accel: Accel,
    /// The roles of KubeVirt that are stood in for; the others are left to the real components.
    pub roles: Vec<Role>,
    /// How long things take in the stand-in.
    pub delays: Delays,
}

/// What of segue runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segue {
    /// Nothing.
    Nothing,
    /// The controller.
    Controller,
    /// The controller, and an agent on every node, with this gate.
    WithAgents(Hook),
}

/// A running cluster. Dropping it ends its processes.
pub struct Cluster {
    /// The API.
    pub plane: ControlPlane,
    /// The controller.
    pub controller: Arc<Mutex<Controller>>,
    /// The agents, where there is a program for them. They may or may not run.
    pub agents: Option<Arc<Mutex<Agents>>>,
    /// The hypervisors.
    pub hypervisor: LabHypervisor,
    /// The controller that writes to the VMs' ports beside segue's, while there is one.
    pub kube_ovn: Arc<Mutex<Option<KubeOvn>>>,
    kube_ovn_controller: Option<kube_ovn::Program>,
    kubevirt: KubeVirt<LabHypervisor>,
}

impl Cluster {
    /// Brings a cluster up on a lab that is up, controller and stand-in included.
    ///
    /// # Errors
    /// When a part is missing or does not come up. What was started ends with the error.
    pub async fn start(lab: &Lab, parts: &Parts, progress: &dyn Progress) -> Result<Self> {
        progress.step("Starting etcd and kube-apiserver");
        let settings = Settings {
            assets: Assets::find()?,
            directory: lab.central().path("/run/kubernetes"),
            address: IpAddr::V4(API),
            port: Port::Fixed(API_PORT),
        };
        let plane = ControlPlane::start(settings, &central_spawner(lab)).await?;
        progress.step("Installing KubeVirt's CRDs and the shipped manifests");
        plane.apply_kubevirt_crds().await?;
        let manifests = plane.kubectl();
        manifests.apply_kustomization(&parts.manifests).await?;
        agents::issue(lab)?;
        let agents = match &parts.node_hooks {
            Some(program) => {
                let agents = Agents::install(lab, &plane, &parts.manifests, program).await?;
                Some(Arc::new(Mutex::new(agents)))
            }
            None => None,
        };
        let kubeconfig = plane
            .kubeconfig_of_service_account(NAMESPACE, SERVICE_ACCOUNT)
            .await?;

        progress.step("Starting migration-controller and the stand-in for KubeVirt");
        let hypervisor = LabHypervisor::new(lab, parts.probe.clone(), parts.accel).await?;
        let settings = kubevirt_settings(lab, parts.delays);
        let mut kubevirt = KubeVirt::new(settings, hypervisor.clone());
        for &role in &parts.roles {
            kubevirt.switch_on(role, plane.client());
        }
        let mut controller = Controller::new(lab, &parts.controller, &kubeconfig)?;
        controller.start().await?;
        Ok(Self {
            controller: Arc::new(Mutex::new(controller)),
            agents,
            hypervisor,
            kube_ovn: Arc::default(),
            kube_ovn_controller: parts
                .kube_ovn_controller
                .as_ref()
                .map(|path| kube_ovn::Program {
                    path: path.clone(),
                    host: lab.central().clone(),
                    kubeconfig: plane.admin_kubeconfig(),
                    southbound: lab.sb_endpoint(),
                    log: lab.central().path("/var/log/kube-ovn-controller.log"),
                }),
            plane,
            kubevirt,
        })
    }

    /// A client with all rights.
    pub fn client(&self) -> Client {
        self.plane.client()
    }

    /// What happens to calls of plugins' hooks from now on.
    pub fn hook_calls(&self) -> broadcast::Receiver<HookCall> {
        self.kubevirt.hook_calls()
    }

    /// Starts and stops parts of segue until this and nothing else of it runs. It does when this returns.
    ///
    /// # Errors
    /// When a part does not start or stop, or there is no program for the agents.
    pub async fn run_segue(&self, wanted: Segue) -> Result<()> {
        let is_wanted = matches!(wanted, Segue::WithAgents(_));
        if !is_wanted && let Some(agents) = &self.agents {
            agents.lock().await.stop_all().await?;
        }
        let mut controller = self.controller.lock().await;
        if wanted == Segue::Nothing {
            return controller.stop().await;
        }
        if !controller.is_running() {
            controller.start().await?;
        }
        if let Segue::WithAgents(hook) = wanted {
            self.agents()?.lock().await.start_all(hook).await?;
        }
        Ok(())
    }

    /// Runs Kube-OVN's controller, or its stand-in, set up like this, or neither.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn run_kube_ovn(&self, wanted: Option<kube_ovn::Settings>) -> Result<()> {
        let mut running = self.kube_ovn.lock().await;
        if let Some(mut before) = running.take() {
            before.stop().await;
        }
        if let Some(settings) = wanted {
            let program = self.kube_ovn_controller.clone();
            let started = Box::pin(KubeOvn::start(settings, self.client(), program));
            *running = Some(started.await.context("Kube-OVN's controller")?);
        }
        Ok(())
    }

    /// The agents.
    ///
    /// # Errors
    /// When there is no program for them.
    pub fn agents(&self) -> Result<&Arc<Mutex<Agents>>> {
        let agents = self.agents.as_ref();
        agents.context("there is no node-hooks: `make build` builds it, --node-hooks names it")
    }

    /// Ends everything in order; goes on after an error and returns the first.
    pub async fn stop(self) -> Result<()> {
        let agents = match &self.agents {
            Some(agents) => agents.lock().await.stop_all().await,
            None => Ok(()),
        };
        let controller = self.controller.lock().await.stop().await;
        let kube_ovn = self.run_kube_ovn(None).await;
        self.kubevirt.stop().await;
        let plane = self.plane.stop().await.context("the Kubernetes API");
        agents.and(controller).and(kube_ovn).and(plane)
    }
}

/// The end of a log, to be appended to an error.
fn tail_of(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let tail = lines.get(lines.len().saturating_sub(LOG_TAIL)..);
    let tail = tail.unwrap_or_default().join("\n");
    format!("; the end of {}:\n{tail}", log.display())
}

fn kubevirt_settings(lab: &Lab, delays: Delays) -> KubeVirtSettings {
    let nodes = lab.nodes().map(|node| NodeSpec {
        address: node.underlay().map(IpAddr::V4),
        ..NodeSpec::new(node.name())
    });
    KubeVirtSettings {
        nodes: nodes.collect(),
        delays,
        limits: Limits::default(),
    }
}

/// Runs programs of this machine in central's network namespace.
fn central_spawner(lab: &Lab) -> Spawner {
    let central = lab.central().clone();
    Arc::new(move |argv: &[OsString]| {
        let (program, arguments) = argv.split_first().map_or_else(
            // The spawner's contract has no way to fail; nor has this command one to succeed.
            || (Path::new("/nonexistent").as_os_str(), &[][..]),
            |(program, arguments)| (program.as_os_str(), arguments),
        );
        let mut command = central
            .netns_command(program)
            .unwrap_or_else(|_| Command::new("/nonexistent"));
        command.args(arguments);
        command
    })
}
