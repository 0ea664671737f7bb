//! The status of a migration: its phase follows the pod and the VMI's `migrationState`.

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Time};
use kube::{
    Api, ResourceExt as _,
    api::{ListParams, PostParams},
    runtime::events::EventType,
};
use serde_json::json;

use super::{
    super::super::{
        Condition, Error, Hypervisor, MigrationState, PhaseTransition,
        VirtualMachineInstanceMigration, VmiPhase, VmimPhase, VmimStatus,
        api::{ABORT_REQUESTED, now},
        context::namespace,
        names,
        template::PodState,
    },
    Migrations, Observed,
};

const FAILED: &str = "FailedMigration";

/// What is to become of a migration.
struct Verdict {
    phase: Option<VmimPhase>,
    /// Type, reason and note of the Event that goes with it.
    event: Option<(EventType, &'static str, &'static str)>,
    abort_requested: bool,
}

impl Verdict {
    fn fail(note: &'static str) -> Self {
        Self {
            phase: Some(VmimPhase::Failed),
            event: Some((EventType::Warning, FAILED, note)),
            abort_requested: false,
        }
    }
}

impl<H: Hypervisor> Migrations<H> {
    pub(super) async fn update_status(&self, observed: &Observed) -> Result<(), Error> {
        let migration = &observed.migration;
        let mut wanted = migration.clone();
        let status = wanted.status.get_or_insert_default();
        let mut event = None;
        if migration.is_final() {
            if let Some(state) = observed.state() {
                status.migration_state = Some(state.clone());
            }
        } else {
            let verdict = self.verdict(observed).await?;
            event = verdict.event;
            status.phase = verdict.phase;
            if verdict.abort_requested && !migration.is_abort_requested() {
                status.conditions.push(abort_requested());
            }
            note_transition(migration.phase(), status);
            // In one write with phase Pending: `SetSourcePod` looks at the phase that is about to be written.
            if status.phase == Some(VmimPhase::Pending)
                && let Some(pod) = super::current_pod(&observed.vmi, &observed.pods)
            {
                status.migration_state.get_or_insert_default().source_pod = Some(pod.name_any());
            }
        }
        self.write(migration, wanted).await?;
        if let Some((type_, reason, note)) = event {
            self.context.event(migration, type_, reason, note).await;
        }
        Ok(())
    }

    async fn write(
        &self,
        migration: &VirtualMachineInstanceMigration,
        wanted: VirtualMachineInstanceMigration,
    ) -> Result<(), Error> {
        let mut written = wanted;
        if migration.status != written.status {
            let api = self
                .context
                .api::<VirtualMachineInstanceMigration>(&namespace(migration));
            written = api
                .replace_status(&migration.name_any(), &PostParams::default(), &written)
                .await
                .map_err(Error::api(format!(
                    "updating the status of {}",
                    migration.name_any()
                )))?;
        }
        if migration.is_final() && migration.is_guarded() {
            let mut released = written.clone();
            released
                .finalizers_mut()
                .retain(|finalizer| finalizer != names::MIGRATION_FINALIZER);
            self.context.replace(&written, &released).await?;
        }
        Ok(())
    }

    /// The obvious failures first, then one step ahead at most.
    async fn verdict(&self, observed: &Observed) -> Result<Verdict, Error> {
        let Observed { migration, vmi, .. } = observed;
        let (phase, pod, state) = (migration.phase(), observed.target_pod(), observed.state());
        let handed_over = phase.is_some_and(|phase| phase >= VmimPhase::PreparingTarget);
        if matches!(vmi.phase(), Some(VmiPhase::Failed | VmiPhase::Succeeded)) {
            return Ok(Verdict::fail(
                "Migration failed vmi shutdown during migration.",
            ));
        }
        if migration.is_deleting() && state.is_none() {
            let failed = Verdict::fail("Migration failed due to being canceled");
            return Ok(Verdict {
                abort_requested: true,
                ..failed
            });
        }
        if pod.is_some_and(PodState::is_down) {
            return Ok(Verdict::fail(
                "Migration failed because target pod shutdown during migration",
            ));
        }
        if pod.is_none() && phase.is_some_and(|phase| phase >= VmimPhase::Scheduling) {
            return Ok(Verdict::fail(
                "Migration target pod was removed during active migration.",
            ));
        }
        if handed_over && vmi.migration_state().is_none() {
            return Ok(Verdict::fail(
                "VMI's migration state was cleared during the active migration.",
            ));
        }
        if handed_over && state.is_none() {
            return Ok(Verdict::fail(
                "VMI's migration state was taken over by another migration job during active migration.",
            ));
        }
        if state.is_some_and(|state| state.failed) {
            return Ok(Verdict::fail("source node reported migration failed"));
        }
        if migration.is_deleting() && !migration.is_abort_requested() {
            return Ok(Verdict {
                phase,
                event: None,
                abort_requested: true,
            });
        }
        self.advance(observed, pod, state).await
    }

