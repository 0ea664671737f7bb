//! The scheduler: node selectors, cordons and anti-affinity by host name.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Binding, Node, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::{
    super::{Error, Hypervisor, api::now, context::namespace, names, template::PodState as _},
    Kubelet,
};

impl<H: Hypervisor> Kubelet<H> {
    /// Binds a pod to a node, or says that there is none.
    pub(super) async fn schedule(&self, pod: &Pod) -> Result<bool, Error> {
        let client = &self.context.client;
        let nodes: Api<Node> = Api::all(client.clone());
        let nodes = nodes
            .list(&ListParams::default())
            .await
            .map_err(Error::api("listing nodes"))?
            .items;
        let ours =
            ListParams::default().labels(&format!("{}={}", names::APP, names::VIRT_LAUNCHER));
        let pods: Api<Pod> = Api::all(client.clone());
        let pods = pods
            .list(&ours)
            .await
            .map_err(Error::api("listing pods"))?
            .items;
        match choose(pod, &nodes, &pods) {
            Some(node) => self.bind(pod, node).await.map(|()| true),
            None => self
                .mark_unschedulable(pod, nodes.len())
                .await
                .map(|()| false),
        }
    }

    async fn bind(&self, pod: &Pod, node: String) -> Result<(), Error> {
        let doing = format!("binding pod {} to {node}", pod.name_any());
        let binding = Binding {
            metadata: ObjectMeta {
                name: Some(pod.name_any()),
                namespace: pod.namespace(),
                uid: pod.uid(),
                ..ObjectMeta::default()
            },
            target: ObjectReference {
                kind: Some("Node".into()),
                name: Some(node),
                ..ObjectReference::default()
            },
        };
        let pods = self.context.api::<Pod>(&namespace(pod));
        // Answered with a Status object, which is not a Pod.
        let bound: Result<serde_json::Value, _> = pods
            .create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding)
            .await;
        bound.map(drop).map_err(Error::api(doing))
    }

    async fn mark_unschedulable(&self, pod: &Pod, nodes: usize) -> Result<(), Error> {
        let conditions = pod
            .status
            .iter()
            .filter_map(|status| status.conditions.as_ref())
            .flatten();
        if conditions
            .into_iter()
            .any(|condition| condition.reason.as_deref() == Some("Unschedulable"))
        {
            return Ok(());
        }
        let status = json!({"status": {"conditions": [{
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": format!("0/{nodes} nodes are available"),
            "lastTransitionTime": now(),
        }]}});
        let name = pod.name_any();
        self.context
            .api::<Pod>(&namespace(pod))
            .patch_status(&name, &PatchParams::default(), &Patch::Strategic(status))
            .await
            .map(drop)
            .map_err(Error::api(format!("marking pod {name} as unschedulable")))
    }
}

/// The fitting node with the fewest pods; of several the first by name.
fn choose(pod: &Pod, nodes: &[Node], pods: &[Pod]) -> Option<String> {
    let on = |node: &str| {
        pods.iter()
            .filter(|other| !other.is_down() && other.node() == Some(node))
            .collect::<Vec<_>>()
    };
    let empty = BTreeMap::new();
    let selector = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.node_selector.as_ref())
        .unwrap_or(&empty);
    let fits = |node: &&Node| {
        let cordoned = node
            .spec
            .as_ref()
            .is_some_and(|spec| spec.unschedulable == Some(true));
        let selected = selector
            .iter()
            .all(|(label, value)| node.labels().get(label) == Some(value));
        let apart = on(&node.name_any()).iter().all(|other| !repels(pod, other));
        !cordoned && selected && apart
    };
    nodes
        .iter()
        .filter(fits)
        .map(kube::ResourceExt::name_any)
        .min_by_key(|node| (on(node).len(), node.clone()))
}

/// Whether `pod` must not be on a node where `other` is.
fn repels(pod: &Pod, other: &Pod) -> bool {
    let affinity = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.affinity.as_ref()?.pod_anti_affinity.as_ref());
    let terms = affinity.and_then(|it| {
        it.required_during_scheduling_ignored_during_execution
            .as_ref()
    });
    terms.into_iter().flatten().any(|term| {
        let wanted = term
            .label_selector
            .as_ref()
            .and_then(|selector| selector.match_labels.as_ref());
        wanted.is_some_and(|wanted| {
            wanted
                .iter()
                .all(|(label, value)| other.labels().get(label) == Some(value))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, unschedulable: bool) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"name": name}},
            "spec": {"unschedulable": unschedulable},
        }))
        .unwrap()
    }

    fn pod(vmi: &str, node: Option<&str>, phase: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "labels": {"vmi": vmi}},
            "spec": {
                "nodeName": node,
                "containers": [],
                "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
                    {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"vmi": vmi}}},
                ]}},
            },
            "status": {"phase": phase},
        }))
        .unwrap()
    }

    #[test]
    fn a_pod_goes_where_its_vmi_is_not_where_there_is_room_and_where_it_may() {
        let nodes = [
            node("a", false),
            node("b", false),
            node("c", false),
            node("d", true),
        ];
        let running = [
            pod("x", Some("a"), "Running"),
            pod("y", Some("b"), "Running"),
            pod("x", Some("c"), "Succeeded"),
        ];
        assert_eq!(
            choose(&pod("x", None, "Pending"), &nodes, &running).as_deref(),
            Some("c")
        );
        let mut picky = pod("x", None, "Pending");
        let mut select = |name: &str| {
            picky.spec.as_mut().unwrap().node_selector =
                Some([("name".to_owned(), name.to_owned())].into());
            choose(&picky, &nodes, &running)
        };
        assert_eq!(select("b").as_deref(), Some("b"));
        assert_eq!(select("a"), None, "its own VMI is there");
        assert_eq!(select("d"), None, "cordoned");
    }
}
