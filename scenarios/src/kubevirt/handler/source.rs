//! virt-handler on the node that a VMI leaves.

use std::time::Duration;

use kube::{ResourceExt as _, runtime::events::EventType};

use super::{
    super::{
        DomainState, Error, HookPoint, Hypervisor, Machine, Migration, MigrationState,
        VirtualMachineInstance,
        context::{namespace, sooner},
        hypervisor::domain_of,
        launcher::{Abort, Job, Launcher, left},
        nics,
    },
    Handler,
};

const ABORTING: &str = "VirtualMachineInstance is aborting migration.";
const MIGRATING: &str = "VirtualMachineInstance is migrating.";
/// How often virt-handler looks for the target's ports.
const PORTS_INTERVAL: Duration = Duration::from_secs(1);

impl<H: Hypervisor> Handler<H> {
    /// Starts or aborts the copy, once plugins agree, and reports how it goes. Answers when to look again.
    pub(super) async fn source(
        &self,
        vmi: &VirtualMachineInstance,
    ) -> Result<Option<Duration>, Error> {
        let Some(state) = vmi
            .migration_state()
            .filter(|state| state.source_node.as_ref() == Some(&self.node))
        else {
            return Ok(None);
        };
        let launcher = self.launchers().by_domain(&self.node, &domain_of(vmi));
        let alive = launcher.filter(|launcher| {
            launcher
                .domain
                .is_some_and(|domain| domain.state != DomainState::Shutoff)
        });
        if state.is_done() {
            // Whoever declared it over, virt-handler cuts the connection that the copy goes through.
            if let Some(launcher) = alive.filter(|launcher| is_copying(launcher, state)) {
                self.launchers().abort(&launcher.sandbox.uid);
            }
            return Ok(None);
        }
        let mut look = None;
        if let Some(launcher) = alive {
            look = self.copy(vmi, state, &launcher).await?;
        }
        let (wanted, later) = self.progress(vmi, state);
        self.context.replace(vmi, &wanted).await?;
        let reported = wanted
            .migration_state()
            .filter(|wanted| wanted.failed && !state.failed);
        if let Some(reason) = reported.and_then(|state| state.failure_reason.as_ref()) {
            let uid = state.migration_uid.as_deref().unwrap_or_default();
            let note =
                format!("VirtualMachineInstance migration uid {uid} failed. reason:{reason}");
            self.context
                .event(vmi, EventType::Warning, "Migrated", note)
                .await;
        }
        Ok(sooner(look, later))
    }

    async fn copy(
        &self,
        vmi: &VirtualMachineInstance,
        state: &MigrationState,
        launcher: &Launcher,
    ) -> Result<Option<Duration>, Error> {
        if state.abort_requested {
            if is_copying(launcher, state) && self.launchers().abort(&launcher.sandbox.uid) {
                self.context
                    .event(vmi, EventType::Normal, "Migrating", ABORTING)
                    .await;
            }
            return Ok(None);
        }
        if launcher
            .job
            .as_ref()
            .is_some_and(|job| Some(&job.migration.uid) == state.migration_uid.as_ref())
        {
            return Ok(None);
        }
        if state.target_direct_migration_node_ports.is_empty() {
            return Ok(Some(PORTS_INTERVAL));
        }
        let (Some(uid), Some(target_node), Some(target_pod), Some(target_address)) = (
            &state.migration_uid,
            &state.target_node,
            &state.target_pod,
            &state.target_node_address,
        ) else {
            return Ok(None);
        };
        let Some(target) = self
            .launchers()
            .by_pod(target_node, &namespace(vmi), target_pod)
        else {
            return Ok(None);
        };
        // Whatever becomes of the VMI meanwhile, virt-handler goes on with the one that it has asked about.
        self.context
            .call_node_hooks(HookPoint::PreMigrationSource, vmi, &self.node)
            .await?;
        self.launchers().migrate(Migration {
            uid: uid.clone(),
            machine: Machine {
                vmi: vmi.clone(),
                nics: nics(vmi)?,
            },
            source: launcher.sandbox.clone(),
            target: target.sandbox,
            target_address: target_address.clone(),
        });
        self.context
            .event(vmi, EventType::Normal, "Migrating", MIGRATING)
            .await;
        Ok(None)
    }

    /// The VMI with what is known of the copy, and when more of it will be.
    fn progress(
        &self,
        vmi: &VirtualMachineInstance,
        state: &MigrationState,
    ) -> (VirtualMachineInstance, Option<Duration>) {
        let mut wanted = vmi.clone();
        let (job, reported) = (
            state
                .migration_uid
                .as_ref()
                .and_then(|uid| self.launchers().job(uid)),
            wanted
                .status
                .as_mut()
                .and_then(|status| status.migration_state.as_mut()),
        );
        let (Some(job), Some(reported)) = (job, reported) else {
            return (wanted, None);
        };
        reported.start_timestamp = Some(job.started.clone());
        reported.mode = Some("PreCopy".into());
        let failed = job
            .ended
            .as_ref()
            .and_then(|ended| Some((ended, ended.failure.clone()?)));
        let Some((ended, reason)) = failed else {
            return (wanted, None);
        };
        if let Some(left) = left(ended.at, self.launchers().delays().domain_notification) {
            return (wanted, Some(left));
        }
        reported.failed = true;
        reported.completed = true;
        reported.end_timestamp = Some(ended.timestamp.clone());
        reported.failure_reason = Some(reason);
        reported.abort_status = abort_status(&job);
        tracing::debug!(vmi = vmi.name_any(), "the copy is reported as failed");
        (wanted, None)
    }
}

fn is_copying(launcher: &Launcher, state: &MigrationState) -> bool {
    launcher.job.as_ref().is_some_and(|job| {
        job.ended.is_none() && Some(&job.migration.uid) == state.migration_uid.as_ref()
    })
}

fn abort_status(job: &Job) -> Option<String> {
    let word = match job.abort? {
        Abort::InProgress => "Aborting",
        Abort::Succeeded => "Succeeded",
        Abort::Failed => "Failed",
    };
    Some(word.into())
}
