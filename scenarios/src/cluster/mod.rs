//! A lab with Kubernetes on top: a real API, the shipped manifests and controller, and the stand-in
//! for those parts of KubeVirt that drive the domains.
//!
//! # Caveats
//!
//! Everything here connects to the API on central's loopback, so the calling process must be in
//! central's network namespace ([`Host::enter_netns`](crate::lab::Host::enter_netns)) before its
//! tokio runtime starts.

mod controller;
mod gate;
mod hypervisor;
mod kept;
mod objects;

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use kube::Client;
use tokio::sync::Mutex;

use crate::kubernetes::{Assets, ControlPlane, Port, Settings, Spawner};
use crate::kubevirt::{Delays, KubeVirt, Limits, NodeSpec, Role, Settings as KubeVirtSettings};
use crate::lab::{Accel, Lab, Progress};

pub use controller::{Controller, metrics};
pub use gate::Gate;
pub use hypervisor::LabHypervisor;
pub use kept::{Kept, STAND_IN, log_of_kept};
pub(crate) use objects::{VmPort, cordon_all_but, delete_vm, ensure_namespace, vmi, vmim};

/// Where the API listens, in central's network namespace.
const API: Ipv4Addr = Ipv4Addr::LOCALHOST;
const API_PORT: u16 = 6443;
/// Whose rights the controller has: as in `manifests/`.
const NAMESPACE: &str = "segue-system";
const SERVICE_ACCOUNT: &str = "migration-controller";

/// The programs and files that a cluster is made of.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The shipped migration-controller.
    pub controller: PathBuf,
    /// A static dataplane-probe, for the guests.
    pub probe: PathBuf,
    /// arp-proxy, for networks whose gateways OVN cannot answer for.
    pub arp_proxy: Option<PathBuf>,
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
    /// The controller, and an agent on every node.
    WithAgents,
}

/// A running cluster. Dropping it ends its processes.
pub struct Cluster {
    /// The API.
    pub plane: ControlPlane,
    /// The controller.
    pub controller: Arc<Mutex<Controller>>,
    /// The hypervisors.
    pub hypervisor: LabHypervisor,
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
            plane,
            controller: Arc::new(Mutex::new(controller)),
            hypervisor,
            kubevirt,
        })
    }

    /// A client with all rights.
    pub fn client(&self) -> Client {
        self.plane.client()
    }

    /// Starts and stops parts of segue until this and nothing else of it runs. It does when this returns.
    ///
    /// # Errors
    /// When a part does not start or stop, or there are no agents.
    pub async fn run_segue(&self, wanted: Segue) -> Result<()> {
        let mut controller = self.controller.lock().await;
        match wanted {
            Segue::Nothing => controller.stop().await,
            Segue::Controller if controller.is_running() => Ok(()),
            Segue::Controller => controller.start().await,
            Segue::WithAgents => {
                bail!("the lab has no agents: `segue-agentless` is what it can do")
            }
        }
    }

    /// Ends everything in order; goes on after an error and returns the first.
    pub async fn stop(self) -> Result<()> {
        let controller = self.controller.lock().await.stop().await;
        self.kubevirt.stop().await;
        let plane = self.plane.stop().await.context("the Kubernetes API");
        controller.and(plane)
    }
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
