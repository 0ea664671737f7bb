//! VMs of a scenario: their ports, their objects, their guests.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use kube::api::PostParams;
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use tokio::time::timeout;

use crate::cluster::{self, VmPort};
use crate::cni::kube_ovn;
use crate::kubevirt::{VirtualMachineInstance, VmiPhase};
use crate::lab::{Lab, Nic};
use crate::report::Tried;
use crate::scenario::{Cni, Family, FoundBy, Layout, PortsOf, Requested, Topology, Vm};

use super::flows::of_family;
use super::inside;
use super::networks::Networks;
use super::ovn::{Ovn, PortView};
use super::place::{self, Placed};

/// An emulated guest boots in a few seconds, in more on a busy machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(90);

/// A VM that runs.
pub(super) struct RunningVm {
    /// What the scenario says of it.
    pub spec: Vm,
    /// Its domain.
    pub domain: String,
    /// Its interfaces, the first on the pod network.
    pub nics: Vec<Nic>,
    /// How its network is laid out.
    pub layout: Layout,
    /// How its ports were before the first migration, by name.
    pub before: BTreeMap<String, PortView>,
    /// Where flows through a load balancer go, by the flow's name.
    pub node_ports: BTreeMap<String, Vec<SocketAddr>>,
    /// What came of forbidden flows before they were forbidden, by name.
    pub proofs: BTreeMap<String, Tried>,
}

impl RunningVm {
    /// Creates the ports and the VMI, and returns once the guest answers on all its addresses. `host` is the guest's
    /// number in every subnet.
    pub(super) async fn start(
        lab: &Lab,
        client: Client,
        networks: &Networks<'_>,
        ovn: &Ovn,
        layout: Layout,
        host: u8,
        spec: &Vm,
    ) -> Result<Self> {
        let nics = networks.add_ports(layout, spec, host).await?;
        if spec.requested_chassis == Requested::Node {
            let option = format!("requested-chassis={}", spec.node);
            // A pod's own port is there once the pod is, and asks for its node from the start.
            for nic in nics.iter().skip(own_ports(layout)) {
                lab.nbctl(["lsp-set-options", &nic.lsp, &option]).await?;
            }
        }
        create_vmi(client, spec, &nics, layout).await?;
        let mut vm = Self {
            domain: format!("{}_{}", spec.namespace, spec.name),
            spec: spec.clone(),
            layout,
            nics,
            before: BTreeMap::new(),
            node_ports: BTreeMap::new(),
            proofs: BTreeMap::new(),
        };
        vm.wait_reachable(lab, ovn).await?;
        Ok(vm)
    }

    /// Returns once its traffic has its place on a node, in the routed topology.
    pub(super) async fn placed_on(&self, ovn: &Ovn, node: &str) -> Result<()> {
        place::settled(ovn, &self.placed(), Some(node)).await
    }

    /// Returns once every port is bound where the VM starts and the guest answers, and remembers how
    /// the ports are then.
    async fn wait_reachable(&mut self, lab: &Lab, ovn: &Ovn) -> Result<()> {
        let bound = async {
            let mut changed = ovn.changed();
            loop {
                let views: Vec<_> = self.ports().filter_map(|port| ovn.port(port)).collect();
                let here = |view: &PortView| view.chassis.as_ref() == Some(&self.spec.node);
                if views.len() == self.nics.len() && views.iter().all(here) {
                    return;
                }
                changed.next().await;
            }
        };
        timeout(BOOT_DEADLINE, bound)
            .await
            .with_context(|| format!("the ports of {} were not bound in time", self.spec.key()))?;
        let client = lab.host("client")?;
        for address in self.addresses() {
            inside::answers(client, address).await?;
        }
        let views = self.ports().map(|port| {
            let view = ovn
                .port(port)
                .with_context(|| format!("port {port} is gone"))?;
            Ok((port.to_owned(), view))
        });
        self.before = views.collect::<Result<_>>()?;
        Ok(())
    }

    /// Names of its logical switch ports, or what those of its pods have in common.
    pub(super) fn ports(&self) -> impl Iterator<Item = &str> {
        self.nics.iter().map(|nic| nic.lsp.as_str())
    }

