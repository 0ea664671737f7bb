//! The watches that fill a [`Cluster`].

use std::collections::BTreeSet;
use std::fmt;
use std::fmt::Debug;
use std::sync::Arc;

use futures::StreamExt;
use handover::VmName;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::core::DeserializeGuard;
use kube::runtime::watcher::{Config, Event};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::store::object_name;
use super::{Cluster, Seen, State, Store, Stored};
use crate::api::{Handover, HandoverPolicy};
use crate::kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration, keys};
use crate::policy::Policy;

/// How long one watch request lasts. A connection that went dead without a word is noticed only when
/// its request should have ended, and until then what migrates goes unseen.
const WATCH_SECONDS: u32 = 30;

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// VirtualMachineInstance.
    Vmi,
    /// VirtualMachineInstanceMigration.
    Migration,
    /// Handover.
    Handover,
    /// The pods of guests.
    Pod,
    /// Node.
    Node,
    /// HandoverPolicy.
    Policy,
}

/// Who hears of changes.
pub(crate) trait Listener: Send + Sync + 'static {
    /// Something that these VMs' handovers depend on changed.
    fn vms_changed(&self, vms: BTreeSet<VmName>);

    /// Something that every open handover may depend on changed.
    fn world_changed(&self);

    /// A node or a chassis changed: what every open handover may depend on, and every guest whose
    /// node has no chassis yet.
    fn nodes_changed(&self);

    /// Everything may have changed.
    fn everything_changed(&self);

    /// The routed topology, or segue's rows of it, changed.
    fn layout_changed(&self);

    /// An address may be in a place set without a port that has it.
    fn addresses_left(&self);

    /// An object could not be read.
    fn malformed(&self, kind: Kind);
}

impl Kind {
    pub(crate) const ALL: [Self; 6] = [
        Self::Vmi,
        Self::Migration,
        Self::Handover,
        Self::Pod,
        Self::Node,
        Self::Policy,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmi => "VirtualMachineInstance",
            Self::Migration => "VirtualMachineInstanceMigration",
            Self::Handover => "Handover",
            Self::Pod => "Pod",
            Self::Node => "Node",
            Self::Policy => "HandoverPolicy",
        })
    }
}

/// One kind's watch: how its objects are stored.
struct Watch<K, T> {
    kind: Kind,
    api: Api<DeserializeGuard<K>>,
    config: Config,
    convert: fn(K) -> Result<T, String>,
    store: fn(&mut State) -> &mut Store<T>,
}

/// What to do about a watch that will fail until somebody does something. Without every kind's objects
/// no handover is made.
fn remedy(kind: Kind, error: &watcher::Error) -> Option<&'static str> {
    let (watcher::Error::WatchError(status)
    | watcher::Error::InitialListFailed(kube::Error::Api(status))
    | watcher::Error::WatchStartFailed(kube::Error::Api(status))
    | watcher::Error::WatchFailed(kube::Error::Api(status))) = error
    else {
        return None;
    };
    let ours = matches!(kind, Kind::Handover | Kind::Policy);
    // By the number: of a kind that it does not know an API server says no more than that.
    if status.code == 403 {
        Some("no handover is made until it works: apply this version's manifests/rbac.yaml")
    } else if status.code == 404 && ours {
        Some("no handover is made until it works: apply this version's manifests/crd.yaml")
    } else if status.code == 404 {
        Some("no handover is made until it works: is KubeVirt installed?")
    } else {
        None
    }
}

/// Watches everything into `cluster` until `stop`.
pub(crate) fn watch_all(
    client: &Client,
    cluster: &Arc<Cluster>,
    listener: &Arc<impl Listener>,
    stop: &CancellationToken,
    tasks: &mut JoinSet<()>,
) {
    let spawn = Spawn {
        client,
        cluster,
        listener,
        stop,
    };
    let all = Config::default().timeout(WATCH_SECONDS);
    let launchers = all
        .clone()
        .labels(&format!("{}={}", keys::APP, keys::LAUNCHER));
    spawn.watch::<VirtualMachineInstance, _>(tasks, Kind::Vmi, all.clone(), Ok, |s| &mut s.vmis);
    spawn.watch::<VirtualMachineInstanceMigration, _>(
        tasks,
        Kind::Migration,
        all.clone(),
        Ok,
        |state| &mut state.migrations,
    );
    spawn.watch::<Handover, _>(tasks, Kind::Handover, all.clone(), Ok, |state| {
        &mut state.handovers
    });
    spawn.watch::<Pod, _>(
        tasks,
        Kind::Pod,
        launchers,
        |pod| Ok(pod.into()),
        |s| &mut s.pods,
    );
    spawn.watch::<Node, _>(
        tasks,
        Kind::Node,
        all.clone(),
        |node| Ok(node.into()),
        |s| &mut s.nodes,
    );
    spawn.watch::<HandoverPolicy, _>(tasks, Kind::Policy, all, Policy::try_from, |s| {
        &mut s.policies
    });
}

