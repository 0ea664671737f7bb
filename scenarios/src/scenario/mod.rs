//! Scenario files: what to run, and what must come of it.
//!
//! A file is YAML. Unknown keys, wrong types and names that refer to nothing are errors that show
//! the place. The fields' documentation below is the format's reference.

mod agents;
mod expect;
mod flow;
mod load;
mod strategy;

use serde::Deserialize;

pub use agents::{AgentFault, AgentFaultKind, FailureStrategy, Hook, OnTimeout};
pub use expect::{Expect, FlowExpect, Forgeries, OpenedBy, Outcome};
pub use flow::{Family, Flow, Opener, Peer, Probe};
pub use load::{PRIMARY, ScenarioError, load};
pub use strategy::{NoStrategy, Strategy};

/// One scenario: a few VMs, what happens to them, what is expected.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Short name, as in the report; letters, digits and dashes.
    pub name: String,
    /// One or two sentences for people.
    pub about: String,
    /// How the VMs' networks are laid out.
    #[serde(default)]
    pub topology: Topology,
    /// Who hands the VMs' ports over.
    #[serde(default)]
    pub strategy: Strategy,
    /// Whose the VMs' ports are, where they are a CNI's: its controller makes them, and writes to them beside segue. They
    /// are found by their names, and nothing is requested of them before.
    #[serde(default)]
    pub cni: Option<Cni>,
    /// Whether that CNI hands ports over by itself (Kube-OVN's `--enable-live-migration-optimize`).
    #[serde(default = "defaults::optimize")]
    pub optimize: bool,
    /// How the gate is to be, where not as shipped; with `strategy: segue`.
    #[serde(default)]
    pub hook: Hook,
    /// Who answers for the guests' gateway, in the routed topology.
    #[serde(default)]
    pub gateway: Gateway,
    /// Whether the gateways translate the guests' IPv4 addresses towards the outside, in the routed
    /// topology. The guests' own addresses cannot be reached from outside then.
    #[serde(default)]
    pub snat: bool,
    /// Whose the VMs' ports on the first network are. With `strategy: ovn-kubernetes` they are the pods' whatever is said
    /// here.
    #[serde(default)]
    pub ports_of: PortsOf,
    /// `HandoverPolicies` that are there before the first VM is and go with the last.
    #[serde(default)]
    pub policies: Vec<Policy>,
    /// The VMs; all of them run before the first step.
    pub vms: Vec<Vm>,
    /// How their peer on the same network sees them: the primary flow of each VM, `east-west`.
    #[serde(default)]
    pub probe: Probe,
    /// What else is watched, of every VM.
    #[serde(default)]
    pub flows: Vec<Flow>,
    /// Whether `tcpdump` captures the primary flow of each migration, on the client and on both nodes. What `scenarios
    /// capture` recomputes from its files has to agree with the report then.
    #[serde(default)]
    pub capture: bool,
    /// What happens, one after the other.
    pub steps: Vec<Step>,
}

/// How the VMs' networks are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Topology {
    /// One logical switch spans the nodes; the port gets two chassis for a while.
    #[default]
    Shared,
    /// The guest's first port has an address and a gateway that is the same everywhere, and each
    /// node has a gateway to the outside; further ports are on shared switches.
    Routed,
}

/// Whose a VM's first port is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortsOf {
    /// The VM's: it stays where the VM was born, whatever pod the VM runs in.
    #[default]
    Vm,
    /// The pod's, as in ovn-kubernetes: `<namespace>_<pod>` on its node's switch, with a host route
    /// of the cluster router to each of the VM's addresses. For the policy `mode: StaticRoutes`. On a shared switch only
    /// with `strategy: ovn-kubernetes`.
    Pod,
}

/// A CNI whose controller writes to the ports of VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cni {
    /// Kube-OVN.
    KubeOvn,
}

/// How VMs' networks are laid out, and whose the ports are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// How they are laid out.
    pub topology: Topology,
    /// Whose the ports are.
    pub ports_of: PortsOf,
    /// The CNI that makes the VMs' ports; the runner does where there is none.
    pub cni: Option<Cni>,
}

impl Scenario {
    /// How its VMs' networks are laid out.
    pub fn layout(&self) -> Layout {
        Layout {
            topology: self.topology,
            ports_of: match self.strategy {
                Strategy::OvnKubernetes => PortsOf::Pod,
                _ => self.ports_of,
            },
            cni: self.cni,
        }
    }
}

/// Who answers for the guests' gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gateway {
    /// OVN's `arp_proxy`, with its Ethernet address (23.06 and later).
    #[default]
    Ovn,
    /// The program arp-proxy, on each node.
    ArpProxy,
}

/// A `HandoverPolicy` of the cluster.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// Its `spec`, as it is written in a manifest.
    pub spec: serde_json::Value,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace.
    #[serde(default = "defaults::namespace")]
    pub namespace: String,
    /// The node it starts on.
    pub node: String,
    /// How many ports it has, each on a network of its own. The topology is the first one's.
    #[serde(default = "defaults::ports")]
    pub ports: u8,
    /// What `requested-chassis` says before the first migration.
    #[serde(default)]
    pub requested_chassis: Requested,
    /// How segue is to find its ports.
    #[serde(default)]
    pub found_by: FoundBy,
    /// Its ports are in a port group whose ACLs let in what the flows are made of and nothing else.
    /// Flows that are `forbidden` must pass before, and not once after.
    #[serde(default)]
    pub isolated: bool,
    /// Guest memory in MiB.
    #[serde(default = "defaults::memory")]
    pub memory_mib: u32,
}