    async fn advance(
        &self,
        observed: &Observed,
        pod: Option<&Pod>,
        state: Option<&MigrationState>,
    ) -> Result<Verdict, Error> {
        let phase = observed.migration.phase();
        let step = |there: bool, next: VmimPhase| if there { Some(next) } else { phase };
        let has = |wanted: fn(&MigrationState) -> bool| state.is_some_and(wanted);
        let mut event = None;
        let next = match phase {
            None if self.is_another_running(observed).await? => {
                return Ok(Verdict::fail(
                    "VMI is not eligible for migration because another migration job is in progress.",
                ));
            }
            None => Some(VmimPhase::Pending),
            Some(VmimPhase::Pending) => step(pod.is_some(), VmimPhase::Scheduling),
            Some(VmimPhase::Scheduling) => {
                step(pod.is_some_and(PodState::is_ready), VmimPhase::Scheduled)
            }
            Some(VmimPhase::Scheduled) => step(
                has(|state| state.target_node.is_some()),
                VmimPhase::PreparingTarget,
            ),
            Some(VmimPhase::PreparingTarget) => step(
                has(|state| state.target_node_address.is_some()),
                VmimPhase::TargetReady,
            ),
            Some(VmimPhase::TargetReady) => step(
                has(|state| state.start_timestamp.is_some()),
                VmimPhase::Running,
            ),
            Some(VmimPhase::Running) => {
                if let (Some(pod), Some(ready)) = (
                    pod,
                    state.and_then(|state| state.target_node_domain_ready_timestamp.as_ref()),
                ) {
                    self.annotate_ready(pod, ready).await?;
                }
                let completed = has(|state| state.completed);
                if completed {
                    event = Some((
                        EventType::Normal,
                        "SuccessfulMigration",
                        "Source node reported migration succeeded",
                    ));
                }
                step(completed, VmimPhase::Succeeded)
            }
            Some(VmimPhase::Succeeded | VmimPhase::Failed) => phase,
        };
        Ok(Verdict {
            phase: next,
            event,
            abort_requested: false,
        })
    }

    /// The VMI's state may be of an older migration; only one that still exists and is not over is in the way.
    async fn is_another_running(&self, observed: &Observed) -> Result<bool, Error> {
        let Some(current) = observed
            .vmi
            .migration_state()
            .and_then(|state| state.migration_uid.clone())
        else {
            return Ok(false);
        };
        let all: Api<VirtualMachineInstanceMigration> = self.context.api(&namespace(&observed.vmi));
        let all = all
            .list(&ListParams::default())
            .await
            .map_err(Error::api("listing migrations"))?;
        Ok(all.iter().any(|other| {
            other.uid().as_ref() == Some(&current)
                && other.uid() != observed.migration.uid()
                && !other.is_final()
        }))
    }

    /// Written in phase Running only, and so missing when that phase was too short to be seen.
    async fn annotate_ready(&self, pod: &Pod, ready: &Time) -> Result<(), Error> {
        if pod
            .annotations()
            .contains_key(names::TARGET_READY_TIMESTAMP)
        {
            return Ok(());
        }
        tokio::time::sleep(self.context.launchers.delays().ready_annotation).await;
        let path = format!(
            "/metadata/annotations/{}",
            names::TARGET_READY_TIMESTAMP.replace('/', "~1")
        );
        let operations = json!([{"op": "add", "path": path, "value": go_time(ready)}]);
        self.context.patch(pod, operations).await.map(drop)
    }
}

/// Go's `Time.String()`, which is what KubeVirt puts into the annotation.
fn go_time(time: &Time) -> String {
    time.0.strftime("%Y-%m-%d %H:%M:%S +0000 UTC").to_string()
}

fn abort_requested() -> Condition {
    Condition {
        type_: ABORT_REQUESTED.into(),
        status: "True".into(),
        last_probe_time: Some(now()),
        ..Condition::default()
    }
}

fn note_transition(before: Option<VmimPhase>, status: &mut VmimStatus) {
    let Some(phase) = status.phase.filter(|phase| Some(*phase) != before) else {
        return;
    };
    if status
        .phase_transition_timestamps
        .iter()
        .all(|transition| transition.phase != phase)
    {
        status.phase_transition_timestamps.push(PhaseTransition {
            phase,
            phase_transition_timestamp: now(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_annotation_is_what_go_prints() {
        let time = Time("2026-09-01T10:00:11Z".parse().unwrap());
        assert_eq!(go_time(&time), "2026-09-01 10:00:11 +0000 UTC");
    }
}
