//! What the controller writes when a pod of a VM comes, changes or goes.

use std::collections::BTreeMap;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::cache::Cache;
use super::groups;
use super::write::{Columns, Write};
use super::{CLUSTER_ROUTER, PROVIDER, VENDOR, VENDOR_KEY};
use crate::kubevirt::{VirtualMachineInstance, names};
use crate::lab::Nic;
use crate::lab::topology::Subnet;

/// Annotations of a network: `<provider>.kubernetes.io/<what>` (`pkg/util/const.go`).
pub(super) fn annotation(provider: &str, what: &str) -> String {
    format!("{provider}.kubernetes.io/{what}")
}

/// What there is to write for a pod: to the Northbound, and then to the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Writes {
    pub(super) north: Vec<Write>,
    pub(super) annotations: BTreeMap<String, String>,
}

/// One of a pod's networks that Kube-OVN serves.
struct Network<'p> {
    /// `ovn`, or `<attachment>.<namespace>.ovn`.
    provider: &'p str,
    /// The logical switch, which has the subnet's name.
    subnet: &'p str,
}

/// What there is of a VM beside its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    /// The VirtualMachineInstance.
    pub(super) vmi: State,
    /// It says that a VirtualMachine owns it.
    pub(super) is_owned: bool,
    /// The VirtualMachine of its name.
    pub(super) vm: State,
}

/// What there is of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Present,
    Deleting,
    Absent,
}

impl Owner {
    /// Nothing of the VM is to stay (`isVMToDel`).
    pub(super) fn is_going(self) -> bool {
        match self.vmi {
            State::Present => false,
            State::Deleting if !self.is_owned => true,
            State::Deleting | State::Absent => self.vm != State::Present,
        }
    }
}

/// The VM whose pod it is (`isVMPod`).
pub(super) fn vm(pod: &Pod) -> Option<&str> {
    let owners = pod.owner_references();
    let vmi = owners.iter().find(|owner| {
        owner.kind == "VirtualMachineInstance" && owner.api_version.starts_with("kubevirt.io/")
    })?;
    Some(&vmi.name)
}

/// Its node, if it has one.
pub(super) fn node(pod: &Pod) -> Option<&String> {
    let node = pod.spec.as_ref()?.node_name.as_ref()?;
    (!node.is_empty()).then_some(node)
}

/// It has not ended (`isPodAlive`). A launcher is never started again.
pub(super) fn is_alive(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

fn has(pod: &Pod, provider: &str, what: &str, value: &str) -> bool {
    let annotation = annotation(provider, what);
    pod.annotations()
        .get(&annotation)
        .is_some_and(|has| has == value)
}

/// Whether a pod that is new to the controller is worked on (`podNeedSync`): not where that was done.
pub(super) fn needs_sync(pod: &Pod) -> bool {
    !has(pod, PROVIDER, "routed", "true")
}

fn networks(pod: &Pod) -> impl Iterator<Item = Network<'_>> {
    let annotations = pod.annotations().iter();
    annotations.filter_map(|(key, subnet)| {
        let provider = key.strip_suffix(".kubernetes.io/logical_switch")?;
        Some(Network { provider, subnet })
    })
}

/// `<vm>.<namespace>[.<provider>]` (`pkg/ovs/util.go`, `PodNameToPortName`).
fn port_name(pod: &Pod, provider: &str) -> Option<String> {
    let (vm, namespace) = (vm(pod)?, pod.namespace()?);
    Some(if provider == PROVIDER {
        format!("{vm}.{namespace}")
    } else {
        format!("{vm}.{namespace}.{provider}")
    })
}

/// Names of the ports of a pod to which addresses were given.
pub(super) fn allocated_ports(pod: &Pod) -> impl Iterator<Item = String> {
    let given = networks(pod).filter(|net| has(pod, net.provider, "allocated", "true"));
    given.filter_map(|net| port_name(pod, net.provider))
}

/// Names of the ports that a pod has on a subnet.
pub(super) fn ports_on(pod: &Pod, subnet: &str) -> impl Iterator<Item = String> {
    let there = networks(pod).filter(move |net| net.subnet == subnet);
    there.filter_map(|net| port_name(pod, net.provider))
}

/// Gives a pod its addresses, and with them its port: once, and the target of a migration at every look
/// (`needAllocateSubnets`, `reconcileAllocateSubnets`). A port that is there is written over.
///
/// # Errors
/// The annotation that the pod lacks: the addresses are those that it asks for.
pub(super) fn allocate(cache: &Cache, pod: &Pod) -> Result<Writes, String> {
    let mut writes = Writes::default();
    let Some(vm) = vm(pod).filter(|_| is_alive(pod)) else {
        return Ok(writes);
    };
    let migrates = pod.annotations().contains_key(names::MIGRATION_JOB_NAME);
    for net in networks(pod) {
        if !migrates && has(pod, net.provider, "allocated", "true") {
            continue;
        }
        let asked = |what: &str| {
            let annotation = annotation(net.provider, what);
            let value = pod.annotations().get(&annotation).cloned();
            value.ok_or(annotation)
        };
        let (ip, mac) = (asked("ip_address")?, asked("mac_address")?);
        if let Some(name) = port_name(pod, net.provider) {
            let columns = columns(pod, vm, name, &net, (&mac, &ip));
            writes.north.push(match cache.port(&columns.name) {
                Some((port, _)) => Write::Replace { port, columns },
                None => Write::Create {
                    switch: net.subnet.to_owned(),
                    columns,
                },
            });
        }
        for (what, value) in [
            ("ip_address", ip.as_str()),
            ("mac_address", &mac),
            ("logical_router", CLUSTER_ROUTER),
            ("allocated", "true"),
            ("virtualmachine", vm),
        ] {
            let annotation = annotation(net.provider, what);
            writes.annotations.insert(annotation, value.to_owned());
        }
    }
    Ok(writes)
}

