//! Switching the roles on and off.

use std::{collections::HashMap, fmt, sync::Arc};

use kube::Client;
use tokio::{sync::broadcast, task::JoinSet};

use super::{
    Delays, HookCall, Hypervisor, Limits, NodeSpec, controller, handler, kubelet,
    launcher::Launchers,
};

/// A part of a cluster that is stood in for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Role {
    /// virt-controller.
    VirtController,
    /// virt-handler, on every node.
    VirtHandler,
    /// The scheduler, and the kubelet on every node.
    Kubelet,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Kubelet, Self::VirtHandler, Self::VirtController];
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VirtController => "virt-controller",
            Self::VirtHandler => "virt-handler",
            Self::Kubelet => "kubelet",
        })
    }
}

/// What is to be stood in for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The nodes, which the kubelet registers.
    pub nodes: Vec<NodeSpec>,
    /// How long things take.
    pub delays: Delays,
    /// How many migrations there may be.
    pub limits: Limits,
}

/// The stand-in: the nodes' launchers, and the roles that are on. None is at first.
///
/// Dropping it switches everything off, as if the power had failed. The domains go on.
pub struct KubeVirt<H> {
    settings: Settings,
    launchers: Arc<Launchers<H>>,
    running: HashMap<Role, JoinSet<()>>,
}

impl<H: Hypervisor> KubeVirt<H> {
    /// The nodes with nothing on them. Listens to the hypervisor from now on.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn new(settings: Settings, hypervisor: H) -> Self {
        let launchers = Launchers::new(hypervisor, settings.delays);
        Self {
            settings,
            launchers,
            running: HashMap::new(),
        }
    }

    /// The hypervisor.
    pub fn hypervisor(&self) -> &H {
        self.launchers.hypervisor()
    }

    /// What happens to calls of plugins' hooks from now on.
    pub fn hook_calls(&self) -> broadcast::Receiver<HookCall> {
        self.launchers.hook_calls()
    }

    /// Switches a role on, with a client of its own. Nothing happens when it is on already.
    pub fn switch_on(&mut self, role: Role, client: Client) {
        if self.is_on(role) {
            return;
        }
        let mut tasks = JoinSet::new();
        let launchers = Arc::clone(&self.launchers);
        match role {
            Role::VirtController => {
                tasks.spawn(controller::run(client, launchers, self.settings.limits));
            }
            Role::VirtHandler => {
                for node in &self.settings.nodes {
                    tasks.spawn(handler::run(
                        client.clone(),
                        Arc::clone(&launchers),
                        node.name.clone(),
                    ));
                }
            }
            Role::Kubelet => {
                tasks.spawn(kubelet::run(client, launchers, self.settings.nodes.clone()));
            }
        }
        self.running.insert(role, tasks);
    }

    /// Switches a role off where it stands, as a crash would; it has stopped when this returns.
    pub async fn switch_off(&mut self, role: Role) {
        if let Some(mut tasks) = self.running.remove(&role) {
            tasks.shutdown().await;
        }
    }

    /// Whether a role is on.
    pub fn is_on(&self, role: Role) -> bool {
        self.running.contains_key(&role)
    }

    /// Switches all roles off and gives up on copies that are under way. The domains go on.
    pub async fn stop(mut self) {
        for role in Role::ALL {
            self.switch_off(role).await;
        }
        self.launchers.shut_down().await;
    }
}