struct Spawn<'a, L> {
    client: &'a Client,
    cluster: &'a Arc<Cluster>,
    listener: &'a Arc<L>,
    stop: &'a CancellationToken,
}

impl<L: Listener> Spawn<'_, L> {
    fn watch<K, T: Stored>(
        &self,
        tasks: &mut JoinSet<()>,
        kind: Kind,
        config: Config,
        convert: fn(K) -> Result<T, String>,
        store: fn(&mut State) -> &mut Store<T>,
    ) where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        let watch = Watch {
            kind,
            api: Api::all(self.client.clone()),
            config,
            convert,
            store,
        };
        let run = watch.run(self.cluster.clone(), self.listener.clone());
        let stop = self.stop.clone();
        tasks.spawn(async move {
            stop.run_until_cancelled(run).await;
        });
    }
}

impl<K, T> Watch<K, T>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    T: Stored,
{
    async fn run(self, cluster: Arc<Cluster>, listener: Arc<impl Listener>) {
        let kind = self.kind;
        let mut events = watcher(self.api.clone(), self.config.clone())
            .default_backoff()
            .boxed();
        let mut listed = Vec::new();
        while let Some(event) = events.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    let remedy = remedy(kind, &error);
                    let error = &error as &(dyn std::error::Error + 'static);
                    tracing::warn!(%kind, error, remedy, "watch failed; trying again");
                    continue;
                }
            };
            match event {
                Event::Init => listed.clear(),
                Event::InitApply(object) => listed.push(self.see(object, listener.as_ref())),
                Event::InitDone => {
                    let all = std::mem::take(&mut listed);
                    tracing::debug!(%kind, objects = all.len(), "listed");
                    self.change(
                        &cluster,
                        listener.as_ref(),
                        |store| store.replace(all),
                        true,
                    );
                }
                Event::Apply(object) => {
                    let seen = self.see(object, listener.as_ref());
                    self.change(
                        &cluster,
                        listener.as_ref(),
                        |store| store.apply(seen),
                        false,
                    );
                }
                Event::Delete(object) => {
                    let seen = self.see(object, listener.as_ref());
                    self.change(
                        &cluster,
                        listener.as_ref(),
                        |store| store.delete(&seen),
                        false,
                    );
                }
            }
        }
    }

    fn see(&self, object: DeserializeGuard<K>, listener: &impl Listener) -> Seen<T> {
        let (meta, error) = match object.0 {
            Ok(mut object) => {
                // Who wrote which field: often the larger half of an object, and of no use here.
                object.meta_mut().managed_fields = None;
                let meta = object.meta().clone();
                match (self.convert)(object) {
                    Ok(object) => return Seen::Valid(Arc::new(object)),
                    Err(error) => (meta, error),
                }
            }
            Err(invalid) => (invalid.metadata, invalid.error),
        };
        let (namespace, name) = object_name(&meta);
        let consequence = match self.kind {
            Kind::Policy => "it applies to no VM until it can",
            _ => "its VM's handovers wait until it can",
        };
        tracing::warn!(
            kind = %self.kind, namespace, name, error,
            "object cannot be read; {consequence}"
        );
        listener.malformed(self.kind);
        Seen::Malformed {
            meta: Box::new(meta),
            error: error.into(),
        }
    }

    /// Changes the store, and tells the listener about the VMs concerned before and after.
    fn change(
        &self,
        cluster: &Cluster,
        listener: &impl Listener,
        change: impl FnOnce(&mut Store<T>) -> Vec<super::Key>,
        listed: bool,
    ) {
        let (vms, newly_synced) = {
            let mut state = cluster.write();
            let keys = change((self.store)(&mut state));
            let newly_synced = listed && state.synced.insert(self.kind);
            (state.vms(&keys), newly_synced)
        };
        if newly_synced || self.kind == Kind::Policy {
            listener.everything_changed();
        } else if self.kind == Kind::Node {
            listener.nodes_changed();
        }
        listener.vms_changed(vms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_person_can_mend_is_said_with_its_remedy() {
        let refused = |kind, code: u16| {
            let status = serde_json::json!({ "status": "Failure", "code": code });
            let status = Box::new(serde_json::from_value(status).unwrap());
            remedy(
                kind,
                &watcher::Error::InitialListFailed(kube::Error::Api(status)),
            )
        };
        for (kind, code, file) in [
            (Kind::Policy, 404, "manifests/crd.yaml"),
            (Kind::Policy, 403, "manifests/rbac.yaml"),
            (Kind::Node, 403, "manifests/rbac.yaml"),
            (Kind::Vmi, 404, "KubeVirt"),
        ] {
            let said = refused(kind, code);
            assert!(
                said.is_some_and(|said| said.contains(file)),
                "{kind} {code}: {said:?}"
            );
        }
        assert_eq!(refused(Kind::Policy, 500), None);
    }
}
