//! Scheduler and kubelets: nodes exist, pods get to one of them, run there and end.

mod nodes;
mod pods;
mod schedule;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    runtime::{Controller, watcher},
};

use super::{
    Hypervisor,
    context::{self, Context},
    launcher::Launchers,
    names,
};

/// A node of the lab, as the API is to have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// Its name, and its host name.
    pub name: String,
    /// Its InternalIP.
    pub address: Option<IpAddr>,
    /// More labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations, [`NodeSpec::CHASSIS_ID`] for one.
    pub annotations: BTreeMap<String, String>,
}

impl NodeSpec {
    /// The annotation with the `system-id` of the node's chassis, as ovn-kubernetes has it.
    pub const CHASSIS_ID: &str = "k8s.ovn.org/node-chassis-id";

    /// A node without an address and annotations.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            address: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        }
    }

    /// With the chassis that it is.
    #[must_use]
    pub fn with_chassis(mut self, system_id: impl Into<String>) -> Self {
        self.annotations
            .insert(Self::CHASSIS_ID.into(), system_id.into());
        self
    }
}

struct Kubelet<H> {
    context: Context<H>,
    nodes: Vec<NodeSpec>,
}

/// Runs until dropped.
pub(super) async fn run<H: Hypervisor>(
    client: Client,
    launchers: Arc<Launchers<H>>,
    nodes: Vec<NodeSpec>,
) {
    let changes = launchers.changes();
    let context = Context::new(client.clone(), launchers, "kubelet", None);
    let kubelet = Arc::new(Kubelet { context, nodes });
    kubelet.register_nodes().await;
    let ours =
        watcher::Config::default().labels(&format!("{}={}", names::APP, names::VIRT_LAUNCHER));
    Controller::new(Api::<Pod>::all(client), ours)
        .reconcile_all_on(changes)
        .run(pods::reconcile, context::retry, kubelet)
        .for_each(async |_| ())
        .await;
}
