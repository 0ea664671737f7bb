//! What a scenario has beside its VMs: policies, load balancers in front of them, ACLs around them.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;

use crate::lab::isolation::{Allowed, Isolation, Protocol};
use crate::lab::routed::outside_addresses;
use crate::report::Check;
use crate::scenario::{Peer, Scenario};

use super::Bench;
use super::checks::Checks;
use super::flows::prove;
use super::inside::REFLECTOR;
use super::networks::Networks;
use super::vm::RunningVm;

/// The first port of a gateway's load balancers: Kubernetes' range for NodePorts begins at 30,000.
const FIRST_NODE_PORT: u16 = 30_700;

/// What was set up, to be taken down again.
pub(super) struct Surroundings<'a> {
    node_ports: Vec<(String, u16)>,
    isolations: Vec<Isolation<'a>>,
    /// Addresses of the VMs that have a place while the VMs are there.
    placed: Vec<IpAddr>,
}

impl<'a> Surroundings<'a> {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self {
            node_ports: Vec::new(),
            isolations: Vec::new(),
            placed: Vec::new(),
        }
    }

    /// Puts load balancers in front of the VMs and ACLs around them. What the ACLs will forbid is
    /// shown to pass before.
    pub(super) async fn set_up(&mut self, bench: &Bench<'a>, vms: &mut [RunningVm]) -> Result<()> {
        let networks = bench.networks;
        for vm in vms.iter_mut() {
            self.placed.extend(vm.routed());
            self.add_node_ports(bench.scenario, networks, vm).await?;
            prove(bench, vm).await?;
            if vm.spec.isolated {
                let allowed = allowed(bench.scenario, networks, vm)?;
                let lsps: Vec<_> = vm.ports().flat_map(|port| bench.ovn.names(port)).collect();
                let lsps: Vec<_> = lsps.iter().map(String::as_str).collect();
                let name = format!("isolated_{}", vm.spec.name.replace('-', "_"));
                let isolation = Isolation::create(bench.lab, &name, &lsps, &allowed).await?;
                self.isolations.push(isolation);
            }
        }
        Ok(())
    }

    async fn add_node_ports(
        &mut self,
        scenario: &Scenario,
        networks: &Networks<'_>,
        vm: &mut RunningVm,
    ) -> Result<()> {
        for flow in &scenario.flows {
            let Some(node) = &flow.through else { continue };
            for &family in flow.family.each() {
                let port = FIRST_NODE_PORT + u16::try_from(self.node_ports.len())?;
                let target = SocketAddr::new(vm.probed(family)?, REFLECTOR);
                let network = networks.routed()?;
                let address = network.add_node_port(node, port, target).await?;
                self.node_ports.push((node.clone(), port));
                let of_flow = vm.node_ports.entry(flow.name.clone()).or_default();
                of_flow.push(address);
            }
        }
        Ok(())
    }

    /// Addresses that must have no place once the VMs are gone.
    pub(super) fn placed(&self) -> Vec<IpAddr> {
        self.placed.clone()
    }

    /// Takes everything down, and goes on after an error.
    pub(super) async fn take_down(self, networks: &Networks<'_>) -> Vec<Check> {
        let mut checks = Checks::default();
        for isolation in self.isolations {
            checks.worked("the VM's ACLs can be removed", &isolation.remove().await);
        }
        for (node, port) in self.node_ports {
            let removed = match networks.routed() {
                Ok(network) => network.del_node_port(&node, port).await,
                Err(error) => Err(error),
            };
            checks.worked("the load balancer can be removed", &removed);
        }
        checks.0
    }
}

/// Who may reach an isolated VM: the peers of its flows, at the reflector's port.
fn allowed(scenario: &Scenario, networks: &Networks<'_>, vm: &RunningVm) -> Result<Vec<Allowed>> {
    let mut peers = networks.client_addresses(vm.layout.topology, vm.spec.ports)?;
    let open = scenario.flows.iter().filter(|flow| !flow.forbidden);
    if open.clone().any(|flow| flow.peer == Peer::Outside) {
        peers.extend(outside_addresses());
    }
    let both = |peer: IpAddr| {
        [Protocol::Tcp, Protocol::Udp].map(|protocol| Allowed {
            peer,
            protocol,
            port: REFLECTOR,
        })
    };
    Ok(peers.into_iter().flat_map(both).collect())
}
