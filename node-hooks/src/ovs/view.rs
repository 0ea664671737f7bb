//! What of Open vSwitch's database matters, and how it is read.

use std::collections::{BTreeMap, BTreeSet};

use arp_proxy::ovs::IFACE_ID;
use ovsdb_rs::Snapshot;
use uuid::Uuid;

use super::{Interface, Interfaces, Statistics};

/// Where ovn-controller says that a port's flows are all there.
const OVN_INSTALLED: &str = "ovn-installed";

/// What drives an interface's device, in its `status`, and the name that a tap's driver has in Linux.
const DRIVER: &str = "driver_name";
const TUN: &str = "tun";

ovsdb_rs::table! {
    pub(super) struct Bridge in "Bridge" {
        pub(super) name: String,
        pub(super) ports: BTreeSet<Uuid>,
    }

    pub(super) struct Port in "Port" {
        pub(super) name: String,
        pub(super) interfaces: BTreeSet<Uuid>,
    }

    pub(super) struct Row in "Interface" {
        pub(super) name: String,
        pub(super) ofport: Option<i64>,
        pub(super) error: Option<String>,
        pub(super) mac_in_use: Option<String>,
        pub(super) external_ids: BTreeMap<String, String>,
        pub(super) statistics: BTreeMap<String, i64>,
        pub(super) status: BTreeMap<String, String>,
    }
}

/// Reads snapshots, and says once what is wrong in them.
pub(super) struct View {
    bridge: String,
    /// That the bridge is not there has been said.
    missing: bool,
    /// Logical ports with several interfaces, by the interfaces' names: those that have been warned of.
    ambiguous: BTreeMap<String, Vec<String>>,
}

impl View {
    pub(super) fn new(bridge: &str) -> Self {
        Self {
            bridge: bridge.to_owned(),
            missing: false,
            ambiguous: BTreeMap::new(),
        }
    }

    pub(super) fn of(&mut self, snapshot: &Snapshot) -> Interfaces {
        let bridge = snapshot
            .iter::<Bridge>()
            .find(|(_, bridge)| bridge.name == self.bridge);
        self.note_missing(bridge.is_none());
        let Some((_, bridge)) = bridge else {
            return Interfaces::new();
        };
        let rows = bridge
            .ports
            .iter()
            .filter_map(|port| snapshot.get::<Port>(port))
            // ovn-controller passes the bridge's own port over, too.
            .filter(|port| port.name != self.bridge)
            .flat_map(|port| port.interfaces.clone())
            .filter_map(|interface| snapshot.get::<Row>(&interface));
        let mut candidates: BTreeMap<String, Vec<Interface>> = BTreeMap::new();
        for row in rows {
            if let Some(iface_id) = row.external_ids.get(IFACE_ID) {
                let of_port = candidates.entry(iface_id.clone()).or_default();
                of_port.push(read(&row));
            }
        }
        self.note_ambiguous(&candidates);
        candidates
            .into_iter()
            .filter_map(|(iface_id, candidates)| Some((iface_id, choose(candidates)?)))
            .collect()
    }

    fn note_missing(&mut self, missing: bool) {
        if missing && !self.missing {
            tracing::warn!(
                bridge = self.bridge,
                "Open vSwitch has no such bridge; waiting for it"
            );
        }
        self.missing = missing;
    }

    fn note_ambiguous(&mut self, candidates: &BTreeMap<String, Vec<Interface>>) {
        let ambiguous: BTreeMap<String, Vec<String>> = candidates
            .iter()
            .filter(|(_, interfaces)| interfaces.len() > 1)
            .map(|(iface_id, interfaces)| {
                let names = interfaces.iter().map(|interface| interface.name.clone());
                (iface_id.clone(), names.collect())
            })
            .collect();
        for (iface_id, interfaces) in &ambiguous {
            if self.ambiguous.get(iface_id) != Some(interfaces) {
                tracing::warn!(
                    iface_id,
                    ?interfaces,
                    "several interfaces have this iface-id; remove it from all but one"
                );
            }
        }
        self.ambiguous = ambiguous;
    }
}

/// The first of the best.
fn choose(candidates: Vec<Interface>) -> Option<Interface> {
    candidates
        .into_iter()
        .min_by_key(|interface| (!interface.installed, interface.ofport.is_none()))
}

fn read(row: &Row) -> Interface {
    let statistic = |name| {
        let value = row.statistics.get(name).copied().unwrap_or_default();
        u64::try_from(value).unwrap_or_default()
    };
    let installed = row.external_ids.get(OVN_INSTALLED);
    Interface {
        name: row.name.clone(),
        // -1 where the switch could not open it.
        ofport: row
            .ofport
            .and_then(|port| u32::try_from(port).ok())
            .filter(|port| *port > 0),
        installed: installed.is_some_and(|value| value.eq_ignore_ascii_case("true")),
        error: row.error.clone(),
        mac_in_use: row.mac_in_use.as_deref().and_then(|mac| mac.parse().ok()),
        statistics: Statistics {
            rx_packets: statistic("rx_packets"),
            rx_dropped: statistic("rx_dropped"),
            tx_packets: statistic("tx_packets"),
            tx_dropped: statistic("tx_dropped"),
        },
        is_tap: row.status.get(DRIVER).is_some_and(|driver| driver == TUN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, ofport: Option<u32>, installed: bool) -> Interface {
        Interface {
            name: name.to_owned(),
            ofport,
            installed,
            ..Interface::default()
        }
    }

    #[test]
    fn the_interface_that_ovn_chose_is_taken() {
        let chosen = |candidates| choose(candidates).map(|interface| interface.name);
        let (a, b, c) = (
            candidate("a", None, false),
            candidate("b", Some(2), false),
            candidate("c", Some(3), true),
        );
        assert_eq!(chosen(vec![a.clone(), b.clone(), c]).as_deref(), Some("c"));
        assert_eq!(chosen(vec![a.clone(), b.clone()]).as_deref(), Some("b"));
        // Among equals the first, whose row's UUID is the smallest.
        let d = candidate("d", Some(4), false);
        assert_eq!(chosen(vec![b, d]).as_deref(), Some("b"));
        assert_eq!(chosen(vec![a]).as_deref(), Some("a"));
    }

    #[test]
    fn a_row_of_nonsense_is_read_as_what_it_is_not() {
        let row = Row {
            name: "tap0".to_owned(),
            ofport: Some(-1),
            error: Some("no such device".to_owned()),
            mac_in_use: Some("nothing".to_owned()),
            external_ids: BTreeMap::from([(OVN_INSTALLED.to_owned(), "yes".to_owned())]),
            statistics: BTreeMap::from([("rx_packets".to_owned(), -7)]),
            status: BTreeMap::new(),
        };
        let read = read(&row);
        assert_eq!(read.ofport, None);
        assert!(!read.installed);
        assert_eq!(read.error.as_deref(), Some("no such device"));
        assert_eq!(read.mac_in_use, None);
        assert_eq!(read.statistics, Statistics::default());
        assert!(!read.is_tap);
    }

    #[test]
    fn a_tap_is_told_from_the_end_of_a_pods_cable() {
        let is_tap = |driver: &str| {
            read(&Row {
                name: "port0".to_owned(),
                ofport: Some(1),
                error: None,
                mac_in_use: None,
                external_ids: BTreeMap::new(),
                statistics: BTreeMap::new(),
                status: BTreeMap::from([(DRIVER.to_owned(), driver.to_owned())]),
            })
            .is_tap
        };
        assert!(is_tap("tun"));
        assert!(!is_tap("veth"));
    }
}
