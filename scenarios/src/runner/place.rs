//! The routed topology: where a VM's outside traffic goes, and the gateway that its guest sees.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::timeout;

use crate::lab::routed::GATEWAY_MAC;
use crate::report::GatewayEntry;
use crate::scenario::PortsOf;

use super::Bench;
use super::checks::Checks;
use super::ovn::{Ovn, Places};
use super::vm::RunningVm;

/// The controller places a guest within milliseconds of seeing it run; the rest is for a busy
/// machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// Addresses of a guest, to which something leads by where the guest is.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// Whose the guest's ports are: a place is a place set, or, of pods' ports, where a route leads.
    pub ports_of: PortsOf,
}

impl Placed {
    /// Addresses that are in place sets, or are not to be in any.
    pub(super) fn in_sets(addresses: Vec<IpAddr>) -> Self {
        Self {
            addresses,
            ports_of: PortsOf::Vm,
        }
    }

    /// Where they are.
    pub(super) fn places(&self, ovn: &Ovn) -> Places {
        match self.ports_of {
            PortsOf::Vm => ovn.places(&self.addresses),
            PortsOf::Pod => ovn.routes(&self.addresses),
        }
    }
}

/// Returns once the place of each of these addresses is `chassis` and no other; with no chassis, once
/// they have none.
pub(super) async fn settled(ovn: &Ovn, placed: &Placed, chassis: Option<&str>) -> Result<()> {
    let mut changed = ovn.changed();
    let waiting = async {
        while misplaced(ovn, placed, chassis).is_some() {
            changed.next().await;
        }
    };
    timeout(DEADLINE, waiting).await.map_err(|_| {
        let found = misplaced(ovn, placed, chassis).unwrap_or_default();
        anyhow::anyhow!(
            "waited {} s in vain for the place of {:?} to be {}: {found}",
            DEADLINE.as_secs(),
            placed.addresses,
            chassis.unwrap_or("nowhere")
        )
    })
}

/// What is wrong with the places of these addresses, if anything is.
pub(super) fn misplaced(ovn: &Ovn, placed: &Placed, chassis: Option<&str>) -> Option<String> {
    astray(&placed.places(ovn), chassis)
}

fn astray(places: &Places, chassis: Option<&str>) -> Option<String> {
    let astray = places
        .iter()
        .filter(|(_, sets)| !sets.iter().map(String::as_str).eq(chassis));
    let told: Vec<_> = astray
        .map(|(address, places)| format!("the places of {address} are {places:?}"))
        .collect();
    (!told.is_empty()).then(|| told.join(", "))
}

/// Every address of the VM has to be where the guest runs.
pub(super) fn check(checks: &mut Checks, ovn: &Ovn, vm: &RunningVm, chassis: &str) {
    let placed = vm.placed();
    if placed.addresses.is_empty() {
        return;
    }
    let (key, wrong) = (vm.spec.key(), misplaced(ovn, &placed, Some(chassis)));
    checks.that(
        match placed.ports_of {
            PortsOf::Vm => {
                format!("the addresses of {key} are in the sets of {chassis} and in no other")
            }
            PortsOf::Pod => format!("the routes to {key} lead to the switch of {chassis}"),
        },
        wrong.is_none(),
        || wrong.unwrap_or_default(),
    );
}

/// Whether every address is in the set of this chassis and in no other; none are nowhere.
pub(super) fn all_in(places: &Places, chassis: &str) -> bool {
    !places.is_empty() && astray(places, Some(chassis)).is_none()
}

/// What the guest's neighbour table says of its gateway; nothing where it has none.
pub(super) async fn gateway(bench: &Bench<'_>, vm: &RunningVm, node: &str) -> Result<Vec<Entry>> {
    if vm.routed().is_empty() {
        return Ok(Vec::new());
    }
    let guest = bench
        .cluster
        .hypervisor
        .guest(&vm.domain)
        .context("a VM without a guest")?;
    let entries = guest.gateway_entries(bench.lab.host(node)?).await?;
    Ok(entries
        .into_iter()
        .map(|entry| (entry.address, entry.mac.map(|mac| mac.to_string())))
        .collect())
}

