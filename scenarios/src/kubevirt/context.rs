//! What the roles have in common.

use std::{fmt::Debug, sync::Arc, time::Duration};

use k8s_openapi::{NamespaceResourceScope, api::core::v1::Pod};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
    runtime::{
        controller::Action,
        events::{Event, EventType, Recorder, Reporter},
    },
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tracing::{debug, warn};

use super::{Error, Hypervisor, VirtualMachineInstance, launcher::Launchers};

/// KubeVirt's queues start at 5 ms and double, up to minutes; two steps are enough for a lab.
const RETRY_CONFLICT: Duration = Duration::from_millis(50);
const RETRY_FAILURE: Duration = Duration::from_secs(1);

/// One role's access to the API and to the nodes.
pub(super) struct Context<H> {
    pub(super) client: Client,
    pub(super) launchers: Arc<Launchers<H>>,
    recorder: Recorder,
}

impl<H: Hypervisor> Context<H> {
    pub(super) fn new(
        client: Client,
        launchers: Arc<Launchers<H>>,
        component: &str,
        node: Option<&str>,
    ) -> Self {
        let reporter = Reporter {
            controller: component.into(),
            instance: node.map(Into::into),
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            launchers,
        }
    }

    pub(super) fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// An object as it is now. The roles act on nothing older, so that a conflict means that somebody else wrote.
    pub(super) async fn current<K>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        self.api::<K>(namespace)
            .get_opt(name)
            .await
            .map_err(Error::api(format!(
                "reading {} {namespace}/{name}",
                K::kind(&())
            )))
    }

    /// The pods of a VMI, oldest first.
    pub(super) async fn pods_of(&self, vmi: &VirtualMachineInstance) -> Result<Vec<Pod>, Error> {
        let Some(uid) = vmi.uid() else {
            return Ok(Vec::new());
        };
        let selector = format!("{}={uid}", super::names::CREATED_BY);
        let pods: Api<Pod> = self.api(&namespace(vmi));
        let listed = pods
            .list(&ListParams::default().labels(&selector))
            .await
            .map_err(Error::api(format!(
                "listing the pods of {}",
                vmi.name_any()
            )))?;
        let mut pods = listed.items;
        pods.sort_by_key(|pod| (pod.creation_timestamp(), pod.name_any()));
        Ok(pods)
    }

    /// Applies a JSON patch, tests included.
    pub(super) async fn patch<K>(&self, object: &K, operations: Value) -> Result<K, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + Debug,
    {
        let doing = format!("patching {} {}", K::kind(&()), object.name_any());
        let patch = serde_json::from_value(operations).map_err(kube::Error::SerdeError);
        let patch = patch.map_err(Error::api(doing.clone()))?;
        self.api::<K>(&namespace(object))
            .patch(
                &object.name_any(),
                &PatchParams::default(),
                &Patch::<()>::Json(patch),
            )
            .await
            .map_err(Error::api(doing))
    }

    /// Writes an object if it differs from what it was read as. Somebody else's write in between is a conflict.
    pub(super) async fn replace<K>(&self, read: &K, wanted: &K) -> Result<(), Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + Debug
            + Serialize
            + PartialEq,
    {
        if read == wanted {
            return Ok(());
        }
        self.api::<K>(&namespace(read))
            .replace(&read.name_any(), &kube::api::PostParams::default(), wanted)
            .await
            .map(drop)
            .map_err(Error::api(format!(
                "updating {} {}",
                K::kind(&()),
                read.name_any()
            )))
    }

    /// Records an Event. A failure is logged only: KubeVirt's recorder does no more.
    pub(super) async fn event<K: Resource<DynamicType = ()>>(
        &self,
        on: &K,
        type_: EventType,
        reason: &str,
        note: impl Into<String>,
    ) {
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(note.into()),
            action: "Migrate".into(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &on.object_ref(&())).await {
            warn!(%error, reason, "an Event is lost");
        }
    }
}

pub(super) fn namespace(object: &impl kube::ResourceExt) -> String {
    object.namespace().unwrap_or_default()
}

/// Tries again soon. A conflict is everyday life; anything else is told.
#[expect(clippy::needless_pass_by_value, reason = "the runtime's signature")]
pub(super) fn retry<K: Resource, C>(object: Arc<K>, error: &Error, _context: Arc<C>) -> Action {
    if error.is_conflict() {
        debug!(object = object.name_any(), %error, "conflict");
        return Action::requeue(RETRY_CONFLICT);
    }
    warn!(
        object = object.name_any(),
        error = error.with_cause(),
        "trying again"
    );
    Action::requeue(RETRY_FAILURE)
}

/// The sooner of two moments to look again.
pub(super) fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Looks again after a while, or when something changes.
pub(super) fn look_again(after: Option<Duration>) -> Action {
    after.map_or_else(Action::await_change, Action::requeue)
}
