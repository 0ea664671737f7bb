//! The networks that VMs are on, with the client on each.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::lab::routed::{self, RoutedNetwork};
use crate::lab::topology::{SharedSwitch, Subnet};
use crate::lab::{Lab, Nic};
use crate::scenario::{FoundBy, Gateway, Layout, PortsOf, Scenario, Topology, Vm};

/// Host numbers of guests in each subnet; the client has a lower one.
pub(super) const FIRST_HOST: u8 = 10;

/// The networks of a lab. Those of both topologies are there side by side.
pub(super) struct Networks<'a> {
    lab: &'a Lab,
    switches: Vec<SharedSwitch<'a>>,
    routed: Option<RoutedNetwork<'a>>,
    arp_proxy: Option<PathBuf>,
}

/// Where a VM's port is.
enum Network<'n, 'a> {
    Shared(&'n SharedSwitch<'a>),
    Routed(&'n RoutedNetwork<'a>),
}

impl<'a> Networks<'a> {
    /// The first shared network, created unless it is there: the client is plugged into it already.
    pub(super) async fn open(lab: &'a Lab) -> Result<Self> {
        let first = SharedSwitch::ensure(lab, Subnet(0)).await?;
        Ok(Self {
            lab,
            switches: vec![first],
            routed: None,
            arp_proxy: None,
        })
    }

    /// The program that answers for gateways where OVN is not to.
    pub(super) fn with_arp_proxy(self, arp_proxy: Option<PathBuf>) -> Self {
        Self { arp_proxy, ..self }
    }

    /// Makes what a scenario needs, unless it is there.
    pub(super) async fn prepare(&mut self, scenario: &Scenario) -> Result<()> {
        let ports = scenario.vms.iter().map(|vm| vm.ports).max().unwrap_or(1);
        self.ensure_shared(ports).await?;
        if scenario.topology == Topology::Shared {
            return Ok(());
        }
        let gateway = match (scenario.gateway, &self.arp_proxy) {
            (Gateway::Ovn, _) => routed::Gateway::Ovn,
            (Gateway::ArpProxy, Some(program)) => routed::Gateway::ArpProxy(program.clone()),
            (Gateway::ArpProxy, None) => {
                anyhow::bail!("gateway: arp_proxy: there is no arp-proxy; --arp-proxy names it")
            }
        };
        let network = RoutedNetwork::ensure(self.lab, &gateway).await?;
        network.set_snat(scenario.snat).await?;
        self.routed = Some(network);
        Ok(())
    }

    /// The lowest host number that no guest has on the first network.
    pub(super) async fn free_host(&self) -> Result<u8> {
        let first = self.switches.first().context("no network")?;
        first.free_host(FIRST_HOST).await
    }

    /// The routed network, of a scenario that is of that topology.
    pub(super) fn routed(&self) -> Result<&RoutedNetwork<'a>> {
        self.routed
            .as_ref()
            .context("there is no routed network in this lab yet")
    }

    /// Makes sure that there are `count` shared networks.
    async fn ensure_shared(&mut self, count: u8) -> Result<()> {
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

    fn of_port(&self, topology: Topology, number: u8) -> Result<Network<'_, 'a>> {
        if topology == Topology::Routed && number == 0 {
            return Ok(Network::Routed(self.routed()?));
        }
        let switch = self.switches.get(usize::from(number));
        Ok(Network::Shared(switch.context("no such network")?))
    }

    /// Adds the ports of a VM, but those of its pods and those that a CNI makes, and returns its interfaces. `host` is the guest's
    /// number in every subnet.
    pub(super) async fn add_ports(&self, layout: Layout, vm: &Vm, host: u8) -> Result<Vec<Nic>> {
        let mut nics = Vec::new();
        let key = vm.key();
        let label: &[_] = match vm.found_by {
            FoundBy::Label => &[("segue.io/vm", key.as_str())],
            FoundBy::KubeOvnName | FoundBy::Nothing => &[],
        };
        for number in 0..vm.ports {
            let lsp = lsp_name(vm, number);
            let of_pods = number == 0 && layout.ports_of == PortsOf::Pod;
            let nic = match self.of_port(layout.topology, number)? {
                Network::Shared(switch) => {
                    let nic = switch.subnet().nic(&lsp, host);
                    if !of_pods && layout.cni.is_none() {
                        switch.add_port(&nic, label).await?;
                    }
                    nic
                }
                Network::Routed(network) => {
                    let nic = network.nic(&lsp, &vm.node, host)?;
                    if !of_pods {
                        network.add_port(&nic, label).await?;
                    }
                    nic
                }
            };
            nics.push(nic);
        }
        Ok(nics)
    }

    /// The client's addresses on the networks of a VM with so many ports.
    pub(super) fn client_addresses(&self, topology: Topology, ports: u8) -> Result<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for number in 0..ports {
            let nic = match self.of_port(topology, number)? {
                Network::Shared(switch) => switch.subnet().client(),
                Network::Routed(network) => network.client()?,
            };
            addresses.extend(nic.addresses());
        }
        Ok(addresses)
    }

    /// Removes the ports of a VM as far as they are there.
    pub(super) async fn remove_ports(&self, topology: Topology, vm: &Vm) -> Result<()> {
        for number in 0..vm.ports {
            let lsp = lsp_name(vm, number);
            match self.of_port(topology, number) {
                Ok(Network::Shared(switch)) => switch.del_port(&lsp).await?,
                Ok(Network::Routed(network)) => network.del_port(&lsp).await?,
                // Nothing can be on a network that there is not.
                Err(_) => {}
            }
        }
        Ok(())
    }
}

/// The name of a VM's port on network `number`.
fn lsp_name(vm: &Vm, number: u8) -> String {
    let (name, namespace) = (&vm.name, &vm.namespace);
    match (vm.found_by, number) {
        (FoundBy::Label | FoundBy::Nothing, _) => format!("{namespace}-{name}-{number}"),
        (FoundBy::KubeOvnName, 0) => format!("{name}.{namespace}"),
        (FoundBy::KubeOvnName, _) => format!("{name}.{namespace}.net{number}.{namespace}.ovn"),
    }
}

/// The names of all its ports.
pub(super) fn ports_of(vm: &Vm) -> Vec<String> {
    (0..vm.ports).map(|number| lsp_name(vm, number)).collect()
}
