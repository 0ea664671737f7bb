//! The objects that an operator, a user and a CNI would make.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions::is_deleted};
use kube::{Api, Client, ResourceExt as _};
use migration_controller::api::Handover;
use serde_json::json;
use tokio::time::timeout;

use crate::kubevirt::{
    PORTS_ANNOTATION, Port, VirtualMachineInstance, VirtualMachineInstanceMigration, names,
    virtual_machine,
};

const MANAGER: &str = "scenarios";
/// A guest is ended at once; the rest is for a busy machine.
const GONE_DEADLINE: Duration = Duration::from_mins(1);

/// A port of a VM: its interface in the VMI and its logical switch port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmPort {
    /// The interface's name in the VMI: `default` for the pod network.
    pub(crate) interface: String,
    /// The logical switch port.
    pub(crate) lsp: String,
    /// Whether each pod has another, and `lsp` is what they have in common.
    pub(crate) of_pod: bool,
    /// Whether the ports of the pods are not to say whose they are.
    pub(crate) unlabelled: bool,
    /// The guest's Ethernet address.
    pub(crate) mac: String,
    /// The guest's addresses.
    pub(crate) addresses: Vec<IpAddr>,
}

/// A VMI as a user would write it, free to run on any node.
pub(crate) fn vmi(
    namespace: &str,
    name: &str,
    memory_mib: u32,
    ports: &[VmPort],
) -> Result<VirtualMachineInstance> {
    let told: BTreeMap<_, _> = ports
        .iter()
        .map(|port| {
            let told = Port {
                iface_id: Some(port.lsp.clone()),
                of_pod: port.of_pod,
                unlabelled: port.unlabelled,
                addresses: port.addresses.clone(),
            };
            (port.interface.clone(), told)
        })
        .collect();
    let interfaces: Vec<_> = ports
        .iter()
        .map(|port| json!({"name": port.interface, "macAddress": port.mac, "bridge": {}}))
        .collect();
    let networks: Vec<_> = ports
        .iter()
        .map(|port| match port.interface.as_str() {
            "default" => json!({"name": "default", "pod": {}}),
            other => json!({"name": other, "multus": {"networkName": other}}),
        })
        .collect();
    let object = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {
            "namespace": namespace,
            "name": name,
            // KubeVirt's webhook would put it there; without it the pods outlive the VMI.
            "finalizers": [names::VMI_FINALIZER],
            "annotations": {
                (names::ALLOW_POD_BRIDGE_MIGRATION): "",
                (PORTS_ANNOTATION): serde_json::to_string(&told).context("ports")?,
            },
        },
        "spec": {
            "domain": {
                "memory": {"guest": format!("{memory_mib}Mi")},
                "devices": {"interfaces": interfaces},
            },
            "networks": networks,
        },
    });
    serde_json::from_value(object).context("a VMI")
}

/// A migration of a VMI to a node, as `virtctl migrate --addedNodeSelector` makes it and virt-api admits it: the real
/// virt-controller leaves label and finalizer to virt-api.
pub(crate) fn vmim(
    namespace: &str,
    name: &str,
    vm: &str,
    node: &str,
) -> VirtualMachineInstanceMigration {
    let mut migration = VirtualMachineInstanceMigration::admitted(namespace, name, vm);
    let selected = ("kubernetes.io/hostname".to_owned(), node.to_owned());
    migration.spec.added_node_selector.extend([selected]);
    migration
}

/// A VirtualMachine that owns a VMI of its name, made unless it is there. Nobody runs it: that it exists is what others
/// go by.
pub(crate) async fn own(client: Client, vmi: &mut VirtualMachineInstance) -> Result<()> {
    let (namespace, name) = (vmi.namespace().unwrap_or_default(), vmi.name_any());
    let vms: Api<DynamicObject> = Api::namespaced_with(client, &namespace, &virtual_machine());
    let object = json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachine",
        "metadata": {"name": name},
        "spec": {"runStrategy": "Manual", "template": {"spec": vmi.spec}},
    });
    let apply = PatchParams::apply(MANAGER);
    let vm = vms.patch(&name, &apply, &Patch::Apply(object)).await;
    let vm = vm.with_context(|| format!("create VM {namespace}/{name}"))?;
    vmi.owner_references_mut().push(OwnerReference {
        api_version: "kubevirt.io/v1".to_owned(),
        kind: "VirtualMachine".to_owned(),
        name,
        uid: vm.uid().context("a VM without UID")?,
        controller: Some(true),
        block_owner_deletion: Some(true),
    });
    Ok(())
}

/// Deletes a VMI, if there is one, with its VM and the migrations that it owned, and returns once it is gone.
pub(crate) async fn delete_vm(client: Client, namespace: &str, name: &str) -> Result<()> {
    let owners: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), namespace, &virtual_machine());
    unless_gone(owners.delete(name, &DeleteParams::default()).await)?;
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(client.clone(), namespace);
    let what = || format!("delete VMI {namespace}/{name}");
    let Some(vmi) = vmis.get_opt(name).await.with_context(what)? else {
        return Ok(());
    };
    let uid = vmi.uid().context("a VMI without UID")?;
    vmis.delete(name, &DeleteParams::default())
        .await
        .with_context(what)?;
    timeout(GONE_DEADLINE, await_condition(vmis, name, is_deleted(&uid)))
        .await
        .with_context(|| format!("VMI {namespace}/{name} is not gone after 60 s"))??;
    collect(client, namespace, name).await
}

/// What Kubernetes' garbage collector, which does not run here, would do once a VMI is gone.
async fn collect(client: Client, namespace: &str, vm: &str) -> Result<()> {
    let migrations: Api<VirtualMachineInstanceMigration> =
        Api::namespaced(client.clone(), namespace);
    let handovers: Api<Handover> = Api::namespaced(client, namespace);
    for migration in migrations.list(&ListParams::default()).await?.items {
        if migration.spec.vmi_name != vm {
            continue;
        }
        let name = migration.name_any();
        unless_gone(migrations.delete(&name, &DeleteParams::default()).await)?;
        unless_gone(handovers.delete(&name, &DeleteParams::default()).await)?;
    }
    Ok(())
}

/// Somebody else may have deleted it in the same moment.
fn unless_gone<T>(deleted: kube::Result<T>) -> Result<()> {
    match deleted {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error).context("collect what a VM left behind"),
    }
}

/// Creates a namespace unless it is there.
pub(crate) async fn ensure_namespace(client: Client, name: &str) -> Result<()> {
    let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
    let namespaces: Api<Namespace> = Api::all(client);
    namespaces
        .patch(name, &PatchParams::apply(MANAGER), &Patch::Apply(object))
        .await
        .with_context(|| format!("create namespace {name}"))?;
    Ok(())
}

/// Cordons every node but one, or none: where a VM starts is the scheduler's choice, and this is how
/// an operator leaves it only one.
pub(crate) async fn cordon_all_but(client: Client, open: Option<&str>) -> Result<()> {
    let nodes: Api<Node> = Api::all(client);
    for node in nodes.list_metadata(&ListParams::default()).await?.items {
        let name = node.name_any();
        let cordoned = open.is_some_and(|open| open != name);
        let patch = json!({"spec": {"unschedulable": cordoned}});
        nodes
            .patch(&name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .with_context(|| format!("cordon node {name}"))?;
    }
    Ok(())
}
