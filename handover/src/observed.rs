//! What is seen of the world at one moment.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Chassis, Epoch, FlipPolicy, Mark, MigrationUid, PortName, Route, Signals, Timestamp};

/// Everything a decision depends on, seen at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// When.
    pub now: Timestamp,
    /// Whose handover.
    pub identity: Identity,
    /// What newer migrations of the same VM have come to.
    pub newer: Newer,
    /// What is known of its earlier ones.
    pub earlier: Earlier,
    /// KubeVirt itself names this migration as the VM's last, with the node that the guest leaves.
    /// Until it does, what is known of the VM may be from before.
    pub is_named: bool,
    /// How the migration stands.
    pub outcome: Outcome,
    /// The chassis the guest leaves, once known.
    pub source: Option<Chassis>,
    /// The chassis the guest goes to, once known.
    pub target: Option<Chassis>,
    /// The chassis that earlier migrations of the VM left. A port still pinned to one of them was
    /// left behind while no controller ran; it is nobody's choice.
    pub former: Vec<Chassis>,
    /// Whether the pod on the source holds no interface any more: it is gone, or was over long
    /// enough ago for its network to have been torn down.
    pub source_pod_gone: bool,
    /// The same of the pod on the target.
    pub target_pod_gone: bool,
    /// What is known of the guest's whereabouts.
    pub signals: Signals,
    /// The VM's ports.
    pub ports: Vec<Port>,
    /// The routes that depend on where the guest is; none where nothing routes by its place.
    pub routes: Vec<Route>,
    /// Names of the chassis that routes can lead to: those with a gateway.
    pub gateways: BTreeSet<String>,
    /// When the routes follow the guest.
    pub flip: FlipPolicy,
    /// How far the chassis have followed the Northbound.
    pub barrier: Barrier,
    /// Moments that deadlines count from.
    pub since: Since,
    /// How long to wait for what may never come.
    pub deadlines: Deadlines,
}

/// Which handover this is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The migration.
    pub migration: MigrationUid,
    /// Its epoch.
    pub epoch: Epoch,
}

/// What the VM's newer migrations have come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Newer {
    /// One of them [has moved something](crate::has_moved). The ports are that one's business now.
    pub has_moved: bool,
    /// One of them is under way, as far as is known, so any migration before it is over.
    pub has_begun: bool,
}

impl Newer {
    /// Takes in what was observed of a newer migration.
    pub fn note(&mut self, newer: &Observed) {
        self.has_begun |= newer.outcome == Outcome::Running && newer.target.is_some();
        self.has_moved |= crate::has_moved(newer);
    }
}

/// What is known of the VM's earlier migrations. KubeVirt runs one migration of a VM at a time, so
/// where this contradicts what is known of this one, one of both is old news.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Earlier {
    /// One of them is not over, and its target is known.
    pub under_way: bool,
    /// Where the last of them that is over took the guest, if it moved.
    pub left_guest_on: Option<Chassis>,
}

/// One end of the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Side {
    /// Where the guest was when the migration began.
    Source,
    /// Where it goes.
    Target,
}

impl Side {
    /// The other end.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// How the migration stands, fused from the objects that tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// It may still go either way.
    Running,
    /// It is over and the guest runs on this side: it succeeded ([`Side::Target`]), or it failed
    /// or was cancelled (usually [`Side::Source`]).
    GuestOn(Side),
    /// It is over and there is no guest any more.
    GuestGone,
}

/// One Logical_Switch_Port of the VM with its Southbound binding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: PortName,
    /// What the Northbound asks for.
    pub config: PortConfig,
    /// What the Southbound reports.
    pub binding: Binding,
    /// Names of the chassis that opened the port as an additional one: they saw the announcement
    /// that the activation strategy waits for.
    pub activated: BTreeSet<String>,
    /// Whether the guest's announcement, on the target, comes through this port. Behind a NAT in its
    /// pod it does not.
    pub announces: bool,
}

impl Port {
    /// Whether no chassis has claimed it.
    pub fn is_unclaimed(&self) -> bool {
        self.binding.chassis.is_none() && self.binding.additional.is_empty()
    }
}

/// The part of a Logical_Switch_Port that segue reads and writes.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PortConfig {
    /// `options:requested-chassis`, as it stands: a comma-separated list, the main chassis first.
    pub requested_chassis: Option<String>,
    /// `options:activation-strategy`.
    pub activation_strategy: Option<String>,
    /// segue's mark.
    pub mark: Option<Mark>,
}

/// The part of a Port_Binding that segue observes, chassis by `Chassis.name`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Binding {
    /// `chassis`.
    pub chassis: Option<String>,
    /// `additional_chassis`.
    pub additional: Vec<String>,
}

impl Binding {
    /// Whether `chassis` is the port's only chassis.
    pub fn is_only_on(&self, chassis: &Chassis) -> bool {
        self.chassis.as_ref() == Some(&chassis.name) && self.additional.is_empty()
    }

    /// Whether `chassis` has claimed the port in either role.
    pub fn is_claimed_by(&self, chassis: &Chassis) -> bool {
        self.chassis.as_ref() == Some(&chassis.name) || self.additional.contains(&chassis.name)
    }

    /// Names of the chassis that have claimed the port, in either role.
    pub fn claimed(&self) -> impl Iterator<Item = &String> {
        self.chassis.iter().chain(&self.additional)
    }
}

/// How far the chassis have followed the Northbound.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Barrier {
    /// `NB_Global.nb_cfg`.
    pub nb_cfg: i64,
    /// `Chassis_Private.nb_cfg` by chassis name, for every chassis there is.
    pub applied: BTreeMap<String, i64>,
}

/// Moments that deadlines count from; absent what has not happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Since {
    /// The barrier was written.
    pub barrier: Option<Timestamp>,
    /// The migration was first seen to be over.
    pub outcome: Option<Timestamp>,
}

/// How long to wait for what may never come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// For chassis other than source and target to pass the barrier, counted from its writing. A
    /// dead node must not hold up every migration of the cluster.
    pub peers: Duration,
    /// For the source to give the port up after a success, counted from the outcome. Then the
    /// target is made the only chassis all the same: pods can linger.
    pub release: Duration,
    /// For the port to be bound where the guest runs, counted from the outcome, before the handover
    /// is called [failed](crate::Phase::Failed).
    pub establish: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            peers: Duration::from_secs(2),
            release: Duration::from_secs(30),
            establish: Duration::from_secs(90),
        }
    }
}
