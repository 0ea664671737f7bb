//! Scenario files: what to run, and what must come of it.
//!
//! A file is YAML. Unknown keys, wrong types and names that refer to nothing are errors that show
//! the place. The fields' documentation below is the format's reference.

mod load;

use serde::Deserialize;

pub use load::{ScenarioError, load};

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
    /// The VMs; all of them run before the first step.
    pub vms: Vec<Vm>,
    /// How their peers' view is measured.
    #[serde(default)]
    pub probe: Probe,
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
    /// How many ports it has, each on a network of its own.
    #[serde(default = "defaults::ports")]
    pub ports: u8,
    /// What `requested-chassis` says before the first migration.
    #[serde(default)]
    pub requested_chassis: Requested,
    /// How segue is to find its ports.
    #[serde(default)]
    pub found_by: FoundBy,
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
}

/// How a VM's peers' view is measured.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Probe {
    /// Packets a second in each direction.
    pub rate_hz: u32,
    /// Address family.
    pub family: Family,
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            rate_hz: 1_000,
            family: Family::Ipv4,
        }
    }
}

/// Address family of the probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A VM migrates.
    Migrate(Migrate),
    /// Several VMs migrate at the same time.
    Together(Vec<Migrate>),
    /// Nothing happens, and it is measured.
    Quiet(Quiet),
    /// The client's link drops everything for a time, and it is measured.
    Outage(Outage),
}

/// A migration.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Which VM.
    pub vm: String,
    /// The node to go to.
    pub to: String,
    /// Delete the migration object once this has happened.
    #[serde(default)]
    pub cancel_at: Option<Moment>,
    /// Let the hypervisor fail the migration.
    #[serde(default)]
    pub fail: Option<Failure>,
    /// Kill the controller (SIGKILL).
    #[serde(default)]
    pub kill_controller: Option<Kill>,
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
    /// When it dies.
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
    /// The copy of the guest's memory began.
    Copying,
    /// The guest paused on the source.
    Paused,
    /// The target's ovn-controller opened the port.
    Activated,
    /// The guest resumed on the target.
    Resumed,
    /// The migration object is final.
    Ended,
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

/// What must come of a migration. What holds for every migration is not said here but checked
/// always: the guest answers where it runs, the port is bound there alone, the request and the
/// strategy are what they were, no mark is left, the handover is final.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// How the handover ends.
    pub outcome: Outcome,
    /// The long TCP stream lives.
    pub tcp_survives: bool,
    /// Most packets that may be lost towards the VM.
    pub to_vm_max_lost: Option<u64>,
    /// Most packets that may be lost from the VM.
    pub from_vm_max_lost: Option<u64>,
    /// Most packets that may arrive twice, both directions together.
    pub max_duplicated: Option<u64>,
    /// Most that the network may add to the hypervisor's pause, in milliseconds.
    pub max_network_added_ms: Option<f64>,
}

impl Default for Expect {
    fn default() -> Self {
        Self {
            outcome: Outcome::Succeeded,
            tcp_survives: true,
            to_vm_max_lost: None,
            from_vm_max_lost: None,
            max_duplicated: Some(0),
            max_network_added_ms: None,
        }
    }
}

/// How a handover ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
pub enum Outcome {
    /// The guest runs on the target and the port is bound there alone.
    Succeeded,
    /// The guest runs on the source and the port is bound there alone.
    RolledBack,
    /// Neither could be established in time.
    Failed,
}

mod defaults {
    pub(super) fn namespace() -> String {
        "demo".to_owned()
    }

    pub(super) fn ports() -> u8 {
        1
    }

    pub(super) fn memory() -> u32 {
        128
    }
}
