//! A stand-in for kube-ovn-controller, as far as it writes to the ports of VMs.
//!
//! It watches the real API and writes the Northbound as the controller does: whole columns, made of what it remembers,
//! without a guard. It is read from the controller's sources at v1.15.24 (c95b7e889); v1.16.2 (3fa53308c) differs where
//! that is said. The real program can take its place ([`Program`]).
//!
//! | when | what | where |
//! | --- | --- | --- |
//! | a pod is new: it has no annotation `routed` | the port, with the addresses that the pod asks for; made if it is not there | `pkg/controller/pod.go`: `enqueueAddPod`, `podNeedSync`, `reconcileAllocateSubnets` |
//! | a pod changes that was made by a migration (`kubevirt.io/migrationJobName`), also when that is long over | `addresses`, DHCP options, `port_security` and the whole `external_ids` of the VM's port; `options` stay | `pod.go`: `enqueueUpdatePod`, `needAllocateSubnets`; `pkg/ovs/ovn-nb-logical_switch_port.go`: `CreateLogicalSwitchPort` |
//! | a pod has addresses and a node, once | the port leaves the port groups `node.<other>` and `<subnet>.<other>` and joins those of its node | `pod.go`: `needRouteSubnets`, `reconcileRouteSubnets` |
//! | phase Scheduling, and a target pod with a node | `requested-chassis=<source>,<target>`, `activation-strategy=rarp`, unless the list is these two, as text; without a node it tries again (v1.16.2 does not) | `pkg/controller/kubevirt.go`: `handleAddOrUpdateVMIMigration`; `SetLogicalSwitchPortMigrateOptions` |
//! | phase Succeeded, Failed | `requested-chassis=<target>`, `<source>`, no strategy, where anything is requested and the VMI's state is this migration's | `ResetLogicalSwitchPortMigrateOptions` |
//! | any pod of a VM is deleted | both options go; the port groups go where no other pod lives; the port goes where the VM does, or is no VirtualMachine | `pod.go`: `handleDeletePod`; `CleanLogicalSwitchPortMigrateOptions` |
//! | a VirtualMachine is deleted | its ports go | `kubevirt.go`: `handleDeleteVM` |
//! | every minute | the groups `node.<node>` hold the ports of the pods there that have not ended: in a migration source and target alike | `pkg/controller/node.go`: `checkAndUpdateNodePortGroup` |
//! | it starts | the groups `<subnet>.<node>`, by every pod that has not ended; each migration anew: the last one's reset, as long as the next is not handed over to virt-handler | `pkg/controller/subnet.go`: `reconcileDistributedSubnetRouteInDefaultVpc`; `kubevirt.go`: `enqueueAddVMIMigration` |
//!
//! The rows of migrations are those of `--enable-live-migration-optimize`. VMs are read from the API each time, pods and
//! rows are remembered.
//!
//! # What is left out
//! Addresses are those that pods ask for by annotation, nothing is chosen. Subnets, routers, policies, network policies,
//! security groups, DHCP, hot-plugged networks, and what is done for pods that are not VMs'. Port groups steer nothing in
//! the lab: there is no router that has policies for them.

mod cache;
mod groups;
mod migrations;
mod pods;
mod program;
#[cfg(test)]
mod tests;
mod worker;
mod write;

use anyhow::Result;
use kube::Client;
use tokio::task::JoinSet;

pub(crate) use pods::ask_for;
pub use program::Program;

use program::Running;
use worker::Worker;

/// The key of `external_ids` that says whose a row is.
const VENDOR_KEY: &str = "vendor";
const VENDOR: &str = "kube-ovn";
/// The router of the default VPC.
const CLUSTER_ROUTER: &str = "ovn-cluster";
/// The provider of the pod network.
const PROVIDER: &str = "ovn";
const REQUESTED: &str = "requested-chassis";
const STRATEGY: &str = "activation-strategy";

/// How Kube-OVN is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The Northbound, like `tcp:172.30.0.1:6641`.
    pub northbound: String,
    /// The nodes, which are also the names of their chassis.
    pub nodes: Vec<String>,
    /// The subnets, which are also the names of their logical switches.
    pub subnets: Vec<String>,
    /// `--enable-live-migration-optimize`.
    pub optimize: bool,
}

/// A controller that runs: the stand-in or the real one. Dropping it ends it.
pub struct KubeOvn {
    settings: Settings,
    client: Client,
    program: Option<Program>,
    runs: Option<Runs>,
}

enum Runs {
    StandIn(JoinSet<()>),
    Program(Running),
}

impl KubeOvn {
    /// Starts it, and returns once its port groups are there.
    ///
    /// # Errors
    /// When the API or the Northbound cannot be reached, or the program does not start.
    pub async fn start(
        settings: Settings,
        client: Client,
        program: Option<Program>,
    ) -> Result<Self> {
        let mut kube_ovn = Self {
            settings,
            client,
            program,
            runs: None,
        };
        kube_ovn.run().await?;
        Ok(kube_ovn)
    }

    async fn run(&mut self) -> Result<()> {
        let (settings, client) = (self.settings.clone(), self.client.clone());
        self.runs = Some(if let Some(program) = &self.program {
            Runs::Program(program.start(&settings, client).await?)
        } else {
            let worker = Worker::start(settings, client).await?;
            let mut tasks = JoinSet::new();
            tasks.spawn(worker.run());
            Runs::StandIn(tasks)
        });
        Ok(())
    }

    /// Ends it as a crash would, with all that it remembers, and starts it again.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn restart(&mut self) -> Result<()> {
        self.stop().await;
        self.run().await
    }

    /// Ends it as a crash would.
    pub async fn stop(&mut self) {
        match self.runs.take() {
            Some(Runs::StandIn(mut tasks)) => tasks.shutdown().await,
            Some(Runs::Program(running)) => running.kill().await,
            None => {}
        }
    }
}

/// Whether it moves ports in and out of a port group of that name when they change nodes.
pub(crate) fn is_of_node(group: &str) -> bool {
    group.contains('.')
}
