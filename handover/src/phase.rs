//! Where a handover stands, and what it waits for.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Chassis, PortName};

/// Where a handover stands.
///
/// The order is the usual one; a handover can skip phases and, while it is being prepared, go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
pub enum Phase {
    /// The migration exists; source or target is not known yet.
    #[default]
    Pending,
    /// The port is requested on both chassis; the target has not caught up.
    Preparing,
    /// The target holds the port behind its activation strategy and the chassis that matter know.
    Ready,
    /// The guest paused on the source.
    Switching,
    /// The guest resumed on the target.
    Switched,
    /// The migration succeeded; the target is being made the port's only chassis.
    Finalising,
    /// The guest runs on the target, the port is bound there alone, no mark is left.
    Succeeded,
    /// The migration failed or was cancelled; the source is being made the port's only chassis.
    RollingBack,
    /// The guest runs on the source, the port is bound there alone, no mark is left.
    RolledBack,
    /// The side where the guest runs could not be established in time. Nothing destructive was
    /// done, the next observation may still end the handover well.
    Failed,
}

impl Phase {
    /// Whether the handover is over for good.
    ///
    /// [`Phase::Failed`] is not: it says that an operator should look, and ends as soon as the
    /// world allows it.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::RolledBack)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a handover waits for, in words an operator can act on (its `Display`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// No port of the VM is known.
    Ports,
    /// The node the guest leaves has no chassis yet.
    Source,
    /// The target pod has no node, or its node has no chassis.
    Target,
    /// What is known of the VM is from before an earlier migration was over.
    EarlierMigration,
    /// No port of the VM has an interface on the source.
    Interface,
    /// The Southbound has a port on chassis that are no end of the migration.
    BoundElsewhere {
        /// The port.
        port: PortName,
        /// Names of the chassis that have it.
        chassis: Vec<String>,
    },
    /// `requested-chassis` was set by somebody to a value that does not name the source.
    ForeignRequest {
        /// The port.
        port: PortName,
        /// The value found.
        requested: String,
    },
    /// The target has not claimed the port: its interface is not there yet.
    Claim {
        /// The port.
        port: PortName,
        /// The target.
        target: Chassis,
    },
    /// The source, the target or both have not applied the configuration the barrier stands for.
    Barrier {
        /// Names of the chassis that lag.
        lagging: Vec<String>,
    },
    /// Source and target have; others have not, and their deadline is not over.
    ///
    /// Which they are is not said: it changes with every one of what may be hundreds, and whoever
    /// records each wait would write as often.
    Peers,
    /// The port is prepared; the guest has not moved.
    Guest,
    /// The guest moved; the migration is not over.
    MigrationEnd,
    /// An agent says that the guest runs on the source again; KubeVirt has not said so yet.
    Outcome,
    /// The source still holds the port's interface.
    SourceRelease {
        /// The port.
        port: PortName,
    },
    /// The port is requested on this chassis alone and not bound there yet.
    Binding {
        /// The port.
        port: PortName,
        /// The chassis where the guest runs.
        chassis: Chassis,
    },
    /// The guest's traffic with the outside stays with the gateway that carried it before, until its
    /// time is over.
    KeptEgress {
        /// Names of the chassis whose gateways carry it.
        gateways: Vec<String>,
    },
    /// The pod on the other side still exists; dropping the request now would let two chassis
    /// compete for the port.
    OtherPod {
        /// The port.
        port: PortName,
    },
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ports => f.write_str(
                "no logical switch port of this VM is known: label one with \
                 external_ids:segue.io/vm=<namespace>/<name>, or name it as Kube-OVN does",
            ),
            Self::Source => f.write_str(
                "KubeVirt has not said yet which node the guest leaves, or no chassis is known of it",
            ),
            Self::Target => f.write_str("the target pod is not scheduled to a node yet"),
            Self::EarlierMigration => f.write_str(
                "what KubeVirt has said of this VM is from before an earlier migration of it was \
                 over; nothing is prepared before it says where the guest is",
            ),
            Self::Interface => f.write_str(
                "no chassis has an interface of any of this VM's logical switch ports: ports that \
                 nobody uses want to be deleted, or relieved of external_ids:segue.io/vm",
            ),
            Self::BoundElsewhere { port, chassis } => write!(
                f,
                "the Southbound has port {port} on chassis {}, which is no end of this migration, so \
                 nothing is written: either what KubeVirt says of the guest is old, or the port is \
                 not this VM's; if it is not, remove its external_ids:segue.io/vm",
                chassis.join(", ")
            ),
            Self::ForeignRequest { port, requested } => write!(
                f,
                "port {port} has options:requested-chassis={requested}, which is neither the node of \
                 the guest nor this handover's: remove it or name the guest's node, segue overwrites \
                 nobody's choice"
            ),
            Self::Claim { port, target } => {
                write!(f, "chassis {target} has not claimed port {port} yet")
            }
            Self::Barrier { lagging } => write!(
                f,
                "not yet caught up with the Northbound: {}",
                lagging.join(", ")
            ),
            Self::Peers => f.write_str(
                "source and target have caught up with the Northbound; the other chassis have a \
                 moment left to",
            ),
            Self::Guest => f.write_str("ready: the guest has not moved yet"),
            Self::MigrationEnd => f.write_str("the guest moved; the migration is not over yet"),
            Self::Outcome => f.write_str(
                "the guest runs on the source again, says the agent there; the ports stay on both \
                 chassis until KubeVirt says how the migration ended",
            ),
            Self::SourceRelease { port } => {
                write!(f, "the source still holds the interface of port {port}")
            }
            Self::Binding { port, chassis } => {
                write!(f, "port {port} is not bound to chassis {chassis} alone yet")
            }
            Self::KeptEgress { gateways } => write!(
                f,
                "traffic with the outside stays with the gateway of {} for its connections' sake, \
                 as the policy says",
                gateways.join(", ")
            ),
            Self::OtherPod { port } => write!(
                f,
                "port {port} stays requested explicitly until the pod that the guest does not run \
                 in is gone"
            ),
        }
    }
}