/// The gateway's address, and its Ethernet address where the guest knows it.
pub(super) type Entry = (IpAddr, Option<String>);

/// The entries before and after a migration, address by address.
pub(super) fn compared(before: &[Entry], after: &[Entry]) -> Vec<GatewayEntry> {
    let find = |entries: &[Entry], wanted: IpAddr| {
        let found = entries.iter().find(|(address, _)| *address == wanted);
        found.and_then(|(_, mac)| mac.clone())
    };
    let mut addresses: Vec<_> = before.iter().chain(after).map(|entry| entry.0).collect();
    addresses.sort();
    addresses.dedup();
    addresses
        .into_iter()
        .map(|address| GatewayEntry {
            address,
            before: find(before, address),
            after: find(after, address),
        })
        .collect()
}

/// The gateway has to be the same as before, and the same as everywhere.
pub(super) fn check_gateway(checks: &mut Checks, vm: &RunningVm, entries: &[GatewayEntry]) {
    let expected = GATEWAY_MAC.to_string();
    for entry in entries {
        checks.that(
            format!(
                "the guest of {} has gateway {} at {expected}, as before",
                vm.spec.key(),
                entry.address
            ),
            entry.before.as_ref() == Some(&expected) && entry.after == entry.before,
            || format!("before: {:?}, after: {:?}", entry.before, entry.after),
        );
    }
    if !vm.routed().is_empty() {
        let families = |v4: bool| entries.iter().any(|entry| entry.address.is_ipv4() == v4);
        let wanted = vm.routed();
        checks.that(
            format!(
                "the guest of {} has an entry for each gateway that it uses",
                vm.spec.key()
            ),
            wanted.iter().all(|address| families(address.is_ipv4())),
            || format!("{entries:?}"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(of: &[(&str, &[&str])]) -> Places {
        let owned = |sets: &[&str]| sets.iter().map(|&set| set.to_owned()).collect();
        of.iter()
            .map(|&(address, sets)| (address.parse().unwrap(), owned(sets)))
            .collect()
    }

    #[test]
    fn a_place_is_one_set_for_every_address() {
        let both = places(&[("10.20.1.10", &["node2"]), ("fd00::a", &["node2"])]);
        assert!(all_in(&both, "node2"));
        assert!(!all_in(&both, "node1"));
        assert!(!all_in(&places(&[]), "node2"));
        for wrong in [
            [("10.20.1.10", &["node2"][..]), ("fd00::a", &["node1"][..])],
            [("10.20.1.10", &["node2"][..]), ("fd00::a", &[][..])],
            [
                ("10.20.1.10", &["node1", "node2"][..]),
                ("fd00::a", &["node2"][..]),
            ],
        ] {
            assert!(!all_in(&places(&wrong), "node2"), "{wrong:?}");
        }
        let split = places(&[("10.20.1.10", &["node2"]), ("fd00::a", &["node1"])]);
        let told = astray(&split, Some("node2")).unwrap();
        assert!(
            told.contains("fd00::a") && !told.contains("10.20.1.10"),
            "{told}"
        );
        assert!(astray(&places(&[("10.20.1.10", &[])]), None).is_none());
        assert!(astray(&split, None).is_some());
    }

    #[test]
    fn entries_are_compared_address_by_address() {
        let entry =
            |address: &str, mac: Option<&str>| (address.parse().unwrap(), mac.map(str::to_owned));
        let mac = GATEWAY_MAC.to_string();
        let before = [entry("169.254.1.1", Some(&mac))];
        let after = [
            entry("fe80::1", None),
            entry("169.254.1.1", Some("0a:00:00:00:00:01")),
        ];
        let compared = compared(&before, &after);
        let macs: Vec<_> = compared
            .iter()
            .map(|entry| (entry.before.as_deref(), entry.after.as_deref()))
            .collect();
        assert_eq!(
            macs,
            [
                (Some(mac.as_str()), Some("0a:00:00:00:00:01")),
                (None, None)
            ]
        );
    }
}
