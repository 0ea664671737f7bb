//! A pod from its binding to its end.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod};
use kube::{
    Resource as _, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
    runtime::{controller::Action, events::EventType},
};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    super::{
        Error, Hypervisor, Nic, Sandbox, VirtualMachineInstance,
        api::now,
        context::namespace,
        hypervisor::domain_of,
        launcher::{Launcher, left},
        nics,
        template::PodState as _,
    },
    Kubelet,
};

pub(super) async fn reconcile<H: Hypervisor>(
    seen: Arc<Pod>,
    kubelet: Arc<Kubelet<H>>,
) -> Result<Action, Error> {
    let context = &kubelet.context;
    let Some(pod) = context
        .current::<Pod>(&namespace(&*seen), &seen.name_any())
        .await?
    else {
        return Ok(Action::await_change());
    };
    let Some(node) = pod.node() else {
        if pod.metadata.deletion_timestamp.is_some() {
            kubelet.remove(&pod).await?;
        } else if !kubelet.place(&pod).await? {
            // A node, a label or a pod that goes may change that; the scheduler flushes such pods back now and then.
            return Ok(Action::requeue(std::time::Duration::from_secs(1)));
        }
        return Ok(Action::await_change());
    };
    if !kubelet.nodes.iter().any(|known| known.name == node) {
        return Ok(Action::await_change());
    }
    let uid = pod.uid().unwrap_or_default();
    let launcher = context.launchers.by_uid(&uid);
    if pod.metadata.deletion_timestamp.is_some() {
        return kubelet.stop(&pod, &uid).await;
    }
    match launcher {
        None if pod.phase() == "Pending" => {
            let plugged = kubelet.start(&pod, node).await;
            if let Err(error) = &plugged {
                let cause = error.with_cause();
                context
                    .event(&pod, EventType::Warning, "FailedCreatePodSandBox", cause)
                    .await;
            }
            plugged?;
        }
        Some(launcher) if !launcher.started => kubelet.run(&pod, &launcher).await?,
        Some(Launcher {
            exit: Some(exit), ..
        }) => {
            if let Some(left) = left(exit, std::time::Duration::ZERO) {
                return Ok(Action::requeue(left));
            }
            kubelet.end(&pod, &uid).await?;
        }
        _ => {}
    }
    Ok(Action::await_change())
}

impl<H: Hypervisor> Kubelet<H> {
    /// Binds a pod that has no node yet, as late as the scheduler would.
    async fn place(&self, pod: &Pod) -> Result<bool, Error> {
        sleep(self.context.launchers.delays().scheduling).await;
        self.schedule(pod).await
    }

    /// The sandbox: CNI ADD. The change of the launcher brings the next round.
    async fn start(&self, pod: &Pod, node: &str) -> Result<(), Error> {
        let Some(vmi) = self.vmi_of(pod).await? else {
            return Ok(());
        };
        let nics = nics(&vmi)?;
        sleep(self.context.launchers.delays().sandbox).await;
        let sandbox = Sandbox {
            node: node.to_owned(),
            namespace: namespace(pod),
            pod: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
        };
        self.context
            .launchers
            .plug(&sandbox, domain_of(&vmi), nics)
            .await
    }

    /// The containers.
    async fn run(&self, pod: &Pod, launcher: &Launcher) -> Result<(), Error> {
        sleep(self.context.launchers.delays().containers).await;
        self.write_status(
            pod,
            running(pod, launcher.plugged.as_deref().unwrap_or_default()),
        )
        .await?;
        self.context.launchers.run(&launcher.sandbox.uid);
        Ok(())
    }

    /// The process has ended by itself: the status says so first, then the sandbox goes. The object stays.
    async fn end(&self, pod: &Pod, uid: &str) -> Result<(), Error> {
        if !pod.is_down() {
            self.write_status(pod, succeeded(pod)).await?;
        }
        if self
            .context
            .launchers
            .by_uid(uid)
            .is_some_and(|launcher| launcher.plugged.is_some())
        {
            sleep(self.context.launchers.delays().sandbox_teardown).await;
            self.context.launchers.unplug(uid).await?;
        }
        Ok(())
    }

