//! The Node objects.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tracing::warn;

use super::{
    super::{Error, Hypervisor, api::now, names},
    Kubelet, NodeSpec,
};

const HOSTNAME: &str = "kubernetes.io/hostname";
/// The architecture that VMIs ask for, by Kubernetes' name for it.
const ARCH: (&str, &str) = ("kubernetes.io/arch", "amd64");
const RETRY: Duration = Duration::from_millis(200);

impl<H: Hypervisor> Kubelet<H> {
    /// Makes every node exist and be ready, however long the API takes.
    pub(super) async fn register_nodes(&self) {
        for node in &self.nodes {
            while let Err(error) = self.register(node).await {
                warn!(node = node.name, %error, "trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn register(&self, node: &NodeSpec) -> Result<(), Error> {
        let api: Api<Node> = Api::all(self.context.client.clone());
        let failed = || Error::api(format!("registering node {}", node.name));
        let apply = PatchParams::apply("kubelet").force();
        api.patch(&node.name, &apply, &Patch::Apply(object(node)))
            .await
            .map_err(failed())?;
        api.patch_status(&node.name, &apply, &Patch::Apply(status(node)))
            .await
            .map_err(failed())?;
        // The API taints a new node as not ready, and leaves it to a controller that does not run to take that back.
        let untaint = json!({"spec": {"taints": null}});
        api.patch(&node.name, &PatchParams::default(), &Patch::Merge(untaint))
            .await
            .map_err(failed())?;
        Ok(())
    }
}

fn object(node: &NodeSpec) -> Value {
    let mut labels = BTreeMap::from([
        ARCH,
        (HOSTNAME, node.name.as_str()),
        (names::SCHEDULABLE, "true"),
    ]);
    labels.extend(
        node.labels
            .iter()
            .map(|(label, value)| (label.as_str(), value.as_str())),
    );
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": labels, "annotations": node.annotations},
    })
}

fn status(node: &NodeSpec) -> Value {
    let mut addresses = vec![json!({"type": "Hostname", "address": node.name})];
    addresses.extend(
        node.address
            .map(|address| json!({"type": "InternalIP", "address": address})),
    );
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "status": {
            "addresses": addresses,
            "conditions": [{
                "type": "Ready",
                "status": "True",
                "reason": "KubeletReady",
                "message": "kubelet is posting ready status",
                "lastHeartbeatTime": now(),
                "lastTransitionTime": now(),
            }],
        },
    })
}
