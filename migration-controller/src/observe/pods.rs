//! The pods at both ends, and whether they are gone.

use std::sync::Arc;

use super::Inputs;
use crate::api::{HandoverSpec, Moment};
use crate::cluster::{LauncherPod, PodLife};

/// Whether pods hold no network interface any more.
pub(super) struct Gone {
    /// They do not.
    pub(super) gone: bool,
    /// They may by then.
    pub(super) recheck: Option<Moment>,
}

/// Whether all of these pods are gone: absent, or over for so long that the network plugin has had
/// its time. No pods at all are gone.
pub(super) fn gone<'a>(
    inputs: &Inputs<'_>,
    pods: impl IntoIterator<Item = &'a Arc<LauncherPod>>,
) -> Gone {
    let mut all = Gone {
        gone: true,
        recheck: None,
    };
    for pod in pods {
        match pod.life {
            PodLife::Alive => all.gone = false,
            PodLife::Over(finished) => {
                let grace = inputs.patience.pod_gone_grace;
                let free = finished.and_then(|at| at.checked_add(grace).ok());
                match free.map(Moment::from_jiff) {
                    Some(free) if free <= inputs.now => {}
                    // Without a word about its end nothing is known of how long ago it was.
                    free => {
                        all.gone = false;
                        all.recheck = all.recheck.max(free);
                    }
                }
            }
        }
    }
    all
}

/// The pods that were made for the migration of `spec`.
pub(super) fn of_target<'a>(inputs: &Inputs<'a>, spec: &HandoverSpec) -> Vec<&'a Arc<LauncherPod>> {
    let named = spec.target.as_ref().and_then(|target| target.pod.clone());
    let is_target = |pod: &&Arc<LauncherPod>| {
        pod.migration() == Some(&spec.migration.uid) || named.as_deref() == Some(pod.name())
    };
    inputs.objects.pods.iter().filter(is_target).collect()
}

/// The pods of the VM that the guest may have been in on the source node.
pub(super) fn on_source<'a>(inputs: &Inputs<'a>, spec: &HandoverSpec) -> Vec<&'a Arc<LauncherPod>> {
    let source = spec.source.clone().unwrap_or_default();
    let is_source = |pod: &&Arc<LauncherPod>| match &source.pod {
        Some(name) => pod.name() == name,
        None => {
            pod.node.as_ref() == Some(&source.node) && pod.migration() != Some(&spec.migration.uid)
        }
    };
    by_age(inputs.objects.pods.iter().filter(is_source).collect())
}

/// The target pod of a migration; the newest that is not over, where there are several.
pub(super) fn newest_target<'a>(
    inputs: &Inputs<'a>,
    migration: &str,
) -> Option<&'a Arc<LauncherPod>> {
    let targets = inputs.objects.pods.iter();
    let targets = targets.filter(|pod| pod.migration() == Some(migration));
    let (alive, over): (Vec<_>, Vec<_>) = targets.partition(|pod| pod.life == PodLife::Alive);
    by_age(alive).pop().or_else(|| by_age(over).pop())
}

fn by_age(mut pods: Vec<&Arc<LauncherPod>>) -> Vec<&Arc<LauncherPod>> {
    pods.sort_by_key(|pod| pod.meta.creation_timestamp.as_ref().map(|at| at.0));
    pods
}
