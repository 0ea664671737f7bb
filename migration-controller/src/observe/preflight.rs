//! What cannot survive a migration, whatever the network does, and what nobody can tell of.

use crate::kubevirt::{Interface, VirtualMachineInstance};

/// Names of binding plugins that give the guest a tap on a bridge with the pod's interface
/// (`domainAttachmentType: managedTap`), as the documentation of ovn-kubernetes and of KubeVirt
/// registers them. What a name stands for is said in the cluster's own `KubeVirt` object, which is not
/// read.
const BRIDGING: [&str; 2] = ["l2bridge", "managedtap"];
/// What names of plugins say whose guest shares memory with a switch in user space: there is no tap.
const USER_SPACE: [&str; 3] = ["vhostuser", "vhost-user", "dpdk"];

/// An interface that will not keep its connections, or may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Incompatible {
    /// Whether it is known that it will not; else it is only not known that it will.
    pub(crate) certain: bool,
    /// Why, in a word for programs.
    pub(crate) reason: &'static str,
    /// Why, for people.
    pub(crate) message: String,
}

/// What is wrong with one interface.
struct Flaw {
    certain: bool,
    reason: &'static str,
    why: String,
}

/// What of the VM's interfaces cannot be handed over, or is not known to; nothing where all can.
pub(crate) fn preflight(vmi: &VirtualMachineInstance) -> Option<Incompatible> {
    let mut messages = Vec::new();
    let mut worst: Option<Flaw> = None;
    for interface in vmi.interfaces() {
        let Some(flaw) = flaw(interface) else {
            continue;
        };
        let name = interface.name.as_deref().unwrap_or("without a name");
        messages.push(format!("interface {name} {}", flaw.why));
        let known = worst.as_ref().is_some_and(|worst| worst.certain);
        if worst.is_none() || (flaw.certain && !known) {
            worst = Some(flaw);
        }
    }
    worst.map(
        |Flaw {
             certain, reason, ..
         }| Incompatible {
            certain,
            reason,
            message: messages.join("; "),
        },
    )
}

fn flaw(interface: &Interface) -> Option<Flaw> {
    let certain = |reason, why: &str| {
        Some(Flaw {
            certain: true,
            reason,
            why: why.to_owned(),
        })
    };
    if interface.masquerade.is_some() {
        let why = "is bound by masquerade: the pod's address changes with the pod, and connections \
                   through it are lost; bind it by bridge to keep them";
        return certain("Masquerade", why);
    }
    if interface.sriov.is_some() {
        let why = "is an SR-IOV function: nothing on the node can see the guest's frames on it or \
                   hand them over";
        return certain("Sriov", why);
    }
    if interface.bridge.is_some() {
        return None;
    }
    let plugin = interface.binding.as_ref();
    let plugin = plugin.and_then(|binding| binding.name.as_deref());
    let why = match plugin.map(str::to_ascii_lowercase) {
        Some(name) if BRIDGING.contains(&name.as_str()) => return None,
        Some(name) if USER_SPACE.iter().any(|word| name.contains(word)) => {
            let why = "is one of a switch in user space: nothing on the node can see the guest's \
                       frames on it or hand them over";
            return certain("VhostUser", why);
        }
        Some(_) => format!(
            "is bound by the plugin {}, which is not known here: whether the guest keeps its \
             address, and OVN sees its frames, is the plugin's to say",
            plugin.unwrap_or_default()
        ),
        None => "is bound in a way that is not known here: whether the guest keeps its address, \
                 and OVN sees its frames, cannot be told"
            .to_owned(),
    };
    Some(Flaw {
        certain: false,
        reason: "UnknownBinding",
        why,
    })
}
