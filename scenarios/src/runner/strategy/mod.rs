//! What segue's peers write while a VM migrates, replayed on the same lab.
//!
//! Each module has one peer's sequence: which rows of the Northbound it writes, and on which sign. The signs are those
//! that the peer itself goes by, seen as it sees them, in watches on the real API and in libvirt's events ([`Seen`]). What
//! takes the peer time beyond that (its queues, its processes) is left out, and where its sources leave a choice it gets
//! the faster one, so a peer is rather better here than in a cluster.
//!
//! A replay ends when the peer has nothing left to write for the migration. Its ports are then as they were before, with
//! the place brought up to date, whether the migration succeeded or not.

mod clone;
mod kube_ovn;
mod neutron;
mod northbound;
mod ovn_kubernetes;
mod signs;
mod single;
#[cfg(test)]
mod tests;

use std::time::SystemTime;

use futures::future::BoxFuture;
use thiserror::Error;

use crate::scenario::{Moment, Strategy, Topology};

use super::moments::Moments;

pub(super) use northbound::Northbound;
pub(super) use signs::{Seen, Signs, follow};

/// Whoever hands the ports of a VM over in segue's place.
pub(super) trait Baseline: Send + Sync {
    /// Makes the peer's writes for one migration, each when its sign is seen.
    fn replay<'a>(&'a self, stage: &'a Stage, signs: Signs) -> BoxFuture<'a, Result<(), Error>>;
}

/// What a replay is about, and what it works with.
#[derive(Clone)]
pub(super) struct Stage {
    /// The database that is written.
    pub north: Northbound,
    /// The VM's logical switch ports; of those of its pods what they have in common.
    pub ports: Vec<String>,
    /// The chassis that the guest leaves.
    pub source: String,
    /// The chassis that it goes to.
    pub target: String,
    /// How its network is laid out.
    pub topology: Topology,
    /// Where it is noted that the traffic was led to the target.
    pub moments: Moments,
}

/// What a replay can fail at.
#[derive(Debug, Error)]
pub(super) enum Error {
    /// A write was refused, or the database could not be reached.
    #[error("the Northbound does not take what {what}")]
    Write {
        /// What was to be written.
        what: String,
        /// Why not.
        source: ovsdb_rs::Error,
    },
    /// A port is not there.
    #[error("there is no logical switch port {0} in the Northbound: who has removed it?")]
    NoPort(String),
    /// A VM's pods have more ports than they are to have, or fewer.
    #[error(
        "{found} logical switch ports of pods are {common}, where the source pod's alone is expected"
    )]
    PodPorts {
        /// What they have in common.
        common: String,
        /// How many there are.
        found: usize,
    },
    /// A port is on no switch that is known.
    #[error("there is no logical switch {0} to make the target pod's port on")]
    NoSwitch(String),
    /// The watches ended.
    #[error("the migration cannot be followed to its end: its watches ended")]
    Deaf,
}

/// The replay of a strategy; none of those that are segue's own.
pub(super) fn baseline(strategy: Strategy) -> Option<Box<dyn Baseline>> {
    match strategy {
        Strategy::Segue | Strategy::SegueAgentless => None,
        Strategy::KubeOvn => Some(Box::new(kube_ovn::KubeOvn)),
        Strategy::OvnKubernetes => Some(Box::new(ovn_kubernetes::OvnKubernetes)),
        Strategy::Neutron => Some(Box::new(neutron::Neutron)),
        Strategy::Clone => Some(Box::new(clone::Clones)),
        Strategy::Single => Some(Box::new(single::Single)),
    }
}

// === impl Stage ===

impl Stage {
    /// Asks for both chassis, on every port, with this activation strategy if any. One transaction for each port, as the
    /// peers do it.
    async fn request_both(&self, strategy: Option<&str>) -> Result<(), Error> {
        let both = format!("{},{}", self.source, self.target);
        for port in &self.ports {
            self.north.request(port, &both, strategy).await?;
        }
        Ok(())
    }

    /// Asks for one chassis, on every port, without a strategy.
    async fn request_one(&self, chassis: &str) -> Result<(), Error> {
        for port in &self.ports {
            self.north.request(port, chassis, None).await?;
        }
        Ok(())
    }

    /// Asks for the chassis where the guest is, now that its migration is over.
    async fn request_where_it_is(&self, seen: &Seen) -> Result<(), Error> {
        let succeeded = seen.succeeded();
        let chassis = if succeeded {
            &self.target
        } else {
            &self.source
        };
        self.request_one(chassis).await
    }

    /// Notes that the traffic is led to the target from now on.
    fn flipped(&self) {
        self.moments.note(Moment::Flipped, SystemTime::now());
    }
}
