//! virt-handler, one per node: VMIs that were handed over get domains, and domains get to other nodes.

mod source;
mod target;

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use kube::{
    Api, Client, ResourceExt as _,
    runtime::{Controller, controller::Action, events::EventType, watcher},
};
use serde_json::json;

use super::{
    Condition, Error, Hypervisor, Machine, VirtualMachineInstance, VmiPhase,
    api::now,
    context::{self, Context, look_again, namespace, sooner},
    hypervisor::domain_of,
    launcher::Launchers,
    names, nics,
};

/// What virt-handler says of a node without SELinux (`pkg/virt-handler/vm.go`, `updateSELinuxContext`).
const NO_SELINUX: &str = "none";

/// The virt-handler of one node.
pub(super) struct Handler<H> {
    context: Context<H>,
    node: String,
}

/// Runs until dropped.
pub(super) async fn run<H: Hypervisor>(client: Client, launchers: Arc<Launchers<H>>, node: String) {
    let changes = launchers.changes();
    let context = Context::new(client.clone(), launchers, "virt-handler", Some(&node));
    Controller::new(
        Api::<VirtualMachineInstance>::all(client),
        watcher::Config::default(),
    )
    .reconcile_all_on(changes)
    .run(
        reconcile,
        context::retry,
        Arc::new(Handler { context, node }),
    )
    .for_each(async |_| ())
    .await;
}

async fn reconcile<H: Hypervisor>(
    seen: Arc<VirtualMachineInstance>,
    handler: Arc<Handler<H>>,
) -> Result<Action, Error> {
    let context = &handler.context;
    let Some(vmi) = context
        .current::<VirtualMachineInstance>(&namespace(&*seen), &seen.name_any())
        .await?
    else {
        return Ok(Action::await_change());
    };
    let is_over = matches!(vmi.phase(), Some(VmiPhase::Succeeded | VmiPhase::Failed));
    if vmi.metadata.deletion_timestamp.is_some() || is_over {
        return Ok(Action::await_change());
    }
    let worked = handler.work(&vmi).await;
    if let Err(error) = &worked
        && !error.is_conflict()
    {
        context
            .event(&vmi, EventType::Warning, "SyncFailed", error.with_cause())
            .await;
    }
    worked.map(look_again)
}

impl<H: Hypervisor> Handler<H> {
    fn launchers(&self) -> &Arc<Launchers<H>> {
        &self.context.launchers
    }

    /// Does what the VMI asks of this node. Answers when to look again.
    async fn work(&self, vmi: &VirtualMachineInstance) -> Result<Option<Duration>, Error> {
        let labelled = |label: &str| {
            vmi.labels()
                .get(label)
                .is_some_and(|node| *node == self.node)
        };
        if labelled(names::NODE_NAME) && vmi.phase() == Some(VmiPhase::Scheduled) {
            self.start(vmi).await?;
            return Ok(None);
        }
        let mut look: Option<Duration> = None;
        if vmi.node() == Some(&self.node) {
            look = sooner(look, self.source(vmi).await?);
        }
        if labelled(names::MIGRATION_TARGET_NODE_NAME) {
            look = sooner(look, self.target(vmi).await?);
        }
        Ok(look)
    }

    /// Starts the domain of a VMI that was handed over to this node.
    async fn start(&self, vmi: &VirtualMachineInstance) -> Result<(), Error> {
        let Some(launcher) = self
            .launchers()
            .by_domain(&self.node, &domain_of(vmi))
            .filter(|it| it.started)
        else {
            return Ok(());
        };
        let machine = Machine {
            vmi: vmi.clone(),
            nics: nics(vmi)?,
        };
        self.launchers().start(&launcher, &machine).await?;
        let mut wanted = vmi.clone();
        let status = wanted.status.get_or_insert_default();
        status.phase = Some(VmiPhase::Running);
        status.selinux_context = Some(NO_SELINUX.to_owned());
        status.conditions = ["Ready", "LiveMigratable"]
            .map(|type_| Condition {
                type_: type_.into(),
                status: "True".into(),
                last_probe_time: Some(now()),
                ..Condition::default()
            })
            .into();
        status.interfaces = machine
            .nics
            .iter()
            .map(|nic| {
                json!({
                    "name": nic.name,
                    "mac": nic.mac,
                    "ipAddress": nic.addresses.first(),
                    "ipAddresses": nic.addresses,
                    "infoSource": "domain",
                })
            })
            .collect();
        self.context.replace(vmi, &wanted).await?;
        self.context
            .event(
                vmi,
                EventType::Normal,
                "Started",
                "VirtualMachineInstance started.",
            )
            .await;
        Ok(())
    }
}
