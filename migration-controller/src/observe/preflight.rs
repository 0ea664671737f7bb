//! What cannot survive a migration, whatever the network does.

use crate::kubevirt::{Interface, VirtualMachineInstance};

/// An interface that will not keep its connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Incompatible {
    /// Why, in a word for programs.
    pub(crate) reason: &'static str,
    /// Why, for people.
    pub(crate) message: String,
}

/// What of the VM's interfaces cannot be handed over; nothing where all can.
pub(crate) fn preflight(vmi: &VirtualMachineInstance) -> Option<Incompatible> {
    let found: Vec<_> = vmi.interfaces().iter().filter_map(incompatible).collect();
    let (reason, _) = *found.first()?;
    let messages: Vec<_> = vmi
        .interfaces()
        .iter()
        .filter_map(|interface| {
            let (_, why) = incompatible(interface)?;
            let name = interface.name.as_deref().unwrap_or("without a name");
            Some(format!("interface {name} {why}"))
        })
        .collect();
    Some(Incompatible {
        reason,
        message: messages.join("; "),
    })
}

fn incompatible(interface: &Interface) -> Option<(&'static str, &'static str)> {
    if interface.masquerade.is_some() {
        let why = "is bound by masquerade: the pod's address changes with the pod, and connections \
                   through it are lost; bind it by bridge to keep them";
        Some(("Masquerade", why))
    } else if interface.sriov.is_some() {
        let why = "is an SR-IOV function: nothing on the node can see the guest's frames on it or \
                   hand them over";
        Some(("Sriov", why))
    } else {
        None
    }
}
