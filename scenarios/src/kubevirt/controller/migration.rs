//! A migration from phase to phase.

mod status;

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, ListParams, PostParams},
    runtime::{controller::Action, events::EventType},
};
use serde_json::json;
use tokio::sync::watch;

use super::{
    super::{
        Error, Hypervisor, MigrationState, VirtualMachineInstance, VirtualMachineInstanceMigration,
        VmiPhase, VmimPhase, api,
        context::{Context, look_again, namespace},
        names,
        template::{self, PodState},
    },
    Limits,
    vmi::current_pod,
};

/// KubeVirt looks this often whether a migration that waits has room.
const ROOM_INTERVAL: Duration = Duration::from_secs(5);
/// And this often whether another pod of the same VMI has ended.
const PODS_INTERVAL: Duration = Duration::from_secs(1);

/// The reason of the Event that tells of a target without a node (`pkg/controller/controller.go`).
const UNSCHEDULABLE: &str = "migrationTargetPodUnschedulable";

pub(super) struct Migrations<H> {
    pub(super) context: Arc<Context<H>>,
    pub(super) limits: Limits,
    pub(super) freed: watch::Sender<()>,
}

/// A migration and what it is about, as they are now.
struct Observed {
    migration: VirtualMachineInstanceMigration,
    vmi: VirtualMachineInstance,
    /// All pods of the VMI.
    pods: Vec<Pod>,
}

impl Observed {
    fn target_pod(&self) -> Option<&Pod> {
        let uid = self.migration.uid();
        self.pods
            .iter()
            .find(|pod| uid.is_some() && pod.labels().get(names::MIGRATION_JOB_UID) == uid.as_ref())
    }

    /// The state of this very migration: there from the hand-over on.
    fn state(&self) -> Option<&MigrationState> {
        self.vmi.migration_state_of(&self.migration)
    }
}

pub(super) async fn reconcile<H: Hypervisor>(
    seen: Arc<VirtualMachineInstanceMigration>,
    migrations: Arc<Migrations<H>>,
) -> Result<Action, Error> {
    let context = &migrations.context;
    let (namespace, name) = (namespace(&*seen), seen.name_any());
    let Some(migration) = context
        .current::<VirtualMachineInstanceMigration>(&namespace, &name)
        .await?
    else {
        return Ok(Action::await_change());
    };
    // A person's `kubectl create` meets no webhook here.
    let mut admitted = migration.clone();
    if !migration.is_deleting()
        && !migration.is_final()
        && api::admit(&mut admitted.metadata, &migration.spec.vmi_name)
    {
        context.replace(&migration, &admitted).await?;
        return Ok(Action::await_change());
    }
    let vmi = context
        .current::<VirtualMachineInstance>(&namespace, &migration.spec.vmi_name)
        .await?;
    let Some(vmi) = vmi else {
        migrations.orphan(&migration).await?;
        return Ok(Action::await_change());
    };
    let pods = context.pods_of(&vmi).await?;
    let observed = Observed {
        migration,
        vmi,
        pods,
    };
    let synced = migrations.sync(&observed).await;
    // What sync has changed is not looked at: as in KubeVirt the status follows what was observed before it, and the
    // change brings the next round.
    migrations.update_status(&observed).await?;
    let look = synced?;
    if observed.migration.is_final() {
        // Once: everybody looks again when one is over, those that are over included.
        if observed.migration.is_guarded() {
            migrations.freed.send_replace(());
        }
        migrations.collect_garbage(&observed).await?;
    }
    Ok(look_again(look))
}

impl<H: Hypervisor> Migrations<H> {
    /// A migration whose VMI is gone.
    async fn orphan(&self, migration: &VirtualMachineInstanceMigration) -> Result<(), Error> {
        if migration.is_deleting() {
            let mut released = migration.clone();
            released
                .finalizers_mut()
                .retain(|finalizer| finalizer != names::MIGRATION_FINALIZER);
            return self.context.replace(migration, &released).await;
        }
        self.delete(migration).await
    }

