//! VMs whose ports are Kube-OVN's: how its controller is set up, and what happens to it and to the pods that it goes by.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt as _};
use tokio::task::JoinSet;

use crate::cni::kube_ovn::Settings;
use crate::kubevirt::names;
use crate::lab::topology::Subnet;
use crate::lab::{Host, Lab};
use crate::report::Check;
use crate::scenario::{Cni, Migrate, Scenario};

use super::Bench;
use super::feeders::Followed;
use super::moments::Moments;

/// How Kube-OVN is set up in a scenario, if it is there.
pub(super) fn settings(lab: &Lab, scenario: &Scenario) -> Option<Settings> {
    let Cni::KubeOvn = scenario.cni?;
    let networks = scenario.vms.iter().map(|vm| vm.ports).max().unwrap_or(1);
    Some(Settings {
        northbound: lab.nb_endpoint(),
        nodes: lab.nodes().map(Host::name).map(str::to_owned).collect(),
        subnets: (0..networks)
            .map(|number| Subnet(number).switch())
            .collect(),
        optimize: scenario.optimize,
    })
}

/// Sets off what is to happen to the controller and to old pods, each thing at its moment.
pub(super) fn disturb(
    bench: &Bench<'_>,
    followed: &Followed,
    migrate: &Migrate,
    moments: &Moments,
    disturbances: &mut JoinSet<Result<Vec<Check>>>,
) {
    if let Some(at) = migrate.restart_cni_at {
        let (kube_ovn, moments) = (Arc::clone(&bench.cluster.kube_ovn), moments.clone());
        disturbances.spawn(async move {
            moments.wait(at).await;
            let mut running = kube_ovn.lock().await;
            let running = running.as_mut().context("no CNI's controller runs")?;
            running.restart().await.map(|()| Vec::new())
        });
    }
    if let Some(at) = migrate.delete_old_pods_at {
        let pods: Api<Pod> = Api::namespaced(bench.cluster.client(), &followed.namespace);
        let (vm, moments) = (migrate.vm.clone(), moments.clone());
        disturbances.spawn(async move {
            moments.wait(at).await;
            delete_old(&pods, &vm).await
        });
    }
}

/// Deletes the pods of a VM that have ended, as KubeVirt's garbage collection does and as people do.
async fn delete_old(pods: &Api<Pod>, vm: &str) -> Result<Vec<Check>> {
    let of_vm = ListParams::default().labels(&format!("{}={vm}", names::VM_NAME));
    let ended = pods.list(&of_vm.fields("status.phase=Succeeded")).await;
    let ended = ended
        .with_context(|| format!("list the pods of {vm}"))?
        .items;
    for pod in &ended {
        let name = pod.name_any();
        let deleted = pods.delete(&name, &DeleteParams::default()).await;
        deleted.with_context(|| format!("delete pod {name}"))?;
    }
    Ok(vec![Check {
        what: format!("{vm} has pods of earlier migrations to be deleted"),
        failure: ended.is_empty().then(|| "it has none".to_owned()),
    }])
}
