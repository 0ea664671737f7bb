//! VMs of a scenario: their ports, their objects, their guests.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use kube::api::PostParams;
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use tokio::time::timeout;

use crate::cluster::{self, VmPort};
use crate::kubevirt::{VirtualMachineInstance, VmiPhase};
use crate::lab::topology::{SharedSwitch, Subnet};
use crate::lab::{Lab, Nic};
use crate::scenario::{Family, FoundBy, Requested, Vm};

use super::inside;
use super::ovn::{Ovn, PortView};

/// Host numbers of guests in each subnet; the client has a lower one.
pub(super) const FIRST_HOST: u8 = 10;
/// An emulated guest boots in a few seconds, in more on a busy machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(90);

/// The networks of a lab, with the client on each.
pub(super) struct Networks<'a> {
    lab: &'a Lab,
    switches: Vec<SharedSwitch<'a>>,
}

/// A VM that runs.
pub(super) struct RunningVm {
    /// What the scenario says of it.
    pub spec: Vm,
    /// Its domain.
    pub domain: String,
    /// Its interfaces, the first on the pod network.
    pub nics: Vec<Nic>,
    /// How its ports were before the first migration, by name.
    pub before: BTreeMap<String, PortView>,
}

impl<'a> Networks<'a> {
    /// The first network, created unless it is there: the client is plugged into it already.
    pub(super) async fn open(lab: &'a Lab) -> Result<Self> {
        let first = SharedSwitch::ensure(lab, Subnet(0)).await?;
        Ok(Self {
            lab,
            switches: vec![first],
        })
    }

    /// The lowest host number that no guest has on the first network.
    pub(super) async fn free_host(&self) -> Result<u8> {
        let first = self.switches.first().context("no network")?;
        first.free_host(FIRST_HOST).await
    }

    /// Makes sure that there are `count` networks.
    pub(super) async fn ensure(&mut self, count: u8) -> Result<()> {
        for number in u8::try_from(self.switches.len())?..count {
            let switch = SharedSwitch::create(self.lab, Subnet(number)).await?;
            let interface = format!("eth{number}");
            self.lab
                .plug_client(&interface, &switch.subnet().client())
                .await?;
            self.switches.push(switch);
        }
        Ok(())
    }

    fn with_ports(&self, vm: &Vm) -> impl Iterator<Item = &SharedSwitch<'a>> {
        self.switches.iter().take(usize::from(vm.ports))
    }
}

/// The name of a VM's port on network `number`.
fn lsp_name(vm: &Vm, number: u8) -> String {
    let (name, namespace) = (&vm.name, &vm.namespace);
    match (vm.found_by, number) {
        (FoundBy::Label, _) => format!("{namespace}-{name}-{number}"),
        (FoundBy::KubeOvnName, 0) => format!("{name}.{namespace}"),
        (FoundBy::KubeOvnName, _) => format!("{name}.{namespace}.net{number}.{namespace}.ovn"),
    }
}

/// The names of all its ports.
pub(super) fn ports_of(vm: &Vm) -> Vec<String> {
    (0..vm.ports).map(|number| lsp_name(vm, number)).collect()
}

impl RunningVm {
    /// Creates the ports and the VMI, and returns once the guest answers on all its addresses.
    /// `host` is the guest's number in every subnet.
    pub(super) async fn start(
        lab: &Lab,
        client: Client,
        networks: &mut Networks<'_>,
        ovn: &Ovn,
        host: u8,
        spec: &Vm,
    ) -> Result<Self> {
        networks.ensure(spec.ports).await?;
        let mut nics = Vec::new();
        for switch in networks.with_ports(spec) {
            let nic = switch
                .subnet()
                .nic(&lsp_name(spec, switch.subnet().0), host);
            let key = spec.key();
            let label: &[_] = match spec.found_by {
                FoundBy::Label => &[("segue.io/vm", key.as_str())],
                FoundBy::KubeOvnName => &[],
            };
            switch.add_port(&nic, label).await?;
            if spec.requested_chassis == Requested::Node {
                let option = format!("requested-chassis={}", spec.node);
                lab.nbctl(["lsp-set-options", &nic.lsp, &option]).await?;
            }
            nics.push(nic);
        }
        create_vmi(client, spec, &nics).await?;
        let mut vm = Self {
            domain: format!("{}_{}", spec.namespace, spec.name),
            spec: spec.clone(),
            nics,
            before: BTreeMap::new(),
        };
        vm.wait_reachable(lab, ovn).await?;
        Ok(vm)
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

    /// Names of its logical switch ports.
    pub(super) fn ports(&self) -> impl Iterator<Item = &str> {
        self.nics.iter().map(|nic| nic.lsp.as_str())
    }

    /// All its addresses.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.nics.iter().flat_map(addresses_of)
    }

    /// The address that is probed.
    pub(super) fn probed(&self, family: Family) -> Result<IpAddr> {
        let wanted = |address: &IpAddr| address.is_ipv4() == (family == Family::Ipv4);
        self.addresses()
            .find(wanted)
            .with_context(|| format!("{} has no {family:?} address", self.spec.key()))
    }
}

fn addresses_of(nic: &Nic) -> impl Iterator<Item = IpAddr> + use<> {
    let v4 = nic.v4.map(|(address, _)| IpAddr::V4(address));
    let v6 = nic.v6.map(|(address, _)| IpAddr::V6(address));
    v4.into_iter().chain(v6)
}

async fn create_vmi(client: Client, spec: &Vm, nics: &[Nic]) -> Result<()> {
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
            mac: nic.mac.to_string(),
            addresses: addresses_of(nic).collect(),
        })
        .collect();
    let (namespace, name) = (&spec.namespace, &spec.name);
    cluster::ensure_namespace(client.clone(), namespace).await?;
    let object = cluster::vmi(namespace, name, spec.memory_mib, &ports)?;
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
pub(super) async fn remove(client: Client, networks: &Networks<'_>, spec: &Vm) -> Result<()> {
    let deleted = cluster::delete_vm(client, &spec.namespace, &spec.name).await;
    for switch in networks.with_ports(spec) {
        switch.del_port(&lsp_name(spec, switch.subnet().0)).await?;
    }
    deleted
}

/// The node that a VM runs on, as the API tells.
pub(super) async fn node_of(client: Client, vm: &Vm) -> Result<String> {
    let vmis: Api<VirtualMachineInstance> = Api::namespaced(client, &vm.namespace);
    let vmi = vmis.get(&vm.name).await.with_context(|| vm.key())?;
    let node = vmi.status.and_then(|status| status.node_name);
    node.with_context(|| format!("{} has no node", vm.key()))
}