    async fn delete<K>(&self, object: &K) -> Result<(), Error>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let name = object.name_any();
        match self
            .context
            .api::<K>(&namespace(object))
            .delete(&name, &DeleteParams::default())
            .await
        {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            deleted => deleted
                .map(drop)
                .map_err(Error::api(format!("deleting {} {name}", K::kind(&())))),
        }
    }

    /// Does what the phase asks for. Answers when to look again.
    async fn sync(&self, observed: &Observed) -> Result<Option<Duration>, Error> {
        let Observed { migration, vmi, .. } = observed;
        let (pod, state) = (observed.target_pod(), observed.state());
        if vmi.metadata.deletion_timestamp.is_some() || state.is_some_and(|state| state.completed) {
            return Ok(None);
        }
        let cancelled = migration.is_deleting();
        match (migration.phase(), pod) {
            (Some(VmimPhase::Pending | VmimPhase::Scheduling), Some(pod)) if cancelled => {
                self.cancel_before_hand_over(migration, pod).await?;
            }
            (Some(VmimPhase::Scheduled), Some(pod)) if cancelled && state.is_none() => {
                self.cancel_before_hand_over(migration, pod).await?;
            }
            (Some(VmimPhase::Pending), None) if !cancelled => {
                return self.create_target(observed).await;
            }
            (Some(VmimPhase::Pending | VmimPhase::Scheduling), Some(pod)) if !pod.is_ready() => {
                return self.give_up_when_pending_too_long(migration, pod).await;
            }
            (Some(VmimPhase::Scheduled), Some(pod)) if pod.is_ready() && state.is_none() => {
                self.hand_over(observed, pod).await?;
            }
            (Some(VmimPhase::PreparingTarget | VmimPhase::TargetReady), pod)
                if pod.is_none_or(PodState::is_down)
                    && state.is_some_and(|state| state.start_timestamp.is_none()) =>
            {
                self.mark_failed(observed).await?;
            }
            (Some(VmimPhase::Failed), _) if state.is_some_and(|state| !state.failed) => {
                self.mark_failed(observed).await?;
            }
            (Some(VmimPhase::Running), _)
                if cancelled && state.is_some_and(|state| !state.abort_requested) =>
            {
                self.request_abort(observed).await?;
            }
            _ => {}
        }
        Ok(None)
    }

    async fn create_target(&self, observed: &Observed) -> Result<Option<Duration>, Error> {
        let Observed {
            migration,
            vmi,
            pods,
        } = observed;
        if pods.iter().filter(|pod| !pod.is_down()).count() > 1 {
            return Ok(Some(PODS_INTERVAL));
        }
        if current_pod(vmi, pods).is_none() || vmi.phase() != Some(VmiPhase::Running) {
            return Ok(None);
        }
        if !self.has_room(observed).await? {
            return Ok(Some(ROOM_INTERVAL));
        }
        let pod = self
            .context
            .api::<Pod>(&namespace(vmi))
            .create(&PostParams::default(), &template::target(vmi, migration))
            .await
            .map_err(Error::api(format!(
                "creating the target pod of {}",
                migration.name_any()
            )))?;
        let note = format!("Created migration target pod {}", pod.name_any());
        self.context
            .event(migration, EventType::Normal, "SuccessfulCreate", note)
            .await;
        Ok(None)
    }

    /// Whether the limits let one more migration start. Counted are those that have a target pod.
    async fn has_room(&self, observed: &Observed) -> Result<bool, Error> {
        let client = &self.context.client;
        let listing = |what: &str| Error::api(format!("listing {what}"));
        let pods: Api<Pod> = Api::all(client.clone());
        let targets = pods
            .list(&ListParams::default().labels(names::MIGRATION_JOB_UID))
            .await
            .map_err(listing("target pods"))?;
        let all: Api<VirtualMachineInstanceMigration> = Api::all(client.clone());
        let all = all
            .list(&ListParams::default())
            .await
            .map_err(listing("migrations"))?;
        let running: Vec<_> = all
            .iter()
            .filter(|migration| !migration.is_final())
            .filter(|migration| {
                let uid = migration.uid();
                targets
                    .iter()
                    .any(|pod| pod.labels().get(names::MIGRATION_JOB_UID) == uid.as_ref())
            })
            .collect();
        if running.len() >= self.limits.per_cluster {
            return Ok(false);
        }
        let mut outbound = 0;
        for migration in running {
            let namespace = namespace(migration);
            let vmi = self
                .context
                .current::<VirtualMachineInstance>(&namespace, &migration.spec.vmi_name)
                .await?;
            if vmi.is_some_and(|vmi| vmi.node() == observed.vmi.node()) {
                outbound += 1;
            }
        }
        Ok(outbound < self.limits.per_node)
    }

    async fn cancel_before_hand_over(
        &self,
        migration: &VirtualMachineInstanceMigration,
        pod: &Pod,
    ) -> Result<(), Error> {
        if pod.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        self.delete(pod).await?;
        let note = format!(
            "migration canceled and pod {}/{} is deleted",
            namespace(pod),
            pod.name_any()
        );
        self.context
            .event(migration, EventType::Normal, "SuccessfulDelete", note)
            .await;
        Ok(())
    }

    async fn give_up_when_pending_too_long(
        &self,
        migration: &VirtualMachineInstanceMigration,
        pod: &Pod,
    ) -> Result<Option<Duration>, Error> {
        if pod.phase() != "Pending" || pod.metadata.deletion_timestamp.is_some() {
            return Ok(None);
        }
        let conditions = pod
            .status
            .iter()
            .filter_map(|status| status.conditions.as_ref())
            .flatten();
        let unschedulable = conditions.into_iter().any(|condition| {
            condition.type_ == "PodScheduled"
                && condition.reason.as_deref() == Some("Unschedulable")
        });
        if unschedulable {
            let note = format!(
                "Migration target pod for VMI [{}/{}] is currently unschedulable.",
                namespace(pod),
                migration.spec.vmi_name
            );
            self.context
                .event(migration, EventType::Warning, UNSCHEDULABLE, note)
                .await;
        }
        let (limit, word) = if unschedulable {
            (self.limits.unschedulable, "unschedulable")
        } else {
            (self.limits.pending, "pending")
        };
        let created = pod
            .creation_timestamp()
            .map_or(0, |created| created.0.as_second());
        let age = api::now().0.as_second().saturating_sub(created);
        let age = Duration::from_secs(u64::try_from(age).unwrap_or(0));
        if let Some(left) = limit.checked_sub(age).filter(|left| !left.is_zero()) {
            return Ok(Some(left));
        }
        self.delete(pod).await?;
        let note = format!(
            "{word} pod {}/{} timeout period exceeded",
            namespace(pod),
            pod.name_any()
        );
        self.context
            .event(migration, EventType::Normal, "SuccessfulDelete", note)
            .await;
        Ok(None)
    }

    /// Tells the VMI of its migration. From here on virt-handler acts: the label brings the VMI to the target's.
    async fn hand_over(&self, observed: &Observed, pod: &Pod) -> Result<(), Error> {
        let Observed { migration, vmi, .. } = observed;
        let source_pod = migration
            .status
            .as_ref()
            .and_then(|status| status.migration_state.as_ref()?.source_pod.clone());
        // Nothing of the migration before remains.
        let state = MigrationState {
            migration_uid: migration.uid(),
            source_node: vmi.node().map(ToOwned::to_owned),
            source_pod,
            target_node: pod.node().map(ToOwned::to_owned),
            target_pod: Some(pod.name_any()),
            migration_configuration: Some(configuration(self.limits)),
            target_memory_overhead: pod.annotations().get(names::MEMORY_OVERHEAD_BYTES).cloned(),
            ..MigrationState::default()
        };
        let mut labels = vmi.labels().clone();
        labels.extend(pod.node().map(|node| {
            (
                names::MIGRATION_TARGET_NODE_NAME.to_owned(),
                node.to_owned(),
            )
        }));
        let operations = json!([
            {"op": "test", "path": "/status/migrationState", "value": vmi.migration_state()},
            {"op": "add", "path": "/status/migrationState", "value": state},
            {"op": "test", "path": "/metadata/labels", "value": vmi.labels()},
            {"op": "replace", "path": "/metadata/labels", "value": labels},
        ]);
        self.context.patch(vmi, operations).await?;
        let note = "Migration target pod is ready for preparation by virt-handler.";
        self.context
            .event(migration, EventType::Normal, "SuccessfulHandOver", note)
            .await;
        Ok(())
    }

    async fn mark_failed(&self, observed: &Observed) -> Result<(), Error> {
        let Some(state) = observed.state() else {
            return Ok(());
        };
        let mut operations = vec![
            json!({"op": "test", "path": "/status/migrationState/migrationUid", "value": state.migration_uid}),
            json!({"op": "add", "path": "/status/migrationState/failed", "value": true}),
            json!({"op": "add", "path": "/status/migrationState/completed", "value": true}),
        ];
        let mut unless = |there: bool, field: &str, value: serde_json::Value| {
            if !there {
                let path = format!("/status/migrationState/{field}");
                operations.push(json!({"op": "add", "path": path, "value": value}));
            }
        };
        unless(
            state.end_timestamp.is_some(),
            "endTimestamp",
            json!(api::now()),
        );
        unless(
            state.start_timestamp.is_some(),
            "startTimestamp",
            json!(api::now()),
        );
        unless(
            state.failure_reason.is_some(),
            "failureReason",
            json!("Target pod is down"),
        );
        self.context.patch(&observed.vmi, operations.into()).await?;
        let uid = observed.migration.uid().unwrap_or_default();
        let note = format!(
            "VirtualMachineInstance migration uid {uid} failed. reason: Target pod is down"
        );
        self.context
            .event(&observed.vmi, EventType::Warning, "FailedMigration", note)
            .await;
        Ok(())
    }

    async fn request_abort(&self, observed: &Observed) -> Result<(), Error> {
        let uid = observed.migration.uid();
        let operations = json!([
            {"op": "test", "path": "/status/migrationState/migrationUid", "value": uid},
            {"op": "add", "path": "/status/migrationState/abortRequested", "value": true},
        ]);
        self.context.patch(&observed.vmi, operations).await?;
        let note = "Migration is ready to be canceled by virt-handler.";
        self.context
            .event(
                &observed.migration,
                EventType::Normal,
                "SuccessfulAbortMigration",
                note,
            )
            .await;
        Ok(())
    }

    /// Deletes the oldest final migrations of the VMI, and the pods that they left behind.
    async fn collect_garbage(&self, observed: &Observed) -> Result<(), Error> {
        let namespace = namespace(&observed.vmi);
        let selector = format!("{}={}", names::VMI_NAME, observed.vmi.name_any());
        let all = self
            .context
            .api::<VirtualMachineInstanceMigration>(&namespace);
        let all = all.list(&ListParams::default().labels(&selector)).await;
        let mut over = all
            .map_err(Error::api(format!(
                "listing the migrations of {}",
                observed.vmi.name_any()
            )))?
            .items;
        over.retain(|migration| migration.is_final() && !migration.is_deleting());
        over.sort_by_key(|migration| (migration.creation_timestamp(), migration.name_any()));
        let surplus = over.len().saturating_sub(self.limits.kept_when_final);
        for migration in over.iter().take(surplus) {
            let state = migration
                .status
                .as_ref()
                .and_then(|status| status.migration_state.as_ref());
            let left_behind = state.and_then(|state| match state {
                MigrationState {
                    failed: true,
                    target_pod,
                    ..
                } => target_pod.as_ref(),
                MigrationState {
                    completed: true,
                    source_pod,
                    ..
                } => source_pod.as_ref(),
                _ => None,
            });
            if let Some(pod) = observed
                .pods
                .iter()
                .find(|pod| Some(&pod.name_any()) == left_behind)
            {
                self.delete(pod).await?;
            }
            self.delete(migration).await?;
        }
        Ok(())
    }
}

/// What holds for a migration where neither the KubeVirt object nor a policy says otherwise
/// (`pkg/virt-config/configuration.go`).
fn configuration(limits: Limits) -> serde_json::Value {
    json!({
        "parallelMigrationsPerCluster": limits.per_cluster,
        "parallelOutboundMigrationsPerNode": limits.per_node,
        "bandwidthPerMigration": "0",
        "completionTimeoutPerGiB": 150,
        "progressTimeout": 150,
        "allowAutoConverge": false,
        "allowPostCopy": false,
        "allowWorkloadDisruption": false,
        "unsafeMigrationOverride": false,
        "disableTLS": false,
    })
}