/// `buildLogicalSwitchPort`, of a subnet without DHCP, security groups and virtual addresses.
fn columns(
    pod: &Pod,
    vm: &str,
    name: String,
    net: &Network<'_>,
    (mac, ip): (&str, &str),
) -> Columns {
    let addresses = format!("{mac} {}", ip.replace(',', " "));
    let secured = has(pod, net.provider, "port_security", "true");
    let of = format!("{}/{vm}", pod.namespace().unwrap_or_default());
    let ids = [(VENDOR_KEY, VENDOR), ("pod", &of), ("ls", net.subnet)];
    Columns {
        name,
        port_security: secured.then(|| addresses.clone()),
        addresses,
        external_ids: ids
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
    }
}

/// Leads the traffic of a pod's ports through the gateway of its node, once (`needRouteSubnets`,
/// `reconcileRouteSubnets`).
pub(super) fn route(cache: &Cache, pod: &Pod) -> Writes {
    let mut writes = Writes::default();
    let Some(node) = node(pod).filter(|_| is_alive(pod)) else {
        return writes;
    };
    for net in networks(pod) {
        let is = |what| has(pod, net.provider, what, "true");
        if !is("allocated") || is("routed") {
            continue;
        }
        let name = port_name(pod, net.provider);
        if let Some((port, _)) = name.as_deref().and_then(|name| cache.port(name)) {
            writes
                .north
                .extend(groups::move_to(cache, port, net.subnet, node));
        }
        let routed = annotation(net.provider, "routed");
        writes.annotations.insert(routed, "true".to_owned());
    }
    writes
}

/// Strips the ports of the VM whose pod went, whichever pod that was and whatever the VM does meanwhile. Where the VM
/// stays so do its ports, and their port groups while another pod of it lives; else they go (`handleDeletePod`).
pub(super) fn delete(cache: &Cache, pod: &Pod, owner: Owner, others: &[&Pod]) -> Vec<Write> {
    let Some(name) = vm(pod) else {
        return Vec::new();
    };
    let key = format!("{}/{name}", pod.namespace().unwrap_or_default());
    let ports: Vec<_> = cache.ports_of(&key).collect();
    let pinned = ports
        .iter()
        .filter(|(_, row)| row.options.contains_key(super::REQUESTED));
    let mut writes: Vec<_> = pinned
        .map(|(port, row)| {
            let mut options = row.options.clone();
            options.remove(super::REQUESTED);
            options.remove(super::STRATEGY);
            Write::Options {
                port: *port,
                options,
            }
        })
        .collect();
    // The VM has to be a VirtualMachine: `appendCheckPodNetToDel` asks for nothing else.
    let stays =
        pod.metadata.deletion_timestamp.is_some() && !owner.is_going() && owner.vm != State::Absent;
    let has_sibling = others.iter().any(|other| {
        other.namespace() == pod.namespace()
            && other.name_any() != pod.name_any()
            && vm(other) == Some(name)
            && is_alive(other)
    });
    if !stays {
        writes.extend(ports.iter().map(|(port, _)| Write::Delete { port: *port }));
    } else if !has_sibling {
        writes.extend(
            ports
                .iter()
                .map(|(port, _)| groups::leave_all(cache, *port)),
        );
    }
    writes
}

/// Has the pods of a VMI ask for the addresses of these interfaces, one for each network: they get its annotations.
///
/// # Errors
/// When an interface is on no subnet of the lab's.
pub(crate) fn ask_for(vmi: &mut VirtualMachineInstance, nics: &[Nic]) -> anyhow::Result<()> {
    let name = format!("{}.{}", vmi.name_any(), vmi.namespace().unwrap_or_default());
    for nic in nics {
        let subnet = Subnet::of(nic).with_context(|| format!("port {} has no subnet", nic.lsp))?;
        let provider = nic.lsp.strip_prefix(&name).unwrap_or_default();
        let provider = provider.strip_prefix('.').unwrap_or(PROVIDER);
        let addresses: Vec<_> = nic.addresses().map(|address| address.to_string()).collect();
        vmi.annotations_mut().extend([
            (annotation(provider, "logical_switch"), subnet.switch()),
            (annotation(provider, "mac_address"), nic.mac.to_string()),
            (annotation(provider, "ip_address"), addresses.join(",")),
        ]);
    }
    Ok(())
}
