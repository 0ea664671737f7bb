//! The network cards of a VMI as the node sees them: which OVN port, which MAC.

use std::{collections::BTreeMap, net::IpAddr};

use kube::ResourceExt as _;
use serde::{Deserialize, Serialize};

use super::{Error, VirtualMachineInstance};

/// Annotation of a VMI: JSON, from an interface's name to its [`Port`]. Interfaces that it does not name have the port
/// that Kube-OVN would give them.
pub const PORTS_ANNOTATION: &str = "scenarios.segue.io/ports";

/// What the annotation [`PORTS_ANNOTATION`] says of an interface, like
/// `{"default": {"ifaceId": "vm0", "addresses": ["10.0.0.5"]}}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Port {
    /// The name of the logical switch port: `external_ids:iface-id` of the Open vSwitch interface. Unset, it is
    /// `<vm>.<namespace>` on the pod network, and `<vm>.<namespace>.<name>.<namespace>.ovn` on Multus' network
    /// `<namespace>/<name>`, as Kube-OVN names the ports of VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iface_id: Option<String>,
    /// Whether the port is the pod's and not the VM's: each pod of the VM has another. `iface_id` then names what they
    /// have in common.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub of_pod: bool,
    /// Whether the ports of the pods are not to say whose they are.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unlabelled: bool,
    /// What the guest has there; shown in the status of the VMI and of its pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
}

/// A network card, and the OVN port that it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The interface's name in the VMI.
    pub name: String,
    /// The logical switch port.
    pub iface_id: String,
    /// Whether that is only what the ports of the VM's pods have in common, and each pod has a port of its own.
    pub of_pod: bool,
    /// Whose card it is, `<namespace>/<vm>`, where the ports of the pods are to say so.
    pub vm: Option<String>,
    /// As the VMI has it.
    pub mac: String,
    /// What the guest has there, where the annotation tells.
    pub addresses: Vec<IpAddr>,
}

/// The network cards of a VMI, in its order.
///
/// # Errors
/// When an interface has no MAC address (without one the guest would get another on the target) or no network, or
/// when the annotation is malformed or names an interface that is not there.
pub fn nics(vmi: &VirtualMachineInstance) -> Result<Vec<Nic>, Error> {
    let (name, namespace) = (vmi.name_any(), vmi.namespace().unwrap_or_default());
    let malformed = |reason: String| Error::Vmi {
        vmi: format!("{namespace}/{name}"),
        reason,
    };
    let mut ports: BTreeMap<String, Port> = match vmi.annotations().get(PORTS_ANNOTATION) {
        Some(json) => serde_json::from_str(json)
            .map_err(|error| malformed(format!("annotation {PORTS_ANNOTATION}: {error}")))?,
        None => BTreeMap::new(),
    };
    let mut nics = Vec::new();
    for interface in &vmi.spec.domain.devices.interfaces {
        let network = vmi
            .spec
            .networks
            .iter()
            .find(|network| network.name == interface.name);
        let Some(network) = network else {
            return Err(malformed(format!(
                "interface {} has no network of its name",
                interface.name
            )));
        };
        let Some(mac) = interface.mac_address.clone() else {
            return Err(malformed(format!(
                "interface {} has no macAddress",
                interface.name
            )));
        };
        let port = ports.remove(&interface.name).unwrap_or_default();
        let iface_id = port.iface_id.unwrap_or_else(|| match &network.multus {
            None => format!("{name}.{namespace}"),
            Some(multus) => {
                let (of, attachment) = multus
                    .network_name
                    .split_once('/')
                    .unwrap_or((&namespace, &multus.network_name));
                format!("{name}.{namespace}.{attachment}.{of}.ovn")
            }
        });
        nics.push(Nic {
            name: interface.name.clone(),
            iface_id,
            of_pod: port.of_pod,
            vm: (!port.unlabelled).then(|| format!("{namespace}/{name}")),
            mac,
            addresses: port.addresses,
        });
    }
    match ports.into_keys().next() {
        None => Ok(nics),
        Some(stray) => Err(malformed(format!(
            "annotation {PORTS_ANNOTATION}: there is no interface {stray}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vmi(ports: Option<&str>) -> VirtualMachineInstance {
        let annotations = ports.map(|ports| json!({PORTS_ANNOTATION: ports}));
        serde_json::from_value(json!({
            "metadata": {"name": "vm0", "namespace": "tenant", "annotations": annotations},
            "spec": {
                "domain": {"devices": {"interfaces": [
                    {"name": "default", "macAddress": "02:00:00:00:00:01", "bridge": {}},
                    {"name": "blue", "macAddress": "02:00:00:00:00:02", "bridge": {}},
                    {"name": "red", "macAddress": "02:00:00:00:00:03", "bridge": {}},
                ]}},
                "networks": [
                    {"name": "default", "pod": {}},
                    {"name": "blue", "multus": {"networkName": "blue-net"}},
                    {"name": "red", "multus": {"networkName": "infra/red-net"}},
                ],
            },
        }))
        .unwrap()
    }

    #[test]
    fn ports_are_named_as_kube_ovn_names_them_unless_told_otherwise() {
        let ids = |vmi| {
            nics(&vmi)
                .unwrap()
                .into_iter()
                .map(|nic| nic.iface_id)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            ids(vmi(None)),
            [
                "vm0.tenant",
                "vm0.tenant.blue-net.tenant.ovn",
                "vm0.tenant.red-net.infra.ovn"
            ]
        );
        let told = vmi(Some(
            r#"{"blue": {"ifaceId": "port-b", "addresses": ["10.0.0.5", "fd00::5"]}}"#,
        ));
        assert_eq!(
            ids(told.clone()),
            ["vm0.tenant", "port-b", "vm0.tenant.red-net.infra.ovn"]
        );
        assert_eq!(nics(&told).unwrap()[1].addresses.len(), 2);
    }

    #[test]
    fn what_is_wrong_is_named_with_the_vmi() {
        let error = |vmi| nics(&vmi).unwrap_err().to_string();
        assert!(
            error(vmi(Some("{")))
                .starts_with("VMI tenant/vm0: annotation scenarios.segue.io/ports:")
        );
        assert!(error(vmi(Some(r#"{"green": {}}"#))).contains("there is no interface green"));
        assert!(error(vmi(Some(r#"{"red": {"mac": "x"}}"#))).contains("unknown field `mac`"));
        let mut without_mac = vmi(None);
        without_mac.spec.domain.devices.interfaces[1].mac_address = None;
        assert!(error(without_mac).contains("interface blue has no macAddress"));
        let mut without_network = vmi(None);
        without_network.spec.networks.remove(0);
        assert!(error(without_network).contains("interface default has no network"));
    }
}