impl Vm {
    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// What `requested-chassis` says before the first migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Requested {
    /// The chassis of the VM's node, as ovn-kubernetes sets it.
    #[default]
    Node,
    /// Nothing, as Kube-OVN leaves it.
    Unset,
}

/// How segue is to find a VM's ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundBy {
    /// `external_ids:segue.io/vm=<namespace>/<name>`.
    #[default]
    Label,
    /// Kube-OVN's port names, `<vm>.<namespace>[.<provider>]`.
    KubeOvnName,
    /// Not at all.
    Nothing,
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A VM migrates.
    Migrate(Box<Migrate>),
    /// Several VMs migrate at the same time.
    Together(Vec<Migrate>),
    /// Nothing happens, and it is measured.
    Quiet(Quiet),
    /// The client's link drops everything for a time, and it is measured.
    Outage(Outage),
    /// A VM that does not move announces that it does, and nothing must come of it. With `strategy: segue`.
    Forge(Forge),
}

/// A migration.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Which VM.
    pub vm: String,
    /// The node to go to.
    pub to: String,
    /// Who hands its ports over this time, where not the scenario's `strategy`: segue with its agents or without.
    #[serde(default)]
    pub strategy: Option<Strategy>,
    /// Delete the migration object once this has happened.
    #[serde(default)]
    pub cancel_at: Option<Moment>,
    /// Let the hypervisor fail the migration.
    #[serde(default)]
    pub fail: Option<Failure>,
    /// Kill the controller (SIGKILL).
    #[serde(default)]
    pub kill_controller: Option<Kill>,
    /// What is done to agents; with `strategy: segue`.
    #[serde(default)]
    pub agents: Vec<AgentFault>,
    /// For how long the target's ovn-controller stands still (SIGSTOP) once the target pod has a node, in milliseconds:
    /// the handover cannot become ready before.
    #[serde(default)]
    pub target_stalls_ms: Option<u32>,
    /// Have the guest announce, where it runs, that it has come there (RARP, gratuitous ARP), and the same of another
    /// machine. With `strategy: segue`.
    #[serde(default)]
    pub forge_at: Option<Moment>,
    /// Delete the pods that the VM has left in earlier migrations.
    #[serde(default)]
    pub delete_old_pods_at: Option<Moment>,
    /// End the CNI's controller, with all that it remembers, and start it again; with `cni`.
    #[serde(default)]
    pub restart_cni_at: Option<Moment>,
    /// What must come of it.
    #[serde(default)]
    pub expect: Expect,
}

/// A failure of the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// The target dies when the guest has paused on the source and not yet resumed: the source
    /// resumes.
    SwitchOver,
}

/// A crash of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kill {
    /// When it dies: before it writes what comes after that, or the scenario fails.
    pub at: Moment,
    /// When it is started again; at once by default.
    #[serde(default)]
    pub restart_at: Option<Moment>,
}

/// A moment of a migration, in the usual order.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, serde::Serialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// The migration object exists.
    Created,
    /// The target pod has a node.
    Scheduled,
    /// The port is requested on both chassis (T1 is in the Northbound).
    Armed,
    /// The target claimed the port in the Southbound.
    Claimed,
    /// `nb_cfg` has been raised for the barrier.
    BarrierRaised,
    /// The handover is Ready.
    Ready,
    /// virt-handler asks whether the copy may begin.
    Asked,
    /// It was told that it may not.
    Refused,
    /// Nobody objects, or not so that it counts.
    Allowed,
    /// The copy of the guest's memory began.
    Copying,
    /// The guest paused on the source.
    Paused,
    /// The target's ovn-controller opened the port.
    Activated,
    /// The guest resumed on the target.
    Resumed,
    /// Every address of the VM is in the target's set, and in no other (T2 is in the Northbound).
    Flipped,
    /// The migration object is final.
    Ended,
    /// The migration object is final, and every address of the VM is still in the source's set.
    Kept,
    /// One chassis is requested again (T3 is in the Northbound).
    Settled,
    /// No mark is left on the port.
    Released,
}

/// A time in which nothing happens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quiet {
    /// The VM whose peers are watched.
    pub vm: String,
    /// How long, in seconds.
    pub seconds: u32,
}

/// An outage on the client's link, for the probe to find.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outage {
    /// The VM whose peers are watched.
    pub vm: String,
    /// How long everything is dropped, in milliseconds.
    pub ms: u32,
}

/// Announcements of a VM that does not move.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forge {
    /// The VM.
    pub vm: String,
}

mod defaults {
    pub(super) fn namespace() -> String {
        "demo".to_owned()
    }

    pub(super) fn optimize() -> bool {
        true
    }

    pub(super) fn ports() -> u8 {
        1
    }

    pub(super) fn memory() -> u32 {
        128
    }
}
