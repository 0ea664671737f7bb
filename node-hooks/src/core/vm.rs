//! Which VM, and which of its handovers.

use std::fmt;

use node_hooks_api::agent::HandoverId;

/// The longest name, UID or port name that is taken: Kubernetes' own are at most 253 bytes.
pub(super) const LONGEST_NAME: usize = 512;

/// A VirtualMachineInstance by namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vm {
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
}

/// How a command's handover stands to what is known of its VM.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing is known, or an older handover.
    Newer,
    /// It is the one that is known.
    Same,
    /// A newer one is known, or another of the same epoch; with the reason for people.
    Stale(String),
}

impl fmt::Display for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Vm {
    /// The VM that `id` is about, if `id` can be about one: no name is empty or absurdly long.
    pub(super) fn of(id: &HandoverId) -> Option<Self> {
        [&id.namespace, &id.vm, &id.migration_uid]
            .into_iter()
            .all(|text| is_name(text))
            .then(|| Self {
                namespace: id.namespace.clone(),
                name: id.vm.clone(),
            })
    }

    /// What KubeVirt calls the VM's libvirt domain.
    pub(super) fn domain(&self) -> String {
        format!("{}_{}", self.namespace, self.name)
    }
}

/// Whether `text` can be a name at all.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= LONGEST_NAME
}
