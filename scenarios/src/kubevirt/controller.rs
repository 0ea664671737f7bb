//! virt-controller: VMIs get pods, migrations get phases.

mod migration;
mod vmi;

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt as _,
    runtime::{Controller, reflector::ObjectRef, watcher},
};

use super::{
    Hypervisor, VirtualMachineInstance, VirtualMachineInstanceMigration,
    context::{self, Context},
    launcher::Launchers,
    names,
};

/// KubeVirt's limits on migrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `parallelMigrationsPerCluster`; 5 by default.
    pub per_cluster: usize,
    /// `parallelOutboundMigrationsPerNode`; 2 by default.
    pub per_node: usize,
    /// Migrations of a VMI that are kept when they are over; 5. With an older one goes the pod that it left behind:
    /// the source of a successful one, the target of a failed one. Until then such pods stay, completed.
    pub kept_when_final: usize,
    /// How long a target may be unschedulable; 5 min.
    pub unschedulable: Duration,
    /// How long a target may be pending for any reason; 15 min.
    pub pending: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_cluster: 5,
            per_node: 2,
            kept_when_final: 5,
            unschedulable: Duration::from_mins(5),
            pending: Duration::from_mins(15),
        }
    }
}

/// Runs until dropped.
pub(super) async fn run<H: Hypervisor>(
    client: Client,
    launchers: Arc<Launchers<H>>,
    limits: Limits,
) {
    let context = Arc::new(Context::new(
        client.clone(),
        launchers,
        "virtualmachine-controller",
        None,
    ));
    tokio::join!(
        run_vmis(client.clone(), Arc::clone(&context)),
        run_migrations(client, context, limits)
    );
}

async fn run_vmis<H: Hypervisor>(client: Client, context: Arc<Context<H>>) {
    Controller::new(
        Api::<VirtualMachineInstance>::all(client.clone()),
        watcher::Config::default(),
    )
    .owns(Api::<Pod>::all(client), launcher_pods())
    .run(vmi::reconcile, context::retry, context)
    .for_each(async |_| ())
    .await;
}

async fn run_migrations<H: Hypervisor>(client: Client, context: Arc<Context<H>>, limits: Limits) {
    let migrations = Api::<VirtualMachineInstanceMigration>::all(client.clone());
    let controller = Controller::new(migrations, watcher::Config::default());
    let known = controller.store();
    let of_vmi = move |vmi: VirtualMachineInstance| -> Vec<_> {
        let (namespace, name) = (vmi.namespace(), vmi.name_any());
        let known = known.state();
        known
            .iter()
            .filter(|migration| {
                migration.namespace() == namespace && migration.spec.vmi_name == name
            })
            .map(|migration| ObjectRef::from_obj(&**migration))
            .collect()
    };
    let of_pod = |pod: Pod| {
        let name = pod.annotations().get(names::MIGRATION_JOB_NAME)?;
        Some(ObjectRef::new(name).within(&pod.namespace()?))
    };
    // A migration that is over makes room for one that waits.
    let (freed, room) = tokio::sync::watch::channel(());
    let room = futures::stream::unfold(room, |mut room| async move {
        room.changed().await.ok().map(|()| ((), room))
    });
    controller
        .watches(
            Api::<VirtualMachineInstance>::all(client.clone()),
            watcher::Config::default(),
            of_vmi,
        )
        .watches(Api::<Pod>::all(client), launcher_pods(), of_pod)
        .reconcile_all_on(room)
        .run(
            migration::reconcile,
            context::retry,
            Arc::new(migration::Migrations {
                context,
                limits,
                freed,
            }),
        )
        .for_each(async |_| ())
        .await;
}

fn launcher_pods() -> watcher::Config {
    watcher::Config::default().labels(&format!("{}={}", names::APP, names::VIRT_LAUNCHER))
}
