//! What the stand-in needs of the lab: somebody who plugs ports and runs domains.

use std::{
    future::Future,
    path::{Path, PathBuf},
    time::Instant,
};

use futures::stream::BoxStream;
use kube::ResourceExt as _;

use super::{Nic, VirtualMachineInstance};

/// Whatever a hypervisor has to complain of.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A virt-launcher pod on a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sandbox {
    /// The node that the pod is bound to.
    pub node: String,
    /// The pod's namespace, which is the VM's.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub uid: String,
}

/// A VM to run, and its network cards.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The whole object, for memory, processors and whatever else the domain is made from.
    pub vmi: VirtualMachineInstance,
    /// Its network cards.
    pub nics: Vec<Nic>,
}

/// A copy of a running domain from one pod to another.
#[derive(Clone, Debug)]
pub struct Migration {
    /// The UID of the VirtualMachineInstanceMigration.
    pub uid: String,
    /// What migrates.
    pub machine: Machine,
    /// Where it runs.
    pub source: Sandbox,
    /// Where it is to run.
    pub target: Sandbox,
    /// What [`Hypervisor::prepare_target`] answered.
    pub target_address: String,
}

/// A change of a domain on a node, as libvirt's lifecycle events tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainEvent {
    /// Where it was seen.
    pub node: String,
    /// [`Machine::domain`].
    pub domain: String,
    /// What the domain is from then on.
    pub state: DomainState,
    /// When it became so.
    pub at: Instant,
}

/// What a domain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainState {
    /// It exists and does not execute: it is being received, or it is suspended.
    Paused,
    /// It executes.
    Running,
    /// It is gone.
    Shutoff,
}

/// Runs real domains on real ports.
///
/// Everything is asked for again after a failure or a restart of the role that asks: what is done already is to be
/// answered with success. Every future may be dropped half way, as when a role is switched off.
pub trait Hypervisor: Send + Sync + 'static {
    /// CNI ADD: makes a tap for each card and puts it into br-int of the pod's node with the card's `iface-id`.
    fn plug(
        &self,
        sandbox: &Sandbox,
        nics: &[Nic],
    ) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// CNI DEL: undoes [`Hypervisor::plug`].
    fn unplug(
        &self,
        sandbox: &Sandbox,
        nics: &[Nic],
    ) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Defines and starts the domain in a pod that is plugged. Returns when it executes.
    fn start(
        &self,
        sandbox: &Sandbox,
        machine: &Machine,
    ) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Makes a plugged target ready to receive, and answers the address to send to.
    fn prepare_target(
        &self,
        sandbox: &Sandbox,
        machine: &Machine,
    ) -> impl Future<Output = Result<String, BoxError>> + Send;

    /// Copies the domain. Success: it executes on the target and is gone from the source. Failure: it executes on
    /// the source and is gone from the target. An abort is a failure.
    fn migrate(&self, migration: &Migration) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Aborts [`Hypervisor::migrate`]. Success: the abort was accepted, and `migrate` is about to fail. Failure: it
    /// was too late, or there is nothing to abort.
    fn abort(&self, migration: &Migration) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Ends the domain of a pod, if it has one.
    fn destroy(
        &self,
        sandbox: &Sandbox,
        domain: &str,
    ) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// The changes of all domains on all nodes, from now on. Without them the changes are deduced from the calls
    /// above, some milliseconds late.
    fn events(&self) -> BoxStream<'static, DomainEvent>;

    /// Where this machine has a path of a node: plugins have their sockets there.
    fn on_node(&self, node: &str, path: &Path) -> PathBuf;
}

impl Sandbox {
    /// The name of the pod's own logical switch port, as ovn-kubernetes names it, in networks with a port for every
    /// pod.
    pub fn port(&self) -> String {
        format!("{}_{}", self.namespace, self.pod)
    }
}

impl Machine {
    /// The domain's name, made as KubeVirt makes it: `<namespace>_<name>`.
    pub fn domain(&self) -> String {
        domain_of(&self.vmi)
    }
}

pub(super) fn domain_of(vmi: &VirtualMachineInstance) -> String {
    format!("{}_{}", vmi.namespace().unwrap_or_default(), vmi.name_any())
}