    /// The pod is deleted: its process is asked to end, the sandbox goes, and then the object.
    async fn stop(&self, pod: &Pod, uid: &str) -> Result<Action, Error> {
        let launchers = &self.context.launchers;
        launchers.terminate(uid).await?;
        let exit = launchers.by_uid(uid).and_then(|launcher| launcher.exit);
        if let Some(left) = exit.and_then(|exit| left(exit, std::time::Duration::ZERO)) {
            return Ok(Action::requeue(left));
        }
        self.end(pod, uid).await?;
        self.remove(pod).await?;
        launchers.forget(uid);
        Ok(Action::await_change())
    }

    /// Takes the object away for good.
    async fn remove(&self, pod: &Pod) -> Result<(), Error> {
        let now = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: pod.uid(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let name = pod.name_any();
        match self
            .context
            .api::<Pod>(&namespace(pod))
            .delete(&name, &now)
            .await
        {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            deleted => deleted
                .map(drop)
                .map_err(Error::api(format!("removing pod {name}"))),
        }
    }

    async fn vmi_of(&self, pod: &Pod) -> Result<Option<VirtualMachineInstance>, Error> {
        let kind = VirtualMachineInstance::kind(&());
        let Some(owner) = pod
            .owner_references()
            .iter()
            .find(|owner| owner.kind == kind)
        else {
            return Ok(None);
        };
        self.context.current(&namespace(pod), &owner.name).await
    }

    async fn write_status(&self, pod: &Pod, status: Value) -> Result<(), Error> {
        let name = pod.name_any();
        self.context
            .api::<Pod>(&namespace(pod))
            .patch_status(
                &name,
                &PatchParams::default(),
                &Patch::Strategic(json!({"status": status})),
            )
            .await
            .map(drop)
            .map_err(Error::api(format!("updating the status of pod {name}")))
    }
}

fn running(pod: &Pod, nics: &[Nic]) -> Value {
    let addresses: Vec<_> = nics
        .first()
        .map_or(&[][..], |nic| &nic.addresses)
        .iter()
        .map(|ip| json!({"ip": ip}))
        .collect();
    let state = json!({"running": {"startedAt": now()}});
    let mut status = json!({
        "phase": "Running",
        "startTime": now(),
        "conditions": conditions("True", None),
        "containerStatuses": containers(pod, true, &state),
        "initContainerStatuses": side_cars(pod, true, &state),
    });
    if let Some(first) = addresses.first() {
        status["podIP"] = first["ip"].clone();
        status["podIPs"] = addresses.into();
    }
    status
}

fn succeeded(pod: &Pod) -> Value {
    let state = json!({"terminated": {
        "exitCode": 0, "reason": "Completed", "finishedAt": now(),
    }, "running": null});
    json!({
        "phase": "Succeeded",
        "conditions": conditions("False", Some("PodCompleted")),
        "containerStatuses": containers(pod, false, &state),
        "initContainerStatuses": side_cars(pod, false, &state),
    })
}

fn conditions(ready: &str, reason: Option<&str>) -> Vec<Value> {
    ["Ready", "ContainersReady"]
        .map(|type_| json!({"type": type_, "status": ready, "reason": reason, "lastTransitionTime": now()}))
        .into()
}

fn containers(pod: &Pod, ready: bool, state: &Value) -> Vec<Value> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    statuses(containers, ready, state)
}

/// Init containers that run beside the others: there are no others here.
fn side_cars(pod: &Pod, ready: bool, state: &Value) -> Vec<Value> {
    let side_cars = pod.spec.iter().flat_map(|spec| &spec.init_containers);
    statuses(side_cars.flatten(), ready, state)
}

fn statuses<'a>(
    containers: impl Iterator<Item = &'a Container>,
    ready: bool,
    state: &Value,
) -> Vec<Value> {
    containers
        .map(|container| {
            json!({
                "name": container.name,
                "image": container.image,
                "imageID": "",
                "ready": ready,
                "started": ready,
                "restartCount": 0,
                "state": state,
            })
        })
        .collect()
}
