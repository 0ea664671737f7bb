//! virt-handler on the node that a VMI comes to.

use std::{collections::BTreeMap, time::Duration};

use kube::{ResourceExt as _, runtime::events::EventType};

use super::{
    super::{
        DomainState, Error, Hypervisor, Machine, MigrationState, VirtualMachineInstance,
        api::now,
        context::{namespace, sooner},
        launcher::{Job, Launcher, left},
        names, nics,
    },
    Handler,
};

const PREPARED: &str = "VirtualMachineInstance Migration Target Prepared.";
/// The port of libvirt in virt-launcher's network, and where a proxy would have it on the node. Nothing is proxied
/// here; that it is published is what virt-handler on the source waits for.
const PROXIED: (&str, i32) = ("49152", 36041);

impl<H: Hypervisor> Handler<H> {
    /// Prepares the target, reports its domain, and acknowledges the end. Answers when to look again.
    pub(super) async fn target(
        &self,
        vmi: &VirtualMachineInstance,
    ) -> Result<Option<Duration>, Error> {
        let Some(state) = vmi.migration_state() else {
            return Ok(None);
        };
        if state.is_done() {
            self.clean_up(vmi, state).await?;
            return Ok(None);
        }
        let launcher = state
            .target_pod
            .as_ref()
            .filter(|_| state.is_target(&self.node));
        let launcher =
            launcher.and_then(|pod| self.launchers().by_pod(&self.node, &namespace(vmi), pod));
        let Some(launcher) = launcher.filter(|launcher| launcher.started) else {
            return Ok(None);
        };

        let mut wanted = vmi.clone();
        let (mut look, mut is_acknowledged) = (None, false);
        if let Some(reported) = wanted
            .status
            .as_mut()
            .and_then(|status| status.migration_state.as_mut())
        {
            if needs_finalisation(state) {
                reported.completed = true;
            } else if state.start_timestamp.is_none() && state.target_node_address.is_none() {
                self.prepare(vmi, &launcher, reported).await?;
            }
            look = self.report_domain(&launcher, reported);
            let job = state
                .migration_uid
                .as_ref()
                .and_then(|uid| self.launchers().job(uid));
            match job.and_then(|job| Some((left(job.ended.as_ref()?.at, self.completion()), job))) {
                Some((Some(left), _)) => look = sooner(look, Some(left)),
                Some((None, job)) => is_acknowledged = acknowledge(&job, reported),
                None => {}
            }
        }
        if is_acknowledged {
            wanted
                .labels_mut()
                .insert(names::NODE_NAME.into(), self.node.clone());
            if let Some(status) = &mut wanted.status {
                status.node_name = Some(self.node.clone());
            }
        }
        self.context.replace(vmi, &wanted).await?;
        if is_acknowledged {
            let note = format!("The VirtualMachineInstance migrated to node {}.", self.node);
            self.context
                .event(vmi, EventType::Normal, "Migrated", note)
                .await;
        }
        Ok(look)
    }

    fn completion(&self) -> Duration {
        self.launchers().delays().completion
    }

    async fn prepare(
        &self,
        vmi: &VirtualMachineInstance,
        launcher: &Launcher,
        reported: &mut MigrationState,
    ) -> Result<(), Error> {
        tokio::time::sleep(self.launchers().delays().target_preparation).await;
        let machine = Machine {
            vmi: vmi.clone(),
            nics: nics(vmi)?,
        };
        let address = self.launchers().prepare(launcher, &machine).await?;
        self.context
            .event(vmi, EventType::Normal, "PreparingTarget", PREPARED)
            .await;
        let (inner, outer) = PROXIED;
        let note = format!("Migration Target is listening at {address}, on ports: {outer}");
        self.context
            .event(vmi, EventType::Normal, "PreparingTarget", note)
            .await;
        reported.target_node_address = Some(address);
        reported.target_direct_migration_node_ports = BTreeMap::from([(inner.to_owned(), outer)]);
        Ok(())
    }

    /// First that the domain exists, then that it runs. Answers when that will be known.
    fn report_domain(
        &self,
        launcher: &Launcher,
        reported: &mut MigrationState,
    ) -> Option<Duration> {
        let domain = launcher
            .domain
            .filter(|domain| domain.state != DomainState::Shutoff)?;
        if let Some(left) = left(domain.since, self.launchers().delays().domain_notification) {
            return Some(left);
        }
        reported.target_node_domain_detected = true;
        if domain.state == DomainState::Running
            && reported.target_node_domain_ready_timestamp.is_none()
        {
            reported.target_node_domain_ready_timestamp = Some(now());
        }
        None
    }

    /// After the verdict: a failed target ends, and the VMI is none of this node's business any more unless it is
    /// its home.
    async fn clean_up(
        &self,
        vmi: &VirtualMachineInstance,
        state: &MigrationState,
    ) -> Result<(), Error> {
        if state.failed {
            let pod = state.target_pod.as_ref();
            let launcher =
                pod.and_then(|pod| self.launchers().by_pod(&self.node, &namespace(vmi), pod));
            if let Some(launcher) = launcher {
                self.launchers().terminate(&launcher.sandbox.uid).await?;
            }
        }
        let mut wanted = vmi.clone();
        wanted
            .labels_mut()
            .remove(names::MIGRATION_TARGET_NODE_NAME);
        self.context.replace(vmi, &wanted).await
    }
}

/// The end is acknowledged, the verdict is not given yet.
fn needs_finalisation(state: &MigrationState) -> bool {
    state.start_timestamp.is_some()
        && state.end_timestamp.is_some()
        && !state.completed
        && !state.failed
}

/// Takes the end of a successful copy over into the VMI, once the domain is known to run. A failed copy is the source's
/// to report.
fn acknowledge(job: &Job, reported: &mut MigrationState) -> bool {
    if reported.target_node_domain_ready_timestamp.is_none() || reported.end_timestamp.is_some() {
        return false;
    }
    let Some(ended) = job.ended.as_ref().filter(|ended| ended.failure.is_none()) else {
        return false;
    };
    reported
        .start_timestamp
        .get_or_insert_with(|| job.started.clone());
    reported.end_timestamp = Some(ended.timestamp.clone());
    true
}
