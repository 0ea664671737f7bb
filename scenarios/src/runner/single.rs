//! One VM in a lab that is left running: for a person, not for a scenario.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use kube::{Api, Client};

use crate::cluster;
use crate::kubevirt::VirtualMachineInstance;
use crate::lab::{Host, Lab};
use crate::scenario::{Layout, PortsOf, Topology, Vm};

use super::networks::{Networks, ports_of};
use super::ovn::Ovn;
use super::vm::{self, RunningVm};

/// The simpler one, for a person to begin with.
const TOPOLOGY: Topology = Topology::Shared;

/// A VM that does not exist yet. The calling process is in central's network namespace.
pub struct SingleVm<'a> {
    lab: &'a Lab,
    client: Client,
    spec: Vm,
}

impl<'a> SingleVm<'a> {
    /// Describes it; nothing is created yet.
    ///
    /// # Errors
    /// When there is no such node, or there is such a VMI already.
    pub async fn new(lab: &'a Lab, client: Client, spec: Vm) -> Result<Self> {
        let nodes: Vec<_> = lab.nodes().map(Host::name).collect();
        ensure!(
            nodes.contains(&spec.node.as_str()),
            "there is no node {:?}; there are {}",
            spec.node,
            nodes.join(", ")
        );
        let vm = Self { lab, client, spec };
        ensure!(
            !vm.exists().await?,
            "there is a VMI {} already: take another name, or delete it",
            vm.spec.key()
        );
        Ok(vm)
    }

    /// Creates its logical switch port and its VMI, and returns its addresses once the guest answers
    /// at all of them.
    ///
    /// # Errors
    /// When the API refuses it, or the guest does not run or answer in time.
    ///
    /// # Cancellation
    /// After an error and after dropping the future, [`tidy`](Self::tidy) undoes what was half done.
    pub async fn start(&self) -> Result<Vec<IpAddr>> {
        let spec = &self.spec;
        let networks = Networks::open(self.lab).await?;
        // The port of an earlier VM of this name.
        vm::remove(self.client.clone(), &networks, TOPOLOGY, spec).await?;
        let host = networks.free_host().await?;
        let ovn = Ovn::follow(self.lab).await?;
        let client = self.client.clone();
        let layout = Layout {
            topology: TOPOLOGY,
            ports_of: PortsOf::Vm,
            cni: None,
        };
        let running =
            RunningVm::start(self.lab, client, &networks, &ovn, layout, host, spec).await?;
        Ok(running.addresses().collect())
    }

    /// Lets pods onto every node again, and removes the port where there is no VMI. A VMI that is
    /// there stays, to be looked at. Returns whether there is one.
    pub async fn tidy(&self) -> Result<bool> {
        cluster::cordon_all_but(self.client.clone(), None).await?;
        let exists = self.exists().await?;
        if !exists {
            let networks = Networks::open(self.lab).await?;
            vm::remove(self.client.clone(), &networks, TOPOLOGY, &self.spec).await?;
        }
        Ok(exists)
    }

    async fn exists(&self) -> Result<bool> {
        let vmis: Api<VirtualMachineInstance> =
            Api::namespaced(self.client.clone(), &self.spec.namespace);
        let found = vmis.get_opt(&self.spec.name).await;
        let found = found.with_context(|| format!("read VMI {}", self.spec.key()))?;
        Ok(found.is_some())
    }

    /// Names of its logical switch ports.
    pub fn ports(&self) -> Vec<String> {
        ports_of(&self.spec)
    }
}
