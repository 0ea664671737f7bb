//! The Northbound as the controller remembers it: what it writes is made of this, however old it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ovsdb_rs::Snapshot;
use uuid::Uuid;

use super::{VENDOR, VENDOR_KEY};

ovsdb_rs::table! {
    #[derive(Eq, Default)]
    pub(super) struct Port in "Logical_Switch_Port" {
        pub(super) name: String,
        pub(super) r#type: String,
        pub(super) options: BTreeMap<String, String>,
        pub(super) external_ids: BTreeMap<String, String>,
    }

    #[derive(Eq, Default)]
    pub(super) struct Group in "Port_Group" {
        pub(super) name: String,
        pub(super) ports: BTreeSet<Uuid>,
        pub(super) external_ids: BTreeMap<String, String>,
    }
}

/// What is remembered of the Northbound.
#[derive(Clone, Debug, Default)]
pub(super) struct Cache {
    pub(super) ports: BTreeMap<Uuid, Arc<Port>>,
    pub(super) groups: Vec<Arc<Group>>,
}

impl Cache {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let mut groups: Vec<_> = snapshot
            .iter::<Group>()
            .map(|(_, row)| row.clone())
            .collect();
        groups.sort_by(|one, other| one.name.cmp(&other.name));
        Self {
            ports: snapshot.rows::<Port>().into_iter().collect(),
            groups,
        }
    }

    /// A port by its name.
    pub(super) fn port(&self, name: &str) -> Option<(Uuid, &Port)> {
        let mut ports = self.ports.iter();
        let (uuid, port) = ports.find(|(_, port)| port.name == name)?;
        Some((*uuid, port))
    }

    /// The ports of a VM (`ListNormalLogicalSwitchPorts`): those that say so, and that they are Kube-OVN's.
    pub(super) fn ports_of(&self, vm: &str) -> impl Iterator<Item = (Uuid, &Port)> {
        let is = |port: &Port, key: &str, value: &str| {
            port.external_ids.get(key).is_some_and(|has| has == value)
        };
        let ports = self.ports.iter().filter(move |(_, port)| {
            port.r#type.is_empty() && is(port, "pod", vm) && is(port, VENDOR_KEY, VENDOR)
        });
        ports.map(|(uuid, port)| (*uuid, &**port))
    }
}
