//! Whether a guest's announcement, when it has moved, comes through a port.

use super::Inputs;
use crate::api::HandoverSpec;
use crate::kubevirt::Interface;
use crate::ovn::PortRow;

/// Whether what a guest announces comes through this port.
///
/// Behind masquerade it stays in the pod. KubeVirt has masquerade on the pod's network only, so a
/// port whose name says that it is of another network is not behind it, and neither is one with the
/// MAC of another interface. Of a port that nothing is known of it is taken to be behind it: then OVN
/// delivers twice for a moment, where else the guest would be cut off.
pub(super) fn announces(inputs: &Inputs<'_>, spec: &HandoverSpec, row: &PortRow) -> bool {
    let vmi = inputs.objects.vmi.as_ref();
    let interfaces = vmi.map(|vmi| vmi.interfaces()).unwrap_or_default();
    let (behind, others): (Vec<_>, Vec<_>) = interfaces
        .iter()
        .partition(|interface| interface.masquerade.is_some());
    if behind.is_empty() {
        return true;
    }
    if others.iter().any(|interface| has_mac_of(row, interface)) {
        return true;
    }
    let namespace = vmi.and_then(|vmi| vmi.metadata.namespace.as_deref());
    let of_pod_network = format!("{}.{}.", spec.vm.name, namespace.unwrap_or_default());
    !others.is_empty() && row.name.as_str().starts_with(&of_pod_network)
}

fn has_mac_of(row: &PortRow, interface: &Interface) -> bool {
    let Some(mac) = &interface.mac_address else {
        return false;
    };
    let macs = row.addresses.iter();
    let mut macs = macs.filter_map(|element| element.split_whitespace().next());
    macs.any(|known| known.eq_ignore_ascii_case(mac))
}
