//! Who hands the VMs' ports over.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Who hands the VMs' ports over while they migrate.
///
/// The last five are not segue's doing: the migration-controller does not run, and the runner makes the Northbound's
/// writes that the peer of that name makes, when that peer would make them.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// segue with its agents on the nodes.
    #[default]
    Segue,
    /// segue's controller alone.
    SegueAgentless,
    /// Kube-OVN: both chassis and `rarp` from the migration's phase Scheduling on, the target's alone when it has
    /// succeeded.
    KubeOvn,
    /// ovn-kubernetes: a port for every pod; the host route, or the addresses on a shared switch, follow when the target
    /// pod's ready annotation appears.
    OvnKubernetes,
    /// Neutron: both chassis and `rarp` from the port's binding on the target on, the target's alone when the
    /// hypervisor's job is over.
    Neutron,
    /// Both chassis and no strategy: every packet goes to both.
    Clone,
    /// One chassis, another one when the guest resumes.
    Single,
}

/// There is no strategy of a name.
#[derive(Debug, thiserror::Error)]
#[error("there is no strategy {name:?}; there are {}", Strategy::ALL.map(Strategy::as_str).join(", "))]
pub struct NoStrategy {
    /// The name.
    pub name: String,
}

impl Strategy {
    /// All of them, segue's first.
    pub const ALL: [Self; 7] = [
        Self::Segue,
        Self::SegueAgentless,
        Self::KubeOvn,
        Self::OvnKubernetes,
        Self::Neutron,
        Self::Clone,
        Self::Single,
    ];

    /// As files and reports name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Segue => "segue",
            Self::SegueAgentless => "segue-agentless",
            Self::KubeOvn => "kube-ovn",
            Self::OvnKubernetes => "ovn-kubernetes",
            Self::Neutron => "neutron",
            Self::Clone => "clone",
            Self::Single => "single",
        }
    }

    /// Whether segue does it, and not the runner in a peer's way.
    pub const fn is_segue(self) -> bool {
        matches!(self, Self::Segue | Self::SegueAgentless)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Strategy {
    type Err = NoStrategy;

    fn from_str(name: &str) -> Result<Self, NoStrategy> {
        let mut all = Self::ALL.into_iter();
        let named = all.find(|strategy| strategy.as_str() == name);
        named.ok_or_else(|| NoStrategy {
            name: name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_everywhere() {
        for strategy in Strategy::ALL {
            let json = serde_json::to_value(strategy).unwrap();
            assert_eq!(json, strategy.as_str());
            assert_eq!(strategy.to_string().parse::<Strategy>().unwrap(), strategy);
        }
        let error = "segue-agent".parse::<Strategy>().unwrap_err().to_string();
        assert!(error.contains("segue-agentless"), "{error}");
    }
}
