//! A VMI from its creation to the hand-over to virt-handler, and its end.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt as _,
    api::{DeleteParams, PostParams},
    runtime::{controller::Action, events::EventType},
};
use serde_json::json;

use super::super::{
    Error, Hypervisor, VirtualMachineInstance, VmiPhase,
    context::{Context, namespace},
    names,
    template::{self, PodState},
};

pub(super) async fn reconcile<H: Hypervisor>(
    seen: Arc<VirtualMachineInstance>,
    context: Arc<Context<H>>,
) -> Result<Action, Error> {
    let Some(vmi) = context
        .current::<VirtualMachineInstance>(&namespace(&*seen), &seen.name_any())
        .await?
    else {
        return Ok(Action::await_change());
    };
    let pods = context.pods_of(&vmi).await?;
    if vmi.metadata.deletion_timestamp.is_some() {
        delete(&context, &vmi, &pods).await?;
        return Ok(Action::await_change());
    }
    let wanted = advance(&context, &vmi, &pods).await?;
    // From Scheduled on virt-handler owns the object: then KubeVirt patches, so as not to conflict with it.
    if matches!(vmi.phase(), Some(VmiPhase::Scheduled | VmiPhase::Running)) {
        patch(&context, &vmi, &wanted).await?;
        sync_node_label(&context, &vmi, &pods).await?;
    } else {
        context.replace(&vmi, &wanted).await?;
    }
    Ok(Action::await_change())
}

/// The VMI as it should be, given its pods.
async fn advance<H: Hypervisor>(
    context: &Context<H>,
    vmi: &VirtualMachineInstance,
    pods: &[Pod],
) -> Result<VirtualMachineInstance, Error> {
    let mut wanted = vmi.clone();
    let pod = current_pod(vmi, pods);
    let status = wanted.status.get_or_insert_default();
    status.active_pods = active_pods(pods);
    match (vmi.phase(), pod) {
        (None, _) => status.phase = Some(VmiPhase::Pending),
        (Some(VmiPhase::Pending), None) => create_pod(context, vmi).await?,
        (Some(VmiPhase::Pending), Some(_)) => status.phase = Some(VmiPhase::Scheduling),
        (Some(VmiPhase::Scheduling), Some(pod)) if pod.is_ready() => {
            let node = pod.node().map(ToOwned::to_owned);
            status.phase = Some(VmiPhase::Scheduled);
            status.node_name.clone_from(&node);
            status
                .unknown
                .insert("migrationTransport".into(), "Unix".into());
            wanted
                .labels_mut()
                .extend(node.map(|node| (names::NODE_NAME.to_owned(), node)));
        }
        (Some(VmiPhase::Scheduling), pod) if pod.is_none_or(PodState::is_going) => {
            status.phase = Some(VmiPhase::Failed);
        }
        (Some(VmiPhase::Scheduled | VmiPhase::Running), None) => {
            status.phase = Some(VmiPhase::Failed);
        }
        _ => {}
    }
    Ok(wanted)
}

/// The newest pod on the VMI's node, or the newest of all while it has none.
pub(super) fn current_pod<'a>(vmi: &VirtualMachineInstance, pods: &'a [Pod]) -> Option<&'a Pod> {
    pods.iter().rev().find(|pod| {
        vmi.node()
            .is_none_or(|node| node.is_empty() || pod.node() == Some(node))
    })
}

fn active_pods(pods: &[Pod]) -> BTreeMap<String, String> {
    pods.iter()
        .filter_map(|pod| Some((pod.uid()?, pod.node().unwrap_or_default().to_owned())))
        .collect()
}

async fn create_pod<H: Hypervisor>(
    context: &Context<H>,
    vmi: &VirtualMachineInstance,
) -> Result<(), Error> {
    let pod = context
        .api::<Pod>(&namespace(vmi))
        .create(&PostParams::default(), &template::launcher(vmi))
        .await
        .map_err(Error::api(format!(
            "creating the pod of {}",
            vmi.name_any()
        )))?;
    let note = format!("Created virtual machine pod {}", pod.name_any());
    context
        .event(vmi, EventType::Normal, "SuccessfulCreate", note)
        .await;
    Ok(())
}

async fn patch<H: Hypervisor>(
    context: &Context<H>,
    vmi: &VirtualMachineInstance,
    wanted: &VirtualMachineInstance,
) -> Result<(), Error> {
    let (Some(old), Some(new)) = (&vmi.status, &wanted.status) else {
        return Ok(());
    };
    let mut operations = Vec::new();
    if old.phase != new.phase {
        operations.push(json!({"op": "test", "path": "/status/phase", "value": old.phase}));
        operations.push(json!({"op": "replace", "path": "/status/phase", "value": new.phase}));
    }
    if old.active_pods != new.active_pods {
        if !old.active_pods.is_empty() {
            operations.push(
                json!({"op": "test", "path": "/status/activePods", "value": old.active_pods}),
            );
        }
        operations
            .push(json!({"op": "add", "path": "/status/activePods", "value": new.active_pods}));
    }
    if operations.is_empty() {
        return Ok(());
    }
    context.patch(vmi, operations.into()).await.map(drop)
}

/// The label that a target pod copied from its VMI says the truth only once the migration is over, and this is why.
async fn sync_node_label<H: Hypervisor>(
    context: &Context<H>,
    vmi: &VirtualMachineInstance,
    pods: &[Pod],
) -> Result<(), Error> {
    let Some(pod) = current_pod(vmi, pods) else {
        return Ok(());
    };
    let wanted = vmi.labels().get(names::NODE_NAME);
    if wanted.is_none() || pod.labels().get(names::NODE_NAME) == wanted || pod.is_going() {
        return Ok(());
    }
    let path = format!("/metadata/labels/{}", names::NODE_NAME.replace('/', "~1"));
    context
        .patch(pod, json!([{"op": "add", "path": path, "value": wanted}]))
        .await
        .map(drop)
}

async fn delete<H: Hypervisor>(
    context: &Context<H>,
    vmi: &VirtualMachineInstance,
    pods: &[Pod],
) -> Result<(), Error> {
    let api = context.api::<Pod>(&namespace(vmi));
    for pod in pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
    {
        let name = pod.name_any();
        api.delete(&name, &DeleteParams::default())
            .await
            .map_err(Error::api(format!("deleting pod {name}")))?;
    }
    if pods.is_empty() {
        let mut wanted = vmi.clone();
        wanted
            .finalizers_mut()
            .retain(|finalizer| finalizer != names::VMI_FINALIZER);
        context.replace(vmi, &wanted).await?;
    }
    Ok(())
}