    /// All its addresses.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.nics.iter().flat_map(Nic::addresses)
    }

    /// Its addresses on the routed network.
    pub(super) fn routed(&self) -> Vec<IpAddr> {
        let routed = self.layout.topology == Topology::Routed;
        let first = self.nics.first().filter(|_| routed);
        first.into_iter().flat_map(Nic::addresses).collect()
    }

    /// What is to follow it there.
    pub(super) fn placed(&self) -> Placed {
        Placed {
            addresses: self.routed(),
            ports_of: self.layout.ports_of,
        }
    }

    /// The load balancer's address for a flow.
    pub(super) fn node_port(&self, flow: &str, family: Family) -> Result<SocketAddr> {
        let ports = self.node_ports.get(flow).into_iter().flatten();
        let mut wanted = ports.filter(|port| port.is_ipv4() == (family == Family::Ipv4));
        let port = wanted.next().copied();
        port.with_context(|| format!("flow {flow} has no {family:?} load balancer"))
    }

    /// The address that is probed: its first port's.
    pub(super) fn probed(&self, family: Family) -> Result<IpAddr> {
        self.probed_at(0, family)
    }

    /// The address of one of its ports that is probed.
    pub(super) fn probed_at(&self, port: u8, family: Family) -> Result<IpAddr> {
        let nic = self.nics.get(usize::from(port));
        nic.and_then(|nic| of_family(nic.addresses(), family))
            .with_context(|| {
                format!(
                    "{} has no {family:?} address at port {port}",
                    self.spec.key()
                )
            })
    }
}

/// How many of a VM's ports, the first ones, are those of its pods.
fn own_ports(layout: Layout) -> usize {
    match layout.ports_of {
        PortsOf::Vm => 0,
        PortsOf::Pod => 1,
    }
}

async fn create_vmi(client: Client, spec: &Vm, nics: &[Nic], layout: Layout) -> Result<()> {
    let of_pod = own_ports(layout);
    let ports: Vec<_> = nics
        .iter()
        .enumerate()
        .map(|(number, nic)| VmPort {
            interface: if number == 0 {
                "default".to_owned()
            } else {
                format!("net{number}")
            },
            lsp: nic.lsp.clone(),
            of_pod: number < of_pod,
            unlabelled: spec.found_by == FoundBy::Nothing,
            mac: nic.mac.to_string(),
            addresses: nic.addresses().collect(),
        })
        .collect();
    let (namespace, name) = (&spec.namespace, &spec.name);
    cluster::ensure_namespace(client.clone(), namespace).await?;
    let mut object = cluster::vmi(namespace, name, spec.memory_mib, &ports)?;
    if let Some(Cni::KubeOvn) = layout.cni {
        cluster::own(client.clone(), &mut object).await?;
        kube_ovn::ask_for(&mut object, nics)?;
    }
    cluster::cordon_all_but(client.clone(), Some(&spec.node)).await?;
    let booted = boot(client.clone(), spec, &object).await;
    cluster::cordon_all_but(client, None).await?;
    booted
}

/// Creates a VMI and returns once it runs.
async fn boot(client: Client, spec: &Vm, object: &VirtualMachineInstance) -> Result<()> {
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(client, &spec.namespace);
    let created = vmis.create(&PostParams::default(), object).await;
    created.map_err(|error| match error {
        // What the API says of an object is for whoever named it; the rest of the answer is not.
        kube::Error::Api(status) => anyhow!("VMI {}: {}", spec.key(), status.message),
        error => anyhow::Error::new(error).context(format!("create VMI {}", spec.key())),
    })?;
    let phase = |vmi: &VirtualMachineInstance| vmi.status.as_ref().and_then(|status| status.phase);
    let settled = |vmi: Option<&VirtualMachineInstance>| {
        matches!(
            vmi.and_then(phase),
            Some(VmiPhase::Running | VmiPhase::Failed)
        )
    };
    let vmi = timeout(BOOT_DEADLINE, await_condition(vmis, &spec.name, settled))
        .await
        .with_context(|| format!("{} did not boot in time", spec.key()))??;
    let phase = vmi.as_ref().and_then(phase);
    ensure!(
        phase == Some(VmiPhase::Running),
        "{} is {phase:?}",
        spec.key()
    );
    Ok(())
}

/// Deletes a VMI and its ports as far as they are there, and returns once the guest is gone.
pub(super) async fn remove(
    client: Client,
    networks: &Networks<'_>,
    topology: Topology,
    spec: &Vm,
) -> Result<()> {
    let deleted = cluster::delete_vm(client, &spec.namespace, &spec.name).await;
    networks.remove_ports(topology, spec).await?;
    deleted
}

/// The node that a VM runs on, as the API tells.
pub(super) async fn node_of(client: Client, vm: &Vm) -> Result<String> {
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(client, &vm.namespace);
    let vmi = vmis.get(&vm.name).await.with_context(|| vm.key())?;
    let node = vmi.status.and_then(|status| status.node_name);
    node.with_context(|| format!("{} has no node", vm.key()))
}
